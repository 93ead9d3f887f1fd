"""Names and order that say where in the network something is, the same whichever exporter wrote the model.

torch.onnx.export takes the paths of the parameters for names. nnU-Net's networks reach a parameter by several paths,
and the exporters take different ones: `dynamo=False` writes `encoder.stages.0.0.convs.0.conv.weight`, `dynamo=True`
writes `decoder.encoder.stages.0.0.convs.0.all_modules.0.weight` (torch 2.13, dynamic_network_architectures 0.4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from trtbuild.graph.naming import names_from_structure
from trtbuild.graph.passes import Pass
from trtbuild.graph.wiring import dead_parts, graph_inputs, model_like, opset_of, ordered_nodes

if TYPE_CHECKING:
    import onnx

INPUT, OUTPUT = "image", "logits"


def stable_names(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Name and order nodes and tensors by the graph's structure and its parameters' paths alone.

    1. One input: it is called "image"; one output: "logits"; several keep their names.
    2. Nodes, the tensors between them and the initializers are named by `names_from_structure`.
    3. Nodes stand in the order in which the outputs need them, initializers in the order in which nodes read them.
    4. Comments and metadata of the graph's parts are dropped: exporters put stack traces with the paths of the
       exporting machine there. Those of the model stay.
    """
    old = model.graph
    order = ordered_nodes(model)
    stored = {tensor.name: tensor for tensor in old.initializer}
    new = names_from_structure(order, stored, _interface_names(model), opset_of(model))
    result = model_like(model)
    graph = result.graph
    graph.name = old.name
    for node, name in zip(order, new.nodes, strict=True):
        _add_node(graph, node, name, new.tensors)
    for tensor in (name for name in new.tensors if name in stored):
        weights = graph.initializer.add()
        weights.CopyFrom(stored[tensor])
        weights.name = new.tensors[tensor]
        weights.ClearField("doc_string")
        weights.ClearField("metadata_props")
    fed = {value.name for value in graph_inputs(model)}
    made = {name for node in order for name in node.output} - {value.name for value in old.output}
    _add_values(graph.input, (value for value in old.input if value.name in fed), new.tensors)
    _add_values(graph.output, old.output, new.tensors)
    inner = sorted((value for value in old.value_info if value.name in made), key=lambda v: new.tensors[v.name])
    _add_values(graph.value_info, inner, new.tensors)
    return (model if result == model else result), ()


def _interface_names(model: onnx.ModelProto) -> dict[str, str]:
    names: dict[str, str] = {}
    for values, only in ((graph_inputs(model), INPUT), (list(model.graph.output), OUTPUT)):
        for value in values:
            names.setdefault(value.name, only if len(values) == 1 else value.name)
    return names


def _add_node(graph: onnx.GraphProto, node: onnx.NodeProto, name: str, tensors: Mapping[str, str]) -> None:
    copy = graph.node.add()
    copy.CopyFrom(node)
    copy.name = name
    copy.ClearField("doc_string")
    copy.ClearField("metadata_props")
    copy.input[:] = [tensors[tensor] if tensor else "" for tensor in node.input]
    copy.output[:] = [tensors[tensor] if tensor else "" for tensor in node.output]


def _add_values(
    target: list[onnx.ValueInfoProto], values: Iterable[onnx.ValueInfoProto], tensors: Mapping[str, str]
) -> None:
    import onnx

    for value in values:
        copy = onnx.ValueInfoProto(name=tensors[value.name])
        copy.type.CopyFrom(value.type)
        target.append(copy)


def _requires(model: onnx.ModelProto) -> tuple[str, ...]:
    """Nothing is dead: a name comes from the way to an output."""
    return tuple(f"{part} leads to no output" for part in dead_parts(model))


def _ensures(model: onnx.ModelProto) -> tuple[str, ...]:
    problems = []
    names = [node.name for node in model.graph.node]
    if "" in names or len(set(names)) < len(names):
        problems.append("node names are missing or not unique")
    for values, wanted in ((graph_inputs(model), INPUT), (list(model.graph.output), OUTPUT)):
        if len(values) == 1 and values[0].name != wanted:
            problems.append(f"{values[0].name} is not called {wanted}")
    return tuple(problems)


STABLE_NAMES = Pass(name="stable_names", requires=_requires, apply=stable_names, ensures=_ensures)
