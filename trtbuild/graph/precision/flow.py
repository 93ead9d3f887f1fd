"""What flows through a graph: which tensors hold values of the network's input, who makes and who reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trtbuild.errors import GraphError
from trtbuild.graph.files import check_model
from trtbuild.graph.infer_shapes import infer_shapes
from trtbuild.graph.wiring import STANDARD, graph_inputs, interface, wiring_problems

if TYPE_CHECKING:
    import onnx

SHAPE_OPERATORS = ("Shape", "Size")  # they read a tensor, and their result holds none of its values
MOVES = ("Concat", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")  # their outputs hold the same values
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def is_standard(node: onnx.NodeProto, *operators: str) -> bool:
    """Whether the node is one of these standard operators."""
    return node.op_type in operators and node.domain in STANDARD


def activations(model: onnx.ModelProto) -> tuple[str, ...]:
    """The tensors whose values depend on those of the network's input, which comes first; in graph order."""
    found = dict.fromkeys(value.name for value in graph_inputs(model))
    for node in model.graph.node:
        if not is_standard(node, *SHAPE_OPERATORS) and any(name in found for name in node.input):
            found.update(dict.fromkeys(name for name in node.output if name))
    return tuple(found)


def makers(model: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """For each tensor that a node makes, that node."""
    return {name: node for node in model.graph.node for name in node.output if name}


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX's number of the element type of every tensor, inferred anew (float32 is 1).

    Raises:
        GraphError: the type of a tensor cannot be inferred.
    """
    inferred, _ = infer_shapes(model)
    values = (*inferred.graph.input, *inferred.graph.output, *inferred.graph.value_info)
    types = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    types |= {tensor.name: int(tensor.data_type) for tensor in model.graph.initializer}
    unknown = [name for name in makers(model) if not types.get(name)]
    if unknown:
        raise GraphError("The type of a tensor is not known.", expected="standard operators, whose types follow",
                         got=", ".join(unknown[:5]), where="the given model",
                         hint="Store the types of these tensors in the model (value_info).")  # fmt: skip
    return types


def stored_values(model: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    """The initializers that no caller can replace (older exporters list some among the inputs too)."""
    fed = {value.name for value in model.graph.input}
    return {tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in fed}


def attributes_of(node: onnx.NodeProto) -> Mapping[str, object]:
    """The values of a node's attributes by name."""
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def finished(step: str, before: onnx.ModelProto, after: onnx.ModelProto) -> onnx.ModelProto:
    """`after` with its shapes inferred, once it is seen to be sound and to have the interface of `before`.

    Raises:
        GraphError: it has not, or onnx.checker refuses it; the message names `step`.
    """
    problems = wiring_problems(after)
    if interface(before) != interface(after):
        problems += (f"inputs and outputs were {interface(before)} and are {interface(after)}",)
    if problems:
        raise GraphError(f"{step} broke its contract.", got="; ".join(problems[:5]), where="the resulting graph",
                         hint="Please report this, with the ONNX file if you may.")  # fmt: skip
    result, _ = infer_shapes(after)
    check_model(result, where=f"the result of {step}")
    return result
