"""How many operations a network's layers take, from their shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from trtbuild.errors import GraphError
from trtbuild.graph.wiring import STANDARD, graph_inputs, initializer_names, model_like

if TYPE_CHECKING:
    import onnx

WEIGHTED = ("Conv", "ConvTranspose", "MatMul", "Gemm")
SMALL = 1024  # elements: only values of small tensors take part in shapes
Shape = tuple[int, ...]


def operations(model: onnx.ModelProto) -> Mapping[str, int]:
    """Operations of every Conv, ConvTranspose, MatMul and Gemm: two per multiply-add, batch 1 where the batch is free.

    A Conv takes 2 N Cout |y| Cin/groups |kernel|, a ConvTranspose 2 N Cin |x| Cout/groups |kernel| (|y| and |x|: the
    voxels of its output and input), a matrix product 2 rows columns inner: what the operators' definitions in ONNX
    add up, so what falls on padding counts, and so does what a ConvTranspose's padding cuts off. A bias does not.

    A node without a name is called `node_of_<output>` as TensorRT's parser does; nodes of one name are added up.

    Raises:
        GraphError: a shape is not known, or an input has a free dimension besides the first.
    """
    nodes = [node for node in model.graph.node if node.op_type in WEIGHTED and node.domain in STANDARD]
    shapes = _shapes(model)
    found: dict[str, int] = {}
    for node in nodes:
        name = node.name or f"node_of_{node.output[0]}"
        tensors = (*node.input[:2], node.output[0])
        missing = [tensor for tensor in tensors if tensor not in shapes]
        if missing:
            raise GraphError("The operations of a layer cannot be counted: a shape is not known.", got=missing[0],
                             where=f"node {name}", hint="export the network with a fixed patch")  # fmt: skip
        found[name] = found.get(name, 0) + _count(node, *(shapes[tensor] for tensor in tensors))
    return found


def _count(node: onnx.NodeProto, x: Shape, w: Shape, y: Shape) -> int:
    if node.op_type == "Conv":
        return 2 * math.prod(y) * math.prod(w[1:])
    if node.op_type == "ConvTranspose":
        return 2 * math.prod(x) * math.prod(w[1:])
    transposed = node.op_type == "Gemm" and any(entry.name == "transA" and entry.i for entry in node.attribute)
    return 2 * math.prod(y) * (x[0] if transposed else x[-1])


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """Shapes of all tensors that are known as numbers, with free batches set to 1."""
    import onnx

    try:
        graph = onnx.shape_inference.infer_shapes(_sketch(model), strict_mode=True, data_prop=True).graph
    except onnx.shape_inference.InferenceError as error:
        raise GraphError("The shapes of the network cannot be inferred.", got=error,
                         hint="check the model with onnx.checker") from error  # fmt: skip
    shapes: dict[str, Shape] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        sizes = [d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if kind.HasField("shape") and None not in sizes:
            shapes.setdefault(value.name, tuple(size for size in sizes if size is not None))
    return shapes


def _sketch(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with batch 1, without the bytes of large weights and without stored shapes."""
    import onnx

    sketch = model_like(model)
    graph, stored = sketch.graph, initializer_names(model)
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(graph_inputs(model))
    for tensor in model.graph.initializer:
        small = math.prod(tensor.dims) <= SMALL
        bare = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
        graph.initializer.append(tensor if small else bare)
    graph.output.extend(value for value in model.graph.output if value.name not in stored)
    for value in graph.input:
        _fix_batch(value)
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    return sketch


def _fix_batch(value: onnx.ValueInfoProto) -> None:
    for axis, size in enumerate(value.type.tensor_type.shape.dim):
        if size.HasField("dim_value"):
            continue
        if axis:
            raise GraphError("The operations cannot be counted: an input has a free dimension besides the batch.",
                             expected="numbers after the first dimension", got=size.dim_param or "no size",
                             where=f"input {value.name}, dimension {axis}",
                             hint="export the network with a fixed patch")  # fmt: skip
        size.dim_value = 1
