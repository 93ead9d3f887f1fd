"""Initializers with equal type, shape and bytes become one."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from typing import TYPE_CHECKING

from trtbuild.graph.passes import Pass
from trtbuild.graph.surgeon import graph_from_model, model_from_graph, no_unread_initializers, redirect
from trtbuild.graph.wiring import output_names

if TYPE_CHECKING:
    import onnx


def fold_duplicate_initializers(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Let all readers of equal initializers read the one that a node reads first.

    Equal means equal in type, shape and every bit, so 0.0 and -0.0 stay apart. Initializers that are outputs of the
    graph stay.
    """
    twins = _twins(model)
    if not twins:
        return model, ()
    graph = graph_from_model(model)
    tensors = graph.tensors()
    for twin, kept in twins.items():
        redirect(tensors[twin], tensors[kept])
    return model_from_graph(graph, model), ()


def _twins(model: onnx.ModelProto) -> dict[str, str]:
    """The initializers to give up, each with the one that takes its place."""
    outputs = output_names(model)
    read: dict[str, None] = dict.fromkeys(name for node in model.graph.node for name in node.input)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name in read:
        if name in stored and name not in outputs:
            alike[(stored[name].data_type, *stored[name].dims)].append(name)
    first: dict[tuple[object, ...], str] = {}
    twins = {}
    for kind, names in alike.items():
        if len(names) < 2:
            continue
        for name in names:
            kept = first.setdefault((*kind, hashlib.sha256(_content(stored[name])).digest()), name)
            if kept != name:
                twins[name] = kept
    return twins


def _content(tensor: onnx.TensorProto) -> bytes:
    import onnx

    if tensor.HasField("raw_data"):
        return bytes(tensor.raw_data)
    return bytes(onnx.numpy_helper.to_array(tensor).tobytes())


def _ensures(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(f"the initializers {kept} and {twin} are equal" for twin, kept in _twins(model).items())


FOLD_DUPLICATE_INITIALIZERS = Pass(
    name="fold_duplicate_initializers",
    requires=no_unread_initializers,
    apply=fold_duplicate_initializers,
    ensures=_ensures,
)
