"""The sliding window against nnU-Net's own functions and a float64 reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trtbuild.errors import InputError, ModelError
from trtbuild.stitch import (
    axis_gaussian,
    axis_steps,
    axis_weight_sum,
    flip_combinations,
    grid_from_shape,
    padded_shape,
)
from trtbuild.stitch.accumulate import add_window, divide_by_weights


@given(patch=st.integers(2, 200), extra=st.integers(0, 900), step=st.sampled_from([0.25, 0.3, 0.5, 0.7, 0.8, 1.0]))
@settings(max_examples=500, deadline=None)
def test_steps_are_nnunets(patch: int, extra: int, step: float) -> None:
    from nnunetv2.inference.sliding_window_prediction import compute_steps_for_sliding_window

    assert (
        list(axis_steps(patch + extra, patch, step))
        == compute_steps_for_sliding_window((patch + extra,), (patch,), step)[0]
    )


@given(patch=st.integers(1, 60), extra=st.integers(0, 200), step=st.floats(0.05, 1.0))
@settings(max_examples=200, deadline=None)
def test_windows_cover_the_axis_and_stay_inside(patch: int, extra: int, step: float) -> None:
    assume(patch * step >= 0.5)
    starts = axis_steps(patch + extra, patch, step)
    covered = np.zeros(patch + extra, dtype=bool)
    for start in starts:
        assert 0 <= start <= extra
        covered[start : start + patch] = True
    assert covered.all()


@pytest.mark.parametrize("step", [0.0, -0.5, 1.5, float("nan")])
def test_a_step_size_out_of_range_is_refused(step: float) -> None:
    with pytest.raises(InputError, match="step size"):
        axis_steps(20, 10, step)


@pytest.mark.parametrize(("patch", "step"), [(10, 0.049), (64, 1e-9), (1, 0.4)])
def test_a_step_below_half_a_voxel_is_refused_with_the_smallest_that_works(patch: int, step: float) -> None:
    with pytest.raises(InputError, match="below half a voxel") as caught:
        axis_steps(patch + 5, patch, step)
    assert caught.value.hint is not None
    smallest = float(caught.value.hint.split()[-1])
    assert set(axis_steps(patch + 5, patch, smallest)) == set(range(6))
    assert axis_steps(patch, patch, step) == (0,)


def test_an_axis_shorter_than_the_patch_is_refused() -> None:
    with pytest.raises(InputError, match="shorter"):
        axis_steps(9, 10, 0.5)


@given(shape=st.tuples(*[st.integers(1, 12)] * 3), patch=st.lists(st.integers(1, 9), min_size=2, max_size=3))
@settings(max_examples=200, deadline=None)
def test_padding_is_nnunets(shape: tuple[int, int, int], patch: list[int]) -> None:
    from acvl_utils.cropping_and_padding.padding import pad_nd_image

    image = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    expected, slicer = pad_nd_image(image, tuple(patch), "constant", {"constant_values": 0}, True)
    padded, inside = padded_shape(shape, tuple(patch))
    ours = np.zeros(padded, dtype=np.float32)
    ours[inside] = image
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_array_equal(expected[slicer], ours[inside])


@pytest.mark.parametrize("patch", [(64, 64, 64), (20, 33, 41), (5, 7), (1, 40, 56), (128, 112)])
def test_the_gaussian_is_nnunets_as_a_product_of_three(patch: tuple[int, ...]) -> None:
    import torch
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    expected = compute_gaussian(patch, 1 / 8, 1, torch.float64, torch.device("cpu")).numpy()
    product = np.ones(())
    for length in patch:
        product = product[..., None] * axis_gaussian(length, 1 / 8)
    np.testing.assert_allclose(product, expected, rtol=1e-12)
    assert (product > 0).all()


def test_windows_come_in_nnunets_order_for_2d_and_3d() -> None:
    grid = grid_from_shape((3, 20, 25), (10, 12), 0.5)
    assert len(grid) == len(list(grid)) == 3 * 3 * 4
    assert next(iter(grid)) == (0, 0, 0)
    assert list(grid)[1] == (0, 0, grid.steps[1][1])
    assert list(grid)[12][0] == 1
    assert len(grid_from_shape((20, 20, 25), (10, 10, 12), 0.5)) == 3 * 3 * 4


def test_mirror_combinations_are_all_subsets_once() -> None:
    assert flip_combinations((), 3) == ((),)
    assert len(set(flip_combinations((0, 1, 2), 3))) == 8
    assert flip_combinations((0, 2), 3) == ((), (0,), (2,), (0, 2))
    for axes, dimensions in [((2,), 2), ((-1,), 3), ((0, 0), 3)]:
        with pytest.raises(ModelError, match="mirror"):
            flip_combinations(axes, dimensions)


def _stitched(function, shape, patch, step):  # type: ignore[no-untyped-def]
    """The mean logits when window at `start` with `flip` yields function(start, flip) (C, *patch)."""
    grid = grid_from_shape(shape, patch, step)
    gaussians = tuple(axis_gaussian(p, 1 / 8).astype(np.float32) for p in patch)
    total = np.zeros((2, *grid.shape), dtype=np.float32)
    exact = np.zeros((2, *grid.shape))
    exact_weight = np.zeros(grid.shape)
    g = np.einsum("i,j,k->ijk", *(axis_gaussian(p, 1 / 8) for p in patch))
    flips = list(itertools.product([False, True], repeat=3))
    for start, flip in itertools.product(grid, flips):
        logits = function(start, flip).astype(np.float32)
        assert add_window(total, logits, gaussians, start, flip)
        where = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        back = np.flip(logits.astype(np.float64), [a + 1 for a in range(3) if flip[a]])
        exact[(slice(None), *where)] += back * g
        exact_weight[where] += g
    weights = tuple(axis_weight_sum(n, p, s, 1 / 8) for n, p, s in zip(grid.shape, patch, grid.steps, strict=True))
    assert divide_by_weights(total, weights, len(flips))
    return total, exact / exact_weight


def test_the_accumulator_equals_a_float64_sum_over_windows_and_flips() -> None:
    rng = np.random.default_rng(3)
    total, exact = _stitched(lambda start, flip: rng.normal(size=(2, 5, 8, 7)), (11, 19, 16), (5, 8, 7), 0.5)
    np.testing.assert_allclose(total, exact, atol=2e-6)


def test_constant_in_gives_constant_out() -> None:
    total, _ = _stitched(lambda start, flip: np.full((2, 5, 8, 7), 3.25), (9, 19, 13), (5, 8, 7), 0.3)
    # up to 4 x 4 x 4 windows x 8 flips = 512 float32 additions per voxel: measured 4e-6, 3e-5 at the very worst
    np.testing.assert_allclose(total, 3.25, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("flip", [(False, False, False), (True, False, True)])
def test_one_non_finite_logit_is_noticed(bad: float, flip: tuple[bool, bool, bool]) -> None:
    total = np.zeros((2, 9, 9, 9), dtype=np.float32)
    ones = tuple(np.ones(5, np.float32) for _ in range(3))
    logits = np.zeros((2, 5, 5, 5), dtype=np.float32)
    assert add_window(total, logits, ones, (4, 4, 4), flip)
    logits[1, 2, 3, 4] = bad
    assert not add_window(total, logits, ones, (4, 4, 4), flip)


def test_a_sum_beyond_float32_is_noticed() -> None:
    total = np.full((1, 2, 2, 2), 3e38, dtype=np.float32)
    assert not divide_by_weights(total, (np.full(2, 0.5),) * 3, 1)
