"""The weighted layers of a network, what they read, and where in the network they stand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trtbuild.graph.precision.flow import SHAPE_OPERATORS, is_standard, makers
from trtbuild.graph.wiring import graph_inputs, initializer_names, node_labels, output_names

if TYPE_CHECKING:
    import onnx

OPERATORS = ("Conv", "ConvTranspose")
Role = Literal["stem", "head", "body"]


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One Conv or ConvTranspose.

    Args:
        name: the node's name, or `<operator>(<output>)` where it has none.
        operator: "Conv" or "ConvTranspose".
        activation: the tensor that it reads.
        sources: the tensors whose largest |x| together is that of `activation`: the inputs of the Concat that makes
            it, and theirs if Concats make those, else the activation alone.
        role: "stem" if a way leads from the network's input to it without another layer; else "head" if one leads
            from it to an output without another; else "body".
    """

    name: str
    operator: str
    activation: str
    sources: tuple[str, ...]
    role: Role


def weighted_layers(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """Every Conv and ConvTranspose in graph order."""
    made, stored = makers(model), initializer_names(model)
    unweighted, last = _before_layers(model), _after_layers(model)
    layers = []
    for name, node in node_labels(model).items():
        if is_standard(node, *OPERATORS):
            role: Role = "stem" if node.input[0] in unweighted else "head" if node.output[0] in last else "body"
            sources = tuple(dict.fromkeys(_sources(node.input[0], made, stored)))
            layers.append(Layer(name=name, operator=node.op_type, activation=node.input[0], sources=sources, role=role))
    return tuple(layers)


def targets(model: onnx.ModelProto) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """The distinct tensors that layers read, each with its sources, in graph order.

    Those of ConvTransposes are among them: `rewrite_conv_transpose` makes Convs of these that read the same tensor.
    """
    return tuple({layer.activation: layer.sources for layer in weighted_layers(model)}.items())


def _sources(tensor: str, made: Mapping[str, onnx.NodeProto], stored: set[str]) -> tuple[str, ...]:
    """A Concat with a stored tensor among its inputs is observed itself: stored tensors cannot be."""
    node = made.get(tensor)
    if node is None or not is_standard(node, "Concat") or stored & set(node.input):
        return (tensor,)
    return tuple(name for source in node.input for name in _sources(source, made, stored))


def _before_layers(model: onnx.ModelProto) -> set[str]:
    """The tensors to which a way leads from an input without a layer."""
    found = {value.name for value in graph_inputs(model)}
    for node in model.graph.node:
        if not is_standard(node, *OPERATORS, *SHAPE_OPERATORS) and found & set(node.input):
            found.update(name for name in node.output if name)
    return found


def _after_layers(model: onnx.ModelProto) -> set[str]:
    """The tensors from which a way leads to an output without a layer."""
    found = output_names(model)
    for node in reversed(model.graph.node):
        if not is_standard(node, *OPERATORS, *SHAPE_OPERATORS) and found & set(node.output):
            found.update(name for name in node.input if name)
    return found
