"""Graphs that show what is inside a network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest
from graph_samples import floats, model_of, node, run, weights_of
from numpy.typing import NDArray
from onnx import TensorProto
from precision_samples import PATCHES, evaluate, network_model, patch_of, run_openvino

from trtbuild.errors import GraphError
from trtbuild.graph.precision import tensor_sizes, tensorrt_form, with_maxima, with_outputs

BACKENDS = {"onnxruntime": run, "openvino": run_openvino}
PATCH = {"x": ["n", 2, 8, 8]}


def small() -> onnx.ModelProto:
    return model_of(
        [
            node("Conv", "x w", "c", "conv"),
            node("Relu", "c", "r", "relu"),
            node("Concat", "r x", "rx", "concat", axis=1),
            node("ArgMax", "rx", "k", "argmax", axis=1),
            node("Cast", "k", "y", "cast", to=TensorProto.FLOAT),
        ],
        PATCH,
        {"y": ["n", 1, 8, 8]},
        {"w": floats(2, 2, 1, 1)},
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", PATCHES)
def test_the_maxima_of_all_activations_are_numpys(name: str, backend: str) -> None:
    """Each is the largest |x| of what `with_outputs` shows, and at the end of what float64 gives."""
    model, x = network_model(name, split=True), patch_of(name)
    shown, names = with_maxima(model, None)
    before = [value.name for value in shown.graph.output]
    assert len(names) == len(before) == len(set(names))
    found = dict(zip(names, map(float, BACKENDS[backend](shown, x)), strict=True))
    values = run(with_outputs(model, names), x)
    for tensor, value in zip(names, values, strict=True):
        assert found[tensor] == pytest.approx(float(np.abs(value).max()), rel=1e-4), tensor
    wanted = np.abs(evaluate(network_model(name), x)).max()
    assert found["logits"] == pytest.approx(float(wanted), rel=1e-4)
    assert found["image"] == float(np.abs(x).max())


def test_every_float_activation_is_shown_but_for_what_is_only_moved() -> None:
    model = small()
    kept = model.SerializeToString()
    shown, names = with_maxima(model, None)
    assert names == ("x", "c", "r", "y")
    assert model.SerializeToString() == kept
    assert [list(value.type.tensor_type.shape.dim) for value in shown.graph.output] == [[]] * 4
    assert [value.name for value in shown.graph.input] == ["x"]


def test_named_tensors_come_in_their_order_and_what_they_do_not_need_is_gone() -> None:
    shown, names = with_maxima(small(), ["rx", "c"])
    assert names == ("rx", "c")
    assert not {"ArgMax", "Cast"} & {entry.op_type for entry in shown.graph.node}
    x = -np.abs(floats(1, 2, 8, 8)) - 1
    largest = [float(v) for v in run(shown, x)]
    (c,) = run(with_outputs(small(), ["c"]), x)
    assert largest == [max(float(np.abs(x).max()), float(c.max(initial=0))), float(np.abs(c).max())]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [(0, 0, 0, 0), (0, 1, 3, 5), ...], ids=str)
def test_a_value_that_is_not_finite_never_vanishes(position: Any, value: float, backend: str) -> None:
    """ReduceMax alone passes NaN over in both backends, unless it comes first."""
    x = floats(1, 2, 8, 8)
    x[position] = value
    shown, _ = with_maxima(small(), ["x"])
    assert not math.isfinite(float(BACKENDS[backend](shown, x)[0]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_several_patches_and_zeros_are_fine(backend: str) -> None:
    shown, _ = with_maxima(small(), ["x", "c"])
    x = floats(3, 2, 8, 8)
    x[2, 1, 7, 7] = -99
    found = [float(value) for value in BACKENDS[backend](shown, x)]
    assert found[0] == 99
    assert [float(value) for value in BACKENDS[backend](shown, np.zeros_like(x))] == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_outputs_keep_names_order_and_values(backend: str) -> None:
    model, x = small(), floats(2, 2, 8, 8)
    shown = with_outputs(model, ["r", "x", "c"])
    assert [value.name for value in shown.graph.output] == ["r", "x", "c"]
    r, same, c = BACKENDS[backend](shown, x)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(r, np.maximum(c, 0))
    wanted: NDArray[Any] = np.einsum("oc,ncij->noij", weights_of(model)["w"][:, :, 0, 0].astype(np.float64), x)
    np.testing.assert_allclose(c, wanted, rtol=0, atol=1e-5)
    assert [entry.op_type for entry in shown.graph.node] == ["Conv", "Relu"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_input_alone_may_be_shown(backend: str) -> None:
    x = floats(2, 2, 8, 8)
    shown = with_outputs(small(), ["x"])
    assert not shown.graph.node
    np.testing.assert_array_equal(BACKENDS[backend](shown, x)[0], x)


def test_outputs_in_the_middle_of_the_form_for_tensorrt_keep_the_bits_of_the_network() -> None:
    model, x = network_model("plain3d"), patch_of("plain3d")
    names = ["decoder.transpconvs.0/Concat_output_0", "image", "logits"]
    for before, after in zip(
        run(with_outputs(model, names), x), run(with_outputs(tensorrt_form(model), names), x), strict=True
    ):
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["x", "nobody"], "unknown: nobody"),
        (["x", "c", "x"], "twice: x"),
        ([], "no names"),
    ],
)
def test_names_that_cannot_be_shown_are_refused(names: list[str], words: str) -> None:
    for function in (with_maxima, with_outputs):
        with pytest.raises(GraphError, match=words):
            function(small(), names)


def test_integers_have_no_maximum_and_weights_are_no_output() -> None:
    with pytest.raises(GraphError, match="maximum") as caught:
        with_maxima(small(), ["x", "k"])
    assert "k" in str(caught.value)
    with pytest.raises(GraphError, match="stored") as caught:
        with_outputs(small(), ["w"])
    assert "w" in str(caught.value)


def test_sizes_are_bytes_of_one_patch_in_graph_order() -> None:
    assert list(tensor_sizes(small()).items()) == [
        ("x", 2 * 64 * 4), ("c", 2 * 64 * 4), ("r", 2 * 64 * 4), ("rx", 4 * 64 * 4), ("k", 64 * 8), ("y", 64 * 4),
    ]  # fmt: skip


@pytest.mark.parametrize("name", PATCHES)
def test_sizes_of_a_network_are_those_of_its_arrays(name: str) -> None:
    model = network_model(name)
    sizes = tensor_sizes(model)
    arrays = run(with_outputs(model, list(sizes)), patch_of(name))
    assert list(sizes.values()) == [array.nbytes for array in arrays]


def test_a_size_that_is_not_known_is_refused_by_name() -> None:
    model = model_of([node("Relu", "x", "y", "relu")], {"x": ["n", 2, "h", 8]}, {"y": ["n", 2, "h", 8]})
    with pytest.raises(GraphError, match="size of a tensor") as caught:
        tensor_sizes(model)
    assert "tensor x" in str(caught.value)
