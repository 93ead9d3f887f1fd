"""InstanceNormalization is written out with means of means, because CPU kernels sum a whole channel in one go.

OpenVINO's MVN and ONNX Runtime's InstanceNormalization add up all voxels of a channel one after the other in float32.
Over 128^3 voxels of which most are alike (an empty background) the rounding errors of the sum all point the same way:
logits of a trained network were wrong by 6e-3 of the largest one. A mean of means rounds only over the few numbers of
each step, so its error stays near that of one float32 operation. It costs time, because the norm is no longer one
kernel: 5 to 10 % more per 64^3 patch for a U-Net of 16 to 128 features, OpenVINO. The pattern is the cheapest of those
tried: the square as Pow and the centring folded into the shift, so that OpenVINO fuses them, save two passes over the
memory. TensorRT wants the plain operator, which `join_instance_norm` gives back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from trtbuild.graph.naming import FreeNames
from trtbuild.graph.passes import Pass
from trtbuild.graph.surgeon import no_unread_initializers
from trtbuild.graph.wiring import STANDARD, initializer_names, model_like, opset_of, output_names

if TYPE_CHECKING:
    import onnx

TERMS = 8  # voxels that one mean goes over, see `mean_kernels`
DEFAULT_EPSILON = 1e-5  # ONNX, InstanceNormalization-6
FLOAT = 1  # onnx.TensorProto.FLOAT


def split_instance_norm(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Write out each float32 InstanceNormalization with known shape and stored scale and bias.

        mean = GlobalAveragePool(AveragePool(... AveragePool(x)))        (N, C, 1, ...), kernels by `mean_kernels`
        variance = the same means of (x - mean) ** 2
        gain = scale / Sqrt(variance + epsilon)                          scale and bias as (1, C, 1, ...)
        y = x * gain + (bias - mean * gain)

    The last line rounds x * gain where (x - mean) * gain would round the difference: at most 2^-24 |mean| / std of the
    result's own scale, which is what the float32 mean is uncertain by anyway.

    1. The last node keeps the norm's name and output; the others are `<norm>/mean_0`, `<norm>/deviation`, ….
    2. Scale and bias keep their names; where others read them too, there is `<name>/per_channel_<n>d` beside them.
    3. Left alone: half precision (means in it are wrong however they are summed) and float64, a free dimension other
       than the batch, scale or bias that are computed or fed, more than three spatial dimensions (no backend has the
       pooling), opsets below 7 (no broadcasting).
    """
    shapes = shapes_of(model)
    left = []
    ranks = {}
    for index, node in enumerate(model.graph.node):
        if _is_norm(node):
            reason = _reason_to_keep(model, node, shapes)
            if reason:
                left.append(f"{node.name or node.output[0]}: {reason}")
            else:
                ranks[index] = len(shapes[node.input[0]])
    if not ranks:
        return model, tuple(left)
    taken = {name for node in model.graph.node for name in (node.name, *node.input, *node.output)}
    names = FreeNames(taken | initializer_names(model))
    initializers, spread = _spread(model, ranks, names)
    scalars: dict[float, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    for index, node in enumerate(model.graph.node):
        if index not in ranks:
            nodes.append(node)
            continue
        vectors = [spread[name, ranks[index]] for name in node.input[1:]]
        two = _scalar(node, 2.0, "two", scalars, names)
        epsilon = _scalar(node, _epsilon(node), "epsilon", scalars, names)
        nodes += _written_out(node, shapes[node.input[0]][2:], (*vectors, epsilon, two), names)
    return with_parts(model, nodes, [*initializers, *scalars.values()]), tuple(left)


def mean_kernels(spatial: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The kernels, which are the strides too, of the AveragePools before the GlobalAveragePool.

    Each step takes prime factors of the axes, last axis first, while the kernel has at most 8 voxels; when no axis has
    a factor that fits, it takes one axis alone by its smallest prime factor. Every kernel divides its axis, so all
    means are over equally many voxels. No sum has more terms than 8 or the largest prime factor of a dimension.

    Eight is 2 x 2 x 2: few enough that the sum of equal numbers is off by an ulp at most, and as fast as 4 x 4 x 4 to
    within 2 % of a network's time; kernels of 4 voxels cost 3 % more.
    """
    rest = list(spatial)
    kernels = []
    while math.prod(rest) > TERMS and _smallest_factor(math.prod(rest)) < math.prod(rest):
        kernel = [1] * len(rest)
        for axis in (*reversed(range(len(rest))),) * 2:
            factor = _smallest_factor(rest[axis] // kernel[axis])
            if math.prod(kernel) * factor <= TERMS:
                kernel[axis] *= factor
        if math.prod(kernel) == 1:
            factor, axis = min((_smallest_factor(n), axis) for axis, n in enumerate(rest) if n > 1)
            kernel[axis] = factor
        kernels.append(tuple(kernel))
        rest = [n // k for n, k in zip(rest, kernel, strict=True)]
    return tuple(kernels)


def _smallest_factor(n: int) -> int:
    return next((k for k in range(2, math.isqrt(n) + 1) if n % k == 0), n)


def shapes_of(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """The known shapes of tensors; a free dimension is None."""
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    shapes: dict[str, tuple[int | None, ...]] = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    for value in values:
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes[value.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    return shapes


def with_parts(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], initializers: Sequence[onnx.TensorProto]
) -> onnx.ModelProto:
    """`model` with these nodes and initializers, and without the stored shapes of what is gone."""
    result = model_like(model)
    graph = result.graph
    for field, value in model.graph.ListFields():
        if field.name in ("name", "doc_string"):
            setattr(graph, field.name, value)
        elif field.name not in ("node", "initializer", "value_info"):
            getattr(graph, field.name).extend(value)
    graph.node.extend(nodes)
    graph.initializer.extend(initializers)
    made = {name for node in nodes for name in node.output}
    graph.value_info.extend(value for value in model.graph.value_info if value.name in made)
    return result


def _is_norm(node: onnx.NodeProto) -> bool:
    return bool(node.op_type == "InstanceNormalization" and node.domain in STANDARD)


def _reason_to_keep(model: onnx.ModelProto, node: onnx.NodeProto, shapes: Mapping[str, tuple[int | None, ...]]) -> str:
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in node.input[1:]}
    if set(node.input[1:]) - set(stored):
        return "its scale or bias is computed"
    if set(stored) & {value.name for value in model.graph.input}:
        return "its scale or bias is an input too"
    if {tensor.data_type for tensor in stored.values()} != {FLOAT}:
        return "it is not in float32"
    _, channels, *spatial = shapes[node.input[0]]
    if not all(spatial):
        return "it has a free spatial dimension"
    if {tuple(tensor.dims) for tensor in stored.values()} != {(channels,)}:
        return f"its scale and bias are not of shape ({channels},)"
    if not 1 <= len(spatial) <= 3:
        return f"it has {len(spatial)} spatial dimensions"
    return "" if opset_of(model) >= 7 else f"opset {opset_of(model)} does not broadcast"


def _spread(
    model: onnx.ModelProto, ranks: Mapping[int, int], names: FreeNames
) -> tuple[list[onnx.TensorProto], dict[tuple[str, int], str]]:
    """The initializers with scales and biases as (1, C, 1, ...), and these by old name and rank."""
    wanted: dict[str, set[int]] = {}
    others = output_names(model)
    for index, node in enumerate(model.graph.node):
        if index in ranks:
            others.add(node.input[0])
            for name in node.input[1:]:
                wanted.setdefault(name, set()).add(ranks[index])
        else:
            others.update(node.input)
    initializers, spread = [], {}
    for tensor in model.graph.initializer:
        rest = sorted(wanted.get(tensor.name, ()))
        alone = len(rest) == 1 and tensor.name not in others
        if not alone:
            initializers.append(tensor)
        for rank in rest:
            name = tensor.name if alone else names.free(f"{tensor.name}{spread_suffix(rank)}")
            initializers.append(with_dims(tensor, name, (1, tensor.dims[0], *[1] * (rank - 2))))
            spread[tensor.name, rank] = name
    return initializers, spread


def spread_suffix(rank: int) -> str:
    """What the name of a scale or bias of shape (1, C, 1, ...) ends with when the one of shape (C,) stays."""
    return f"/per_channel_{rank - 2}d"


def with_dims(tensor: onnx.TensorProto, name: str, dims: Sequence[int]) -> onnx.TensorProto:
    """The same values under another name and shape."""
    copy = type(tensor)()
    copy.CopyFrom(tensor)
    copy.name = name
    copy.dims[:] = dims
    return copy


def _epsilon(node: onnx.NodeProto) -> float:
    return next((float(a.f) for a in node.attribute if a.name == "epsilon"), DEFAULT_EPSILON)


def _scalar(
    node: onnx.NodeProto, value: float, role: str, scalars: dict[float, onnx.TensorProto], names: FreeNames
) -> str:
    """The name of the float32 scalar, which all norms with the same value share."""
    import numpy as np
    from onnx import numpy_helper

    scalar = np.array(value, np.float32)
    if float(scalar) not in scalars:
        scalars[float(scalar)] = numpy_helper.from_array(scalar, names.free(f"{node.name or node.output[0]}/{role}"))
    return str(scalars[float(scalar)].name)


def _written_out(
    norm: onnx.NodeProto, spatial: Sequence[int | None], constants: tuple[str, ...], names: FreeNames
) -> list[onnx.NodeProto]:
    """The nodes; `constants` are the names of scale, bias, epsilon and two."""
    from onnx import helper

    nodes: list[onnx.NodeProto] = []
    base = norm.name or norm.output[0]
    kernels = mean_kernels([n for n in spatial if n])

    def step(operator: str, role: str, *inputs: str, **attributes: Sequence[int]) -> str:
        name = names.free(f"{base}/{role}")
        output = names.free(f"{name}_output_0")
        nodes.append(helper.make_node(operator, inputs, [output], name, **attributes))
        return output

    def mean(role: str, tensor: str) -> str:
        for number, kernel in enumerate(kernels):
            tensor = step("AveragePool", f"{role}_{number}", tensor, kernel_shape=kernel, strides=kernel)
        return step("GlobalAveragePool", role, tensor)

    scale, bias, epsilon, two = constants
    centre = mean("mean", norm.input[0])
    square = step("Pow", "square", step("Sub", "deviation", norm.input[0], centre), two)
    std = step("Sqrt", "std", step("Add", "shifted", mean("variance", square), epsilon))
    gain = step("Div", "gain", scale, std)
    shift = step("Sub", "shift", bias, step("Mul", "centred", centre, gain))
    last = type(norm)()
    last.CopyFrom(norm)
    last.op_type = "Add"
    last.ClearField("attribute")
    last.input[:] = [step("Mul", "scaled", norm.input[0], gain), shift]
    return [*nodes, last]


def _requires(model: onnx.ModelProto) -> tuple[str, ...]:
    """The shapes are inferred: without them nothing would be split."""
    known = shapes_of(model)
    missing = [node.input[0] for node in model.graph.node if _is_norm(node) and node.input[0] not in known]
    return (*no_unread_initializers(model), *(f"{name} has no shape" for name in missing))


def _ensures(model: onnx.ModelProto) -> tuple[str, ...]:
    shapes = shapes_of(model)
    return tuple(f"the InstanceNormalization {node.name or node.output[0]} could be split" for node in model.graph.node
                 if _is_norm(node) and not _reason_to_keep(model, node, shapes))  # fmt: skip


SPLIT_INSTANCE_NORM = Pass(name="split_instance_norm", requires=_requires, apply=split_instance_norm, ensures=_ensures)
