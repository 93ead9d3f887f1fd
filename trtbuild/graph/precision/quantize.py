"""INT8 is written into a graph: QuantizeLinear and DequantizeLinear at the inputs of its Convs.

Activations are symmetric per tensor, weights symmetric per output channel (axis 0), biases stay float. Q/DQ stand on
what a Conv reads, a Concat's output rather than each of its inputs, and never on what a Conv writes: TensorRT fuses
the Q into the kernel before it, and OpenVINO's INT8 falls from 6.0 to 4.3-4.9 times torch's float32 with Q/DQ behind.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtbuild.errors import GraphError
from trtbuild.graph.infer_shapes import INFER_SHAPES
from trtbuild.graph.join_instance_norm import JOIN_INSTANCE_NORM
from trtbuild.graph.passes import run_passes
from trtbuild.graph.precision.flow import (
    QUANTIZERS,
    attributes_of,
    finished,
    is_standard,
    makers,
    stored_values,
)
from trtbuild.graph.precision.layers import Layer, weighted_layers
from trtbuild.graph.precision.pairs import PairWriter
from trtbuild.graph.precision.zero_point import ZeroPoint, with_zero_point
from trtbuild.graph.rewrite_conv_transpose import REWRITE_CONV_TRANSPOSE
from trtbuild.graph.split_instance_norm import with_parts
from trtbuild.graph.wiring import node_labels, opset_of

if TYPE_CHECKING:
    import onnx

Keep = Callable[[Layer], bool] | Collection[str]
LEAST_OPSET = 13  # DequantizeLinear with one scale per channel
RANKS = (4, 5)  # of a Conv's weights: two or three spatial dimensions
FLOAT = 1  # onnx.TensorProto.FLOAT


@dataclass(frozen=True, kw_only=True)
class Quantized:
    """The typed model, the names of the layers that compute in INT8, and `<name>: <reason>` of all others."""

    model: onnx.ModelProto
    quantized: tuple[str, ...]
    left: tuple[str, ...]


def keep_ends(layer: Layer) -> bool:
    """The usual choice of what to keep: stem and head have few channels, cost little time and much accuracy."""
    return layer.role != "body"


def tensorrt_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` as TensorRT wants it: InstanceNormalization as one operator, ConvTranspose as Conv and depth-to-space.

    The inputs of all layers keep their names, so a table of ranges that was made on `model` fits the result.

    Raises:
        GraphError: a pass cannot start or failed.
    """
    return run_passes(model, (INFER_SHAPES, JOIN_INSTANCE_NORM, REWRITE_CONV_TRANSPOSE, INFER_SHAPES)).model


def quantize(model: onnx.ModelProto, amax: Mapping[str, float], *, keep: Keep, zero_point: ZeroPoint) -> Quantized:
    """Put Q/DQ on the inputs of every Conv that is not kept.

    1. The tensor that quantised layers read gets one pair, which all of them share: scale = amax / 127 (float32; 1
       where amax is 0), int8 with zero point 0 ("s8") or uint8 with 128 ("u8"), which is the same grid: both clamp to
       [-128, 127] * scale. Layers that are kept go on reading the float tensor.
    2. Weights become int8 initializers behind a DequantizeLinear: scale = max|w| / 127 per output channel (1 where it
       is 0), rounded half to even. A weight that several Convs share is quantised once for those that are quantised.
    3. Left alone, with the reason: what `keep` says; ConvTranspose (`tensorrt_form` makes Convs of them first); Convs
       with groups (they are bound by memory, and TensorRT has no INT8 kernel for most), with one or more than three
       spatial dimensions, with weights that are computed or not float32.
    4. A graph with Q/DQ in it (quantisation-aware training) is kept as it is, scales and all; only its zero points take
       the form asked for. `amax` and `keep` play no part then, and layers without Q/DQ stay without.

    Scales below float32's smallest normal number count as 0: what they quantise is 0 beside anything else.

    OpenVINO has to be given a fixed batch: with a free one, 2026.4.1 computes a norm that is written out wrongly behind
    a quantised Conv without bias (a residual encoder's skip projections), in both forms.

    Args:
        model: float32, weights inside, opset 13 or above.
        amax: threshold T >= 0 of |x| by tensor, at least for what the quantised layers read.
        keep: what of `weighted_layers(model)` stays in float, as a predicate or as names.
        zero_point: "s8" for TensorRT, which takes no other; "u8" for OpenVINO, which computes int8 behind a Concat
            wrongly, and for ONNX Runtime.

    Raises:
        GraphError: a range is missing, negative or not finite; `keep` names no layer; weights are not finite; the
            opset is too old; a zero point of a quantised graph is neither 0 nor 128.
    """
    layers = weighted_layers(model)
    if any(is_standard(node, *QUANTIZERS) for node in model.graph.node):
        return _as_it_came(model, layers, zero_point)
    _check_opset(model)
    reasons = _reasons(model, layers, _predicate(keep, layers))
    chosen = {layer.name for layer in layers if layer.name not in reasons}
    left = tuple(f"{name}: {reason}" for name, reason in reasons.items())
    if not chosen:
        return Quantized(model=model, quantized=(), left=left)
    writer = PairWriter.of(model, zero_point=zero_point)
    nodes: list[onnx.NodeProto] = []
    for name, node in node_labels(model).items():
        if name in chosen:
            before, activation = writer.activation(node.input[0], _range_of(node.input[0], amax, name))
            loader, weight = writer.weight(node.input[1])
            nodes += [*before, *loader, _reading(node, [activation, weight, *node.input[2:]])]
        else:
            nodes.append(node)
    result = with_parts(model, nodes, writer.initializers(nodes))
    ordered = tuple(layer.name for layer in layers if layer.name in chosen)
    return Quantized(model=finished("quantize", model, result), quantized=ordered, left=left)


def _as_it_came(model: onnx.ModelProto, layers: tuple[Layer, ...], zero_point: ZeroPoint) -> Quantized:
    made, nodes = makers(model), node_labels(model)

    def is_quantised(layer: Layer) -> bool:
        sources = [made.get(name) for name in nodes[layer.name].input[:2]]
        return all(source is not None and is_standard(source, "DequantizeLinear") for source in sources)

    return Quantized(
        model=with_zero_point(model, zero_point),
        quantized=tuple(layer.name for layer in layers if is_quantised(layer)),
        left=tuple(
            f"{layer.name}: kept as it is, in float: the graph came with its own Q/DQ"
            for layer in layers
            if not is_quantised(layer)
        ),
    )


def _check_opset(model: onnx.ModelProto) -> None:
    if opset_of(model) < LEAST_OPSET:
        raise GraphError("The model's opset is too old for scales per channel.", expected=f"{LEAST_OPSET} or above",
                         got=opset_of(model), where="the given model", hint="Export it at opset 20.")  # fmt: skip


def _predicate(keep: Keep, layers: tuple[Layer, ...]) -> Callable[[Layer], bool]:
    if callable(keep):
        return keep
    names = set(keep)
    unknown = sorted(names - {layer.name for layer in layers})
    if unknown:
        raise GraphError("A layer that is to be kept is not in the network.", expected="names of weighted layers",
                         got=", ".join(unknown[:5]), where="keep",
                         hint="trtbuild inspect lists the layers.")  # fmt: skip
    return lambda layer: layer.name in names


def _reasons(model: onnx.ModelProto, layers: tuple[Layer, ...], kept: Callable[[Layer], bool]) -> dict[str, str]:
    """Why layers are left alone, by name."""
    stored, nodes = stored_values(model), node_labels(model)
    reasons = {}
    for layer in layers:
        reason = "kept as asked" if kept(layer) else _reason_to_keep(nodes[layer.name], stored)
        if reason:
            reasons[layer.name] = reason
    return reasons


def _reason_to_keep(node: onnx.NodeProto, stored: Mapping[str, onnx.TensorProto]) -> str:
    if node.op_type == "ConvTranspose":
        return "a ConvTranspose: no backend gains from INT8 unless it is rewritten as Conv first"
    weight = stored.get(node.input[1])
    if weight is None:
        return "its weights are computed or fed"
    if weight.data_type != FLOAT:
        return "its weights are not in float32"
    if len(weight.dims) not in RANKS:
        return f"it has {len(weight.dims) - 2} spatial dimensions, not 2 or 3"
    if attributes_of(node).get("group", 1) != 1:
        return "it has groups"
    return ""


def _range_of(tensor: str, amax: Mapping[str, float], layer: str) -> float:
    if tensor not in amax:
        raise GraphError("The range of a tensor that is to be quantised is not known.", expected=f"amax of {tensor}",
                         got=f"ranges of {len(amax)} other tensors", where=f"layer {layer}",
                         hint="Calibrate this very network, or keep the layer in float.")  # fmt: skip
    value = float(amax[tensor])
    if not 0 <= value <= 3.4028234663852886e38:  # the largest float32; false for NaN too
        raise GraphError("The range of a tensor is no range.", expected="a finite number, 0 or above", got=value,
                         where=f"amax of {tensor}, which layer {layer} reads",
                         hint="Calibrate again; look for NaN or infinity in the cases.")  # fmt: skip
    return value


def _reading(node: onnx.NodeProto, inputs: list[str]) -> onnx.NodeProto:
    copy = type(node)()
    copy.CopyFrom(node)
    copy.input[:] = inputs
    return copy
