"""Graphs that show what is inside a network: the largest |x| of its activations, or some of them as outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trtbuild.errors import GraphError
from trtbuild.graph.files import check_model
from trtbuild.graph.infer_shapes import infer_shapes
from trtbuild.graph.naming import FreeNames
from trtbuild.graph.precision.flow import MOVES, activations, element_types, is_standard, makers
from trtbuild.graph.split_instance_norm import shapes_of, with_parts
from trtbuild.graph.wiring import initializer_names, wiring_problems

if TYPE_CHECKING:
    import onnx

FLOAT = 1  # onnx.TensorProto.FLOAT


def with_maxima(model: onnx.ModelProto, names: Sequence[str] | None) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """A model whose outputs are the largest |x| of tensors, one float32 scalar each, and the names of these tensors.

        max(ReduceMax(x), -ReduceMin(x)) + 0 * ReduceSum(x)

    The last term is 0, or NaN where x holds NaN or infinity: the ReduceMax of ONNX Runtime and of OpenVINO pass NaN
    over in silence. There is no Abs, as it would need the memory of x once more.

    Args:
        model: any network.
        names: the tensors; None for every float32 activation, the network's input among them, but for the outputs of
            `MOVES`, whose values are those of their inputs (`fp16_sensitive` knows that).

    Returns:
        The model, whose inputs are those of `model`, and the tensors in the order of its outputs.

    Raises:
        GraphError: a name is unknown, is not of float32, or occurs twice.
    """
    types = element_types(model)
    if names is None:
        made = makers(model)
        moved = {name for name, node in made.items() if is_standard(node, *MOVES)}
        names = [name for name in activations(model) if types[name] == FLOAT and name not in moved]
    _check_names(names, types)
    others = [name for name in names if types[name] != FLOAT]
    if others:
        raise GraphError("The maximum of a tensor cannot be taken.", expected="float32 tensors",
                         got=", ".join(others[:5]), where="names", hint="Leave these tensors out.")  # fmt: skip
    return _reduced(model, names), tuple(names)


def with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """`model` cut down to what these tensors need, which are its outputs, in this order and with their names.

    An input of the graph may be among them; it is returned as it came. Inputs of the graph stay, needed or not.

    Raises:
        GraphError: there are no names, a name is unknown or a weight's, or occurs twice.
    """
    types = element_types(model)
    _check_names(names, types)
    weights = sorted(initializer_names(model) & set(names))
    if weights:
        raise GraphError("A stored tensor cannot be an output.", expected="names of activations",
                         got=", ".join(weights[:5]), where="names", hint="Leave these tensors out.")  # fmt: skip
    inferred, _ = infer_shapes(model)
    known = {value.name: value for value in
             (*inferred.graph.value_info, *inferred.graph.output, *inferred.graph.input)}  # fmt: skip
    return _cut(inferred, list(model.graph.node), list(model.graph.initializer), [known[name] for name in names])


def tensor_sizes(model: onnx.ModelProto) -> Mapping[str, int]:
    """Bytes of every activation for one patch (batch 1), the network's input first, in graph order.

    Raises:
        GraphError: a dimension other than the first is not known.
    """
    from onnx import helper

    inferred, _ = infer_shapes(model)
    types, shapes = element_types(model), shapes_of(inferred)
    sizes = {}
    for name in activations(model):
        shape = shapes.get(name)
        if shape is None or any(n is None for n in shape[1:]):
            raise GraphError("The size of a tensor is not known.", expected="a shape whose first dimension alone is "
                             "free", got=shape, where=f"tensor {name}",
                             hint="Export the network with a fixed patch.")  # fmt: skip
        one_patch = [1 if n is None else n for n in shape]
        sizes[name] = math.prod(one_patch) * helper.tensor_dtype_to_np_dtype(types[name]).itemsize
    return sizes


def _check_names(names: Sequence[str], types: Mapping[str, int]) -> None:
    unknown = [name for name in names if name not in types]
    twice = [name for name in dict.fromkeys(names) if list(names).count(name) > 1]
    if unknown or twice or not names:
        raise GraphError("These tensors cannot be shown.", expected="distinct names of tensors of the network",
                         got=f"unknown: {', '.join(unknown[:5])}" if unknown else
                         f"twice: {', '.join(twice[:5])}" if twice else "no names",
                         where="names", hint="Use the names of this very network.")  # fmt: skip


def _reduced(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    taken = {name for node in model.graph.node for name in (node.name, *node.input, *node.output)}
    free = FreeNames(taken | initializer_names(model) | {value.name for value in model.graph.input})
    zero = numpy_helper.from_array(np.array(0, np.float32), free.free("maxima/zero"))
    nodes = list(model.graph.node)
    outputs = []
    for tensor in names:
        result = free.free(f"{tensor}/max")

        def step(operator: str, *inputs: str, tensor: str = tensor, result: str = "", **attributes: int) -> str:
            name = free.free(f"{tensor}/{operator}")
            output = result or free.free(f"{name}_output_0")
            nodes.append(helper.make_node(operator, list(inputs), [output], name, **attributes))
            return output

        low = step("Neg", step("ReduceMin", tensor, keepdims=0))
        largest = step("Max", step("ReduceMax", tensor, keepdims=0), low)
        flag = step("Mul", step("ReduceSum", tensor, keepdims=0), zero.name)
        step("Add", largest, flag, result=result)
        outputs.append(helper.make_tensor_value_info(result, onnx.TensorProto.FLOAT, []))
    return _cut(model, nodes, [*model.graph.initializer, zero], outputs)


def _cut(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto],
    outputs: Sequence[onnx.ValueInfoProto],
) -> onnx.ModelProto:
    """`model` with these outputs, and those of these nodes and initializers that lead to them."""
    read = {value.name for value in outputs}
    needed: list[onnx.NodeProto] = []
    for node in reversed(nodes):
        if read & set(node.output):
            needed.append(node)
            read.update(node.input)
    stored = [tensor for tensor in initializers if tensor.name in read]
    result = with_parts(model, needed[::-1], stored)
    result.graph.ClearField("output")
    result.graph.output.extend(outputs)
    shown = {value.name for value in outputs}
    values = [value for value in result.graph.value_info if value.name not in shown]
    result.graph.ClearField("value_info")
    result.graph.value_info.extend(values)
    problems = wiring_problems(result)
    if problems:
        raise GraphError("The graph that shows activations broke its contract.", got="; ".join(problems[:5]),
                         where="the resulting graph",
                         hint="Please report this, with the ONNX file if you may.")  # fmt: skip
    if needed:  # a graph that returns its input alone is no network for `check_model`, but backends run it
        check_model(result, where="the graph that shows activations")
    return result
