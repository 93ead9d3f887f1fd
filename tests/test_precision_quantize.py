"""Q/DQ insertion on hand-made graphs: where the nodes stand, what the numbers are, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import onnx
import pytest
from graph_samples import floats, model_of, node, operators, run, weights_of
from numpy.typing import NDArray
from onnx import TensorProto, helper

from trtbuild.errors import GraphError
from trtbuild.graph.precision import Quantized, quantize, with_zero_point
from trtbuild.graph.precision.zero_point import ZeroPoint

PATCH = {"x": ["n", 2, 8, 8]}
RANGES = {"x": 3.0, "a": 2.0, "ab": 2.5, "b": 1.0}


def conv(source: str, result: str, name: str, weight: str = "w", **attributes: int) -> onnx.NodeProto:
    return node("Conv", f"{source} {weight}", result, name, **attributes)


def two_convs(weight: NDArray[np.float32] | None = None) -> onnx.ModelProto:
    """x -> first -> Relu -> second, with a bias in the second."""
    return model_of(
        [
            conv("x", "c", "first"),
            node("Relu", "c", "a", "relu"),
            node("Conv", "a v bias", "y", "second"),
        ],
        PATCH,
        {"y": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1) if weight is None else weight, "v": floats(2, 2, 1, 1, seed=1), "bias": floats(2)},
    )


def all_of(model: onnx.ModelProto, zero_point: ZeroPoint = "s8", amax: dict[str, float] | None = None) -> Quantized:
    before = model.SerializeToString(deterministic=True)
    result = quantize(model, RANGES if amax is None else amax, keep=(), zero_point=zero_point)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(result.model, full_check=True)
    return result


def test_every_conv_reads_a_pair_and_int8_weights_and_nothing_stands_behind_it() -> None:
    result = all_of(two_convs())
    assert (result.quantized, result.left) == (("first", "second"), ())
    assert operators(result.model) == [
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv", "Relu",
        "QuantizeLinear", "DequantizeLinear", "DequantizeLinear", "Conv",
    ]  # fmt: skip
    convs = [entry for entry in result.model.graph.node if entry.op_type == "Conv"]
    assert [list(entry.input) for entry in convs] == [
        ["x/dequantized", "w/dequantized"], ["a/dequantized", "v/dequantized", "bias"],
    ]  # fmt: skip
    stored = weights_of(result.model)
    assert set(stored) == {
        "bias", "x/scale", "x/zero_point", "w/quantized", "w/scale", "w/zero_point",
        "a/scale", "a/zero_point", "v/quantized", "v/scale", "v/zero_point",
    }  # fmt: skip
    assert stored["bias"].dtype == np.float32
    assert (stored["x/scale"].shape, stored["w/scale"].shape) == ((), (2,))
    assert {stored[name].dtype for name in ("x/zero_point", "w/zero_point", "w/quantized")} == {np.dtype(np.int8)}


def test_scales_are_amax_by_127_and_weights_are_rounded_half_to_even_per_channel() -> None:
    """Channel 0: scale exactly 1, so 2.5 and 3.5 are ties; channel 1 is zero; channel 2 has its own scale."""
    weight = np.zeros((3, 4, 1, 1), np.float32)
    weight[0, :, 0, 0] = [127, 2.5, 3.5, -0.5]
    weight[2, :, 0, 0] = [0.3, -0.7, 0.011, 0]
    model = model_of([conv("x", "y", "first")], {"x": ["n", 4, 8, 8]}, {"y": ["n", 3, 8, 8]}, {"w": weight})
    stored = weights_of(all_of(model).model)
    assert stored["w/quantized"][0].ravel().tolist() == [127, 2, 4, 0]
    assert stored["w/quantized"][1].ravel().tolist() == [0, 0, 0, 0]
    assert stored["w/scale"].tolist() == [1.0, 1.0, float(np.float32(np.float64(np.float32(0.7)) / 127))]
    assert stored["w/quantized"][2].ravel().tolist() == [54, -127, 2, 0]
    assert stored["x/scale"] == np.float32(3.0 / 127)


def test_weights_read_back_equal_numpys_fake_quantisation_bit_for_bit() -> None:
    weight = floats(5, 3, 3, 3, 3, seed=3)
    model = model_of([conv("x", "y", "first")], {"x": ["n", 3, 8, 8, 8]}, {"y": ["n", 5, 6, 6, 6]}, {"w": weight})
    result = all_of(model).model
    result.graph.output.append(helper.make_tensor_value_info("w/dequantized", TensorProto.FLOAT, weight.shape))
    shown = run(result, floats(1, 3, 8, 8, 8))[1]
    scale = (np.abs(weight.astype(np.float64)).max((1, 2, 3, 4), keepdims=True) / 127).astype(np.float32)
    levels = np.rint(weight.astype(np.float64) / scale.astype(np.float64))
    assert np.abs(levels).max() == 127
    np.testing.assert_array_equal(shown, levels.astype(np.float32) * scale)


def test_activations_are_clamped_to_minus_128_and_127_steps_in_both_forms() -> None:
    model = model_of(
        [conv("x", "y", "first")], {"x": [1, 1, 1, 5]}, {"y": [1, 1, 1, 5]}, {"w": np.ones((1, 1, 1, 1), np.float32)}
    )
    x = np.array([0.49, 1.5, 500, -127.6, -500], np.float32).reshape(1, 1, 1, 5)
    for form in ("s8", "u8"):
        (y,) = run(all_of(model, form, {"x": 127.0}).model, x)
        assert y.ravel().tolist() == [0, 2, 127, -128, -128]


def test_the_two_zero_points_give_the_same_bits() -> None:
    x = floats(3, 2, 8, 8, seed=5)
    signed, unsigned = (all_of(two_convs(), form).model for form in ("s8", "u8"))
    stored = weights_of(unsigned)
    assert stored["x/zero_point"] == 128
    assert stored["x/zero_point"].dtype == np.uint8
    assert stored["w/quantized"].dtype == np.int8
    np.testing.assert_array_equal(run(signed, x)[0], run(unsigned, x)[0])


def test_readers_share_one_pair_and_what_is_kept_reads_the_float_tensor() -> None:
    model = model_of(
        [
            conv("x", "a", "one"),
            conv("x", "b", "two", "v"),
            conv("x", "c", "three", "w"),
            node("Add", "a b", "ab", "add"),
            node("Add", "ab c", "d", "add2"),
            node("Add", "d x", "y", "add3"),
        ],
        PATCH,
        {"y": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1), "v": floats(2, 2, 1, 1, seed=1)},
    )
    result = quantize(model, {"x": 3.0}, keep=("three",), zero_point="s8")
    assert (result.quantized, result.left) == (("one", "two"), ("three: kept as asked",))
    assert operators(result.model).count("QuantizeLinear") == 1
    assert operators(result.model).count("DequantizeLinear") == 3
    reads = {entry.name: list(entry.input) for entry in result.model.graph.node}
    assert reads["one"] == ["x/dequantized", "w/dequantized"]
    assert reads["two"] == ["x/dequantized", "v/dequantized"]
    assert reads["three"] == ["x", "w"]
    assert reads["add3"] == ["d", "x"]


def test_a_weight_that_convs_share_is_stored_once() -> None:
    model = model_of(
        [conv("x", "a", "one"), conv("a", "y", "two")], PATCH, {"y": ["n", 2, 8, 8]}, {"w": floats(2, 2, 1, 1)}
    )
    result = all_of(model)
    assert [t.name for t in result.model.graph.initializer].count("w/quantized") == 1
    assert [list(n.input)[1] for n in result.model.graph.node if n.op_type == "Conv"] == ["w/dequantized"] * 2


def test_a_concat_is_quantised_behind_and_its_inputs_are_not() -> None:
    model = model_of(
        [
            conv("x", "a", "one"),
            node("Relu", "x", "b", "skip"),
            node("Concat", "a b", "ab", "concat", axis=1),
            conv("ab", "y", "two", "wide"),
        ],
        PATCH,
        {"y": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1), "wide": floats(2, 4, 1, 1)},
    )
    result = all_of(model).model
    quantisers = [entry for entry in result.graph.node if entry.op_type == "QuantizeLinear"]
    assert [entry.input[0] for entry in quantisers] == ["x", "ab"]
    assert next(list(entry.input) for entry in result.graph.node if entry.op_type == "Concat") == ["a", "b"]


def test_keep_may_be_a_predicate_and_with_all_kept_the_model_stays_the_same_object() -> None:
    model = two_convs()
    result = quantize(model, RANGES, keep=lambda layer: layer.role == "stem", zero_point="s8")
    assert result.quantized == ("second",)
    none = quantize(model, {}, keep=lambda layer: True, zero_point="s8")
    assert none.model is model
    assert none.left == ("first: kept as asked", "second: kept as asked")


def test_what_is_no_plain_conv_is_left_with_its_reason() -> None:
    model = model_of(
        [
            node("Relu", "v", "computed", "weights"),
            conv("x", "a", "grouped", "g", group=2),
            conv("a", "b", "computing", "computed"),
            node("ConvTranspose", "b w", "c", "transposed"),
            conv("c", "y", "plain"),
        ],
        PATCH,
        {"y": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1), "v": floats(2, 2, 1, 1), "g": floats(2, 1, 1, 1)},
    )
    result = all_of(model, amax={"c": 1.0})
    assert result.quantized == ("plain",)
    assert result.left == (
        "grouped: it has groups",
        "computing: its weights are computed or fed",
        "transposed: a ConvTranspose: no backend gains from INT8 unless it is rewritten as Conv first",
    )
    reads = {entry.name: list(entry.input) for entry in result.model.graph.node}
    assert reads["transposed"] == ["b", "w"]


def test_a_conv_over_one_dimension_is_left() -> None:
    model = model_of([conv("x", "y", "line")], {"x": ["n", 2, 8]}, {"y": ["n", 2, 8]}, {"w": floats(2, 2, 1)})
    result = all_of(model)
    assert result.left == ("line: it has 1 spatial dimensions, not 2 or 3",)
    assert result.model is model


def test_a_weight_that_a_caller_can_feed_is_left() -> None:
    model = two_convs()
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 2, 1, 1]))
    assert all_of(model).left == ("first: its weights are computed or fed",)


def test_a_conv_in_half_precision_is_left() -> None:
    model = model_of(
        [conv("x", "y", "half")], PATCH, {"y": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1).astype(np.float16)}, dtype=TensorProto.FLOAT16,
    )  # fmt: skip
    assert all_of(model).left == ("half: its weights are not in float32",)


def test_names_that_are_taken_are_not_taken_again() -> None:
    model = model_of(
        [conv("x", "x/dequantized", "x/QuantizeLinear"), conv("x/dequantized", "y", "w/scale")],
        PATCH,
        {"y": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1)},
    )
    result = all_of(model, amax={"x": 1.0, "x/dequantized": 1.0})
    assert result.quantized == ("x/QuantizeLinear", "w/scale")
    names = [entry.name for entry in result.model.graph.node]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("amax", [0.0, 1e-45, 1e-40])
def test_an_empty_range_has_scale_one(amax: float) -> None:
    result = all_of(two_convs(), amax={"x": amax, "a": 2.0})
    assert weights_of(result.model)["x/scale"] == 1
    assert np.isfinite(run(result.model, np.zeros((1, 2, 8, 8), np.float32))[0]).all()


def test_the_smallest_normal_scale_is_kept() -> None:
    amax = 127 * 2.0**-126
    assert weights_of(all_of(two_convs(), amax={"x": amax, "a": 2.0}).model)["x/scale"] == np.float32(2.0**-126)


@pytest.mark.parametrize("amax", [-1.0, math.nan, math.inf, 1e39])
def test_what_is_no_range_is_refused_with_the_tensors_name(amax: float) -> None:
    with pytest.raises(GraphError, match="no range") as caught:
        quantize(two_convs(), {"x": 1.0, "a": amax}, keep=(), zero_point="s8")
    assert "amax of a" in str(caught.value)
    assert "second" in str(caught.value)


def test_a_missing_range_is_refused_with_the_tensors_name_unless_its_layer_is_kept() -> None:
    with pytest.raises(GraphError, match="not known") as caught:
        quantize(two_convs(), {"x": 1.0}, keep=(), zero_point="s8")
    assert "amax of a" in str(caught.value)
    assert quantize(two_convs(), {"x": 1.0}, keep=("second",), zero_point="s8").quantized == ("first",)


def test_an_unknown_layer_to_keep_is_refused() -> None:
    with pytest.raises(GraphError, match=r"not in the network") as caught:
        quantize(two_convs(), RANGES, keep=("first", "third"), zero_point="s8")
    assert "third" in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(value: float) -> None:
    weight = floats(2, 2, 1, 1)
    weight[1, 0] = value
    with pytest.raises(GraphError, match="not finite") as caught:
        quantize(two_convs(weight), RANGES, keep=(), zero_point="s8")
    assert "tensor w" in str(caught.value)
    assert "1 of 4" in str(caught.value)


def test_an_opset_without_scales_per_channel_is_refused() -> None:
    model = two_convs()
    model.opset_import[0].version = 12
    with pytest.raises(GraphError, match="opset"):
        quantize(model, RANGES, keep=(), zero_point="s8")


class TestGraphsThatCameWithQdq:
    def test_they_are_kept_as_they_are_and_what_they_leave_in_float_stays_so(self) -> None:
        trained = quantize(two_convs(), RANGES, keep=("first",), zero_point="s8").model
        result = quantize(trained, {}, keep=(), zero_point="s8")
        assert result.model is trained
        assert result.quantized == ("second",)
        assert result.left == ("first: kept as it is, in float: the graph came with its own Q/DQ",)

    def test_only_their_zero_points_change(self) -> None:
        trained = all_of(two_convs(), "s8", {"x": 1.25, "a": 0.75}).model
        result = quantize(trained, RANGES, keep=("first",), zero_point="u8")
        assert result.quantized == ("first", "second")
        wanted = all_of(two_convs(), "u8", {"x": 1.25, "a": 0.75}).model
        assert result.model.SerializeToString(deterministic=True) == wanted.SerializeToString(deterministic=True)

    def test_weights_that_stay_float_before_their_q_are_taken_for_quantised(self) -> None:
        """As torch exports quantisation-aware training: QuantizeLinear of the float weight."""
        model = two_convs()
        trained = model_of(
            [
                node("QuantizeLinear", "x s z", "xq", "xq"),
                node("DequantizeLinear", "xq s z", "xd", "xd"),
                node("QuantizeLinear", "w ws wz", "wq", "wq", axis=0),
                node("DequantizeLinear", "wq ws wz", "wd", "wd", axis=0),
                conv("xd", "y", "first", "wd"),
            ],
            PATCH,
            {"y": ["n", 2, 8, 8]},
            {
                "w": weights_of(model)["w"], "s": np.float32(0.02), "z": np.int8(0),
                "ws": np.array([0.01, 0.02], np.float32), "wz": np.zeros(2, np.int8),
            },
        )  # fmt: skip
        result = quantize(trained, {}, keep=(), zero_point="u8")
        assert result.quantized == ("first",)
        stored = weights_of(result.model)
        assert (stored["z"].dtype, stored["wz"].dtype) == (np.uint8, np.int8)
        x = floats(1, 2, 8, 8)
        np.testing.assert_array_equal(run(trained, x)[0], run(result.model, x)[0])
        assert with_zero_point(result.model, "s8").SerializeToString(deterministic=True) == trained_bytes(trained)


def trained_bytes(model: onnx.ModelProto) -> bytes:
    """The model as the passes write it: with inferred shapes and the same weights."""
    from trtbuild.graph.infer_shapes import infer_shapes

    return bytes(infer_shapes(model)[0].SerializeToString(deterministic=True))
