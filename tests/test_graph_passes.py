"""Each pass of trtbuild.graph on hand-made graphs: it changes exactly the nodes named here, and no result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from graph_samples import assert_same_results, floats, integers, model_of, node, operators, run, weights_of
from onnx import TensorProto, helper, numpy_helper

from trtbuild.errors import GraphError
from trtbuild.graph import CleanResult, Pass, PassReport, clean, io_from_model, run_passes
from trtbuild.graph.drop_dead import DROP_DEAD
from trtbuild.graph.fold_constants import FOLD_CONSTANTS
from trtbuild.graph.fold_duplicate_initializers import FOLD_DUPLICATE_INITIALIZERS
from trtbuild.graph.fold_identities import FOLD_IDENTITIES
from trtbuild.graph.infer_shapes import INFER_SHAPES
from trtbuild.graph.rewrite_conv_transpose import REWRITE_CONV_TRANSPOSE
from trtbuild.graph.stable_names import STABLE_NAMES


def applied(step: Pass, model: onnx.ModelProto, *before: Pass) -> tuple[onnx.ModelProto, PassReport]:
    """The result and report of `step`, after it was seen to find nothing in its own result and to keep its input."""
    model = run_passes(model, before).model
    kept = model.SerializeToString(deterministic=True)
    result: CleanResult = run_passes(model, [step])
    assert model.SerializeToString(deterministic=True) == kept
    onnx.checker.check_model(result.model, full_check=True)
    again = run_passes(result.model, [step])
    assert not again.reports[0].modified
    assert again.model.SerializeToString() == result.model.SerializeToString()
    return result.model, result.reports[0]


def names(report: PassReport) -> tuple[Sequence[str], Sequence[str], Sequence[str]]:
    return report.removed, report.added, report.changed


VECTOR = {"x": ["n", 4]}


class TestFoldIdentities:
    def test_readers_of_an_identity_read_its_input(self) -> None:
        model = model_of(
            [
                node("Identity", "w", "w2", "of weight"),
                node("Add", "x w2", "a", "add"),
                node("Identity", "a", "b", "first"),
                node("Identity", "b", "c", "second"),
                node("Mul", "c c", "d", "square"),
                node("Relu", "b", "e", "relu"),
                node("Sub", "d e", "y", "sub"),
            ],
            VECTOR,
            {"y": ["n", 4]},
            {"w": floats(4)},
        )
        result, report = applied(FOLD_IDENTITIES, model)
        assert names(report) == (("of weight", "first", "second"), (), ("add", "square", "relu"))
        assert_same_results(model, result, floats(3, 4))

    def test_an_identity_that_makes_an_output_gives_its_name_to_the_node_before(self) -> None:
        model = model_of(
            [
                node("Relu", "x", "a", "relu"),
                node("Neg", "a", "z", "neg"),
                node("Identity", "a", "y", "identity"),
            ],
            VECTOR,
            {"y": ["n", 4], "z": ["n", 4]},
        )
        result, report = applied(FOLD_IDENTITIES, model)
        assert names(report) == (("identity",), (), ("relu", "neg"))
        assert_same_results(model, result, floats(3, 4))

    def test_identities_between_names_that_must_stay_are_left_and_reported(self) -> None:
        model = model_of(
            [
                node("Identity", "x", "a", "from input"),
                node("Identity", "w", "b", "from weight"),
                node("Relu", "x", "c", "relu"),
                node("Identity", "c", "d", "between outputs"),
            ],
            VECTOR,
            {"a": ["n", 4], "b": [4], "c": ["n", 4], "d": ["n", 4]},
            {"w": floats(4)},
        )
        result, report = applied(FOLD_IDENTITIES, model)
        assert not report.modified
        assert result is model
        assert [line.split(":")[0] for line in report.left] == ["from input", "from weight", "between outputs"]

    def test_only_the_standard_identity_is_one(self) -> None:
        own = node("Identity", "x", "a", "own", domain="my.domain")
        model = model_of([own, node("Relu", "a", "y", "relu")], VECTOR, {"y": ["n", 4]}, domains=["my.domain"])
        assert not run_passes(model, [FOLD_IDENTITIES]).reports[0].modified


class TestFoldDuplicates:
    def test_equal_initializers_become_the_one_that_is_read_first(self) -> None:
        weight = floats(4)
        model = model_of(
            [node("Add", "x b", "p", "one"), node("Mul", "p a", "q", "two"), node("Sub", "q other", "y", "three")],
            VECTOR,
            {"y": ["n", 4]},
            {"a": weight, "b": weight.copy(), "other": floats(4, seed=1)},
        )
        result, report = applied(FOLD_DUPLICATE_INITIALIZERS, model)
        assert names(report) == ((), (), ("two",))
        assert set(weights_of(result)) == {"b", "other"}
        assert (report.initializers_before, report.initializers_after) == (3, 2)
        assert_same_results(model, result, floats(3, 4))

    def test_the_same_values_in_other_fields_of_the_file_are_equal_too(self) -> None:
        raw = numpy_helper.from_array(np.array([1, 2, 3, 4], np.float32), "a")
        listed = helper.make_tensor("b", TensorProto.FLOAT, [4], [1.0, 2.0, 3.0, 4.0])
        assert raw.HasField("raw_data")
        assert not listed.HasField("raw_data")
        nodes = [node("Add", "x a", "p", "one"), node("Mul", "p b", "y", "two")]
        model = model_of(nodes, VECTOR, {"y": ["n", 4]}, {"a": raw, "b": listed})
        assert list(weights_of(applied(FOLD_DUPLICATE_INITIALIZERS, model)[0])) == ["a"]

    def test_type_shape_and_sign_of_zero_keep_initializers_apart(self) -> None:
        nodes = [
            node("Add", "x zero", "p", "one"),
            node("Add", "p minus", "q", "two"),
            node("Add", "q row", "r", "three"),
            node("Cast", "whole", "s", "cast", to=TensorProto.FLOAT),
            node("Add", "r s", "y", "four"),
        ]
        weights = {
            "zero": np.zeros(4, np.float32),
            "minus": -np.zeros(4, np.float32),
            "row": np.zeros((1, 4), np.float32),
            "whole": np.zeros(4, np.int32),
        }
        model = model_of(nodes, VECTOR, {"y": ["n", 4]}, weights)
        assert not applied(FOLD_DUPLICATE_INITIALIZERS, model)[1].modified

    def test_an_initializer_that_is_an_output_stays(self) -> None:
        nodes = [node("Add", "x a", "p", "one"), node("Add", "p b", "y", "two")]
        weights = {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}
        model = model_of(nodes, VECTOR, {"y": ["n", 4], "b": [4]}, weights)
        assert not applied(FOLD_DUPLICATE_INITIALIZERS, model)[1].modified

    @pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
    def test_half_precision_is_compared_bit_by_bit(self, kind: int) -> None:
        weights = {}
        for name, bits in (("a", 0x3F80), ("b", 0x3F80), ("c", 0x3F81)):
            raw = np.full(4, bits, np.uint16).tobytes()
            weights[name] = TensorProto(name=name, data_type=kind, dims=[4], raw_data=raw)
        nodes = [node("Add", "x a", "p", "1"), node("Add", "p b", "q", "2"), node("Add", "q c", "y", "3")]
        model = model_of(nodes, VECTOR, {"y": ["n", 4]}, weights, dtype=kind)
        result, report = applied(FOLD_DUPLICATE_INITIALIZERS, model)
        assert report.changed == ("2",)
        kept = {tensor.name: tensor for tensor in result.graph.initializer}
        assert {name: tensor.raw_data for name, tensor in kept.items()} == {n: weights[n].raw_data for n in "ac"}
        assert {tensor.data_type for tensor in kept.values()} == {kind}


class TestDropDead:
    def test_nodes_without_way_to_an_output_and_unread_initializers_go(self) -> None:
        model = model_of(
            [
                node("Relu", "x", "a", "relu"),
                node("Add", "a w", "b", "dead"),
                node("Neg", "b", "c", "dead too"),
                node("Abs", "a", "y", "abs"),
            ],
            {**VECTOR, "unused": ["n", 4]},
            {"y": ["n", 4]},
            {"w": floats(4), "unread": floats(4, seed=1)},
        )
        result, report = applied(DROP_DEAD, model)
        assert names(report) == (("dead", "dead too"), (), ())
        assert weights_of(result) == {}
        assert [value.name for value in result.graph.input] == ["x", "unused"]
        assert_same_results(model, result, floats(3, 4), floats(3, 4))

    def test_an_optional_output_at_the_end_is_left_out(self) -> None:
        nodes = [node("MaxPool", "x", "y indices", "pool", kernel_shape=[2])]
        model = model_of(nodes, {"x": ["n", 2, 8]}, {"y": ["n", 2, 7]})
        result, report = applied(DROP_DEAD, model)
        assert names(report) == ((), (), ("pool",))
        assert list(result.graph.node[0].output) == ["y"]
        assert_same_results(model, result, floats(3, 2, 8))

    def test_an_optional_output_in_the_middle_leaves_the_others_in_place(self) -> None:
        """graphsurgeon's own clean-up hands Y_c out as Y_h here."""
        weights = {"w": floats(1, 12, 2), "r": floats(1, 12, 3, seed=1)}
        model = model_of(
            [node("LSTM", "x w r", "a hidden c", "lstm", hidden_size=3)],
            {"x": [5, "n", 2]},
            {"a": [5, 1, "n", 3], "c": [1, "n", 3]},
            weights,
        )
        result, report = applied(DROP_DEAD, model)
        assert names(report) == ((), (), ("lstm",))
        assert list(result.graph.node[0].output) == ["a", "", "c"]
        assert_same_results(model, result, floats(5, 2, 2))

    def test_an_output_that_is_not_optional_stays(self) -> None:
        nodes = [node("Split", "x", "a b c", "split", axis=1, num_outputs=3), node("Add", "b c", "y", "add")]
        model = model_of(nodes, {"x": ["n", 6]}, {"y": ["n", 2]})
        assert not applied(DROP_DEAD, model)[1].modified


class TestFoldConstants:
    def fold(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassReport]:
        return applied(FOLD_CONSTANTS, model, INFER_SHAPES)

    @pytest.mark.parametrize(
        ("attribute", "expected"),
        [
            ({"value": numpy_helper.from_array(floats(4))}, floats(4)),
            ({"value_float": 0.1}, np.array(0.1, np.float32)),
            ({"value_floats": [0.1, 0.2, 0.3, 0.4]}, np.array([0.1, 0.2, 0.3, 0.4], np.float32)),
        ],
    )
    def test_constant_nodes_become_initializers_of_the_same_type(self, attribute: dict, expected: np.ndarray) -> None:
        nodes = [node("Constant", "", "c", "constant", **attribute), node("Add", "x c", "y", "add")]
        model = model_of(nodes, VECTOR, {"y": ["n", 4]})
        result, report = self.fold(model)
        assert names(report) == (("constant",), (), ())
        assert weights_of(result)["c"].dtype == expected.dtype
        np.testing.assert_array_equal(weights_of(result)["c"], expected)
        assert_same_results(model, result, floats(3, 4))

    @pytest.mark.parametrize(("kind", "value"), [("value_int", 3), ("value_ints", [2, 2])])
    def test_whole_constants_are_int64(self, kind: str, value: object) -> None:
        nodes = [node("Constant", "", "c", "constant", **{kind: value}), node("Cast", "c", "f", "cast", to=1)]
        model = model_of([*nodes, node("Add", "x f", "y", "add")], {"x": ["n", 2]}, {"y": ["n", 2]})
        result, report = self.fold(model)
        assert report.removed == ("constant", "cast")
        np.testing.assert_array_equal(weights_of(result)["f"], np.array(value, np.float32))

    def test_a_shape_is_folded_as_far_as_it_asks_for_known_dimensions(self) -> None:
        """graphsurgeon's own folding ignores start and end."""
        model = model_of(
            [
                node("Shape", "x", "s", "spatial", start=2),
                node("Shape", "x", "m", "middle", start=-3, end=-1),
                node("Shape", "x", "b", "batch", end=1),
                node("Concat", "b m s", "all", "concat", axis=0),
                node("Cast", "all", "y", "cast", to=TensorProto.FLOAT),
            ],
            {"x": ["n", 3, 5, 7]},
            {"y": [5]},
        )
        result, report = self.fold(model)
        assert names(report) == (("spatial", "middle"), (), ())
        assert {name: values.tolist() for name, values in weights_of(result).items()} == {"s": [5, 7], "m": [3, 5]}
        assert_same_results(model, result, floats(2, 3, 5, 7))

    def test_what_depends_on_no_input_is_computed(self) -> None:
        model = model_of(
            [
                node("Mul", "w two", "w2", "scale"),
                node("Transpose", "w2", "w3", "turn", perm=[1, 0]),
                node("Sqrt", "v", "v2", "root"),
                node("MatMul", "x w3", "a", "matmul"),
                node("Add", "a v2", "y", "add"),
            ],
            VECTOR,
            {"y": ["n", 3]},
            {"w": floats(3, 4), "two": np.array(2, np.float32), "v": np.array([1, 2, 3], np.float32)},
        )
        result, report = self.fold(model)
        assert names(report) == (("scale", "turn", "root"), (), ())
        assert set(weights_of(result)) == {"w3", "v2"}
        assert_same_results(model, result, floats(3, 4))

    def test_arithmetic_between_casts_stays_real(self) -> None:
        """graphsurgeon's cast elision, part of its shape folding, would multiply whole numbers by int(0.5) here."""
        model = model_of(
            [
                node("Shape", "x", "s", "batch", end=1),
                node("Cast", "s", "f", "to float", to=TensorProto.FLOAT),
                node("Mul", "f half", "h", "halve"),
                node("Cast", "h", "i", "to int", to=TensorProto.INT64),
                node("Cast", "i", "j", "back", to=TensorProto.FLOAT),
                node("Abs", "w", "v", "foldable"),
                node("Add", "j v", "k", "add"),
                node("Add", "x k", "y", "add too"),
            ],
            VECTOR,
            {"y": ["n", 4]},
            {"half": np.array([0.5], np.float32), "w": floats(4)},
        )
        result, report = self.fold(model)
        assert names(report) == (("foldable",), (), ())
        assert_same_results(model, result, floats(7, 4))

    def test_quantisation_stays_in_the_graph(self) -> None:
        model = quantized()
        result, report = self.fold(model)
        assert names(report) == (("double scale",), (), ())
        assert operators(result) == [op for op in operators(model) if op != "Mul"]
        assert {line.split(":")[0] for line in report.left} == {"Q w", "DQ w8"}
        assert_same_results(model, result, floats(2, 1, 6, 6))

    def test_random_results_are_not_frozen(self) -> None:
        nodes = [node("RandomNormal", "", "r", "noise", shape=[4]), node("Add", "x r", "y", "add")]
        _, report = self.fold(model_of(nodes, VECTOR, {"y": ["n", 4]}))
        assert not report.modified
        assert report.left == ("noise: its result is random",)

    def test_a_result_much_larger_than_its_inputs_is_left_to_be_computed(self) -> None:
        weights = {"small": np.array([64, 64, 65], np.int64), "fine": np.array([4, 4], np.int64)}
        model = model_of(
            [
                node("ConstantOfShape", "small", "a", "large"),
                node("ConstantOfShape", "fine", "b", "little"),
                node("ReduceSum", "a", "c", "sum", keepdims=0),
                node("Add", "x b", "d", "add"),
                node("Add", "d c", "y", "add too"),
            ],
            VECTOR,
            {"y": ["n", 4]},
            weights,
        )
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
        _, report = self.fold(model)
        assert report.removed == ("little",)
        assert report.left == ("large: its result is much larger than what it is made from",)

    def test_bf16_constants_are_lowered_bit_for_bit_and_bf16_nodes_left(self) -> None:
        bits = np.array([0x3F81, 0x7F7F, 0x0001, 0x8000], np.uint16)
        value = TensorProto(data_type=TensorProto.BFLOAT16, dims=[4], raw_data=bits.tobytes())
        model = model_of(
            [
                node("Constant", "", "c", "constant", value=value),
                node("Cast", "w", "w16", "cast", to=TensorProto.BFLOAT16),
                node("Add", "x c", "a", "add"),
                node("Add", "a w16", "y", "add too"),
            ],
            VECTOR,
            {"y": ["n", 4]},
            {"w": floats(4)},
            dtype=TensorProto.BFLOAT16,
        )
        result, report = self.fold(model)
        assert report.removed == ("constant",)
        assert report.left == ("cast: its type is not one of NumPy's, or not known",)
        (lowered,) = [tensor for tensor in result.graph.initializer if tensor.name == "c"]
        assert lowered.data_type == TensorProto.BFLOAT16
        assert lowered.raw_data == bits.tobytes()

    def test_a_constant_that_is_an_output_is_stored_as_such(self) -> None:
        nodes = [node("Constant", "", "c", "constant", value_floats=[1.0, 2.0]), node("Relu", "x", "y", "relu")]
        model = model_of(nodes, VECTOR, {"y": ["n", 4], "c": [2]})
        result, report = self.fold(model)
        assert report.removed == ("constant",)
        assert_same_results(model, result, floats(2, 4))


def quantized() -> onnx.ModelProto:
    """Q/DQ around a Conv: quantised activations, one weight as float with Q and DQ, one as int8 with DQ."""
    return model_of(
        [
            node("Mul", "half two", "scale", "double scale"),
            node("QuantizeLinear", "x scale zero", "xq", "Q x"),
            node("DequantizeLinear", "xq scale zero", "xd", "DQ x"),
            node("QuantizeLinear", "w ws zero", "wq", "Q w"),
            node("DequantizeLinear", "wq ws zero", "wd", "DQ w"),
            node("Conv", "xd wd", "a", "conv", pads=[1, 1, 1, 1]),
            node("DequantizeLinear", "w8 ws zero", "vd", "DQ w8"),
            node("Conv", "a vd", "y", "conv 2", pads=[1, 1, 1, 1]),
        ],
        {"x": ["n", 1, 6, 6]},
        {"y": ["n", 1, 6, 6]},
        {
            "half": np.array(0.01, np.float32),
            "two": np.array(2, np.float32),
            "zero": np.array(0, np.int8),
            "w": floats(1, 1, 3, 3),
            "ws": np.array(0.015, np.float32),
            "w8": np.arange(-4, 5, dtype=np.int8).reshape(1, 1, 3, 3),
        },
    )


@pytest.mark.parametrize("rewrite", [False, True])
def test_a_quantised_graph_survives_cleaning(rewrite: bool) -> None:
    model = quantized()
    result = clean(model, rewrite_conv_transpose=rewrite, split_instance_norm=False).model
    assert operators(result).count("QuantizeLinear") == 2
    assert operators(result).count("DequantizeLinear") == 3
    assert_same_results(model, result, floats(2, 1, 6, 6))
    types = {tensor.data_type for tensor in result.graph.initializer}
    assert TensorProto.INT8 in types


class TestInferShapes:
    def test_all_tensors_get_shapes_and_the_free_batch_is_called_batch(self) -> None:
        nodes = [node("Conv", "x w", "a", "conv"), node("Concat", "a a", "b", "concat", axis=1)]
        model = model_of([*nodes, node("Relu", "b", "y", "relu")], {"x": ["s77", 1, 8, 8]}, {"y": ["k", 4, "h", None]},
                         {"w": floats(2, 1, 3, 3)})  # fmt: skip
        model.graph.value_info.append(helper.make_tensor_value_info("ghost", 1, [1]))
        result, report = applied(INFER_SHAPES, model)
        assert report.modified
        shapes = {spec.name: spec.shape for spec in io_from_model(result)}
        assert shapes == {"x": ("batch", 1, 8, 8), "y": ("batch", 4, 6, 6)}
        inner = [onnx.helper.printable_value_info(value) for value in result.graph.value_info]
        assert inner == ["%a[FLOAT, batchx2x6x6]", "%b[FLOAT, batchx4x6x6]"]
        assert_same_results(model, result, floats(3, 1, 8, 8))

    def test_an_unnamed_batch_gets_the_name_too_and_a_fixed_one_keeps_its_number(self) -> None:
        for first, expected in ((None, "batch"), (2, 2)):
            model = model_of([node("Relu", "x", "y", "relu")], {"x": [first, 4]}, {"y": [first, 4]})
            result, _ = applied(INFER_SHAPES, model)
            assert [spec.shape for spec in io_from_model(result)] == [(expected, 4), (expected, 4)]

    def test_with_two_inputs_their_own_names_stay(self) -> None:
        model = model_of([node("Add", "x z", "y", "add")], {"x": ["n", 4], "z": ["n", 4]}, {"y": ["n", 4]})
        result, _ = applied(INFER_SHAPES, model)
        assert [spec.shape for spec in io_from_model(result)] == [("n", 4)] * 3

    def test_wrong_stored_shapes_are_replaced(self) -> None:
        model = model_of([node("Relu", "x", "a", "one"), node("Neg", "a", "y", "two")], VECTOR, {"y": ["n", 4]})
        model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", 99]))
        result, _ = applied(INFER_SHAPES, model)
        assert onnx.helper.printable_value_info(result.graph.value_info[0]) == "%a[FLOAT, batchx4]"

    def test_shapes_behind_a_foreign_operator_are_kept_where_stored_and_named_where_not(self) -> None:
        own = [node("Mine", "x", "a", "1", domain="my"), node("Mine", "a", "b", "2", domain="my")]
        model = model_of([*own, node("Relu", "b", "y", "relu")], VECTOR, {"y": ["n", 4]}, domains=["my"])
        model.graph.value_info.append(helper.make_tensor_value_info("a", TensorProto.FLOAT, ["n", 7]))
        result, report = applied(INFER_SHAPES, model)
        assert onnx.helper.printable_value_info(result.graph.value_info[0]) == "%a[FLOAT, batchx7]"
        assert report.left == ("b: its shape cannot be inferred",)
        assert io_from_model(result)[1].shape == ("n", 4)


def up(
    channels: tuple[int, int],
    kernel: Sequence[int],
    spatial: Sequence[int | str],
    bias: bool = True,
    **attributes: object,
) -> onnx.ModelProto:
    """Relu, ConvTranspose, Concat with itself: whole numbers, so that any order of summation gives the same bits."""
    attributes = {"strides": list(kernel), **attributes}
    weights = {"up.weight": integers(*channels, *kernel)} | ({"up.bias": integers(channels[1], seed=1)} if bias else {})
    free: list[int | str | None] = [None] * len(spatial)
    return model_of(
        [
            node("Relu", "x", "a", "relu"),
            node("ConvTranspose", f"a up.weight {'up.bias' if bias else ''}", "u", "up", **attributes),
            node("Concat", "u u", "y", "concat", axis=1),
        ],
        {"x": ["n", channels[0], *spatial]},
        {"y": ["n", None, *free]},
        weights,
    )


SHAPES = [
    ((3, 2), (2,), (5,)),
    ((3, 2), (2, 2), (3, 4)),
    ((1, 4), (3, 2), (4, 3)),
    ((5, 1), (1, 2), (3, 5)),
    ((3, 2), (2, 2, 2), (3, 4, 5)),
    ((4, 3), (1, 2, 2), (3, 4, 5)),
    ((2, 3), (3, 1, 2), (2, 3, 1)),
    ((2, 2), (1, 1, 1), (2, 3, 4)),
]


class TestRewriteConvTranspose:
    def rewrite(self, model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassReport]:
        return applied(REWRITE_CONV_TRANSPOSE, model, INFER_SHAPES)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(("channels", "kernel", "spatial"), SHAPES)
    def test_with_known_shape_it_is_conv_and_depth_to_space_bit_for_bit(
        self, channels: tuple[int, int], kernel: tuple[int, ...], spatial: tuple[int, ...], bias: bool
    ) -> None:
        model = up(channels, kernel, spatial, bias)
        result, report = self.rewrite(model)
        assert operators(result) == ["Relu", "Conv", "Reshape", "Transpose", "Reshape", "Concat"]
        assert names(report) == ((), ("up/Reshape", "up/Transpose", "up/Reshape_1"), ("up",))
        taps = int(np.prod(kernel))
        assert weights_of(result)["up.weight"].shape == (channels[1] * taps, channels[0], *[1] * len(kernel))
        for batch in (1, 3):
            assert_same_results(model, result, integers(batch, channels[0], *spatial, seed=2))
        final = clean(result, rewrite_conv_transpose=True, split_instance_norm=False).model
        assert io_from_model(final)[1].shape == (
            "batch", 2 * channels[1], *(n * k for n, k in zip(spatial, kernel, strict=True)))  # fmt: skip

    @pytest.mark.parametrize("free", [(0,), (1,), (0, 1, 2)])
    def test_with_a_free_dimension_the_shapes_are_computed(self, free: tuple[int, ...]) -> None:
        spatial: list[int | str] = [3, 4, 5]
        for axis in free:
            spatial[axis] = f"d{axis}"
        model = up((3, 2), (1, 2, 2), spatial)
        result, report = self.rewrite(model)
        assert "ConvTranspose" not in operators(result)
        assert set(report.added) == {"up/Shape", "up/Gather", "up/Concat", "up/Mul", "up/Concat_1", "up/Reshape",
                                     "up/Transpose", "up/Reshape_1"}  # fmt: skip
        assert_same_results(model, result, integers(2, 3, 3, 4, 5))
        moved = [n + 1 if axis in free else n for axis, n in enumerate((3, 4, 5))]
        assert_same_results(model, result, integers(1, 3, *moved))

    def test_real_numbers_in_three_dimensions_give_the_same_bits_under_full_optimisation(self) -> None:
        model = up((32, 16), (2, 2, 2), (4, 4, 4))
        for tensor in model.graph.initializer:
            tensor.CopyFrom(numpy_helper.from_array(floats(*tensor.dims), tensor.name))
        result, _ = self.rewrite(model)
        x = floats(2, 32, 4, 4, 4, seed=5)
        np.testing.assert_array_equal(run(model, x, plain=False)[0], run(result, x, plain=False)[0])

    def test_no_tensor_has_more_than_eight_dimensions(self) -> None:
        """TensorRT's limit."""
        result, _ = self.rewrite(up((3, 2), (2, 2, 2), (3, 4, 5)))
        assert max(len(value.type.tensor_type.shape.dim) for value in result.graph.value_info) == 8

    @pytest.mark.parametrize(
        ("attributes", "reason"),
        [
            ({"strides": [1, 1]}, "differ"),
            ({"strides": [2, 1]}, "differ"),
            ({"pads": [0, 0, 1, 0]}, "pads is (0, 0, 1, 0)"),
            ({"output_padding": [1, 0]}, "output_padding is (1, 0)"),
            ({"dilations": [1, 2]}, "dilations is (1, 2)"),
            ({"auto_pad": "SAME_UPPER"}, "automatic"),
            ({"output_shape": [6, 8]}, "automatic"),
        ],
    )
    def test_anything_else_is_left_alone_and_reported(self, attributes: dict, reason: str) -> None:
        model = run_passes(up((3, 2), (2, 2), (3, 4), **attributes), [INFER_SHAPES]).model
        result, report = self.rewrite(model)
        assert result is model
        assert len(report.left) == 1
        assert report.left[0].startswith("up: ")
        assert reason in report.left[0]

    def test_strides_that_are_not_given_are_one(self) -> None:
        nodes = [node("ConvTranspose", "x w", "y", "up")]
        model = model_of(nodes, {"x": ["n", 2, 3, 3]}, {"y": ["n", 2, 4, 4]}, {"w": floats(2, 2, 2, 2)})
        assert not self.rewrite(model)[1].modified

    def test_groups_are_left_alone(self) -> None:
        nodes = [node("ConvTranspose", "x w", "y", "up", strides=[2, 2], group=2)]
        model = model_of(nodes, {"x": ["n", 4, 3, 3]}, {"y": ["n", 4, 6, 6]}, {"w": floats(4, 2, 2, 2)})
        assert self.rewrite(model)[1].left == ("up: group is 2",)

    def test_quantised_weights_are_left_alone(self) -> None:
        nodes = [
            node("DequantizeLinear", "w s", "d", "dequantize"),
            node("ConvTranspose", "x d", "y", "up", strides=[2, 2]),
        ]
        weights = {"w": np.ones((4, 2, 2, 2), np.int8), "s": np.array(0.1, np.float32)}
        model = model_of(nodes, {"x": ["n", 4, 3, 3]}, {"y": ["n", 2, 6, 6]}, weights)
        assert self.rewrite(model)[1].left == ("up: its weights are computed",)

    def test_weights_that_others_read_stay_and_two_nodes_may_share_them(self) -> None:
        model = model_of(
            [
                node("ConvTranspose", "x w b", "u", "up", strides=[2, 2]),
                node("ConvTranspose", "u w b", "v", "up 2", strides=[2, 2]),
                node("ReduceSum", "w", "s", "sum", keepdims=0),
                node("Mul", "v s", "y", "mul"),
            ],
            {"x": ["n", 2, 3, 4]},
            {"y": ["n", 2, 12, 16]},
            {"w": integers(2, 2, 2, 2), "b": integers(2)},
        )
        result, _ = self.rewrite(model)
        assert operators(result).count("Conv") == 2
        assert weights_of(result)["w"].shape == (2, 2, 2, 2)
        assert_same_results(model, result, integers(2, 2, 3, 4, seed=3))
        cleaned = clean(model, rewrite_conv_transpose=True, split_instance_norm=False).model
        assert len(cleaned.graph.initializer) < len(result.graph.initializer)
        assert_same_results(model, cleaned, integers(2, 2, 3, 4, seed=3))

    def test_half_precision_stays_half_precision(self) -> None:
        weights = {"w": integers(3, 2, 2, 2).astype(np.float16), "b": integers(2).astype(np.float16)}
        nodes = [node("ConvTranspose", "x w b", "y", "up", strides=[2, 2])]
        model = model_of(nodes, {"x": ["n", 3, 3, 4]}, {"y": ["n", 2, 6, 8]}, weights, dtype=TensorProto.FLOAT16)
        result, _ = self.rewrite(model)
        assert weights_of(result)["w"].dtype == np.float16
        assert_same_results(model, result, integers(2, 3, 3, 4, seed=2).astype(np.float16))

    @pytest.mark.parametrize("raw", [True, False])
    def test_bf16_weights_keep_every_bit(self, raw: bool) -> None:
        """No CPU backend runs BF16, so the FP32 twin of the graph says where each value has to go."""
        full = up((3, 2), (2, 2), (3, 4))
        half = up((3, 2), (2, 2), (3, 4))
        half.opset_import[0].version = 22
        half.ir_version = 10
        for value in (*half.graph.input, *half.graph.output):
            value.type.tensor_type.elem_type = TensorProto.BFLOAT16
        for tensor in half.graph.initializer:
            bits = numpy_helper.to_array(tensor).view(np.uint32) >> 16
            tensor.ClearField("raw_data")
            tensor.data_type = TensorProto.BFLOAT16
            if raw:
                tensor.raw_data = bits.astype(np.uint16).tobytes()
            else:
                tensor.int32_data.extend(int(word) for word in bits.reshape(-1))
        expected, found = self.rewrite(full)[0], self.rewrite(half)[0]
        assert operators(found) == operators(expected)
        for wanted, got in zip(expected.graph.initializer, found.graph.initializer, strict=True):
            assert list(wanted.dims) == list(got.dims)
            if wanted.data_type == TensorProto.FLOAT:
                assert got.data_type == TensorProto.BFLOAT16
                bits = (np.frombuffer(wanted.raw_data, np.uint32) >> 16).astype(np.uint16)
                assert got.raw_data == bits.tobytes()
        cleaned = clean(half, rewrite_conv_transpose=True, split_instance_norm=False).model
        assert io_from_model(cleaned)[0].dtype == "bfloat16"


def network(prefix: str, inner: str, order: Sequence[int] = (0, 1, 2, 3, 4)) -> onnx.ModelProto:
    """Two blocks and a skip as an exporter might write them; `order` is that of the nodes in the file."""
    nodes = [
        node("Conv", f"x {prefix}a.{inner}0.weight {prefix}a.{inner}0.bias", "t0", "n0", pads=[1, 1]),
        node("InstanceNormalization", f"t0 {prefix}a.{inner}1.weight {prefix}a.{inner}1.bias", "t1", "n1"),
        node("Neg", "x", "t2", "n2"),
        node("Concat", "t1 t2", "t3", "n3", axis=1),
        node("Conv", "t3 decoder.seg.weight onnx::Conv_7", "y", "n4"),
    ]
    weights = {
        f"{prefix}a.{inner}0.weight": floats(2, 1, 3),
        f"{prefix}a.{inner}0.bias": floats(2),
        f"{prefix}a.{inner}1.weight": floats(2, seed=1),
        f"{prefix}a.{inner}1.bias": floats(2, seed=2),
        "decoder.seg.weight": floats(1, 3, 1),
        "onnx::Conv_7": floats(1),
    }
    model = model_of([nodes[i] for i in order], {"x": ["n", 1, 8]}, {"y": ["n", 1, 8]}, weights)
    for entry in model.graph.node:
        entry.doc_string = "File /home/somebody/net.py, line 3"
        entry.metadata_props.add(key="trace", value="/home/somebody")
    model.graph.metadata_props.add(key="graph", value="/home/somebody")
    model.metadata_props.add(key="kept", value="model")
    return model


class TestStableNames:
    def test_paths_of_parameters_name_nodes_and_tensors(self) -> None:
        model = network("encoder.", "conv")
        for tensor in model.graph.initializer:
            tensor.name = tensor.name.replace("conv0", "conv").replace("conv1", "norm")
        for entry in model.graph.node:
            entry.input[:] = [name.replace("conv0", "conv").replace("conv1", "norm") for name in entry.input]
        result, _ = applied(STABLE_NAMES, model)
        assert [entry.name for entry in result.graph.node] == [
            "encoder.a.conv",
            "encoder.a.conv/InstanceNormalization",
            "image/Neg",
            "encoder.a.conv/Concat",
            "decoder.seg",
        ]
        assert [tensor.name for tensor in result.graph.initializer] == [
            "encoder.a.conv.weight",
            "encoder.a.conv.bias",
            "encoder.a.norm.weight",
            "encoder.a.norm.bias",
            "decoder.seg.weight",
            "decoder.seg/B",
        ]
        assert list(result.graph.node[3].input) == [
            "encoder.a.conv/InstanceNormalization_output_0",
            "image/Neg_output_0",
        ]
        assert [spec.name for spec in io_from_model(result)] == ["image", "logits"]
        assert_same_results(model, result, floats(2, 1, 8))

    def test_aliases_and_the_order_in_the_file_make_no_difference(self) -> None:
        plain, _ = applied(STABLE_NAMES, network("encoder.", "all_modules."))
        other, _ = applied(STABLE_NAMES, network("decoder.encoder.", "all_modules.", (2, 0, 1, 3, 4)))
        assert plain.graph.SerializeToString() == other.graph.SerializeToString()
        assert "encoder.a.conv.weight" in weights_of(plain)
        assert "encoder.a.norm.weight" in weights_of(plain)

    def test_traces_of_the_exporting_machine_are_gone_and_the_models_own_metadata_stays(self) -> None:
        result, _ = applied(STABLE_NAMES, network("encoder.", "all_modules."))
        assert b"somebody" not in result.SerializeToString()
        assert [(entry.key, entry.value) for entry in result.metadata_props] == [("kept", "model")]
        assert result.producer_name == "tests"

    def test_a_vector_that_several_nodes_read_is_named_by_the_first_of_them(self) -> None:
        """Folded twins keep the path of one of them, and exporters keep different ones."""
        results = []
        for kept in ("a.norm.weight", "b.norm.weight"):
            nodes = [
                node("Conv", "x a.weight", "t", "1"),
                node("InstanceNormalization", f"t {kept} {kept}", "u", "2"),
                node("Conv", "u b.weight", "v", "3"),
                node("InstanceNormalization", f"v {kept} {kept}", "y", "4"),
            ]
            weights = {"a.weight": floats(1, 1, 3), "b.weight": floats(1, 1, 3, seed=1), kept: floats(1)}
            model = model_of(nodes, {"x": ["n", 1, 8]}, {"y": ["n", 1, 4]}, weights)
            results.append(applied(STABLE_NAMES, model)[0])
        assert results[0].SerializeToString() == results[1].SerializeToString()
        assert "a/InstanceNormalization/scale" in weights_of(results[0])

    def test_a_matrix_that_several_nodes_read_keeps_its_path_which_names_them(self) -> None:
        nodes = [node("Conv", "x a.weight", "t", "1"), node("Conv", "t a.weight", "y", "2")]
        model = model_of(nodes, {"x": ["n", 1, 8]}, {"y": ["n", 1, 4]}, {"a.weight": floats(1, 1, 3)})
        result, _ = applied(STABLE_NAMES, model)
        assert [entry.name for entry in result.graph.node] == ["a", "a_1"]
        assert list(weights_of(result)) == ["a.weight"]

    def test_names_that_collide_are_numbered_in_order(self) -> None:
        nodes = [node("Relu", "x", "image", ""), node("Relu", "image", "b", ""), node("Relu", "b", "y", "")]
        result, _ = applied(STABLE_NAMES, model_of(nodes, VECTOR, {"y": ["n", 4]}))
        assert [entry.name for entry in result.graph.node] == ["image/Relu", "image/Relu_1", "image/Relu_2"]

    def test_several_inputs_and_outputs_keep_their_names(self) -> None:
        nodes = [node("Add", "p q", "r", "add"), node("Neg", "r", "s", "neg")]
        model = model_of(nodes, {"p": ["n", 4], "q": ["n", 4]}, {"r": ["n", 4], "s": ["n", 4]})
        result, _ = applied(STABLE_NAMES, model)
        assert [spec.name for spec in io_from_model(result)] == ["p", "q", "r", "s"]
        assert_same_results(model, result, floats(2, 4), floats(2, 4))

    def test_an_initializer_that_is_the_output_is_called_logits(self) -> None:
        nodes = [node("Relu", "x", "a", "relu")]
        model = model_of(nodes, VECTOR, {"w": [4], "a": ["n", 4]}, {"w": floats(4)})
        assert_same_results(model, applied(STABLE_NAMES, model)[0], floats(1, 4))

    def test_an_output_that_is_an_input_as_well_cannot_be_named_both(self) -> None:
        model = model_of([node("Relu", "x", "a", "relu")], VECTOR, {"a": ["n", 4], "x": ["n", 4]})
        result, _ = applied(STABLE_NAMES, model)
        assert [spec.name for spec in io_from_model(result)] == ["image", "a", "image"]
        only = model_of([node("Relu", "x", "a", "relu")], VECTOR, {"x": ["n", 4]})
        with pytest.raises(GraphError, match="stable_names cannot start"):
            run_passes(only, [STABLE_NAMES])

    def test_the_rewrite_renames_nothing_outside_of_it(self) -> None:
        """A scale table made on the graph with ConvTranspose fits the one without."""
        model = up((3, 2), (2, 2), (3, 4))
        plain, rewritten = (
            clean(model, rewrite_conv_transpose=flag, split_instance_norm=False).model for flag in (False, True)
        )
        without, others = ({name for entry in m.graph.node for name in entry.output} for m in (plain, rewritten))
        assert without - others == set()
