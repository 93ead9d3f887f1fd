"""The file of an engine's layers in a bundle: `engines/<network>.<backend>.layers.json`.

{"format": 1, "operations": {node: whole number}, "table": {"activation_memory": bytes or null,
 "weights_memory": bytes or null, "layers": [{"name", "kind", "tactic", "nodes": [texts],
 "inputs" and "outputs": [{"name", "shape": [whole numbers, -1 is free], "dtype", "format"}]}]}}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from trtbuild.engine.tensorrt.values import EngineLayer, EngineTable, LayerTensor
from trtbuild.errors import EngineError

FORMAT = 1
MAX_SIZE = 32 << 20
"""Bytes; the file of a network with 300 kernels has 0.3 MB."""
LARGEST = 2**63


@dataclass(frozen=True, kw_only=True)
class LayersFile:
    """An engine's layers, and the operations of the network's nodes by name (`trtbuild.graph.cost`)."""

    table: EngineTable
    operations: Mapping[str, int]


def layers_file(table: EngineTable, operations: Mapping[str, int]) -> bytes:
    """The bytes of the file; equal values give equal bytes."""
    data = {"format": FORMAT, "operations": dict(operations), "table": facts_from_table(table)}
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def read_layers_file(content: bytes) -> LayersFile:
    """What `layers_file` wrote.

    Raises:
        EngineError: anything else, with the key at which it is wrong.
    """
    if len(content) > MAX_SIZE:
        _refuse("the file", f"at most {MAX_SIZE} bytes", f"{len(content)} bytes")
    try:
        data = json.loads(content.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise EngineError("The file of an engine's layers is not JSON.", expected="JSON in UTF-8",
                          got=f"{error}"[:200], hint="compile the bundle again") from error  # fmt: skip
    entries = _keys(data, ("format", "operations", "table"), "the file")
    if type(entries["format"]) is not int or entries["format"] != FORMAT:
        _refuse("format", FORMAT, entries["format"])
    counts = entries["operations"]
    if not isinstance(counts, dict):
        _refuse("operations", "an object", counts)
    operations = {_text(name, "operations"): _whole(count, f"operations.{name}") for name, count in counts.items()}
    return LayersFile(table=table_from_facts(entries["table"]), operations=operations)


def facts_from_table(table: EngineTable) -> dict[str, Any]:
    """Plain dicts, lists and scalars."""
    return asdict(table)


def table_from_facts(data: Any) -> EngineTable:
    """The table that `facts_from_table` took apart, before or after JSON.

    Raises:
        EngineError: a key is unknown or missing, or holds a value of another type.
    """
    entries = _keys(data, ("layers", "activation_memory", "weights_memory"), "table")
    memory = {
        name: None if entries[name] is None else _whole(entries[name], f"table.{name}")
        for name in ("activation_memory", "weights_memory")
    }
    layers = (_layer(value, f"layers[{n}]") for n, value in enumerate(_list(entries["layers"], "layers")))
    return EngineTable(layers=tuple(layers), **memory)


def _layer(data: Any, where: str) -> EngineLayer:
    entries = _keys(data, ("name", "kind", "tactic", "inputs", "outputs", "nodes"), where)
    inputs, outputs = (
        tuple(_tensor(value, f"{where}.{side}[{n}]") for n, value in enumerate(_list(entries[side], f"{where}.{side}")))
        for side in ("inputs", "outputs")
    )
    name, kind, tactic = (_text(entries[key], f"{where}.{key}") for key in ("name", "kind", "tactic"))
    nodes = tuple(_text(value, f"{where}.nodes") for value in _list(entries["nodes"], f"{where}.nodes"))
    return EngineLayer(name=name, kind=kind, tactic=tactic, inputs=inputs, outputs=outputs, nodes=nodes)


def _tensor(data: Any, where: str) -> LayerTensor:
    entries = _keys(data, ("name", "shape", "dtype", "format"), where)
    name, dtype, form = (_text(entries[key], f"{where}.{key}") for key in ("name", "dtype", "format"))
    shape = tuple(_whole(size, f"{where}.shape", least=-1) for size in _list(entries["shape"], f"{where}.shape"))
    return LayerTensor(name=name, shape=shape, dtype=dtype, format=form)


def _keys(data: Any, names: tuple[str, ...], where: str) -> dict[str, Any]:
    if not isinstance(data, dict) or set(data) != set(names):
        _refuse(where, f"an object with {', '.join(names)}", sorted(map(str, data)) if isinstance(data, dict) else data)
    return dict(data)


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, (list, tuple)):
        _refuse(where, "a list", data)
    return list(data)


def _text(data: Any, where: str) -> str:
    """A text that can be written: half a surrogate pair cannot."""
    if not isinstance(data, str) or any("\ud800" <= c <= "\udfff" for c in data):
        _refuse(where, "a text", data)
    return str(data)


def _whole(data: Any, where: str, *, least: int = 0) -> int:
    if type(data) is not int or not least <= data < LARGEST:
        _refuse(where, f"a whole number from {least} to 2^63 - 1", data)
    return int(data)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


def _refuse(where: str, expected: object, got: object) -> NoReturn:
    raise EngineError("The file of an engine's layers is wrong.", expected=expected,
                      got=ascii(got)[:200] if not isinstance(got, int) or abs(got) < LARGEST else "a huge number",
                      where=ascii(where)[1:-1][:200], hint="compile the bundle again")  # fmt: skip
