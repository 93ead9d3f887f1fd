"""A graph is raised to a newer opset where that only widens the types that its operators take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtbuild.errors import GraphError
from trtbuild.graph.precision.flow import attributes_of, is_standard
from trtbuild.graph.wiring import STANDARD, model_like, node_labels, opset_of

if TYPE_CHECKING:
    import onnx

OLDEST = 19  # from here on the changes up to `BF16_OPSET` were read one by one
BF16_OPSET = 22  # Conv, InstanceNormalization and pooling take BF16 from here on
IR_VERSION = 10  # of ONNX's file format, which came with opset 21
CHANGED = (
    "GridSample",
    "GroupNormalization",
)  # GridSample-20 renamed its modes, GroupNormalization-21 its scales' shape
POOLS = ("AveragePool", "MaxPool", "LpPool")  # -22 defines ceil_mode at the right border anew


def with_opset(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The same graph at opset `version`; `model` itself if it is there already or beyond.

    The definitions of every operator in it are compared: same inputs and outputs, same attributes with the same
    defaults, or more of them. ONNX's own converter would drop shapes and documentation, and does no more here.

    Raises:
        GraphError: the model is older than opset 19, or an operator's meaning changed on the way.
    """
    old = opset_of(model)
    if old >= version:
        return model
    problems = [f"the opset is {old}"] if old < OLDEST else []
    for label, node in node_labels(model).items():
        if node.domain in STANDARD and not _means_the_same(node, old, version):
            problems.append(f"{node.op_type} {label}")
    if problems:
        raise GraphError("The graph cannot be raised to a newer opset.", got="; ".join(problems[:5]),
                         expected=f"opset {OLDEST} or above, and operators that mean the same at opset {version}",
                         where="the given model", hint="Export the network at opset 20.")  # fmt: skip
    result = model_like(model)
    result.graph.CopyFrom(model.graph)
    for entry in result.opset_import:
        if entry.domain in STANDARD:
            entry.version = version
    result.ir_version = max(model.ir_version, IR_VERSION)
    return result


def _means_the_same(node: onnx.NodeProto, old: int, new: int) -> bool:
    import onnx

    before, after = (onnx.defs.get_schema(node.op_type, version, "") for version in (old, new))
    if before.since_version == after.since_version:
        return True
    if node.op_type in CHANGED or (is_standard(node, *POOLS) and attributes_of(node).get("ceil_mode", 0)):
        return False
    sides = ((before.inputs, after.inputs), (before.outputs, after.outputs))
    formal = all([p.name for p in one] == [p.name for p in other][: len(one)] for one, other in sides)
    return formal and all(
        name in after.attributes and attribute.default_value == after.attributes[name].default_value
        for name, attribute in before.attributes.items()
    )
