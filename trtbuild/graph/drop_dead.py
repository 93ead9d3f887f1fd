"""What contributes to no output is taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtbuild.graph.passes import Pass, nothing
from trtbuild.graph.surgeon import graph_from_model, model_from_graph
from trtbuild.graph.wiring import STANDARD, dead_parts, node_labels, opset_of, output_names

if TYPE_CHECKING:
    import onnx


def drop_dead(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Drop dead parts.

    1. Nodes that lead to no output of the graph.
    2. Initializers that no node reads.
    3. Optional outputs of a node (by its operator's definition) that nobody reads: left out at the end of the list,
       named "" before that, so that the outputs behind them keep their place.

    Inputs of the graph stay, read or not: callers feed them.
    """
    if not _ensures(model):
        return model, ()
    graph = graph_from_model(model)
    graph.cleanup(remove_unused_node_outputs=False, remove_unused_graph_inputs=False)
    result = model_from_graph(graph, model)
    unread = _unread_outputs(result)
    for node in result.graph.node:
        for position, name in enumerate(node.output):
            if name in unread:
                node.output[position] = ""
        while node.output and not node.output[-1]:
            del node.output[-1]
    kept = [value for value in result.graph.value_info if value.name not in unread]
    del result.graph.value_info[:]
    result.graph.value_info.extend(kept)
    return result, ()


def _unread_outputs(model: onnx.ModelProto) -> set[str]:
    import onnx

    read = {name for node in model.graph.node for name in node.input} | output_names(model)
    opset = opset_of(model)
    unread = set()
    for node in model.graph.node:
        if node.domain not in STANDARD or len(node.output) < 2:
            continue
        formal = onnx.defs.get_schema(node.op_type, opset, "").outputs
        optional = onnx.defs.OpSchema.FormalParameterOption.Optional
        unread |= {name for name, parameter in zip(node.output, formal, strict=False)
                   if name and name not in read and parameter.option == optional}  # fmt: skip
    return unread


def _ensures(model: onnx.ModelProto) -> tuple[str, ...]:
    dead = [f"{part} leads to no output" for part in dead_parts(model)]
    trailing = [
        f"{label} ends with an empty output"
        for label, node in node_labels(model).items()
        if node.output and not node.output[-1]
    ]
    return (*dead, *trailing, *(f"nobody reads the output {name}" for name in sorted(_unread_outputs(model))))


DROP_DEAD = Pass(name="drop_dead", requires=nothing, apply=drop_dead, ensures=_ensures)
