"""Which nodes stay float32 in an FP16 graph, by the ranges that were measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from trtbuild.graph.join_instance_norm import join_instance_norm
from trtbuild.graph.precision.flow import MOVES, QUANTIZERS, activations, element_types, is_standard
from trtbuild.graph.wiring import initializer_names, node_labels

if TYPE_CHECKING:
    import onnx

FLOAT = 1  # onnx.TensorProto.FLOAT
LIMIT = 65504 / 8  # FP16's largest number, and a factor for what cases beyond the calibration's may bring
NORMS = ("InstanceNormalization", "LayerNormalization", "GroupNormalization")  # their sums go over whole channels


def fp16_sensitive(
    model: onnx.ModelProto, ranges: Mapping[str, float], *, limit: float = LIMIT, norms: bool = True
) -> dict[str, str]:
    """Names of the nodes that stay float32, each with the reason, in graph order.

    1. A node that reads or makes a tensor whose largest |x| is above `limit`, is not finite, or is not known.
    2. With `norms`: InstanceNormalization, LayerNormalization and GroupNormalization, and the nodes of an
       InstanceNormalization that is written out. Sums over a whole channel and the epsilon (1e-5, below FP16's normal
       numbers) are what FP16 does worst.

    Ranges of the inputs and outputs of operators that only move values (`MOVES`) and of Q/DQ follow from each other, so
    `with_maxima(model, None)` gives all that is needed, also for `tensorrt_form(model)` and what `quantize` makes of
    it. Stored tensors are not looked at: `cast` does.

    Args:
        model: float32, with inferred shapes; with or without Q/DQ.
        ranges: largest |x| by tensor.
        limit: what is still good for FP16.
        norms: whether norms stay float32.
    """
    known = _known(model, ranges)
    types, active = element_types(model), set(activations(model))
    inside = _norm_nodes(model) if norms else set()
    found = {}
    for label, node in node_labels(model).items():
        tensors = [n for n in (*node.input, *node.output) if n in active and types[n] == FLOAT]
        reason = next(filter(None, (_reason(name, known, limit) for name in tensors)), "")
        if label in inside:
            found[label] = "norms stay float32"
        elif reason and set(node.output) & active:
            found[label] = reason
    return found


def _reason(tensor: str, known: Mapping[str, float], limit: float) -> str:
    if tensor not in known:
        return f"the range of {tensor} is not known"
    value = known[tensor]
    return "" if 0 <= value <= limit else f"{tensor} reaches {value:.6g}, above {limit:.6g}"  # false for NaN


def _known(model: onnx.ModelProto, ranges: Mapping[str, float]) -> dict[str, float]:
    """`ranges` and what follows from them: forwards through what moves values and Q/DQ, backwards through the former.

    Q/DQ round by half a step and clamp, so the result may lie above by 1/254 of the range, which `limit` leaves room
    for.
    """
    known = {name: float(value) for name, value in ranges.items()}
    stored = initializer_names(model)
    for node in model.graph.node:
        if is_standard(node, *MOVES, *QUANTIZERS) and node.output[0] not in known:
            values = node.input if node.op_type == "Concat" else node.input[:1]
            if all(name in known and name not in stored for name in values):
                known[node.output[0]] = max(known[name] for name in values)
    for node in reversed(model.graph.node):
        if is_standard(node, *MOVES) and node.op_type != "Concat" and node.output[0] in known:
            known.setdefault(node.input[0], known[node.output[0]])
    return known


def _norm_nodes(model: onnx.ModelProto) -> set[str]:
    """Norms, and the nodes that are gone or another operator once `join_instance_norm` has joined its like."""
    labels = node_labels(model)
    joined = node_labels(join_instance_norm(model)[0])
    plain = {label for label, node in labels.items() if is_standard(node, *NORMS)}
    written = {label for label, node in labels.items()
               if label not in joined or joined[label].op_type != node.op_type}  # fmt: skip
    return plain | written
