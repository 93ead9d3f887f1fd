"""The sliding window against nnU-Net's own functions and a float64 reference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from trtbuild.compiled import compiled
from trtbuild.errors import InputError, ModelError
from trtbuild.half import float_from_half, half_from_float
from trtbuild.stitch import (
    axis_gaussian,
    axis_steps,
    flip_combinations,
    grid_from_shape,
    normalised_weights,
    padded_shape,
)
from trtbuild.stitch.accumulate import add_window, empty_accumulator, shift_down


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


@pytest.mark.parametrize(("length", "patch", "step"), [(20, 20, 0.5), (57, 20, 0.5), (101, 33, 0.3), (7, 1, 0.5)])
def test_normalised_weights_add_up_to_one_in_every_voxel(length: int, patch: int, step: float) -> None:
    steps = axis_steps(length, patch, step)
    total = np.zeros(length)
    for start, weights in zip(steps, normalised_weights(length, patch, steps, 1 / 8), strict=True):
        assert weights.dtype == np.float32
        np.testing.assert_allclose(weights / weights[patch // 2], _normalised(length, patch, steps, start), rtol=1e-6)
        total[start : start + patch] += weights
    np.testing.assert_allclose(total, 1, rtol=3e-7)


def _normalised(length: int, patch: int, steps: tuple[int, ...], start: int) -> np.ndarray:
    """One window's share of the Gaussians' sum, relative to that at its middle."""
    total = np.zeros(length)
    for one in steps:
        total[one : one + patch] += axis_gaussian(patch, 1 / 8)
    share = axis_gaussian(patch, 1 / 8) / total[start : start + patch]
    return np.asarray(share / share[patch // 2])


def _stitched(function, shape, patch, step, kind="float32"):  # type: ignore[no-untyped-def]
    """The mean logits when window at `start` with `flip` yields function(start, flip) (C, *patch), and in float64."""
    grid = grid_from_shape(shape, patch, step)
    flips = list(itertools.product([False, True], repeat=3))
    weights = [
        dict(zip(s, normalised_weights(n, p, s, 1 / 8), strict=True))
        for n, p, s in zip(grid.shape, patch, grid.steps, strict=True)
    ]
    total = empty_accumulator((2, *grid.shape), kind)
    exact = np.zeros((2, *grid.shape))
    exact_weight = np.zeros(grid.shape)
    g = np.einsum("i,j,k->ijk", *(axis_gaussian(p, 1 / 8) for p in patch))
    for start, flip in itertools.product(grid, flips):
        logits = function(start, flip).astype(np.float32)
        z, y, x = (w[s] for w, s in zip(weights, start, strict=True))
        assert add_window(total, logits, (z / np.float32(len(flips)), y, x), start, flip)
        where = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        back = np.flip(logits.astype(np.float64), [a + 1 for a in range(3) if flip[a]])
        exact[(slice(None), *where)] += back * g
        exact_weight[where] += g
    return total, exact / exact_weight


# float16: up to 64 additions per voxel, each rounded to 11 bits of a sum of at most 1.5: 2**-12 each at the worst
@pytest.mark.parametrize(("kind", "tolerance"), [("float32", 2e-6), ("float16", 8e-3)])
def test_the_accumulator_equals_a_float64_sum_over_windows_and_flips(kind: str, tolerance: float) -> None:
    rng = np.random.default_rng(3)
    total, exact = _stitched(lambda start, flip: rng.normal(size=(2, 5, 8, 7)), (11, 19, 16), (5, 8, 7), 0.5, kind)
    assert total.dtype == kind
    np.testing.assert_allclose(total, exact, atol=tolerance)


def test_constant_in_gives_constant_out() -> None:
    total, _ = _stitched(lambda start, flip: np.full((2, 5, 8, 7), 3.25), (9, 19, 13), (5, 8, 7), 0.3)
    # up to 4 x 4 x 4 windows x 8 flips = 512 float32 additions per voxel: measured 4e-6, 3e-5 at the very worst
    np.testing.assert_allclose(total, 3.25, rtol=1e-5)


@pytest.mark.parametrize("flip", [(False, False, False), (True, False, True), (False, True, False)])
def test_a_float16_accumulator_adds_in_float32_and_rounds_as_numpy_does(flip: tuple[bool, bool, bool]) -> None:
    rng = np.random.default_rng(5)
    total = empty_accumulator((3, 9, 12, 40), "float16")
    total[...] = (rng.normal(size=total.shape) * 10.0 ** rng.integers(-7, 3, size=total.shape)).astype(np.float16)
    expected = total.copy()
    logits = rng.normal(0, 10, size=(3, 4, 6, 37)).astype(np.float32)
    z, y, x = (rng.uniform(size=n).astype(np.float32) for n in logits.shape[1:])
    assert add_window(total, logits, (z, y, x), (2, 3, 1), flip)
    weighted = np.flip(logits, [a + 1 for a in range(3) if flip[a]]) * ((z[:, None, None] * y[:, None]) * x)
    inside = expected[:, 2:6, 3:9, 1:38]
    inside[...] = (inside.astype(np.float32) + weighted).astype(np.float16)
    np.testing.assert_array_equal(total.view(np.uint16), expected.view(np.uint16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("flip", [(False, False, False), (True, False, True)])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_one_non_finite_logit_is_noticed(bad: float, flip: tuple[bool, bool, bool], kind: str) -> None:
    total = empty_accumulator((2, 9, 9, 9), kind)  # type: ignore[arg-type]
    ones = tuple(np.ones(5, np.float32) for _ in range(3))
    logits = np.zeros((2, 5, 5, 5), dtype=np.float32)
    assert add_window(total, logits, ones, (4, 4, 4), flip)
    logits[1, 2, 3, 4] = bad
    assert not add_window(total, logits, ones, (4, 4, 4), flip)


@pytest.mark.parametrize(("kind", "largest"), [("float32", 3e38), ("float16", 60000)])
def test_a_sum_that_overflows_is_noticed(kind: str, largest: float) -> None:
    total = empty_accumulator((1, 2, 2, 2), kind)  # type: ignore[arg-type]
    ones = tuple(np.ones(2, np.float32) for _ in range(3))
    logits = np.full((1, 2, 2, 2), largest, dtype=np.float32)
    assert add_window(total, logits, ones, (0, 0, 0), (False, False, False))
    assert not add_window(total, logits, ones, (0, 0, 0), (False, False, False))


@compiled
def _floats(halves, out):  # type: ignore[no-untyped-def]
    for n in range(len(halves)):
        out[n] = float_from_half(halves[n])


@compiled
def _halves(floats, out):  # type: ignore[no-untyped-def]
    for n in range(len(floats)):
        out[n] = half_from_float(floats[n])


def test_every_half_becomes_numpys_float32() -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    ours, expected = np.empty(2**16, dtype=np.float32), bits.view(np.float16).astype(np.float32)
    _floats(bits, ours)
    np.testing.assert_array_equal(ours, expected)  # NaN equals NaN here
    np.testing.assert_array_equal(np.signbit(ours), np.signbit(expected))


def test_floats_become_numpys_halves_at_every_boundary_and_for_random_bits() -> None:
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16)
    exact = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    middle = (exact[1:] + exact[:-1]) / 2  # ties, exact in float32
    edges = np.concatenate([exact, middle, [65519.996, 65520, 65536, np.inf, np.nan]]).astype(np.float32)
    near = [np.nextafter(edges, np.float32(limit)) for limit in (-np.inf, np.inf)]
    random = np.random.default_rng(6).integers(0, 2**32, 2**20, dtype=np.uint32).view(np.float32)
    values = np.concatenate([edges, *near, random])
    values = np.concatenate([values, -values])
    ours = np.empty(len(values), dtype=np.uint16)
    _halves(values, ours)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = values.astype(np.float16)
    known = ~np.isnan(expected)  # of NaN only the sign and payload may differ
    np.testing.assert_array_equal(ours[known], expected.view(np.uint16)[known])
    assert np.isnan(ours.view(np.float16)[~known]).all()


@pytest.mark.parametrize("slices", [0, 1, 4, 6, 7, 50])
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_shifting_down_drops_the_first_slices_and_zeroes_the_freed_end(slices: int, kind: str) -> None:
    total = np.random.default_rng(7).normal(size=(3, 7, 5, 4)).astype(kind)
    expected = np.zeros_like(total)
    keep = max(0, 7 - slices)
    expected[:, :keep] = total[:, 7 - keep :]
    shift_down(total, slices)
    np.testing.assert_array_equal(total, expected)


def test_an_accumulator_that_is_not_contiguous_is_not_shifted() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        shift_down(np.zeros((2, 4, 3, 6), dtype=np.float32)[..., ::2], 1)
