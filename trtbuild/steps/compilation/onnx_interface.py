"""The inputs and outputs of a generic ONNX graph, which keep their names whatever is done to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtbuild.graph import check_model, io_from_model
from trtbuild.graph.naming import FreeNames
from trtbuild.spec import TensorSpec

if TYPE_CHECKING:
    import onnx


def inputs_of(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The inputs of a model, without its stored tensors."""
    specs = io_from_model(model)
    return specs[: len(specs) - len(model.graph.output)]


def with_interface_of(model: onnx.ModelProto, before: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the names of the inputs and outputs of `before`; an inner tensor that has one of these gives way."""
    names = {spec.name: old.name for spec, old in zip(io_from_model(model), io_from_model(before), strict=True)}
    if all(new == old for new, old in names.items()):
        return model
    result = type(model)()
    result.CopyFrom(model)
    graph = result.graph
    inner = {name for node in graph.node for name in (*node.input, *node.output)} - names.keys()
    free = FreeNames(inner | set(names.values()))
    names |= {name: free.free(name) for name in sorted(inner & set(names.values()))}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for part in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.name = names.get(part.name, part.name)
    check_model(result, where="the graph with its own inputs and outputs")
    return result
