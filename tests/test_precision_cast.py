"""FP16 and BF16 graphs: types, Casts, what stays float32, and the numbers."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from graph_samples import floats, model_of, node, operators, run, weights_of
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from precision_samples import PATCHES, all_ranges, amax_of, evaluate, network_model, patch_of, relative_rms

from trtbuild.errors import GraphError
from trtbuild.graph.precision import Cast, cast, fp16_sensitive, keep_ends, quantize, tensorrt_form
from trtbuild.graph.precision.half_weights import FORMATS, HalfType, as_half
from trtbuild.graph.precision.opset import with_opset

PATCH = {"x": ["n", 2, 8, 8]}
TYPES: dict[HalfType, int] = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def conv_relu(weight: NDArray[np.float32] | None = None, bias: NDArray[np.float32] | None = None) -> onnx.ModelProto:
    return model_of(
        [node("Conv", "x w b", "c", "conv"), node("Relu", "c", "y", "relu")],
        PATCH,
        {"y": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1) if weight is None else weight, "b": floats(2) if bias is None else bias},
    )


def cast_of(model: onnx.ModelProto, to: HalfType, keep: Any = ()) -> Cast:
    """The result, once it is seen to be well formed with float32 ends, and the given model to be as it was."""
    before = model.SerializeToString(deterministic=True)
    result = cast(model, to, keep=keep)
    assert model.SerializeToString(deterministic=True) == before
    onnx.checker.check_model(result.model, full_check=True)
    onnx.shape_inference.infer_shapes(result.model, check_type=True, strict_mode=True)
    for value in (*result.model.graph.input, *result.model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    old, new = ([v.name for v in (*m.graph.input, *m.graph.output)] for m in (model, result.model))
    assert old == new
    return result


def types_of(model: onnx.ModelProto) -> dict[str, int]:
    values = (*model.graph.input, *model.graph.output, *model.graph.value_info)
    types = {value.name: int(value.type.tensor_type.elem_type) for value in values}
    return types | {tensor.name: int(tensor.data_type) for tensor in model.graph.initializer}


def reads(model: onnx.ModelProto) -> dict[str, list[str]]:
    return {entry.name: list(entry.input) for entry in model.graph.node}


class TestStructure:
    @pytest.mark.parametrize("to", TYPES)
    def test_one_cast_at_each_end_and_everything_between_in_half(self, to: HalfType) -> None:
        result = cast_of(conv_relu(), to)
        assert (result.left, result.underflow) == ((), ())
        assert operators(result.model) == ["Cast", "Conv", "Relu", "Cast"]
        types = types_of(result.model)
        assert {name: kind for name, kind in types.items() if kind == TensorProto.FLOAT} == {"x": 1, "y": 1}
        assert {types[name] for name in ("w", "b", "c", f"x/{to}", f"y/{to}")} == {TYPES[to]}

    def test_neighbours_that_stay_float_share_float_and_the_rest_reads_one_cast(self) -> None:
        model = model_of(
            [
                node("Relu", "x", "a", "first"),
                node("Exp", "a", "b", "kept one"),
                node("Log", "b", "c", "kept two"),
                node("Add", "c b", "d", "kept three"),
                node("Neg", "b", "e", "half one"),
                node("Mul", "b d", "f", "half two"),
                node("Add", "e f", "y", "last"),
            ],
            PATCH,
            {"y": ["n", 2, 8, 8]},
        )
        result = cast_of(model, "fp16", ("kept one", "kept two", "kept three"))
        assert result.left == tuple(f"kept {n}: kept as asked" for n in ("one", "two", "three"))
        found = reads(result.model)
        assert found["kept one"] == ["a/float32"]
        assert found["kept two"] == ["b"]
        assert found["kept three"] == ["c", "b"]
        assert found["half one"] == ["b/fp16"]
        assert found["half two"] == ["b/fp16", "d/fp16"]
        assert operators(result.model).count("Cast") == 5  # x, a, b, d, y

    def test_reasons_of_a_mapping_are_handed_on(self) -> None:
        assert cast_of(conv_relu(), "fp16", {"conv": "too large"}).left == ("conv: too large",)

    def test_a_weight_that_both_types_read_is_there_twice(self) -> None:
        model = model_of(
            [node("Mul", "x w", "a", "half"), node("Add", "a w", "y", "kept")], PATCH, {"y": ["n", 2, 8, 8]},
            {"w": floats(2, 1, 1)},
        )  # fmt: skip
        result = cast_of(model, "fp16", ("kept",))
        stored = weights_of(result.model)
        np.testing.assert_array_equal(stored["w/fp16"], stored["w"].astype(np.float16))
        assert (reads(result.model)["half"][1], reads(result.model)["kept"][1]) == ("w/fp16", "w")

    def test_an_output_that_others_read_too_is_cast_once(self) -> None:
        model = model_of(
            [node("Relu", "x", "y", "relu"), node("Exp", "y", "z", "exp"), node("Log", "y", "u", "kept")],
            PATCH,
            {"y": ["n", 2, 8, 8], "z": ["n", 2, 8, 8], "u": ["n", 2, 8, 8]},
        )
        result = cast_of(model, "fp16", ("kept",))
        assert reads(result.model)["exp"] == ["y/fp16"]
        assert reads(result.model)["kept"] == ["y"]
        assert operators(result.model).count("Cast") == 3  # x, y, z

    def test_shapes_and_integers_stay_as_they_are(self) -> None:
        """The scales of a Resize are float32 by definition, stored ones and those that come from a shape."""
        model = model_of(
            [
                node("Relu", "x", "a", "relu"),
                node("Shape", "a", "s", "shape"),
                node("Cast", "s", "sf", "to float", to=TensorProto.FLOAT),
                node("Div", "sf sf", "ones", "ones"),
                node("Mul", "ones factors", "scales", "scales"),
                node("Resize", "a - scales", "b", "resize", mode="nearest"),
                node("Resize", "b - fixed", "c", "resize two", mode="linear"),
                node("Reshape", "c target", "d", "reshape"),
                node("ArgMax", "d", "k", "argmax", axis=1, keepdims=0),
                node("Cast", "k", "y", "labels", to=TensorProto.FLOAT),
            ],
            {"x": [1, 2, 4, 4]},
            {"y": [1, 256]},
            {
                "factors": np.array([1, 1, 2, 2], np.float32),
                "fixed": np.array([1, 1, 2, 2], np.float32),
                "target": np.array([1, 2, 256], np.int64),
            },
        )
        result = cast_of(model, "fp16")
        types = types_of(result.model)
        assert result.left == ()
        assert {types[n] for n in ("sf", "ones", "scales", "factors", "fixed")} == {TensorProto.FLOAT}
        assert {types[n] for n in ("a", "b", "c", "d", "y/fp16")} == {TensorProto.FLOAT16}
        assert {types[n] for n in ("s", "k", "target")} == {TensorProto.INT64}
        x = np.arange(32, dtype=np.float32).reshape(1, 2, 4, 4)
        np.testing.assert_array_equal(run(model, x)[0], run(result.model, x)[0])

    def test_many_operators_go_through_by_their_types(self) -> None:
        model = model_of(
            [
                node("Pad", "x pads zero", "p", "pad"),
                node("PRelu", "p slope", "q", "prelu"),
                node("AveragePool", "q", "a", "pool", kernel_shape=[2, 2], strides=[2, 2]),
                node("ReduceMean", "a axes", "m", "mean"),
                node("Sub", "a m", "d", "sub"),
                node("Pow", "d two", "v", "pow"),
                node("Add", "v one", "w", "add"),
                node("Sqrt", "w", "r", "sqrt"),
                node("Concat", "r a", "c", "concat", axis=1),
                node("Transpose", "c", "t", "transpose", perm=[0, 2, 3, 1]),
                node("Reshape", "t flat", "f", "reshape"),
                node("Gemm", "f g", "y", "gemm"),
            ],
            {"x": [1, 2, 8, 8]},
            {"y": [1, 3]},
            {
                "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "zero": np.float32(0), "two": np.float32(2),
                "slope": np.full((2, 1, 1), 0.1, np.float32), "axes": np.array([2, 3], np.int64),
                "one": np.float32(1), "flat": np.array([1, 100], np.int64), "g": floats(100, 3) / 10,
            },
        )  # fmt: skip
        for to in TYPES:
            result = cast_of(model, to)
            assert result.left == ()
            assert operators(result.model).count("Cast") == 2
        x = floats(1, 2, 8, 8)
        half = run(cast_of(model, "fp16").model, x)[0]
        np.testing.assert_allclose(half, run(model, x)[0], rtol=0, atol=0.01)

    def test_what_has_no_half_form_stays_float_with_the_reason(self) -> None:
        """Opset 20: Det takes FP16 but no BF16 before 22; a custom operator is outside of all this."""
        model = model_of(
            [node("Relu", "x", "a", "relu"), node("Mystery", "a", "b", "foreign", domain="elsewhere"),
             node("Relu", "b", "y", "last")],
            PATCH, {"y": ["n", 2, 8, 8]}, domains=("elsewhere",),
        )  # fmt: skip
        model.graph.value_info.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, ["n", 2, 8, 8]))
        result = cast(model, "fp16", keep=())
        assert result.left == ("foreign: its operator is outside the standard",)
        assert reads(result.model)["foreign"] == ["a/float32"]
        older = model_of([node("Celu", "x", "a", "celu"), node("Relu", "a", "y", "relu")], PATCH, {"y": ["n", 2, 8, 8]})
        assert cast_of(older, "fp16").left == ("celu: Celu has no fp16 form at opset 20",)

    def test_what_is_computed_from_constants_alone_stays_float_with_its_reader(self) -> None:
        model = model_of(
            [node("Exp", "w", "v", "apart"), node("Mul", "x v", "a", "reader"), node("Relu", "a", "y", "relu")],
            PATCH, {"y": ["n", 2, 8, 8]}, {"w": np.full((2, 1, 1), 20, np.float32)},
        )  # fmt: skip
        result = cast_of(model, "fp16")
        assert result.left == ("reader: it reads v, which is computed apart from the network's input",)
        assert types_of(result.model)["v"] == TensorProto.FLOAT

    @pytest.mark.parametrize("to", TYPES)
    def test_with_everything_kept_the_model_is_the_given_object(self, to: HalfType) -> None:
        model = conv_relu()
        result = cast_of(model, to, ("conv", "relu"))
        assert result.model is model
        assert len(result.left) == 2

    def test_an_unknown_name_to_keep_is_refused(self) -> None:
        with pytest.raises(GraphError, match="not in the graph") as caught:
            cast(conv_relu(), "fp16", keep=("conv", "nobody"))
        assert "nobody" in str(caught.value)


class TestNumbers:
    @pytest.mark.parametrize("to", TYPES)
    def test_weights_are_rounded_as_numpys_types_round_them(self, to: HalfType) -> None:
        """All exponents, ties, subnormals and zeros."""
        generator = np.random.default_rng(0)
        values = (generator.standard_normal(20000) * 2.0 ** generator.integers(-30, 15, 20000)).astype(np.float32)
        ties = np.array([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 2**-25, 3 * 2**-25, -0.0, 0], np.float32)
        values = np.concatenate([values, -values, ties, np.float32([65504, 65503, -65504])])
        tensor = numpy_helper.from_array(values, "w")
        wanted = values.astype(np.float16 if to == "fp16" else ml_dtypes.bfloat16)
        stored = as_half(tensor, to, "w")
        assert stored.data_type == TYPES[to]
        np.testing.assert_array_equal(np.frombuffer(stored.raw_data, np.uint16), wanted.view(np.uint16))

    def test_the_formats_are_those_of_the_types(self) -> None:
        for to, info in (("fp16", np.finfo(np.float16)), ("bf16", ml_dtypes.finfo(ml_dtypes.bfloat16))):
            found = FORMATS[to]
            assert (found.largest, found.normal) == (float(info.max), float(info.smallest_normal))
            assert found.least == float(info.smallest_subnormal)

    def test_the_result_is_torchs_in_half_precision_for_whole_numbers(self) -> None:
        """Products and sums of small whole numbers are exact, so order and accumulator play no part; weights and bias
        lie beside them by less than FP16 can hold. (ONNX Runtime has no FP16 Conv on a CPU: it takes the Casts of the
        activations out and computes in float32.)"""
        weight = np.random.default_rng(1).integers(-4, 5, (2, 2, 1, 1)).astype(np.float32)
        x = np.random.default_rng(2).integers(-4, 5, (1, 2, 8, 8)).astype(np.float32)
        model = conv_relu(np.where(weight == 0, 0, weight + np.float32(2**-13)), np.array([1, -2], np.float32) + 2**-14)
        (got,) = run(cast_of(model, "fp16").model, x)
        stored = [torch.from_numpy(array).half() for array in (x, weight, np.array([1, -2], np.float32))]
        np.testing.assert_array_equal(got, torch.relu(torch.nn.functional.conv2d(*stored)).float().numpy())

    @pytest.mark.parametrize("to", TYPES)
    def test_a_chain_is_rounded_after_every_operator(self, to: HalfType) -> None:
        """ONNX's reference evaluator against numpy's float16 and ml_dtypes' bfloat16, bit for bit."""
        model = model_of(
            [node("Mul", "x w", "a", "mul"), node("Add", "a b", "c", "add"), node("Relu", "c", "y", "relu")],
            PATCH, {"y": ["n", 2, 8, 8]}, {"w": floats(2, 1, 1, seed=1), "b": floats(2, 1, 1, seed=2)},
        )  # fmt: skip
        dtype: Any = np.float16 if to == "fp16" else ml_dtypes.bfloat16
        x, w, b = floats(3, 2, 8, 8), floats(2, 1, 1, seed=1), floats(2, 1, 1, seed=2)
        wanted = np.maximum((x.astype(dtype) * w.astype(dtype)).astype(dtype) + b.astype(dtype), dtype(0))
        result = cast_of(model, to).model
        (got,) = ReferenceEvaluator(result).run(None, {"x": x})
        assert got.dtype == np.float32
        np.testing.assert_array_equal(got, wanted.astype(np.float32))

    def test_values_beyond_the_largest_keep_their_node_in_float_and_never_become_infinite(self) -> None:
        weight = floats(2, 2, 1, 1)
        weight[1, 0] = -65505
        result = cast_of(conv_relu(weight), "fp16")
        assert result.left == ("conv: w holds 65505, and fp16 ends at 65504",)
        assert types_of(result.model)["w"] == types_of(result.model)["b"] == TensorProto.FLOAT
        weight[1, 0] = 65504
        assert cast_of(conv_relu(weight), "fp16").left == ()
        for value in (math.inf, math.nan):
            weight[1, 0] = value
            assert cast_of(conv_relu(weight), "fp16").left[0].startswith("conv: w holds")

    def test_bf16_has_the_range_of_float32_but_for_its_last_numbers(self) -> None:
        weight = floats(2, 2, 1, 1)
        weight[1, 0] = 255 * 2.0**120
        assert cast_of(conv_relu(weight), "bf16").left == ()
        weight[1, 0] = np.finfo(np.float32).max
        assert cast_of(conv_relu(weight), "bf16").left == ("conv: w holds 3.40282e+38, and bf16 ends at 3.38953e+38",)

    def test_small_values_are_counted(self) -> None:
        """2^-25 is a tie and goes to 0; just above it rounds up to the smallest number, 2^-24."""
        weight = np.array([[[[2.0**-25]], [[1.01 * 2.0**-25]]], [[[-1e-9]], [[2.0**-14]]]], np.float32)
        result = cast_of(conv_relu(weight, np.array([0, 6e-5], np.float32)), "fp16")
        assert result.underflow == (
            "w: of 4 values 2 become 0 in fp16 and 1 are subnormal",
            "b: of 2 values 0 become 0 in fp16 and 1 are subnormal",
        )
        stored = weights_of(result.model)["w"].ravel()
        assert (stored == 0).tolist() == [True, False, True, False]
        assert cast_of(conv_relu(weight), "bf16").underflow == ()


class TestOpset:
    def test_bf16_raises_the_opset_to_22_and_fp16_does_not(self) -> None:
        assert [entry.version for entry in cast_of(conv_relu(), "fp16").model.opset_import] == [20]
        result = cast_of(conv_relu(), "bf16").model
        assert [entry.version for entry in result.opset_import] == [22]
        assert result.ir_version >= 10

    def test_a_newer_opset_stays(self) -> None:
        model = conv_relu()
        model.opset_import[0].version = 23
        assert [entry.version for entry in cast_of(model, "bf16").model.opset_import] == [23]

    def test_onnxs_own_converter_gives_the_same_nodes(self) -> None:
        model = tensorrt_form(network_model("residual3d"))
        ours = with_opset(model, 22)
        theirs = onnx.version_converter.convert_version(model, 22)
        assert [(n.op_type, list(n.input), list(n.output)) for n in ours.graph.node] == [
            (n.op_type, list(n.input), list(n.output)) for n in theirs.graph.node
        ]
        for one, other in zip(ours.graph.node, theirs.graph.node, strict=True):
            assert sorted(a.SerializeToString() for a in one.attribute) == sorted(
                a.SerializeToString() for a in other.attribute
            )

    def test_an_operator_whose_meaning_changed_is_refused_by_name(self) -> None:
        model = model_of(
            [node("GroupNormalization", "x s b", "y", "groups", num_groups=1)], PATCH, {"y": ["n", 2, 8, 8]},
            {"s": floats(1), "b": floats(1)},
        )  # fmt: skip
        with pytest.raises(GraphError, match="raised") as caught:
            cast(model, "bf16", keep=())
        assert "GroupNormalization groups" in str(caught.value)

    def test_pools_that_round_up_and_old_models_are_refused(self) -> None:
        pool = node("AveragePool", "x", "y", "pool", kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
        with pytest.raises(GraphError, match="AveragePool pool"):
            cast(model_of([pool], PATCH, {"y": ["n", 2, 4, 4]}), "bf16", keep=())
        old = conv_relu()
        old.opset_import[0].version = 18
        with pytest.raises(GraphError, match="opset is 18"):
            cast(old, "bf16", keep=())

    def test_a_conv_transpose_in_bf16_is_refused_unless_it_stays_float(self) -> None:
        model = network_model("plain2d")
        with pytest.raises(GraphError, match="ConvTranspose") as caught:
            cast(model, "bf16", keep=())
        assert "decoder.transpconvs.0" in str(caught.value)
        assert "tensorrt_form" in str(caught.value)
        result = cast_of(model, "bf16", ("decoder.transpconvs.0", "decoder.transpconvs.1"))
        assert len(result.left) == 2
        assert cast_of(tensorrt_form(model), "bf16").left == ()


def quantized(weight: NDArray[np.float32] | None = None, amax: float = 3.0, opset: int = 20) -> onnx.ModelProto:
    """conv (quantised) -> relu -> conv2 (quantised) -> y, both reading their own pairs."""
    model = model_of(
        [node("Conv", "x w b", "c", "conv"), node("Relu", "c", "r", "relu"), node("Conv", "r v", "y", "conv2")],
        PATCH,
        {"y": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1) if weight is None else weight, "b": floats(2), "v": floats(2, 2, 1, 1, seed=1)},
        opset=opset,
    )
    return quantize(model, {"x": amax, "r": 4.0}, keep=(), zero_point="s8").model


class TestQdq:
    @pytest.mark.parametrize("to", TYPES)
    def test_scales_become_half_and_integers_stay(self, to: HalfType) -> None:
        result = cast_of(quantized(), to)
        types = types_of(result.model)
        assert result.left == ()
        assert operators(result.model).count("Cast") == 2
        assert {types[n] for n in ("x/scale", "w/scale", "x/dequantized", "w/dequantized", "c")} == {TYPES[to]}
        assert {types[n] for n in ("x/quantized", "w/quantized", "x/zero_point", "w/zero_point")} == {TensorProto.INT8}

    def test_the_numbers_are_those_of_the_float_graph_within_the_rounding_of_fp16(self) -> None:
        x = floats(2, 2, 8, 8)
        model = quantized()
        (got,), (wanted,) = run(cast_of(model, "fp16").model, x), run(model, x)
        assert relative_rms(got, wanted) < 0.02

    @pytest.mark.parametrize("what", ["activation", "weight"])
    def test_a_scale_below_normal_keeps_its_whole_layer_in_float_and_no_other(self, what: str) -> None:
        """2^-14 is FP16's smallest normal number; the channel's largest weight is 127 times just less."""
        weight = floats(2, 2, 1, 1)
        small = 127 * 2.0**-14 * 0.99
        if what == "weight":
            weight[1] *= small / np.abs(weight[1]).max()
        model = quantized(weight, amax=small if what == "activation" else 3.0)
        result = cast_of(model, "fp16")
        assert {entry.split(":")[0] for entry in result.left} == {
            "x/QuantizeLinear", "x/DequantizeLinear", "w/DequantizeLinear", "conv",
        }  # fmt: skip
        first = "x/QuantizeLinear" if what == "activation" else "w/DequantizeLinear"
        assert next(entry for entry in result.left if "normal numbers begin at" in entry).startswith(first)
        types = types_of(result.model)
        assert {types[n] for n in ("x/scale", "w/scale", "x/dequantized", "w/dequantized", "c", "b")} == {1}
        assert {types[n] for n in ("r/scale", "v/scale", "r/dequantized")} == {TensorProto.FLOAT16}
        x = floats(1, 2, 8, 8)
        assert relative_rms(run(result.model, x)[0], run(model, x)[0]) < 0.02
        assert cast_of(model, "bf16").left == ()

    def test_a_layer_that_is_kept_keeps_its_pairs_and_who_shares_them(self) -> None:
        model = model_of(
            [node("Conv", "x w", "a", "one"), node("Conv", "x v", "b", "two"), node("Add", "a b", "y", "add")],
            PATCH, {"y": ["n", 2, 8, 8]}, {"w": floats(2, 2, 1, 1), "v": floats(2, 2, 1, 1, seed=1)},
        )  # fmt: skip
        typed = quantize(model, {"x": 3.0}, keep=(), zero_point="s8").model
        result = cast_of(typed, "fp16", ("one",))
        assert {entry.split(":")[0] for entry in result.left} == {entry.name for entry in typed.graph.node} - {"add"}

    def test_before_opset_19_quantised_layers_stay_float_with_the_reason(self) -> None:
        result = cast_of(quantized(opset=18), "fp16")
        assert any("has no fp16 form at opset 18" in entry for entry in result.left)
        assert types_of(result.model)["r"] == TensorProto.FLOAT16
        assert types_of(result.model)["x/scale"] == TensorProto.FLOAT


class TestSensitive:
    def test_ranges_above_the_limit_unknown_or_not_finite_name_the_tensor(self) -> None:
        model = conv_relu()
        known = {"x": 1.0, "c": 8188.0, "y": 2.0}
        assert fp16_sensitive(model, known) == {}
        assert fp16_sensitive(model, known | {"c": 8188.5}) == {
            "conv": "c reaches 8188.5, above 8188", "relu": "c reaches 8188.5, above 8188",
        }  # fmt: skip
        assert fp16_sensitive(model, {"x": 1.0, "c": 2.0}) == {"relu": "the range of y is not known"}
        assert fp16_sensitive(model, known, limit=1.5) == {
            "conv": "c reaches 8188, above 1.5", "relu": "c reaches 8188, above 1.5",
        }  # fmt: skip
        for value in (math.nan, math.inf):
            assert set(fp16_sensitive(model, known | {"y": value})) == {"relu"}

    @pytest.mark.parametrize("name", PATCHES)
    def test_norms_stay_float_joined_or_written_out(self, name: str) -> None:
        joined, split = (network_model(name, split=flag) for flag in (False, True))
        x = patch_of(name)
        norms = {entry.name for entry in joined.graph.node if entry.op_type == "InstanceNormalization"}
        assert set(fp16_sensitive(joined, all_ranges(joined, x))) == norms
        assert fp16_sensitive(joined, all_ranges(joined, x), norms=False) == {}
        found = fp16_sensitive(split, all_ranges(split, x))
        plain = {entry.name for entry in joined.graph.node} - norms
        assert set(found) == {entry.name for entry in split.graph.node} - plain
        assert set(found.values()) == {"norms stay float32"}

    @pytest.mark.parametrize("name", PATCHES)
    def test_ranges_of_the_bundles_network_do_for_the_form_for_tensorrt_and_its_int8(self, name: str) -> None:
        model, x = network_model(name, split=True), patch_of(name)
        ranges = all_ranges(model, x)
        rewritten = tensorrt_form(model)
        assert fp16_sensitive(rewritten, ranges, norms=False) == {}
        typed = quantize(rewritten, amax_of(model, x), keep=keep_ends, zero_point="s8").model
        assert fp16_sensitive(typed, ranges, norms=False) == {}
        gone = dict(ranges)
        del gone["decoder.transpconvs.0_output_0"]
        assert "decoder.transpconvs.0" in fp16_sensitive(rewritten, gone, norms=False)

    @pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, about the infinities of the bad graph
    def test_what_would_overflow_is_found_by_its_range_and_saved(self) -> None:
        """Products reach 1e5: infinity in FP16, and NaN behind the norm; ONNX's evaluator computes every operator in
        its type. Without the rule for norms the one behind the Conv is found by the range of what it reads."""
        model = model_of(
            [
                node("Conv", "x w", "c", "conv"),
                node("InstanceNormalization", "c s b", "n", "norm"),
                node("Relu", "n", "y", "relu"),
            ],
            {"x": [1, 2, 8, 8]},
            {"y": [1, 2, 8, 8]},
            {"w": np.full((2, 2, 1, 1), 300, np.float32), "s": np.float32([1, 2]), "b": np.float32([0, 1])},
        )
        x = 100 * floats(1, 2, 8, 8)
        found = fp16_sensitive(model, all_ranges(model, x), norms=False)
        assert list(found) == ["conv", "norm"]
        (wanted,), (bad,), (good,) = (
            ReferenceEvaluator(m).run(None, {"x": x})
            for m in (model, cast_of(model, "fp16").model, cast_of(model, "fp16", found).model)
        )
        assert not np.isfinite(bad).all()
        np.testing.assert_allclose(good, wanted, rtol=2**-10, atol=1e-6)


@pytest.mark.parametrize("name", PATCHES)
class TestNetworks:
    def test_fp16_in_onnx_runtime_is_the_network_within_fp16s_rounding(self, name: str) -> None:
        """10 bits of fraction: 2^-11 = 0.0005 per operation, some tens of them one after the other."""
        model, x = tensorrt_form(network_model(name, split=True)), patch_of(name)
        wanted = evaluate(network_model(name), x)
        for keep in ((), fp16_sensitive(model, all_ranges(model, x))):
            result = cast_of(model, "fp16", keep)
            assert len(result.left) == len(keep)
            assert relative_rms(run(result.model, x)[0], wanted) < 0.005

    def test_a_network_with_conv_transpose_and_norms_written_out_can_be_fp16_too(self, name: str) -> None:
        model, x = network_model(name, split=True), patch_of(name)
        result = cast_of(model, "fp16", fp16_sensitive(model, all_ranges(model, x)))
        assert relative_rms(run(result.model, x)[0], evaluate(network_model(name), x)) < 0.005

    def test_bf16_weights_back_in_float32_are_the_network_within_bf16s_rounding(self, name: str) -> None:
        """No backend here runs BF16 Convs: the graph's types are turned back, its rounded weights stay."""
        model, x = tensorrt_form(network_model(name)), patch_of(name)
        result = cast_of(model, "bf16").model
        assert result.opset_import[0].version == 22
        back = onnx.ModelProto()
        back.CopyFrom(result)
        back.graph.ClearField("value_info")
        for tensor in back.graph.initializer:
            if tensor.data_type == TensorProto.BFLOAT16:
                bits = np.frombuffer(tensor.raw_data, np.uint16).astype(np.uint32) << 16
                values = bits.view(np.float32).reshape(tuple(tensor.dims))
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        for entry in back.graph.node:
            for attribute in entry.attribute:
                if entry.op_type == "Cast" and attribute.i == TensorProto.BFLOAT16:
                    attribute.i = TensorProto.FLOAT
        onnx.checker.check_model(back, full_check=True)
        error = relative_rms(run(back, x)[0], evaluate(network_model(name), x))
        assert 1e-5 < error < 0.02
