"""The layers of a built engine, from the JSON of TensorRT's engine inspector."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from trtbuild.engine.tensorrt.metadata import NODE, nodes_from_metadata, unreadable
from trtbuild.engine.tensorrt.values import EngineLayer, EngineTable, LayerTensor

TYPES = {
    "fp32": "Float", "float": "Float", "fp16": "Half", "half": "Half", "bf16": "BFloat16", "bfloat16": "BFloat16",
    "int8": "Int8", "uint8": "UInt8", "fp8": "FP8", "fp4": "FP4", "int4": "Int4", "int32": "Int32", "int64": "Int64",
    "bool": "Bool",
}  # fmt: skip
"""The words for types in the inspector's "Format/Datatype", and what the log calls them."""


def table_from_inspector(text: str) -> EngineTable:
    """The table in the JSON of EngineInspector.get_engine_information, of TensorRT 10 or 11.

    Written after the public documentation and published outputs (10 has "Format/Datatype" in one text and "Bindings",
    11 has "Format", "Datatype" and "I/O Tensors"); it was never run on a GPU. The inspector tells no bytes.

    Raises:
        EngineError: no such JSON, a layer that cannot be read (it is named), or names only, as an engine gives that
            was built without ProfilingVerbosity.DETAILED.
    """
    try:
        data = json.loads(text, strict=False)  # the separators of Metadata may stand there as they are
    except (ValueError, RecursionError) as error:
        raise unreadable("The engine inspector's answer is not JSON.", "JSON", error, None) from error
    entries = data.get("Layers") if isinstance(data, dict) else None
    if not isinstance(entries, list):
        raise unreadable("The engine inspector's answer has no layers.", 'a list "Layers"', text, None)
    layers = tuple(_layer_from_entry(entry, number) for number, entry in enumerate(entries, start=1))
    return EngineTable(layers=layers, activation_memory=None, weights_memory=None)


def _layer_from_entry(entry: Any, number: int) -> EngineLayer:
    if isinstance(entry, str):
        raise unreadable("The engine tells the names of its layers only.", "details of each", entry, f"layer {number}")
    where = f"layer {number}: {entry}"
    nodes = nodes_from_metadata(_text(entry, "Metadata", where, default=""))
    if nodes is None:
        raise unreadable("The Metadata of a layer cannot be read.", f"{NODE}…]", entry["Metadata"], where)
    return EngineLayer(
        name=_text(entry, "Name", where),
        kind=_text(entry, "LayerType", where),
        tactic=_text(entry, "TacticName", where, default=""),
        inputs=_entries(entry, "Inputs", where),
        outputs=_entries(entry, "Outputs", where),
        nodes=nodes,
    )


def _entries(entry: Mapping[str, Any], key: str, where: str) -> tuple[LayerTensor, ...]:
    values = entry.get(key)
    if not isinstance(values, list):
        raise unreadable("A layer of the engine cannot be read.", f"a list {key}", repr(values), where)
    return tuple(_tensor_from_entry(value, where) for value in values)


def _tensor_from_entry(value: Any, where: str) -> LayerTensor:
    name = _text(value, "Name", where)
    shape = value.get("Dimensions")
    if not isinstance(shape, list) or not all(type(size) is int for size in shape):
        raise unreadable("The shape of a tensor cannot be read.", "whole numbers", repr(shape), where)
    if "Datatype" in value:
        dtype, form = _text(value, "Datatype", where), _text(value, "Format", where)
    else:
        form = _text(value, "Format/Datatype", where)
        dtype = _dtype(form, where)
    return LayerTensor(name=name, shape=tuple(shape), dtype=dtype, format=form)


def _dtype(form: str, where: str) -> str:
    """The one type that a text such as "Row major Int8 format" names."""
    found = {TYPES[word] for word in re.findall("[a-z]+[0-9]*", form.lower()) if word in TYPES}
    if len(found) != 1:
        raise unreadable("The type of a tensor cannot be read.", f"one of {', '.join(TYPES)}", repr(form), where)
    return found.pop()


def _text(entry: Any, key: str, where: str, *, default: str | None = None) -> str:
    value = entry.get(key, default) if isinstance(entry, Mapping) else None
    if not isinstance(value, str):
        raise unreadable("A layer of the engine cannot be read.", f"a text {key}", repr(value), where)
    return value
