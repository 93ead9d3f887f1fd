"""Which nodes of a graph can compute in FP16 or BF16, and which of their tensors are in that type then."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtbuild.errors import GraphError
from trtbuild.graph.precision.flow import QUANTIZERS, activations, element_types, is_standard, stored_values
from trtbuild.graph.precision.half_weights import HalfType, does_not_fit, scale_does_not_fit
from trtbuild.graph.precision.layers import OPERATORS
from trtbuild.graph.wiring import STANDARD, node_labels, opset_of, output_names

if TYPE_CHECKING:
    import onnx

FLOAT = 1  # onnx.TensorProto.FLOAT
ONNX_NAMES: Mapping[HalfType, str] = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}
TYPE_ATTRIBUTES = ("dtype", "output_dtype")  # of operators whose results do not have the type of what they read


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What of a graph becomes half precision.

    Args:
        half: names of the nodes that compute in it.
        half_inputs: (node, position) of the inputs that these read in it.
        half_made: the tensors that these make in it.
        floats: every tensor that is float32 now.
        float_stored: stored tensors that a node goes on reading as float32, or that are outputs of the graph.
        left: `<node>: <reason>` of the nodes that stay float32.
    """

    half: frozenset[str]
    half_inputs: frozenset[tuple[str, int]]
    half_made: frozenset[str]
    floats: frozenset[str]
    float_stored: frozenset[str]
    left: tuple[str, ...]


def plan_of(model: onnx.ModelProto, to: HalfType, keep: Collection[str]) -> Plan:
    """The plan by the rules of `cast`.

    Raises:
        GraphError: `keep` names no node.
    """
    graph = _Graph.of(model)
    unknown = sorted(set(keep) - set(graph.labels))
    if unknown:
        raise GraphError("A node that is to stay float32 is not in the graph.", expected="names of nodes",
                         got=", ".join(unknown[:5]), where="keep",
                         hint="Use the names of this very graph.")  # fmt: skip
    asked = keep if isinstance(keep, Mapping) else dict.fromkeys(keep, "kept as asked")
    reasons = {}
    for label in graph.moving:
        reason = asked[label] if label in asked else _reason_to_keep(graph, label, to)
        if reason:
            reasons[label] = reason
    _keep_whole_groups(graph, reasons)
    half = frozenset(label for label in graph.moving if label not in reasons)
    inputs = frozenset((label, position) for label in half for position in _positions(graph, label, to))
    made = (name for label in half for name in graph.labels[label].output)
    return Plan(
        half=half,
        half_inputs=inputs,
        half_made=frozenset(name for name in made if graph.types.get(name) == FLOAT),
        floats=frozenset(name for name, kind in graph.types.items() if kind == FLOAT),
        float_stored=_float_stored(graph, inputs) | (output_names(model) & set(graph.stored)),
        left=tuple(f"{label}: {reason}" for label, reason in reasons.items()),
    )


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """A model, looked up by names. `active` are its activations; `moving` the nodes that can change type, which make
    some of these and hold float32, or are the Q/DQ of weights."""

    labels: Mapping[str, onnx.NodeProto]
    moving: tuple[str, ...]
    active: frozenset[str]
    types: Mapping[str, int]
    stored: Mapping[str, onnx.TensorProto]
    made: Mapping[str, str]  # the label of the node that makes a tensor
    opset: int

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Graph:
        labels, types, active = node_labels(model), element_types(model), frozenset(activations(model))
        made = {name: label for label, node in labels.items() for name in node.output if name}
        moving = []
        for label, node in labels.items():
            tensors = {name for name in (*node.input, *node.output) if types.get(name) == FLOAT}
            if tensors and (active & set(node.output) or is_standard(node, *QUANTIZERS)):
                moving.append(label)
        return cls(labels=labels, moving=tuple(moving), active=active, types=types, stored=stored_values(model),
                   made=made, opset=opset_of(model))  # fmt: skip


def _formal(graph: _Graph, label: str) -> Iterator[tuple[str, int, set[str]]]:
    """("input" or "output", position, types that the operator takes there) of every float32 tensor of a node."""
    import onnx

    node = graph.labels[label]
    schema = onnx.defs.get_schema(node.op_type, graph.opset, "")
    for side, tensors, formal in (("input", node.input, schema.inputs), ("output", node.output, schema.outputs)):
        for position, tensor in enumerate(tensors):
            if graph.types.get(tensor) == FLOAT:
                yield side, position, set(formal[min(position, len(formal) - 1)].types)


def _positions(graph: _Graph, label: str, to: HalfType) -> tuple[int, ...]:
    """The inputs of the node that can be of the type."""
    return tuple(
        position for side, position, types in _formal(graph, label) if side == "input" and ONNX_NAMES[to] in types
    )


def _reason_to_keep(graph: _Graph, label: str, to: HalfType) -> str:
    node = graph.labels[label]
    if node.domain not in STANDARD:
        return "its operator is outside the standard"
    if any(attribute.name in TYPE_ATTRIBUTES and attribute.i == FLOAT for attribute in node.attribute):
        return "an attribute says that its result is float32"
    for side, position, types in _formal(graph, label):
        tensor = node.input[position] if side == "input" else node.output[position]
        if ONNX_NAMES[to] not in types:
            if side == "output" or tensor in graph.active:
                return f"{node.op_type} has no {to} form at opset {graph.opset}"
        elif side == "input":
            reason = _reason_of_input(graph, node, position, to)
            if reason:
                return reason
    return ""


def _reason_of_input(graph: _Graph, node: onnx.NodeProto, position: int, to: HalfType) -> str:
    tensor = node.input[position]
    if tensor in graph.stored:
        is_scale = position == 1 and is_standard(node, *QUANTIZERS)
        return (scale_does_not_fit if is_scale else does_not_fit)(graph.stored[tensor], to)
    if tensor in graph.made and graph.made[tensor] not in graph.moving:
        return f"it reads {tensor}, which is computed apart from the network's input"
    return ""


def _keep_whole_groups(graph: _Graph, reasons: dict[str, str]) -> None:
    """A layer, the DQs that it reads and the Qs before them stay float32 together; extends `reasons`."""
    links = []
    for label, node in graph.labels.items():
        if is_standard(node, *OPERATORS, "DequantizeLinear"):
            before = {graph.made[name] for name in node.input if name in graph.made}
            wanted = "QuantizeLinear" if node.op_type == "DequantizeLinear" else "DequantizeLinear"
            links += [(other, label) for other in before if is_standard(graph.labels[other], wanted)]
    spreading = True
    while spreading:
        spreading = False
        for one, other in links:
            if (one in reasons) != (other in reasons):
                kept, joined = (one, other) if one in reasons else (other, one)
                reasons[joined] = f"quantised together with {kept}, which stays float32"
                spreading = True


def _float_stored(graph: _Graph, half_inputs: frozenset[tuple[str, int]]) -> frozenset[str]:
    return frozenset(
        tensor
        for label, node in graph.labels.items()
        for position, tensor in enumerate(node.input)
        if tensor in graph.stored and (label, position) not in half_inputs
    )
