"""How the nodes of an ONNX graph hang together: readers, dead nodes, order, and whether it all fits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx

STANDARD = ("", "ai.onnx")  # both name the standard operators


def initializer_names(model: onnx.ModelProto) -> set[str]:
    """Names of the tensors whose values are stored in the model."""
    return {tensor.name for tensor in model.graph.initializer}


def graph_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """The inputs that a caller feeds; old exporters list the initializers among the inputs."""
    stored = initializer_names(model)
    return [value for value in model.graph.input if value.name not in stored]


def output_names(model: onnx.ModelProto) -> set[str]:
    """Names of the graph's outputs."""
    return {value.name for value in model.graph.output}


def interface(model: onnx.ModelProto) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The element types of the inputs and of the outputs, in order."""
    sides = (graph_inputs(model), model.graph.output)
    inputs, outputs = (tuple(int(v.type.tensor_type.elem_type) for v in side) for side in sides)
    return inputs, outputs


def node_labels(model: onnx.ModelProto) -> dict[str, Any]:
    """Nodes by their name, or by operator and output where they have none; the second of a name gets `#2`."""
    labels: dict[str, Any] = {}
    for node in model.graph.node:
        label = base = node.name or f"{node.op_type}({next(iter(node.output), '')})"
        count = 1
        while label in labels:
            count += 1
            label = f"{base}#{count}"
        labels[label] = node
    return labels


def wiring_problems(model: onnx.ModelProto) -> tuple[str, ...]:
    """What makes a graph unusable: a tensor read before it is made, made twice, or an output that nothing makes."""
    made = {value.name for value in model.graph.input} | initializer_names(model)
    problems = []
    for label, node in node_labels(model).items():
        problems += [
            f"{label} reads {name}, which nothing before it makes" for name in node.input if name not in made | {""}
        ]
        problems += [f"{label} makes {name}, which was there already" for name in node.output if name in made]
        made.update(name for name in node.output if name)
    problems += [f"nothing makes the output {name}" for name in output_names(model) if name not in made]
    return tuple(problems)


def ordered_nodes(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes that lead to an output, each after those that it reads, first input first.

    The order depends on the graph alone, not on the order in which the nodes are stored.
    """
    maker = {name: node for node in model.graph.node for name in node.output if name}
    order: list[onnx.NodeProto] = []
    seen: set[str] = set()
    stack = [(maker[v.name], False) for v in reversed(model.graph.output) if v.name in maker]
    while stack:
        node, inputs_done = stack.pop()
        key = next(name for name in node.output if name)
        if inputs_done:
            order.append(node)
        elif key not in seen:
            seen.add(key)
            stack.append((node, True))
            stack += [(maker[name], False) for name in reversed(node.input) if name in maker]
    return order


def dead_parts(model: onnx.ModelProto) -> tuple[str, ...]:
    """Nodes that lead to no output, and initializers that nobody reads."""
    alive = ordered_nodes(model)
    kept = {name for node in alive for name in node.output}
    read = {name for node in alive for name in node.input} | output_names(model)
    nodes = [label for label, node in node_labels(model).items() if not kept & set(node.output) - {""}]
    return (*nodes, *(f"initializer {tensor.name}" for tensor in model.graph.initializer if tensor.name not in read))


def model_like(model: onnx.ModelProto) -> onnx.ModelProto:
    """A model with everything of `model` but its graph."""
    import onnx

    copy = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name == "graph":
            continue
        if isinstance(value, (int, str)):
            setattr(copy, field.name, value)
        else:
            getattr(copy, field.name).extend(value)
    return copy


def opset_of(model: onnx.ModelProto) -> int:
    """Version of the standard operators that the model uses."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in STANDARD), 1)
