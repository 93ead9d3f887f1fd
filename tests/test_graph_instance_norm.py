"""InstanceNormalization written out and put back: exact there and back, and nearer to the truth than CPU kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
from graph_samples import assert_same_results, floats, model_of, node, operators, run, weights_of
from numpy.typing import NDArray
from onnx import TensorProto, helper
from test_graph_networks import NETWORKS
from test_graph_networks import model_of as exported
from test_graph_passes import applied, names

from trtbuild.errors import GraphError
from trtbuild.graph import PassReport, clean, io_from_model, run_passes
from trtbuild.graph.fold_duplicate_initializers import FOLD_DUPLICATE_INITIALIZERS
from trtbuild.graph.infer_shapes import INFER_SHAPES
from trtbuild.graph.join_instance_norm import JOIN_INSTANCE_NORM
from trtbuild.graph.split_instance_norm import SPLIT_INSTANCE_NORM, mean_kernels

Array = NDArray[np.float32]
EPSILON = 1e-5
UNIT = 2.0**-24  # the relative error of one float32 operation


def norm_model(spatial: Sequence[int | str | None], channels: int = 2, **attributes: Any) -> onnx.ModelProto:
    """Relu, the norm, Neg."""
    shape = ["n", channels, *spatial]
    attributes = {"epsilon": EPSILON, **attributes}
    return model_of(
        [
            node("Relu", "x", "a", "relu"),
            node("InstanceNormalization", "a w b", "h", "norm", **attributes),
            node("Neg", "h", "y", "neg"),
        ],
        {"x": shape},
        {"y": shape},
        {"w": 1 + floats(channels) / 10, "b": floats(channels, seed=1)},
    )


def split(model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassReport]:
    return applied(SPLIT_INSTANCE_NORM, model, INFER_SHAPES)


def join(model: onnx.ModelProto) -> tuple[onnx.ModelProto, PassReport]:
    return applied(JOIN_INSTANCE_NORM, model, INFER_SHAPES)


def content(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))


def cleaned(model: onnx.ModelProto, split: bool, rewrite: bool = False) -> onnx.ModelProto:
    return clean(model, rewrite_conv_transpose=rewrite, split_instance_norm=split).model


class TestMeanKernels:
    @pytest.mark.parametrize(
        ("spatial", "kernels"),
        [
            ((1, 1, 1), []),
            ((2, 2), []),
            ((331,), []),
            ((1, 37, 1), []),
            ((8, 8), [(2, 4)]),
            ((4, 4, 8), [(2, 2, 2), (2, 2, 2)]),
            ((6, 5), [(1, 5)]),
            ((37, 53, 41), [(37, 1, 1), (1, 1, 41)]),
        ],
    )
    def test_examples(self, spatial: tuple[int, ...], kernels: list[tuple[int, ...]]) -> None:
        assert list(mean_kernels(spatial)) == kernels

    def test_no_sum_is_longer_than_eight_or_the_largest_prime_factor_and_every_kernel_divides(self) -> None:
        shapes = [(n, m) for n in range(1, 50) for m in (1, 2, 24, 35, 64)]
        shapes += [(n, 2 * n, m) for n in (1, 5, 12, 28, 37, 128) for m in (1, 3, 16, 53)]
        for spatial in shapes:
            rest = list(spatial)
            primes = [p for n in spatial for p in range(2, n + 1) if n % p == 0 and all(p % q for q in range(2, p))]
            longest = max(8, *primes, 1)
            for kernel in mean_kernels(spatial):
                assert 1 < math.prod(kernel) <= longest
                assert all(n % k == 0 for n, k in zip(rest, kernel, strict=True))
                rest = [n // k for n, k in zip(rest, kernel, strict=True)]
            assert math.prod(rest) <= longest


class TestSplit:
    @pytest.mark.parametrize("spatial", [(8,), (6, 10), (4, 6, 8), (1, 1, 1), (5, 7, 3), (1, 9)])
    def test_exactly_the_norm_is_replaced_and_its_output_keeps_its_name(self, spatial: tuple[int, ...]) -> None:
        model = norm_model(spatial)
        result, report = split(model)
        steps = range(len(mean_kernels(spatial)))
        added = [
            *(f"mean_{i}" for i in steps), "mean", "deviation", "square", *(f"variance_{i}" for i in steps),
            "variance", "shifted", "std", "gain", "centred", "shift", "scaled",
        ]  # fmt: skip
        assert names(report) == ((), tuple(f"norm/{role}" for role in added), ("norm",))
        assert report.left == ()
        last = result.graph.node[-2]
        assert (last.name, last.op_type, list(last.output)) == ("norm", "Add", ["h"])
        assert {name: values.shape for name, values in weights_of(result).items()} == {
            "w": (1, 2, *[1] * len(spatial)), "b": (1, 2, *[1] * len(spatial)),
            "norm/two": (), "norm/epsilon": ()}  # fmt: skip
        assert weights_of(result)["norm/epsilon"] == np.float32(EPSILON)
        assert weights_of(result)["w"].tobytes() == weights_of(model)["w"].tobytes()

    def test_norms_without_an_epsilon_have_that_of_onnx_and_all_norms_with_one_epsilon_share_it(self) -> None:
        model = model_of(
            [
                node("InstanceNormalization", "x w b", "p", "default"),
                node("InstanceNormalization", "p w b", "q", "large", epsilon=0.5),
                node("InstanceNormalization", "q b w", "y", "same", epsilon=1e-5),
            ],
            {"x": ["n", 2, 4, 4]},
            {"y": ["n", 2, 4, 4]},
            {"w": floats(2), "b": floats(2, seed=1)},
        )
        result, _ = split(model)
        stored = weights_of(result)
        assert list(stored) == ["w", "b", "default/two", "default/epsilon", "large/epsilon"]
        assert (stored["default/epsilon"], stored["large/epsilon"]) == (np.float32(1e-5), np.float32(0.5))
        x = floats(2, 2, 4, 4, seed=3)
        np.testing.assert_allclose(run(result, x)[0], run(model, x)[0], rtol=0, atol=1e-5)

    def test_a_scale_that_others_read_stays_and_the_norms_get_theirs_beside_it(self) -> None:
        model = shared_parameters()
        result, _ = split(model)
        assert {name: values.shape for name, values in weights_of(result).items()} == {
            "w": (3, 3, 1, 1), "v": (3,), "v/per_channel_2d": (1, 3, 1, 1), "scale": (1, 3, 1, 1),
            "one/two": (), "one/epsilon": ()}  # fmt: skip
        x = floats(2, 3, 4, 4, seed=3)
        np.testing.assert_allclose(run(result, x)[0], run(model, x)[0], rtol=0, atol=1e-5)

    def test_a_name_that_is_taken_is_not_taken_again(self) -> None:
        model = norm_model((4, 4))
        model.graph.node[0].name = "norm/mean"
        model.graph.node[0].output[0] = model.graph.node[1].input[0] = "norm/deviation_output_0"
        result, report = split(model)
        assert "norm/mean_1" in report.added
        assert report.changed == ("norm",)
        np.testing.assert_allclose(run(result, floats(2, 2, 4, 4))[0], run(model, floats(2, 2, 4, 4))[0], atol=1e-5)

    @pytest.mark.parametrize("spatial", [(None, 8), (8, "h"), (4, "d", 8)])
    def test_a_free_spatial_dimension_is_left_alone_and_reported(self, spatial: tuple[int | str | None, ...]) -> None:
        assert left_alone(norm_model(spatial)) == "it has a free spatial dimension"

    def test_four_spatial_dimensions_are_left_alone_and_reported(self) -> None:
        assert left_alone(norm_model((2, 2, 2, 2))) == "it has 4 spatial dimensions"

    @pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE])
    def test_norms_that_are_not_in_float32_are_left_alone_and_reported(self, kind: int) -> None:
        assert left_alone(retyped(norm_model((4, 4)), kind)) == "it is not in float32"

    def test_a_computed_scale_is_left_alone_and_reported(self) -> None:
        model = norm_model((4, 4))
        model.graph.node.insert(0, node("Abs", "w", "w2", "abs"))
        model.graph.node[2].input[1] = "w2"
        assert left_alone(model) == "its scale or bias is computed"

    def test_a_scale_that_a_caller_may_feed_is_left_alone_and_reported(self) -> None:
        model = norm_model((4, 4))
        model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2]))
        assert left_alone(model) == "its scale or bias is an input too"

    def test_an_operator_of_the_same_name_outside_the_standard_is_none(self) -> None:
        own = node("InstanceNormalization", "x w b", "y", "own", domain="my")
        weights = {"w": floats(2), "b": floats(2)}
        model = model_of([own], {"x": ["n", 2, 4]}, {"y": ["n", 2, 4]}, weights, domains=["my"])
        report = run_passes(model, [SPLIT_INSTANCE_NORM]).reports[0]
        assert (report.modified, report.left) == (False, ())

    def test_without_shapes_it_does_not_start(self) -> None:
        with pytest.raises(GraphError, match="split_instance_norm cannot start") as caught:
            run_passes(norm_model((4, 4)), [SPLIT_INSTANCE_NORM])
        assert "a has no shape" in str(caught.value)

    @pytest.mark.parametrize("step", [SPLIT_INSTANCE_NORM, JOIN_INSTANCE_NORM])
    def test_with_unread_initializers_neither_pass_starts(self, step: Any) -> None:
        model = run_passes(norm_model((4, 4)), [INFER_SHAPES]).model
        model.graph.initializer.add(name="unread", data_type=TensorProto.FLOAT, dims=[0])
        with pytest.raises(GraphError, match=f"{step.name} cannot start") as caught:
            run_passes(model, [step])
        assert "nobody reads the initializer unread" in str(caught.value)

    @pytest.mark.parametrize("spatial", [(6, 10), (4, 6, 5)])
    def test_the_batch_stays_free(self, spatial: tuple[int, ...]) -> None:
        """Each image of a batch gets the very bits that it gets alone, in both backends."""
        result = cleaned(norm_model(spatial), split=True)
        assert [spec.shape for spec in io_from_model(result)] == [("batch", 2, *spatial)] * 2
        dims = [value.type.tensor_type.shape.dim for value in result.graph.value_info]
        assert {shape[0].dim_param for shape in dims if shape} == {"batch"}
        x = floats(3, 2, *spatial, seed=5)
        for infer in BACKENDS.values():
            whole = infer(result, x)
            for batch in (1, 2):
                np.testing.assert_array_equal(infer(result, x[:batch]), whole[:batch])


def left_alone(model: onnx.ModelProto) -> str:
    """Why the one norm called `norm` was left."""
    model = run_passes(model, [INFER_SHAPES]).model
    result, report = split(model)
    assert result is model
    ((name, reason),) = (line.split(": ") for line in report.left)
    assert name == "norm"
    return reason


def retyped(model: onnx.ModelProto, kind: int) -> onnx.ModelProto:
    """The model in another type; its weights are zeros."""
    model.opset_import[0].version = 22
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = kind
    width = 8 if kind == TensorProto.DOUBLE else 2
    for tensor in model.graph.initializer:
        zeros = bytes(width * tensor.dims[0])
        tensor.CopyFrom(TensorProto(name=tensor.name, data_type=kind, dims=tensor.dims, raw_data=zeros))
    return model


def shared_parameters() -> onnx.ModelProto:
    """`v` is bias of a Conv and of two norms and scale of one, as after folding duplicates in an untrained network."""
    return model_of(
        [
            node("Conv", "x w v", "c", "conv"),
            node("InstanceNormalization", "c scale v", "h", "one", epsilon=1e-5),
            node("InstanceNormalization", "h v v", "y", "two", epsilon=1e-5),
        ],
        {"x": ["n", 3, 4, 4]},
        {"y": ["n", 3, 4, 4]},
        {"w": floats(3, 3, 1, 1), "v": floats(3, seed=1), "scale": floats(3, seed=2)},
    )


def twisted(change: str) -> onnx.ModelProto:
    """The split norm with one thing that `split_instance_norm` would not have written."""
    model = run_passes(norm_model((4, 6)), [INFER_SHAPES, SPLIT_INSTANCE_NORM]).model
    nodes = {entry.name.removeprefix("norm/"): entry for entry in model.graph.node}
    stored = {tensor.name: tensor for tensor in model.graph.initializer}

    def also_out(tensor: str) -> None:
        model.graph.output.append(helper.make_tensor_value_info(tensor, TensorProto.FLOAT, None))

    def pool(role: str, kernel: Sequence[int], **attributes: int) -> None:
        del nodes[role].attribute[:]
        values = {"kernel_shape": kernel, "strides": kernel, **attributes}
        nodes[role].attribute.extend(helper.make_attribute(key, value) for key, value in values.items())

    changes: dict[str, Callable[[], object]] = {
        "epsilon per channel": lambda: stored["norm/epsilon"].CopyFrom(
            onnx.numpy_helper.from_array(np.full((1, 2, 1, 1), 1e-5, np.float32), "norm/epsilon")
        ),
        "scale per voxel": lambda: stored["w"].CopyFrom(onnx.numpy_helper.from_array(floats(1, 2, 4, 6), "w")),
        "one bias for all": lambda: stored["b"].CopyFrom(onnx.numpy_helper.from_array(floats(1, 1, 1, 1), "b")),
        "deviation is read": lambda: also_out(nodes["deviation"].output[0]),
        "gain is read": lambda: also_out(nodes["gain"].output[0]),
        "a pool is read": lambda: also_out(nodes["variance_0"].output[0]),
        "variance pooled otherwise": lambda: pool("variance_0", (1, 3)),
        "pools that overlap": lambda: [pool(role, (2, 2), strides=[1, 1]) for role in ("mean_0", "variance_0")],
        "pools with a rest": lambda: [pool(role, (3, 2)) for role in ("mean_0", "variance_0")],
        "other pools that tile": lambda: [pool(role, (4, 2)) for role in ("mean_0", "variance_0")],
        "pools with padding": lambda: [pool(role, (2, 2), pads=[0, 0, 2, 2]) for role in ("mean_0", "variance_0")],
        "mean of something else": lambda: nodes["mean_0"].input.__setitem__(0, "x"),
        "not a square": lambda: stored["norm/two"].CopyFrom(onnx.numpy_helper.from_array(np.float32(3), "norm/two")),
        "shift by another gain": lambda: nodes["centred"].input.__setitem__(1, nodes["std"].output[0]),
        "variance of something else": lambda: nodes["deviation"].input.__setitem__(0, "x"),
    }
    changes[change]()
    return run_passes(model, [INFER_SHAPES]).model


class TestJoin:
    @pytest.mark.parametrize("spatial", [(8,), (6, 10), (4, 6, 8), (1, 1, 1), (5, 7, 3), (37, 11)])
    def test_it_undoes_split_byte_for_byte_and_changes_exactly_the_norm(self, spatial: tuple[int, ...]) -> None:
        model = run_passes(norm_model(spatial), [INFER_SHAPES]).model
        model.graph.node[1].doc_string = "what an exporter says"
        written, report = split(model)
        for shaped in (written, run_passes(written, [INFER_SHAPES]).model):
            result, back = applied(JOIN_INSTANCE_NORM, shaped)
            assert content(result) == content(model)
            assert names(back) == (report.added, (), ("norm",))

    def test_shared_scales_and_biases_come_back_byte_for_byte(self) -> None:
        model = run_passes(shared_parameters(), [INFER_SHAPES]).model
        assert content(join(split(model)[0])[0]) == content(model)

    def test_names_play_no_part(self) -> None:
        model = run_passes(norm_model((4, 6)), [INFER_SHAPES]).model
        written = split(model)[0]
        for number, entry in enumerate(written.graph.node):
            entry.name = f"n{number}"
            entry.input[:] = [name.replace("norm/", "") for name in entry.input]
            entry.output[:] = [name.replace("norm/", "") for name in entry.output]
        for tensor in written.graph.initializer:
            tensor.name = tensor.name.replace("norm/", "")
        assert operators(join(written)[0]) == ["Relu", "InstanceNormalization", "Neg"]

    def test_a_norm_whose_pools_tile_the_tensor_otherwise_is_joined(self) -> None:
        """The mean is over all voxels then, whatever kernels an older version of split took."""
        model = twisted("other pools that tile")
        assert "InstanceNormalization" in operators(join(model)[0])

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ("epsilon per channel", "its epsilon is no stored float32 scalar"),
            ("scale per voxel", "its scale or bias is no stored float32 tensor of shape (1, 2, 1, 1)"),
            ("one bias for all", "its scale or bias is no stored float32 tensor of shape (1, 2, 1, 1)"),
            ("deviation is read", "others read what is inside of it"),
            ("gain is read", "others read what is inside of it"),
            ("a pool is read", "others read what is inside of it"),
            ("variance pooled otherwise", "its mean and variance are pooled differently"),
            ("pools that overlap", "its pools do not tile the tensor, or its shape is not known"),
            ("pools with a rest", "its pools do not tile the tensor, or its shape is not known"),
            ("pools with padding", "its pools do not tile the tensor, or its shape is not known"),
            ("mean of something else", "its mean is that of another tensor"),
            ("not a square", "its variance is not the mean of squares"),
            ("shift by another gain", "its shift is not that of what it scales by"),
            ("variance of something else", "its variance is not that of what it scales"),
        ],
    )
    def test_what_differs_in_one_thing_is_left_alone_and_reported(self, change: str, reason: str) -> None:
        model = twisted(change)
        result, report = join(model)
        assert result is model
        assert report.left == (f"norm: {reason}",)

    def test_a_graph_that_was_never_split_is_the_same_object(self) -> None:
        for name in ("2d", "residual"):
            model = exported(name, True)
            report = run_passes(model, [JOIN_INSTANCE_NORM])
            assert report.model is model
            assert report.reports[0].left == ()

    def test_a_scale_that_others_read_in_its_wide_shape_stays_for_them(self) -> None:
        model = split(norm_model((4, 6)))[0]
        model.graph.node.append(node("Mul", "y w", "z", "other reader"))
        model.graph.output[0].name = "z"
        result, _ = join(model)
        assert {name: values.shape for name, values in weights_of(result).items()} == {
            "w": (1, 2, 1, 1), "w/flat": (2,), "b": (2,)}  # fmt: skip
        x = floats(2, 2, 4, 6, seed=3)
        np.testing.assert_allclose(run(result, x)[0], run(model, x)[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
class TestNetworks:
    def test_split_and_joined_again_it_is_the_same_file(self, name: str, dynamo: bool) -> None:
        model = exported(name, dynamo)
        for rewrite in (False, True):
            plain, written = (cleaned(model, split, rewrite) for split in (False, True))
            assert "InstanceNormalization" not in operators(written)
            assert content(run_passes(written, [JOIN_INSTANCE_NORM]).model) == content(plain)
            assert content(cleaned(written, split=False, rewrite=rewrite)) == content(plain)
            assert content(cleaned(plain, split=True, rewrite=rewrite)) == content(written)
            assert content(cleaned(written, split=True, rewrite=rewrite)) == content(written)
            assert content(cleaned(plain, split=False, rewrite=rewrite)) == content(plain)

    def test_only_the_norms_change_and_no_tensor_outside_of_them(self, name: str, dynamo: bool) -> None:
        model = cleaned(exported(name, dynamo), split=False)
        report = run_passes(model, [SPLIT_INSTANCE_NORM]).reports[0]
        norms = [entry.name for entry in model.graph.node if entry.op_type == "InstanceNormalization"]
        assert report.changed == tuple(norms)
        assert (report.removed, report.left) == ((), ())
        assert {added.rpartition("/")[0] for added in report.added} == set(norms)

    def test_the_results_differ_by_rounding(self, name: str, dynamo: bool) -> None:
        """Tens of float32 operations in a row on well-scaled numbers, each wrong by 2^-24 at most."""
        model = exported(name, dynamo)
        x = floats(2, 1, *NETWORKS[name][1], seed=3)
        (plain,), (written,) = (run(cleaned(model, split), x, plain=False) for split in (False, True))
        assert np.abs(written - plain).max() < 1e-4 * np.abs(plain).max()


def test_both_exporters_give_the_same_split_graph() -> None:
    for name in NETWORKS:
        one, two = (cleaned(exported(name, dynamo), split=True).graph for dynamo in (False, True))
        assert [(n.name, *n.input, *n.output) for n in one.node] == [(n.name, *n.input, *n.output) for n in two.node]
        assert [(w.name, *w.dims, w.raw_data) for w in one.initializer] == [
            (w.name, *w.dims, w.raw_data) for w in two.initializer
        ]


def test_norms_survive_folding_duplicates_after_the_split() -> None:
    """A split graph that another tool folded is joined too: scale and bias of all norms may be one tensor."""
    model = run_passes(exported("3d_fullres", True), [INFER_SHAPES, SPLIT_INSTANCE_NORM]).model
    folded = run_passes(model, [FOLD_DUPLICATE_INITIALIZERS]).model
    plain = cleaned(exported("3d_fullres", True), split=False)
    assert content(cleaned(folded, split=False)) == content(plain)
    assert_same_results(plain, cleaned(folded, split=False), floats(1, 1, 64, 64, 64))


# ---- numbers ----


def by_onnxruntime(model: onnx.ModelProto, x: Array) -> Array:
    result: Array = run(model, x, plain=False)[0]
    return result


def by_openvino(model: onnx.ModelProto, x: Array) -> Array:
    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", options)
    result: Array = np.array(compiled([x])[0])
    return result


BACKENDS = {"onnxruntime": by_onnxruntime, "openvino": by_openvino}


def noise(*spatial: int, seed: int = 0) -> Array:
    return floats(1, 2, *spatial, seed=seed)


def constant(value: float, *spatial: int) -> Array:
    return np.full((1, 2, *spatial), value, np.float32)


def blob(value: float, *spatial: int) -> Array:
    """A constant background with a small noisy box in it, as the channels of a patch at the edge of a body are."""
    x = constant(value, *spatial)
    box = (..., *(slice(n // 2, n // 2 + max(n // 8, 1)) for n in spatial))
    x[box] = 3 + 5 * noise(*x[box].shape[2:], seed=1)
    return x


def bare(spatial: Sequence[int]) -> onnx.ModelProto:
    """One norm of two channels and nothing else."""
    nodes = [node("InstanceNormalization", "x w b", "y", "norm", epsilon=EPSILON)]
    weights = {"w": 1 + floats(2) / 10, "b": floats(2, seed=1)}
    return model_of(nodes, {"x": ["n", 2, *spatial]}, {"y": ["n", 2, *spatial]}, weights)


def reference(x: Array) -> tuple[NDArray[np.float64], float]:
    """The norm of `bare` in float64, and the allowed error of a good float32 one.

    2e-6 of the largest value, or the worst case of the longest sum where that is more; and, because the mean has to be
    a float32 number, two roundings of it, and one each of x * gain and mean * gain: 4 * 2^-24 * |mean| * scale / std.
    """
    weights = {name: values.astype(np.float64) for name, values in weights_of(bare(x.shape[2:])).items()}
    axes, shape = tuple(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    wide = x.astype(np.float64)
    mean = wide.mean(axes, keepdims=True)
    std = np.sqrt(((wide - mean) ** 2).mean(axes, keepdims=True) + float(np.float32(EPSILON)))
    y = (wide - mean) / std * weights["w"].reshape(shape) + weights["b"].reshape(shape)
    kernels = mean_kernels(x.shape[2:])
    rest = math.prod(x.shape[2:]) // math.prod(math.prod(kernel) for kernel in kernels)
    longest = max([rest, *(math.prod(kernel) for kernel in kernels)])
    conditioned = 4 * UNIT * float((np.abs(mean) / std).max() * weights["w"].max())
    return y, max(2e-6, longest * UNIT) * float(np.abs(y).max()) + conditioned


HOSTILE = {
    "mean 1e4, deviation 1": (1e4 + noise(64, 64, 64)).astype(np.float32),
    "constant": constant(0.123, 64, 64, 64),
    "constant and large": constant(12345.678, 32, 64, 64),
    "blob": blob(0.37, 64, 64, 64),
    "blob in the size of three": blob(-0.123, 96, 96, 48),
    "blob in odd dimensions": blob(0.37, 37, 53, 41),
    "blob in a long prime": blob(0.37, 7, 257, 131),
    "blob in two dimensions": blob(0.37, 512, 512),
}
HARMLESS = {  # the plain operator is right too: few voxels, or rounding errors of all signs
    "noise": noise(64, 64, 64),
    "noise in two odd dimensions": (5 + noise(255, 127)).astype(np.float32),
    "one voxel": constant(0.37, 1, 1, 1),
    "one large voxel": constant(12345.678, 1, 1),
    "a line": noise(1, 1, 331),
    "zeros": constant(0.0, 16, 16, 16),
    "two voxels": noise(1, 2),
}


def errors(name: str) -> tuple[dict[str, float], dict[str, float], float]:
    """Largest errors by backend, of the plain operator and written out, and the allowed one."""
    x = (HOSTILE | HARMLESS)[name]
    y, allowed = reference(x)
    plain = run_passes(bare(x.shape[2:]), [INFER_SHAPES]).model
    written = run_passes(plain, [SPLIT_INSTANCE_NORM]).model
    before, after = ({key: float(np.abs(infer(model, x) - y).max()) for key, infer in BACKENDS.items()}
                     for model in (plain, written))  # fmt: skip
    return before, after, allowed


@pytest.mark.parametrize("name", HOSTILE)
def test_written_out_both_backends_are_right_where_the_plain_operator_is_wrong_in_one(name: str) -> None:
    before, after, allowed = errors(name)
    assert max(after.values()) <= allowed
    assert max(before.values()) > allowed


@pytest.mark.parametrize("name", HARMLESS)
def test_written_out_both_backends_are_right_where_the_plain_operator_is(name: str) -> None:
    _, after, allowed = errors(name)
    assert max(after.values()) <= allowed


@pytest.mark.parametrize("value", [0.123, -7.7, 12345.678, 3e-20])
@pytest.mark.parametrize("spatial", [(32, 64, 16), (256, 128), (1, 1, 1)])
def test_a_constant_channel_of_powers_of_two_becomes_its_bias(value: float, spatial: tuple[int, ...]) -> None:
    """The plain operator is wrong by 1e-2 to 1e0 here: it divides the error of its mean by sqrt(epsilon)."""
    x = constant(value, *spatial)
    model = run_passes(bare(spatial), [INFER_SHAPES, SPLIT_INSTANCE_NORM]).model
    bias = np.broadcast_to(weights_of(bare(spatial))["b"].reshape(1, 2, *[1] * len(spatial)), x.shape)
    for infer in BACKENDS.values():
        # one rounding each of x * gain, mean * gain and the two sums; gain is at most 1.3 / sqrt(epsilon)
        np.testing.assert_allclose(
            infer(model, x), bias, rtol=4 * UNIT, atol=4 * UNIT * abs(value) * 1.3 / EPSILON**0.5
        )
