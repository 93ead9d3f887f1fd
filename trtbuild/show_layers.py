"""What `inspect --layers` prints: the kernels of each engine, precision coverage and warnings; also as an HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtbuild.atomic import write_whole
from trtbuild.errors import MissingExtra
from trtbuild.show import computes_in, console, new_table, printable

Facts = Mapping[str, Any]
LABELS = {"int8": "INT8", "fp16": "FP16", "bf16": "BF16", "fp32": "FP32"}
COLORS = {"INT8": "#1b7f5c", "FP16": "#3b6fb6", "BF16": "#7a5aa8", "FP32": "#8a8f98", "unknown": "#c0392b"}
WIDTH = 44
"""Characters of a name; its end tells more than its beginning."""
NODES = 2

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Layers of {{ name }}</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; color: #1f2430; background: #fff; margin: 2rem auto; max-width: 84rem;
  padding: 0 1rem; }
h1 { font-size: 1.3rem; } h2 { font-size: 1.1rem; margin-top: 2.5rem; }
.quiet { color: #5b6270; }
.bar { display: flex; height: 1.6rem; border-radius: 4px; overflow: hidden; background: #eceef1; }
.bar span { color: #fff; font-size: 12px; line-height: 1.6rem; overflow: hidden; text-align: center;
  white-space: nowrap; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.5rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .4rem; }
.warnings { background: #fff6e0; border-left: 4px solid #d99a00; padding: .6rem 1rem .6rem 2rem; }
table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e3e6ea; vertical-align: top; }
th { border-bottom: 2px solid #9aa1ac; } td { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; } .types { white-space: nowrap; }
tr.computes td { background: #f4f7fb; }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p class="quiet">bundle {{ identity }}</p>
{% for engine in engines %}
<section>
<h2>{{ engine.title }}</h2>
<p>{{ engine.memory }}</p>
<div class="bar" role="img" aria-label="{{ engine.coverage }}">
{%- for part in engine.parts %}<span style="width: {{ part.percent }}%; background: {{ part.color }}">
{{- part.label }}</span>{% endfor -%}
</div>
<ul class="legend">
{% for part in engine.parts %}<li><i style="background: {{ part.color }}"></i>{{ part.label }} {{ part.percent }} %</li>
{% endfor %}</ul>
<p>{{ engine.coverage }}</p>
{% if engine.warnings %}<ul class="warnings">
{% for warning in engine.warnings %}<li>{{ warning }}</li>
{% endfor %}</ul>{% endif %}
<table>
<thead><tr><th class="number">#</th><th>layer</th><th>kernel</th><th>types</th><th>ONNX nodes</th>
<th class="number">operations</th></tr></thead>
<tbody>
{% for row in engine.rows %}<tr{% if row.share %} class="computes"{% endif %}><td class="number">{{ loop.index0 }}</td>
<td>{{ row.name }}</td><td>{{ row.kind }}</td><td class="types">{{ row.types }}</td><td>{{ row.nodes }}</td>
<td class="number">{{ row.share }}</td></tr>
{% endfor %}</tbody>
</table>
</section>
{% endfor %}
{% if without %}<h2>Engines without a layer table</h2>
<ul>{% for line in without %}<li>{{ line }}</li>{% endfor %}</ul>{% endif %}
</body>
</html>
"""


def layers(facts: Facts) -> None:
    """One table per engine, its coverage, device memory and warnings."""
    out = console()
    for engine in facts["engines"]:
        out.print(_title(engine))
        table = new_table("layer", "kernel", "types", "ONNX nodes", "operations")
        for column in table.columns[:4]:
            column.justify, column.overflow = "left", "fold"
        for layer in engine["layers"]:
            nodes = [_short(node) for node in layer["nodes"][:NODES]]
            more = len(layer["nodes"]) - NODES
            text = ", ".join(nodes) + (f" + {more}" if more > 0 else "")
            table.add_row(_short(layer["name"]), printable(layer["kind"]), _types(layer), text, _share(layer["share"]))
        out.print(table)
        out.print(_coverage(engine["coverage"]))
        out.print(_memory(engine))
        for warning in engine["warnings"]:
            out.print(f"warning: {printable(warning)}")
        out.print()
    for line in facts["without"]:
        out.print(f"no layer table: {printable(line)}")


def write_page(facts: Facts, path: Path) -> None:
    """The same as one HTML file that needs nothing else: no script, no other file, no network.

    Raises:
        MissingExtra: jinja2 is not installed.
        OutputError: the file cannot be written.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ModuleNotFoundError as error:
        raise MissingExtra("jinja2", "report", "write the layers as an HTML page") from error
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    page = template.render(
        name=printable(Path(facts["path"]).name),
        identity=facts["identity"],
        engines=[_section(engine) for engine in facts["engines"]],
        without=[printable(line) for line in facts["without"]],
    )
    write_whole(path, page.encode())


def _section(engine: Facts) -> dict[str, Any]:
    return {
        "title": _title(engine),
        "memory": _memory(engine),
        "coverage": _coverage(engine["coverage"]),
        "parts": [
            {"label": label, "percent": f"{100 * share:.1f}", "color": COLORS[label]}
            for label, share in _parts(engine["coverage"])
        ],
        "warnings": [printable(warning) for warning in engine["warnings"]],
        "rows": [
            {
                "name": printable(layer["name"]),
                "kind": printable(layer["kind"]),
                "types": _types(layer),
                "nodes": ", ".join(map(printable, layer["nodes"])),
                "share": _share(layer["share"]),
            }
            for layer in engine["layers"]
        ],
    }


def _title(engine: Facts) -> str:
    computed = computes_in(engine["precision"], engine["inference_precision"])
    return printable(f"{engine['network']}: {engine['backend']} {engine['version']} in {computed}")


def _parts(coverage: Facts) -> list[tuple[str, float]]:
    """Labels and shares, 0 to 1, of the precisions that there are, and what is left over."""
    parts = [(LABELS[name], share) for name, share in coverage["shares"].items() if share > 0]
    if coverage["unknown"]:
        parts.append(("unknown", max(0.0, 1.0 - sum(coverage["shares"].values()))))
    return parts


def _coverage(coverage: Facts) -> str:
    shares = ", ".join(f"{label} {share:.1%}" for label, share in _parts(coverage))
    text = f"{coverage['operations'] / 1e9:.4g} billion operations per patch: {shares or 'none'}"
    if coverage["unknown"]:
        text += f"; no kernel could be told of {', '.join(map(printable, coverage['unknown']))}"
    return text


def _memory(engine: Facts) -> str:
    parts = [f"{_size(size)} at batch {printable(batch)}" for batch, size in engine["device_per_batch"].items()]
    weights = engine["weights_memory"]
    text = f"device memory: {', '.join(parts) or 'not known'}"
    return text if weights is None else f"{text}; weights {_size(weights)}"


def _types(layer: Facts) -> str:
    """`Int8 -> Float`; a type stands once."""
    sides = ("/".join(dict.fromkeys(tensor["dtype"] for tensor in layer[side])) for side in ("inputs", "outputs"))
    return printable(" -> ".join(side or "none" for side in sides)) if layer["inputs"] or layer["outputs"] else ""


def _share(share: float) -> str:
    return f"{share:.1%}" if share > 0 else ""


def _short(name: str) -> str:
    text = printable(name)
    return text if len(text) <= WIDTH else f"…{text[1 - WIDTH :]}"


def _size(number: int) -> str:
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.1f} kB"
