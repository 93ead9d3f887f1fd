"""Every tensor gets its type and shape, and a free batch dimension is called "batch"."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from trtbuild.graph.passes import Pass
from trtbuild.graph.wiring import STANDARD, graph_inputs, model_like

if TYPE_CHECKING:
    import onnx

BATCH = "batch"
SMALL = 1024  # elements: weights above this take no part in shapes, so they are not copied for the inference


def infer_shapes(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Infer all types and shapes anew from those of the inputs, with onnx.shape_inference (strict).

    1. A model with one input whose first dimension is free: that dimension is named "batch" everywhere.
    2. Shapes that were stored are dropped and inferred again; those of tensors that an operator outside the standard
       makes are kept, and so is the shape of an output that cannot be inferred.
    3. Tensors that stay without a shape are named as left.
    """
    import onnx

    sketch = _sketch(model)
    declared = {value.name: value for value in model.graph.output}
    inferred = onnx.shape_inference.infer_shapes(sketch, check_type=True, strict_mode=True, data_prop=True).graph
    for value in inferred.output:
        if not value.type.tensor_type.HasField("shape") and declared[value.name].type.tensor_type.HasField("shape"):
            value.CopyFrom(declared[value.name])
    made = {name for node in model.graph.node for name in node.output}
    values = sorted((v for v in inferred.value_info if v.name in made), key=lambda v: v.name)
    known = {v.name for v in (*values, *inferred.output) if v.type.tensor_type.HasField("shape")}
    left = tuple(f"{name}: its shape cannot be inferred" for name in sorted(made - known - {""}))
    return _with_values(model, inferred, values), left


def _sketch(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without the bytes of large weights and without stored shapes."""
    import onnx

    sketch = model_like(model)
    graph = sketch.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    for tensor in model.graph.initializer:
        if math.prod(tensor.dims) <= SMALL:
            graph.initializer.add().CopyFrom(tensor)
        else:
            graph.initializer.add().CopyFrom(
                onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            )
    foreign = {name for node in model.graph.node if node.domain not in STANDARD for name in node.output}
    graph.value_info.extend(value for value in model.graph.value_info if value.name in foreign)
    for value in graph.output:
        if value.name not in foreign:
            value.type.tensor_type.ClearField("shape")
    _name_batch(sketch)
    return sketch


def _name_batch(model: onnx.ModelProto) -> None:
    inputs = graph_inputs(model)
    if len(inputs) != 1 or not inputs[0].type.tensor_type.shape.dim:
        return
    first = inputs[0].type.tensor_type.shape.dim[0]
    if first.HasField("dim_value"):
        return
    old = first.dim_param
    first.dim_param = BATCH
    for value in (*model.graph.input, *model.graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if old and dimension.dim_param == old:
                dimension.dim_param = BATCH


def _with_values(
    model: onnx.ModelProto, inferred: onnx.GraphProto, values: list[onnx.ValueInfoProto]
) -> onnx.ModelProto:
    """`model` with these inputs, outputs and shapes; `model` itself if they are its own."""
    old = model.graph
    same = list(old.input) == list(inferred.input) and list(old.output) == list(inferred.output)
    if same and list(old.value_info) == values:
        return model
    result = model_like(model)
    result.graph.CopyFrom(old)
    for field, new in (("input", inferred.input), ("output", inferred.output), ("value_info", values)):
        result.graph.ClearField(field)
        getattr(result.graph, field).extend(new)
    return result


def _requires(model: onnx.ModelProto) -> tuple[str, ...]:
    """The inputs have a type and a number of dimensions."""
    return tuple(f"the input {value.name} has no type or no shape" for value in graph_inputs(model)
                 if not value.type.tensor_type.elem_type or not value.type.tensor_type.HasField("shape"))  # fmt: skip


def _ensures(model: onnx.ModelProto) -> tuple[str, ...]:
    """The outputs have a type and a number of dimensions."""
    return tuple(f"the output {value.name} has no type or no shape" for value in model.graph.output
                 if not value.type.tensor_type.elem_type or not value.type.tensor_type.HasField("shape"))  # fmt: skip


INFER_SHAPES = Pass(name="infer_shapes", requires=_requires, apply=infer_shapes, ensures=_ensures)
