"""ConvTranspose with kernel = stride becomes a 1x1 Conv and a depth-to-space, exactly.

Every output voxel of such a ConvTranspose has one input voxel and one tap of the kernel, so it is a 1x1 Conv to
kernel-many times the channels, whose channels are then laid out in space. TensorRT runs that Conv in INT8 and fuses the
layout with the Concat behind it, while it has no INT8 ConvTranspose for three dimensions; CPU backends get slower.
Products and sums are the same, so ONNX Runtime gives the same bits, except where its fullest optimisation computes a
2-D Conv in another order (blocked channels): then float32 rounding differs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trtbuild.graph.naming import FreeNames
from trtbuild.graph.passes import Pass
from trtbuild.graph.surgeon import (
    bits_from_proto,
    constant_from_bits,
    graph_from_model,
    int64_constant,
    is_constant,
    model_from_graph,
    no_unread_initializers,
    node,
    proto_from_constant,
    variable,
)
from trtbuild.graph.wiring import STANDARD

if TYPE_CHECKING:
    import onnx

DEFAULTS: dict[str, tuple[int, ...]] = {"dilations": (1,), "output_padding": (0,), "pads": (0,)}


def rewrite_conv_transpose(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Rewrite each ConvTranspose with kernel = stride, in any number of dimensions, with or without bias.

    1. With a known spatial shape: Conv (Co * taps channels, order Co then taps), Reshape to (N, Co, *kernel, *shape),
       Transpose that puts every kernel axis behind its spatial axis, Reshape to (N, Co, *(shape * kernel)). Rank 8 in
       three dimensions, which is TensorRT's largest.
    2. With a free spatial dimension: the same, and the two shapes are computed from that of the input.
    3. Left alone: kernel and stride that differ, padding, output padding, dilation, groups, weights that are computed
       (quantised ones too) or of a type that is no float.
    """
    graph = graph_from_model(model)
    left: list[str] = []
    nodes: list[Any] = []
    names = FreeNames({*graph.tensors(), *(entry.name for entry in graph.nodes if entry.op != "ConvTranspose")})
    for entry in graph.nodes:
        if entry.op != "ConvTranspose" or entry.domain not in (None, *STANDARD):
            nodes.append(entry)
            continue
        reason = _reason_to_keep(entry)
        if reason:
            left.append(f"{entry.name or entry.outputs[0].name}: {reason}")
            nodes.append(entry)
        else:
            nodes += _replacement(entry, names)
    if len(nodes) == len(graph.nodes):
        return model, tuple(left)
    graph.nodes = nodes
    return model_from_graph(graph, model), tuple(left)


def _reason_to_keep(entry: Any) -> str:
    weights = entry.inputs[1:]
    if not all(is_constant(tensor) for tensor in weights if tensor.name):
        return "its weights are computed"
    if proto_from_constant(weights[0]).data_type not in (1, 10, 11, 16):  # FLOAT, FLOAT16, DOUBLE, BFLOAT16
        return "its weights are no floating-point numbers"
    kernel = tuple(weights[0].shape[2:])
    if tuple(entry.attrs.get("strides", (1,) * len(kernel))) != kernel:
        return f"kernel {kernel} and strides {tuple(entry.attrs.get('strides', ()))} differ"
    for name, default in DEFAULTS.items():
        if set(entry.attrs.get(name, default)) != set(default):
            return f"{name} is {tuple(entry.attrs[name])}"
    if entry.attrs.get("group", 1) != 1:
        return f"group is {entry.attrs['group']}"
    if "output_shape" in entry.attrs or entry.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "its output shape or padding is automatic"
    return ""


def _replacement(entry: Any, names: FreeNames) -> list[Any]:
    """The nodes that take the place of `entry`; its output tensor keeps its name."""
    source, weight, *bias = entry.inputs
    target = entry.outputs[0]
    base = entry.name or target.name
    entry.inputs.clear()
    entry.outputs.clear()
    kernel = list(weight.shape[2:])
    rank, channels = len(kernel), weight.shape[1]
    inputs = [source, *_conv_weights(names, weight, bias[0] if bias else None)]
    batch, spatial = source.shape[0], list(source.shape[2:])
    taps = channels * math.prod(kernel)
    whole = [batch, channels, *kernel, *spatial]
    deep = variable(names.free(f"{base}/deep"), target.dtype, [batch, taps, *spatial])
    split = variable(names.free(f"{base}/split"), target.dtype, whole)
    axes = [axis for i in range(rank) for axis in (2 + rank + i, 2 + i)]
    mixed = variable(names.free(f"{base}/mixed"), target.dtype, [whole[axis] for axis in (0, 1, *axes)])
    shapes, nodes = _target_shapes(names, base, source, channels, kernel)
    ones = [1] * rank
    conv = node("Conv", names.free(base), inputs, [deep], dilations=ones, group=1, kernel_shape=ones,
                pads=[0] * (2 * rank), strides=ones)  # fmt: skip
    return [
        *nodes,
        conv,
        node("Reshape", names.free(f"{base}/Reshape"), [deep, shapes[0]], [split]),
        node("Transpose", names.free(f"{base}/Transpose"), [split], [mixed], perm=[0, 1, *axes]),
        node("Reshape", names.free(f"{base}/Reshape"), [mixed, shapes[1]], [target]),
    ]


def _conv_weights(names: FreeNames, weight: Any, bias: Any) -> list[Any]:
    """(Ci, Co, *kernel) becomes (Co * taps, Ci, 1, ...), and each bias stands once per tap.

    The new initializers take the old names where nobody else reads the old ones.
    """
    import numpy as np

    proto = proto_from_constant(weight)
    bits = bits_from_proto(proto)
    rank = bits.ndim - 2
    rows = np.ascontiguousarray(np.moveaxis(bits, 0, -1)).reshape(-1, bits.shape[0], *[1] * rank)
    result = [constant_from_bits(_name(names, weight), proto.data_type, rows)]
    if bias is not None and bias.name:
        values = np.repeat(bits_from_proto(proto_from_constant(bias)), math.prod(bits.shape[2:]))
        result.append(constant_from_bits(_name(names, bias), proto.data_type, values))
    return result


def _name(names: FreeNames, tensor: Any) -> str:
    old: str = tensor.name
    return names.free(old) if tensor.outputs else old


def _target_shapes(
    names: FreeNames, base: str, source: Any, channels: int, kernel: list[int]
) -> tuple[tuple[Any, Any], list[Any]]:
    """The two shapes for Reshape (0 keeps the batch), and the nodes that compute them where they are not known."""
    spatial = list(source.shape[2:])
    rank = len(kernel)
    if all(isinstance(n, int) for n in spatial):
        large = [n * k for n, k in zip(spatial, kernel, strict=True)]
        first = int64_constant(names.free(f"{base}/split_shape"), [0, channels, *kernel, *spatial])
        return (first, int64_constant(names.free(f"{base}/shape"), [0, channels, *large])), []

    import numpy as np

    def value(role: str, length: int) -> Any:
        return variable(names.free(f"{base}/{role}"), np.dtype(np.int64), [length])

    def number(role: str, values: list[int]) -> Any:
        return int64_constant(names.free(f"{base}/{role}"), values)

    whole, small, large_shape = value("whole", rank + 2), value("small", rank), value("large", rank)
    split, final = value("split_shape", 2 * rank + 2), value("shape", rank + 2)

    def step(operator: str, inputs: list[Any], output: Any, **attributes: Any) -> Any:
        return node(operator, names.free(f"{base}/{operator}"), inputs, [output], **attributes)

    return (split, final), [
        step("Shape", [source], whole),
        step("Gather", [whole, number("axes", list(range(2, rank + 2)))], small, axis=0),
        step("Concat", [number("split_head", [0, channels, *kernel]), small], split, axis=0),
        step("Mul", [small, number("kernel", kernel)], large_shape),
        step("Concat", [number("head", [0, channels]), large_shape], final, axis=0),
    ]


def _requires(model: onnx.ModelProto) -> tuple[str, ...]:
    """The shapes are inferred: without them every rewrite would take the slower way of case 2."""
    values = (*model.graph.value_info, *model.graph.input, *model.graph.output)
    known = {value.name for value in values if value.type.tensor_type.HasField("shape")}
    missing = [
        node.input[0] for node in model.graph.node if node.op_type == "ConvTranspose" and node.input[0] not in known
    ]
    return (*no_unread_initializers(model), *(f"{name} has no shape" for name in missing))


def _ensures(model: onnx.ModelProto) -> tuple[str, ...]:
    nodes = [entry for entry in graph_from_model(model).nodes if entry.op == "ConvTranspose"]
    return tuple(f"the ConvTranspose {entry.name} could be rewritten" for entry in nodes
                 if entry.domain in (None, *STANDARD) and not _reason_to_keep(entry))  # fmt: skip


REWRITE_CONV_TRANSPOSE = Pass(
    name="rewrite_conv_transpose", requires=_requires, apply=rewrite_conv_transpose, ensures=_ensures
)
