"""The zero points of quantised activations, there and back, and what cannot be converted."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from graph_samples import floats, model_of, node, run, weights_of
from precision_samples import amax_of, network_model, patch_of
from test_precision_quantize import trained_bytes

from trtbuild.errors import GraphError
from trtbuild.graph.precision import keep_ends, quantize, with_zero_point
from trtbuild.graph.precision.zero_point import ZeroPoint

PATCH = {"x": [1, 2, 8, 8]}
SIGNED: dict[str, Any] = {"s": np.float32(0.02), "z": np.int8(0)}


def pair(tensor: str, scale: str = "s", zero: str = "z") -> list[onnx.NodeProto]:
    return [
        node("QuantizeLinear", f"{tensor} {scale} {zero}".strip(), f"{tensor}_q", f"{tensor} q"),
        node("DequantizeLinear", f"{tensor}_q {scale} {zero}".strip(), f"{tensor}_d", f"{tensor} dq"),
    ]


def assert_there_and_back(model: onnx.ModelProto, form: ZeroPoint, *arrays: Any) -> onnx.ModelProto:
    """Another form, the same bits in ONNX Runtime, and the old model again on the way back."""
    before = model.SerializeToString(deterministic=True)
    other = with_zero_point(model, form)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(other, full_check=True)
    for old, new in zip(run(model, *arrays), run(other, *arrays), strict=True):
        np.testing.assert_array_equal(old, new)
    assert with_zero_point(other, form) is other
    back = with_zero_point(other, "s8" if form == "u8" else "u8")
    assert back.SerializeToString(deterministic=True) == trained_bytes(model)
    return other


@pytest.mark.parametrize("name", ["plain2d", "residual3d"])
def test_a_network_goes_there_and_back_byte_for_byte(name: str) -> None:
    model, x = network_model(name), patch_of(name)
    ranges = amax_of(model, x)
    signed, unsigned = (quantize(model, ranges, keep=keep_ends, zero_point=form).model for form in ("s8", "u8"))
    converted = assert_there_and_back(signed, "u8", x)
    assert converted.SerializeToString(deterministic=True) == unsigned.SerializeToString(deterministic=True)
    assert_there_and_back(unsigned, "s8", x)


def test_quantised_tensors_that_are_only_moved_are_followed() -> None:
    """Q -> Concat, Reshape, Transpose, MaxPool -> DQ, all with integers in between."""
    model = model_of(
        [
            node("QuantizeLinear", "x s z", "q", "q"),
            node("QuantizeLinear", "x2 s z", "p", "p"),
            node("Concat", "q p", "c", "concat", axis=1),
            node("MaxPool", "c", "m", "pool", kernel_shape=[2, 2], strides=[2, 2]),
            node("Transpose", "m", "t", "transpose", perm=[0, 2, 3, 1]),
            node("Reshape", "t shape", "r", "reshape"),
            node("DequantizeLinear", "r s z", "y", "dq"),
        ],
        PATCH | {"x2": [1, 2, 8, 8]},
        {"y": [1, 64]},
        SIGNED | {"shape": np.array([1, 64], np.int64)},
    )
    other = assert_there_and_back(model, "u8", floats(1, 2, 8, 8), floats(1, 2, 8, 8, seed=1))
    types = {value.name: value.type.tensor_type.elem_type for value in other.graph.value_info}
    assert {types[name] for name in "qpcmtr"} == {onnx.TensorProto.UINT8}


def test_a_stored_activation_changes_with_its_zero_point_and_weights_do_not() -> None:
    stored = np.array([-128, -1, 0, 127], np.int8).reshape(1, 1, 2, 2)
    model = model_of(
        [
            *pair("x"),
            node("DequantizeLinear", "stored s z", "k", "k"),
            node("Concat", "x_d k", "c", "concat", axis=1),
            node("DequantizeLinear", "w ws", "wd", "wd", axis=0),
            node("Conv", "c wd", "y", "conv"),
        ],
        {"x": [1, 1, 2, 2]},
        {"y": [1, 2, 2, 2]},
        SIGNED
        | {
            "stored": stored,
            "w": np.array([[[[1]], [[-7]]], [[[3]], [[5]]]], np.int8),
            "ws": np.array([0.1, 0.2], np.float32),
        },
    )
    other = assert_there_and_back(model, "u8", floats(1, 1, 2, 2))
    assert weights_of(other)["stored"].ravel().tolist() == [0, 127, 128, 255]
    assert weights_of(other)["w"].dtype == np.int8


def test_a_missing_zero_point_of_int8_is_zero_and_gets_written() -> None:
    model = model_of(
        [
            node("QuantizeLinear", "x s z", "q", "q"),
            node("DequantizeLinear", "q s", "y", "dq"),
        ],
        PATCH,
        {"y": [1, 2, 8, 8]},
        SIGNED,
    )
    assert with_zero_point(model, "s8") is model
    other = with_zero_point(model, "u8")
    x = floats(1, 2, 8, 8)
    np.testing.assert_array_equal(run(model, x)[0], run(other, x)[0])
    assert {name for name, values in weights_of(other).items() if values.dtype == np.uint8} == {"z", "s/zero_point"}


def test_the_zero_point_that_a_weight_shares_stays_for_the_weight() -> None:
    model = model_of(
        [
            *pair("x"),
            node("DequantizeLinear", "w s z", "wd", "wd"),
            node("Conv", "x_d wd", "y", "conv"),
        ],
        PATCH,
        {"y": [1, 1, 8, 8]},
        SIGNED | {"w": np.array([[[[1]], [[-7]]]], np.int8)},
    )
    other = with_zero_point(model, "u8")
    reads = {entry.name: entry.input[2] for entry in other.graph.node if entry.op_type != "Conv"}
    assert reads["wd"] == "z"
    assert reads["x q"] == reads["x dq"] != "z"
    x = floats(1, 2, 8, 8)
    np.testing.assert_array_equal(run(model, x)[0], run(other, x)[0])


@pytest.mark.parametrize("form", ["s8", "u8"])
@pytest.mark.parametrize(
    "zero", [np.int8(3), np.int8(-128), np.uint8(0), np.uint8(127), np.int16(0), np.uint16(32768)], ids=repr
)
def test_other_zero_points_and_types_are_refused_by_name(zero: Any, form: ZeroPoint) -> None:
    opset = 21
    model = model_of(pair("x"), PATCH, {"x_d": [1, 2, 8, 8]}, {"s": np.float32(0.02), "z": zero}, opset=opset)
    with pytest.raises(GraphError, match="not quantised symmetrically") as caught:
        with_zero_point(model, form)
    assert "tensor x" in str(caught.value)
    assert f"zero point {zero}" in str(caught.value)


def test_a_quantiser_without_zero_point_is_unsigned_from_zero_and_refused() -> None:
    model = model_of(pair("x", zero=""), PATCH, {"x_d": [1, 2, 8, 8]}, {"s": np.float32(0.02)})
    with pytest.raises(GraphError, match="uint8 with zero point 0"):
        with_zero_point(model, "s8")


def test_zero_points_that_differ_by_channel_are_refused() -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "x_q", "x q", axis=1),
        node("DequantizeLinear", "x_q s z", "x_d", "x dq", axis=1),
    ]
    weights = {"s": np.array([0.02, 0.03], np.float32), "z": np.array([0, 1], np.int8)}
    with pytest.raises(GraphError, match="zero point 0, 1"):
        with_zero_point(model_of(nodes, PATCH, {"x_d": [1, 2, 8, 8]}, weights), "u8")


def test_a_computed_zero_point_is_refused() -> None:
    nodes = [node("Cast", "f", "z", "computed", to=onnx.TensorProto.INT8), *pair("x")]
    model = model_of(nodes, PATCH, {"x_d": [1, 2, 8, 8]}, {"s": np.float32(0.02), "f": np.float32(0)})
    with pytest.raises(GraphError, match="not stored"):
        with_zero_point(model, "u8")


def test_operators_that_compute_with_integers_are_refused_by_name() -> None:
    nodes = [
        node("QuantizeLinear", "x s z", "q", "q"),
        node("Pad", "q pads", "p", "zero pad"),
        node("DequantizeLinear", "p s z", "y", "dq"),
    ]
    model = model_of(
        nodes, PATCH, {"y": [1, 2, 10, 8]}, SIGNED | {"pads": np.array([0, 0, 1, 0, 0, 0, 1, 0], np.int64)}
    )
    with pytest.raises(GraphError, match="used as integers") as caught:
        with_zero_point(model, "u8")
    assert "zero pad" in str(caught.value)


def test_an_integer_output_of_the_graph_is_refused() -> None:
    model = model_of(pair("x"), PATCH, {"x_d": [1, 2, 8, 8]}, SIGNED)
    model.graph.output.append(onnx.helper.make_tensor_value_info("x_q", onnx.TensorProto.INT8, [1, 2, 8, 8]))
    with pytest.raises(GraphError, match="used as integers"):
        with_zero_point(model, "u8")
