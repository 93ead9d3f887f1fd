"""Hand-made ONNX graphs for the tests of trtbuild.graph, and ONNX Runtime as the judge of what a graph computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

OPSET = 20


def model_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str | None]],
    outputs: dict[str, Sequence[int | str | None] | None],
    weights: dict[str, NDArray[Any] | onnx.TensorProto] | None = None,
    dtype: int = TensorProto.FLOAT,
    opset: int = OPSET,
    domains: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model of these nodes; inputs and outputs all have one type."""
    initializers = []
    for name, values in (weights or {}).items():
        initializers.append(values if isinstance(values, TensorProto) else numpy_helper.from_array(values, name))
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, shape) for name, shape in outputs.items()],
        initializers,
    )
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="tests")


def node(operator: str, inputs: str, outputs: str, name: str, **attributes: Any) -> onnx.NodeProto:
    """A node; tensor names are separated by spaces, `-` is one that is left out."""
    names = [["" if word == "-" else word for word in words.split()] for words in (inputs, outputs)]
    return helper.make_node(operator, *names, name=name, **attributes)


def floats(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def integers(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    """Small whole numbers as float32: their products and sums are exact in any order."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


def run(model: onnx.ModelProto, *arrays: NDArray[Any], plain: bool = True) -> list[NDArray[Any]]:
    """The outputs for these inputs in order; `plain` switches ONNX Runtime's own graph optimisations off."""
    options = onnxruntime.SessionOptions()
    if plain:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    return list(session.run(None, dict(zip(names, arrays, strict=True))))


def assert_same_results(before: onnx.ModelProto, after: onnx.ModelProto, *arrays: NDArray[Any]) -> None:
    """Bit for bit the same outputs."""
    for old, new in zip(run(before, *arrays), run(after, *arrays), strict=True):
        assert old.dtype == new.dtype
        np.testing.assert_array_equal(old, new)


def operators(model: onnx.ModelProto) -> list[str]:
    return [entry.op_type for entry in model.graph.node]


def weights_of(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
