"""What depends on no input is computed now."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from trtbuild.graph.passes import Pass
from trtbuild.graph.surgeon import (
    detach,
    graph_from_model,
    is_constant,
    make_constant,
    model_from_graph,
    no_unread_initializers,
    quiet,
)
from trtbuild.graph.wiring import STANDARD

if TYPE_CHECKING:
    import onnx

RANDOM = (
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
)
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")  # they say in what precision to compute
GROWTH = 1 << 20  # bytes by which one folded node may make the file larger: above, computing beats storing


def fold_constants(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Replace nodes by initializers that hold their results.

    1. Constant nodes, of any numeric type, bit for bit.
    2. Shape of a tensor whose dimensions (those that it asks for) are known.
    3. Nodes whose inputs are all constant: ONNX Runtime computes them.

    Left alone: Q/DQ, random operators, operators outside the standard, results more than 1 MiB larger than what
    they are made from, and types that NumPy lacks (BF16, FP8, INT4).
    """
    graph = graph_from_model(model)
    lowered = [node for node in graph.nodes if _lower_constant(node) or _fold_shape(node)]
    detach(graph, lowered)
    left: dict[str, str] = {}
    folded = _compute(graph, left)
    if not lowered and not folded:
        return model, tuple(left.values())
    return model_from_graph(graph, model), tuple(left.values())


def _lower_constant(node: Any) -> bool:
    """graphsurgeon's own lowering makes float64 of `value_float` and `value_floats`, so it is done here."""
    if node.op != "Constant" or node.domain not in (None, *STANDARD):
        return False
    import numpy as np
    from onnx import numpy_helper

    ((kind, value),) = node.attrs.items()
    if kind == "value":
        make_constant(node.outputs[0], value._values.tensor)
    elif kind in ("value_float", "value_floats"):
        make_constant(node.outputs[0], numpy_helper.from_array(np.array(value, np.float32)))
    elif kind in ("value_int", "value_ints"):
        make_constant(node.outputs[0], numpy_helper.from_array(np.array(value, np.int64)))
    else:
        return False
    return True


def _fold_shape(node: Any) -> bool:
    """graphsurgeon's own folding ignores `start` and `end`, so it is done here."""
    if node.op != "Shape" or node.domain not in (None, *STANDARD):
        return False
    import numpy as np
    from onnx import numpy_helper

    shape = node.inputs[0].shape
    if shape is None:
        return False
    asked = list(shape)[node.attrs.get("start", 0) : node.attrs.get("end", len(shape))]
    if not all(isinstance(dimension, int) for dimension in asked):
        return False
    make_constant(node.outputs[0], numpy_helper.from_array(np.array(asked, np.int64)))
    return True


def _compute(graph: Any, left: dict[str, str]) -> bool:
    """Case 3; fills `left` with what could have been computed but may not be. Whether anything was."""
    constant = {tensor.name for tensor in graph.tensors().values() if is_constant(tensor)}
    kept: set[str] = set()
    foldable = []
    for node in graph.nodes:
        if any(tensor.name and tensor.name not in constant for tensor in node.inputs):
            continue
        reason = _reason_to_keep(node)
        if reason:
            kept.add(node.outputs[0].name)
            left[node.outputs[0].name] = f"{node.name or node.outputs[0].name}: {reason}"
        else:
            foldable.append(node)
            constant.update(tensor.name for tensor in node.outputs)
    if not foldable:
        return False
    with quiet():
        graph.fold_constants(
            fold_shapes=False, error_ok=False, should_exclude_node=lambda node: node.outputs[0].name in kept
        )
    detach(graph, foldable)
    return True


def _reason_to_keep(node: Any) -> str:
    if node.domain not in (None, *STANDARD):
        return "its operator is outside the standard"
    if node.op in QUANTIZERS:
        return "quantisation stays in the graph"
    if node.op in RANDOM:
        return "its result is random"
    tensors = [tensor for tensor in (*node.inputs, *node.outputs) if tensor.name]
    if not all(_is_plain(tensor.dtype) for tensor in tensors):
        return "its type is not one of NumPy's, or not known"
    if _bytes(node.outputs) > _bytes(node.inputs) + GROWTH:
        return "its result is much larger than what it is made from"
    return ""


def _is_plain(dtype: Any) -> bool:
    """Whether NumPy itself has the type; graphsurgeon keeps ONNX's number for some of the others."""
    import numpy as np

    return isinstance(dtype, (np.dtype, type)) and np.dtype(dtype).kind in "biuf"


def _bytes(tensors: list[Any]) -> int:
    """Size of the tensors whose shape is known."""
    import numpy as np

    sizes = 0
    for tensor in tensors:
        if tensor.name and tensor.shape is not None and all(isinstance(n, int) for n in tensor.shape):
            sizes += math.prod(tensor.shape) * np.dtype(tensor.dtype).itemsize
    return sizes


def _ensures(model: onnx.ModelProto) -> tuple[str, ...]:
    nodes = [node for node in model.graph.node if node.op_type == "Constant" and node.domain in STANDARD]
    return tuple(f"the Constant {node.name or node.output[0]} is still there" for node in nodes
                 if not node.attribute[0].name.startswith("value_string"))  # fmt: skip


FOLD_CONSTANTS = Pass(name="fold_constants", requires=no_unread_initializers, apply=fold_constants, ensures=_ensures)
