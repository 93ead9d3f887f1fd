"""Operations of layers against a count of every product, tap by tap, and against numbers worked out by hand."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
from graph_samples import floats, model_of, node
from onnx import TensorProto
from precision_samples import PATCHES, amax_of, network_model, patch_of

from trtbuild.errors import GraphError
from trtbuild.graph.cost import operations
from trtbuild.graph.precision import cast, quantize, tensorrt_form


def counted_conv(x: tuple[int, ...], w: tuple[int, ...], strides: list[int], pads: int, group: int) -> int:
    """A convolution on a padded array of zeros, written as loops that count their multiply-adds."""
    batch, channels, *size = x
    out, inner, *kernel = w
    steps = [range(0, n + 2 * pads - k + 1, s) for n, k, s in zip(size, kernel, strides, strict=True)]
    padded = np.zeros((channels, *(n + 2 * pads for n in size)), np.int64)
    count = 0
    for _ in range(batch):
        for number in range(out):
            first = number // (out // group) * inner
            for corner in itertools.product(*steps):
                window = tuple(slice(c, c + k) for c, k in zip(corner, kernel, strict=True))
                count += padded[(slice(first, first + inner), *window)].size
    return 2 * count


def counted_transposed(x: tuple[int, ...], w: tuple[int, ...]) -> int:
    """Every input voxel of every channel adds to one window of the output per output channel of its group."""
    batch, channels, *size = x
    _, inner, *kernel = w
    taps = np.zeros((inner, *kernel), np.int64)
    return 2 * sum(taps.size for _ in itertools.product(range(batch), range(channels), *map(range, size)))


CASES: dict[str, tuple[tuple[Any, ...], tuple[int, ...], list[int], int, int]] = {
    "2D": (("batch", 3, 7, 6), (4, 3, 3, 3), [1, 1], 1, 1),
    "2D strided": ((2, 3, 9, 8), (4, 3, 3, 2), [2, 3], 0, 1),
    "grouped": (("batch", 6, 5, 5), (4, 3, 3, 3), [1, 1], 1, 2),
    "depthwise": ((1, 4, 6, 6), (4, 1, 3, 3), [1, 1], 1, 4),
    "3D": (("batch", 2, 4, 5, 6), (3, 2, 3, 3, 1), [1, 2, 1], 1, 1),
    "3D 1x1x1, batch of 3": ((3, 2, 4, 4, 4), (5, 2, 1, 1, 1), [1, 1, 1], 0, 1),
}


@pytest.mark.parametrize("name", CASES)
def test_convolutions_against_loops(name: str) -> None:
    x, w, strides, pads, group = CASES[name]
    rank = len(strides)
    conv = node("Conv", "x w b", "y", "conv", strides=strides, pads=[pads] * 2 * rank, group=group)
    model = model_of([conv], {"x": x}, {"y": None}, {"w": floats(*w), "b": floats(w[0])})
    fixed = tuple(1 if size == "batch" else size for size in x)
    assert operations(model) == {"conv": counted_conv(fixed, w, strides, pads, group)}


@pytest.mark.parametrize(
    ("x", "w", "group"),
    [(("batch", 4, 3, 5), (4, 2, 2, 2), 1), ((2, 4, 3, 3, 3), (4, 3, 2, 2, 2), 1), ((1, 4, 5, 5), (4, 2, 3, 3), 2)],
)
def test_transposed_convolutions_against_loops(x: tuple[Any, ...], w: tuple[int, ...], group: int) -> None:
    conv = node("ConvTranspose", "x w", "y", "up", strides=[2] * (len(x) - 2), group=group)
    model = model_of([conv], {"x": x}, {"y": None}, {"w": floats(*w)})
    fixed = tuple(1 if size == "batch" else size for size in x)
    assert operations(model) == {"up": counted_transposed(fixed, w)}


def test_matrix_products_by_hand() -> None:
    nodes = [
        node("MatMul", "x w", "a", "plain"),
        node("MatMul", "x x2", "m", "batched"),
        node("Gemm", "a v", "y", "gemm", transB=1),
        node("Gemm", "u v2", "z", "turned", transA=1),
    ]
    model = model_of(
        [nodes[0], nodes[2], nodes[3]], {"x": ["batch", 8], "u": [5, 3]}, {"y": None, "z": None},
        {"w": floats(8, 16), "v": floats(7, 16), "v2": floats(5, 4)},
    )  # fmt: skip
    assert operations(model) == {"plain": 2 * 16 * 8, "gemm": 2 * 7 * 16, "turned": 2 * 3 * 4 * 5}
    batched = model_of([nodes[1]], {"x": [2, 3, 4, 8], "x2": [8, 5]}, {"m": None})
    assert operations(batched) == {"batched": 2 * 2 * 3 * 4 * 5 * 8}


@pytest.mark.parametrize("name", PATCHES)
def test_a_rewritten_typed_network_costs_what_the_exported_one_does(name: str) -> None:
    """The rewrite of a ConvTranspose, Q/DQ and casts change no product."""
    model = network_model(name)
    ranges = amax_of(model, patch_of(name))
    quantized = quantize(tensorrt_form(model), ranges, keep=(), zero_point="s8").model
    wanted = operations(model)
    assert len(wanted) > 8
    assert operations(tensorrt_form(model)) == wanted
    assert operations(cast(quantized, "fp16", keep=()).model) == wanted


def test_the_model_stays_as_it_was() -> None:
    model = network_model("plain2d")
    before = model.SerializeToString(deterministic=True)
    operations(model)
    assert model.SerializeToString(deterministic=True) == before


def test_a_node_without_a_name_and_nodes_of_one_name() -> None:
    nodes = [node("Conv", "x w", "a", ""), node("Conv", "a w", "b", "same"), node("Conv", "b w", "y", "same")]
    model = model_of(nodes, {"x": [1, 2, 8, 8]}, {"y": None}, {"w": floats(2, 2, 3, 3)})
    one, two, three = (2 * 2 * 2 * 9 * size**2 for size in (6, 4, 2))
    assert operations(model) == {"node_of_a": one, "same": two + three}


def test_other_operators_do_not_count() -> None:
    nodes = [node("Relu", "x", "a", "relu"), node("Add", "a x", "y", "add")]
    assert operations(model_of(nodes, {"x": [1, 2]}, {"y": None})) == {}


def test_a_free_patch_is_refused() -> None:
    model = model_of([node("Conv", "x w", "y", "c")], {"x": ["b", 1, "h", 8]}, {"y": None}, {"w": floats(2, 1, 3, 3)})
    with pytest.raises(GraphError, match="free dimension") as caught:
        operations(model)
    assert "input x, dimension 2" in str(caught.value)


def test_a_shape_that_depends_on_values_is_refused() -> None:
    nodes = [node("NonZero", "x", "i", "nz"), node("Cast", "i", "f", "cast", to=TensorProto.FLOAT),
             node("MatMul", "f w", "y", "mm")]  # fmt: skip
    with pytest.raises(GraphError, match="shape is not known") as caught:
        operations(model_of(nodes, {"x": [1, 8]}, {"y": None}, {"w": floats(8, 2)}))
    assert "node mm" in str(caught.value)


def test_shapes_that_do_not_fit_are_refused() -> None:
    model = model_of([node("Conv", "x w", "y", "c")], {"x": [1, 3, 8, 8]}, {"y": None}, {"w": floats(2, 1, 3, 3, 3)})
    with pytest.raises(GraphError, match="cannot be inferred"):
        operations(model)


def test_outputs_that_are_initializers_or_other_domains_do_not_matter() -> None:
    foreign = onnx.helper.make_node("Conv", ["x"], ["z"], name="foreign", domain="org.example")
    model = model_of(
        [node("Conv", "x w", "y", "c"), foreign], {"x": [1, 1, 4, 4]}, {"y": None, "z": [1]},
        {"w": floats(1, 1, 3, 3)}, domains=("org.example",),
    )  # fmt: skip
    assert operations(model) == {"c": 2 * 4 * 9}
