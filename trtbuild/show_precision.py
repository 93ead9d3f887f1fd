"""What the command line prints about precision: progress of long steps, layers and scales, coverage, the gate."""

from __future__ import annotations

import contextlib
import reprlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from trtbuild import show
from trtbuild.show import console, new_table, printable

Facts = Mapping[str, Any]
QUIET_SECONDS = 20.0
"""Between two lines about one long step where no terminal shows the latest one."""


LONGEST = 2000


@dataclass(frozen=True, kw_only=True)
class Steps:
    """`report` prints a line per step, `say` shows what is under way within one."""

    report: Callable[[str], None]
    say: Callable[[str], None]


@contextlib.contextmanager
def steps(*, quiet: bool) -> Iterator[Steps]:
    """Progress on stderr: lines, and on a terminal one more that changes in place."""
    if quiet:
        yield Steps(report=lambda line: None, say=lambda line: None)
        return
    screen = console(to_error=True)
    if not screen.is_terminal:
        yield Steps(report=screen.print, say=_now_and_then(screen.print))
        return
    from rich.text import Text

    with screen.status("starting") as status:

        def report(line: str) -> None:
            screen.print(Text.assemble(("•", "dim"), " ", line))
            status.update(Text(line))  # a plain string would be read as markup

        yield Steps(report=report, say=lambda line: status.update(Text(line)))


def _now_and_then(write: Callable[[str], None]) -> Callable[[str], None]:
    last = [time.monotonic()]

    def say(line: str) -> None:
        if time.monotonic() - last[0] >= QUIET_SECONDS:
            last[0] = time.monotonic()
            write(f"  {line}")

    return say


def bundle(facts: Facts) -> None:
    """A bundle, with the precision of its layers and what the gate said where it has any below FP32."""
    show.bundle(facts)
    built = any(engine["precision"] == "int8" for engine in facts["engines"])
    failed = any(_is_failed(gate) for gate in facts["gates"])
    for entry in facts["calibrations"]:
        _shown(partial(_calibration, state=_state(built, failed)), entry)
    for gate in facts["gates"]:
        _shown(_gate, gate)
    if not facts["gates"] and any(_below_fp32(engine) for engine in facts["engines"]):
        console().print("no gate judged this bundle")


def calibrations(entries: Sequence[Facts]) -> None:
    """Coverage and scales of networks that were calibrated, with no bundle around them."""
    for entry in entries:
        _shown(_calibration, entry)


def _is_failed(gate: Any) -> bool:
    return isinstance(gate, Mapping) and gate.get("passed") is False


def _below_fp32(engine: Facts) -> bool:
    return engine["precision"] != "fp32" or engine["inference_precision"] not in ("f32", "fp32")


def _state(built: bool, failed: bool) -> str:
    """What to say of a bundle's INT8 layers: a gate that does not pass leaves FP32 engines, and its findings."""
    if built:
        return "in INT8"
    return f"would be in INT8 ({'the gate did not pass: ' * failed}engines are FP32)"


def _shown(how: Callable[[Facts], Iterable[Any]], entry: Any) -> None:
    """The format leaves these entries open, so one that another program wrote in its own way is shown as it is."""
    out = console()
    try:
        lines = list(how(entry))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        lines = [bounded(entry)]
    for line in lines:
        out.print(line)


class _Short(reprlib.Repr):
    """Python does not write integers of many digits."""

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() <= 128 else f"<integer of {x.bit_length()} bits>"


def bounded(value: object) -> str:
    """A repr of at most `LONGEST` characters of any value, on one line."""
    short = _Short()
    short.maxlevel, short.maxdict, short.maxlist, short.maxstring = 3, 12, 12, 80
    text = printable(short.repr(value))
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def _calibration(entry: Facts, state: str = "in INT8") -> Iterator[Any]:
    made = f" for {_text(entry['typed'])}" if "typed" in entry else ""
    sample = f"{_counted(entry['patches'], 'patch')} of {_cases(entry['cases'])}"
    yield f"calibration of {_text(entry['network'])}{made}: {sample}"
    yield from _coverage(entry["coverage"])
    table = new_table("tensor", "largest |x|", "entropy", "percentile", "min-max")
    for tensor, amax in entry["amax"].items():
        numbers = (amax[name] for name in ("max", "entropy", "percentile", "minmax"))
        table.add_row(_text(tensor), *(f"{number:.4g}" for number in numbers))
    yield table
    layers = entry.get("layers", {})
    if names := layers.get("int8"):
        yield f"{_counted(len(names), 'layer')} {state}, thresholds by {_text(entry['method'])}:"
        yield from _indented(names)
    if kept := layers.get("kept"):
        yield "in higher precision:"
        yield from _indented(kept)


def _cases(names: Sequence[str]) -> str:
    return _counted(len(_texts(names)), "case")


def _coverage(coverage: Facts) -> Iterator[Any]:
    table = new_table("class", "cases", "patches", "voxels", "")
    for label, entry in coverage["classes"].items():
        numbers = (f"{entry[name]:d}" for name in ("cases", "patches", "voxels"))
        table.add_row(_text(label), *numbers, "" if entry["missed"] is None else _text(entry["missed"]))
    if coverage["classes"]:
        yield table
    if coverage["note"] is not None:
        yield _text(coverage["note"])


def _gate(gate: Facts) -> Iterator[Any]:
    """The contest, the classes, the layers that were rolled back, the verdict."""
    precision = gate["precision"] if gate["precision"] in ("int8", "fp16") else gate["inference_precision"]
    yield (
        f"gate of {_text(gate['network'])} in {_text(precision)}, {_text(gate['backend'])}: "
        f"{_passed(gate['passed'])} on {_counted(gate['patches'], 'patch')} of {', '.join(_texts(gate['cases']))}"
    )
    if gate.get("contest"):
        table = new_table("thresholds", "mean Dice", "FP32", "worst loss", "flipped voxels", "logit error (rms)", "")
        for trial in gate["contest"]:
            chosen = "chosen" if trial["method"] == gate["method"] else ""
            table.add_row(_text(trial["method"]), *_numbers(trial["agreement"], trial["verdict"]), chosen)
        yield table
    table = new_table("class", "Dice", "FP32", "between the two", "voxels")
    for entry in gate["agreement"]["classes"]:
        numbers = (_number(entry[name]) for name in ("dice_candidate", "dice_fp32", "dice_between"))
        table.add_row(_text(entry["name"]), *numbers, f"{entry['voxels']:d}")
    yield table
    if rolled := gate.get("roll_back"):
        yield (
            f"rolled back to higher precision: {', '.join(_texts(rolled['layers'])) or 'none'} "
            f"({rolled['sensitivity_runs']:d} sensitivity and {_counted(rolled['gate_runs'], 'gate run')})"
        )
    yield from _indented([*_texts(gate["verdict"]["reasons"]), *_texts(gate["verdict"]["notes"])])


def _numbers(agreement: Facts, verdict: Facts) -> tuple[str, ...]:
    judged = [entry for entry in agreement["classes"] if entry["name"] in verdict["judged"]]
    name = "dice_candidate" if agreement["labelled"] else "dice_between"
    means = (_mean(judged, name), _mean(judged, "dice_fp32") if agreement["labelled"] else None)
    losses = [
        (entry["dice_fp32"] if agreement["labelled"] else 1.0) - entry[name]
        for entry in judged
        if entry[name] is not None and (entry["dice_fp32"] is not None or not agreement["labelled"])
    ]
    worst = max(losses, default=None)
    return (*map(_number, (*means, worst)), f"{agreement['flips']:.3%}", _number(agreement["error_rms"]))


def _mean(entries: Sequence[Facts], name: str) -> float | None:
    values = [entry[name] for entry in entries if entry[name] is not None]
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _passed(value: object) -> str:
    if not isinstance(value, bool):
        raise TypeError(f"{type(value).__name__} in place of true or false")
    return "passed" if value else "NOT PASSED"


def _counted(number: int, one: str) -> str:
    """`1 patch`, `2 patches`."""
    many = f"{one}es" if one.endswith("ch") else f"{one}s"
    return f"{number:d} {one if number == 1 else many}"


def _text(value: object) -> str:
    """A text of a bundle, harmless to a terminal."""
    if not isinstance(value, str):
        raise TypeError(f"{type(value).__name__} in place of a text")
    return printable(value)


def _texts(values: object) -> list[str]:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{type(values).__name__} in place of a list")
    return [_text(value) for value in values]


def _indented(lines: object) -> Iterator[str]:
    return (f"  {line}" for line in _texts(lines))


def quantized(facts: Facts) -> None:
    """What became INT8, and what did not."""
    out = console()
    out.print(f"{printable(facts['output'])}: {_counted(len(facts['int8']), 'layer')} in INT8")
    for line in facts["left"]:
        out.print(f"not: {printable(line)}")


def onnx_file(facts: Facts) -> None:
    """An engine of an ONNX file: what it is, what of it is INT8, and what TensorRT warned of."""
    record, out = facts["record"], console()
    computed = show.computes_in(record["precision"], record["inference_precision"])
    out.print(f"{printable(record['file'])}: {printable(record['backend'])} {printable(record['version'])}, {computed}")
    if facts["quantized"]:
        out.print(f"{_counted(len(facts['quantized']), 'layer')} in INT8")
    for line in facts["left"]:
        out.print(f"not: {printable(line)}")
    for line in facts["warnings"]:
        out.print(f"warning: {printable(line)}")
