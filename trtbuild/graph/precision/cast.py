"""FP16 or BF16 is written into a graph: half-precision weights and tensors, float32 at both ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtbuild.errors import GraphError
from trtbuild.graph.naming import FreeNames
from trtbuild.graph.precision.cast_plan import Plan, plan_of
from trtbuild.graph.precision.flow import SHAPE_OPERATORS, finished, is_standard, stored_values
from trtbuild.graph.precision.half_weights import FORMATS, HalfType, as_half, lost_in
from trtbuild.graph.precision.opset import BF16_OPSET, with_opset
from trtbuild.graph.split_instance_norm import with_parts
from trtbuild.graph.wiring import initializer_names, node_labels, output_names

if TYPE_CHECKING:
    import onnx

FLOAT = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True, kw_only=True)
class Cast:
    """The typed model; `<node>: <reason>` of what stays float32; what weights lose because they are small."""

    model: onnx.ModelProto
    left: tuple[str, ...]
    underflow: tuple[str, ...]


def cast(model: onnx.ModelProto, to: HalfType, *, keep: Collection[str]) -> Cast:
    """Let everything that depends on the network's input compute in `to`, but for what stays float32.

    1. Inputs and outputs of the graph stay float32, with a Cast behind and before them. Initializers are rounded to
       nearest even. One Cast per tensor and type: neighbours that stay float32 hand float32 to each other.
    2. A node stays float32 if `keep` says so, if its operator has no such form at this opset, or if a stored tensor
       that it reads has a value beyond the type's largest: it never becomes infinity.
    3. Q/DQ: scales are cast too, as all weights are (opset 19 on; before it Q/DQ have no such form). A scale below the
       type's normal numbers would lose its relative precision, so it stays float32; and so do all Q, DQ and layers that
       hang together by it, so that the pattern that backends look for, Q, DQ and Conv, has no Cast inside. The same
       holds around a quantised layer that is kept.
    4. Shapes, integers, and what is computed from shapes or stored tensors alone stay as they are.
    5. BF16 raises the opset to 22, the first with Conv, InstanceNormalization and pools in it.

    Values that become 0 or subnormal are counted in `underflow`: FP16 has no number between 0 and 6e-8.

    Args:
        model: float32, weights inside; with or without Q/DQ.
        to: "fp16" or "bf16".
        keep: names of nodes that stay float32, or a mapping of them to reasons, as `fp16_sensitive` gives it.

    Raises:
        GraphError: `keep` names no node; BF16 with a ConvTranspose that is not kept, which no backend has; the opset
            cannot be raised.
    """
    if to == "bf16":
        _refuse_conv_transpose(model, keep)
    raised = with_opset(model, BF16_OPSET) if to == "bf16" else model
    plan = plan_of(raised, to, keep)
    if not plan.half:
        return Cast(model=model, left=plan.left, underflow=())
    writer = _Writer(raised, plan, to)
    nodes = [entry for label, node in node_labels(raised).items() for entry in writer.written(label, node)]
    result = with_parts(raised, nodes, writer.initializers(nodes))
    return Cast(model=finished("cast", model, result), left=plan.left, underflow=writer.underflow())


def _refuse_conv_transpose(model: onnx.ModelProto, keep: Collection[str]) -> None:
    found = [label for label, node in node_labels(model).items()
             if is_standard(node, "ConvTranspose") and label not in keep]  # fmt: skip
    if found:
        raise GraphError("No backend computes a ConvTranspose in BF16.", expected="Conv and depth-to-space instead",
                         got=", ".join(found[:5]), where="the given model",
                         hint="Use tensorrt_form first, or keep these nodes in float32.")  # fmt: skip


class _Writer:
    """Writes the nodes one after the other, with a Cast where a tensor is read in the other type for the first time."""

    def __init__(self, model: onnx.ModelProto, plan: Plan, to: HalfType) -> None:
        taken = {name for node in model.graph.node for name in (node.name, *node.input, *node.output)}
        self._plan, self._to = plan, to
        self._names = FreeNames(taken | initializer_names(model) | {value.name for value in model.graph.input})
        self._outputs = output_names(model)
        self._stored = stored_values(model)
        self._initializers = tuple(model.graph.initializer)
        self._halves: dict[str, onnx.TensorProto] = {}
        self._twins: dict[tuple[str, int], str] = {}  # the name of a tensor in a type

    def written(self, label: str, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The node, the Casts that it needs before it, and behind it those that make outputs of the graph."""
        before: list[onnx.NodeProto] = []
        after: list[onnx.NodeProto] = []
        low = FORMATS[self._to].element_type
        copy = type(node)()
        copy.CopyFrom(node)
        for position, tensor in enumerate(node.input):
            if is_standard(node, *SHAPE_OPERATORS):
                copy.input[position] = self._twins.get((tensor, low), tensor)
            elif tensor in self._plan.floats:
                wanted = low if (label, position) in self._plan.half_inputs else FLOAT
                copy.input[position] = self._in_type(tensor, wanted, before)
        if label in self._plan.half:
            for position, tensor in enumerate(node.output):
                if tensor in self._plan.half_made and tensor in self._outputs:
                    copy.output[position] = self._twins[tensor, low] = self._names.free(f"{tensor}/{self._to}")
                    after.append(self._cast_node(copy.output[position], tensor, FLOAT))
            for attribute in copy.attribute:
                if is_standard(node, "Cast") and attribute.name == "to" and attribute.i == FLOAT:
                    attribute.i = low
        return [*before, copy, *after]

    def initializers(self, nodes: list[onnx.NodeProto]) -> list[onnx.TensorProto]:
        """Those that `nodes` read, the half-precision ones in the places of the float32 ones or behind them."""
        read = {name for node in nodes for name in node.input} | self._outputs
        tensors = []
        for tensor in self._initializers:
            half = self._halves.get(tensor.name)
            if tensor.name in read and (half is None or half.name != tensor.name):
                tensors.append(tensor)
            if half is not None:
                tensors.append(half)
        return tensors

    def underflow(self) -> tuple[str, ...]:
        """What the weights that were cast lose."""
        return tuple(filter(None, (lost_in(self._stored[name], self._to) for name in self._halves)))

    def _in_type(self, tensor: str, wanted: int, before: list[onnx.NodeProto]) -> str:
        """The name of `tensor` in the type `wanted`."""
        own = FORMATS[self._to].element_type if tensor in self._plan.half_made else FLOAT
        key = (tensor, wanted)
        if key in self._twins:
            return self._twins[key]
        if wanted == own or (wanted == FLOAT and tensor in self._outputs):
            return tensor
        if tensor in self._stored:
            alone = tensor not in self._plan.float_stored
            name = tensor if alone else self._names.free(f"{tensor}/{self._to}")
            self._halves[tensor] = as_half(self._stored[tensor], self._to, name)
        else:
            name = self._names.free(f"{tensor}/{'float32' if wanted == FLOAT else self._to}")
            before.append(self._cast_node(tensor, name, wanted))
        self._twins[key] = name
        return name

    def _cast_node(self, source: str, target: str, element_type: int) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node("Cast", [source], [target], self._names.free(f"{target}/Cast"), to=element_type)
