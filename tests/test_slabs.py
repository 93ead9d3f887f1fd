"""The rolling accumulator: slabs leave it early, and nothing else changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from specs import make_spec, spline
from test_tiles import image, null_runner

from trtbuild.errors import NonFinite
from trtbuild.runtime import Settings, logits_from_image, prediction_from_array, tile_plan
from trtbuild.runtime.null import NullRunner
from trtbuild.runtime.runner import Batch
from trtbuild.runtime.slabs import accumulator_depth, rows_of_plan, slabs_from_image
from trtbuild.runtime.tiles import patch3, window_from_image
from trtbuild.runtime.windows import constant_of, repeated_starts
from trtbuild.spec import ModelSpec, NoNormalization

SPECS = {
    "3D": make_spec(normalization=(NoNormalization(),)),
    "2D": make_spec(normalization=(NoNormalization(),), patch=(8, 12), spacing=(1.0, 1.0), configuration="2d"),
}


class Bumpy(NullRunner):
    """Logits that depend on the place inside the patch, so that window weights and flips matter."""

    def answer(self, batch: Batch) -> Batch:
        result = super().answer(batch)
        ramp = np.indices(batch.shape[2:], dtype=np.float32).sum(axis=0)
        return (result + 0.05 * ramp).astype(np.float32)


def reference(data: np.ndarray, spec: ModelSpec, axes: tuple[int, ...], folds: int) -> np.ndarray:
    """Every window, weighted by the dense product of Gaussians in float64, divided by the summed weights."""
    from trtbuild.stitch import axis_gaussian

    plan = tile_plan(data.shape[1:], spec, axes, 0.5)
    padded = np.zeros((len(data), *plan.grid.shape))
    padded[(slice(None), *plan.grid.inside)] = data
    weight = np.ones(patch3(spec))
    for axis, patch in zip((0, 1, 2)[3 - spec.dimensions :], spec.patch, strict=True):
        shape = [1, 1, 1]
        shape[axis] = patch
        weight = weight * axis_gaussian(patch, spec.sigma_scale).reshape(shape)
    total, weights = np.zeros((3, *plan.grid.shape)), np.zeros(plan.grid.shape)
    ramp = np.indices(spec.patch).sum(axis=0).reshape(patch3(spec))
    for tile in plan:
        where = tuple(slice(s, s + p) for s, p in zip(tile.start, patch3(spec), strict=True))
        flipped = tuple(a for a in range(3) if tile.flip[a])
        mean = np.flip(padded[(slice(None), *where)].mean(axis=0), flipped)
        for head in range(3):
            logits = 2 * head * mean - head * head + 0.05 * ramp
            total[(head, *where)] += folds * weight * np.flip(logits, flipped)
        weights[where] += folds * weight
    return (total / weights)[(slice(None), *plan.grid.inside)]


@pytest.mark.parametrize("dimensions", SPECS)
@pytest.mark.parametrize("shape", [(1, 41, 26, 23), (1, 8, 12, 10), (1, 3, 5, 31), (1, 9, 40, 11)])
@pytest.mark.parametrize("keep", [0, 1, 3])
def test_slabs_are_the_dense_float64_mean_slice_by_slice(dimensions: str, shape: tuple[int, ...], keep: int) -> None:
    spec, data = SPECS[dimensions], image(shape)
    axes = (0, 1)
    expected = reference(data, spec, axes, folds=2)
    plan = tile_plan(shape[1:], spec, axes, 0.5)
    seen = 0
    with null_runner(spec, kind=Bumpy) as runner:
        for slab in slabs_from_image(
            data, spec, [runner, runner], plan, "float32", lambda final: max(0, final - keep), lambda done, total: None
        ):
            assert slab.first <= max(0, seen - keep), "a slice that is still needed has left"
            np.testing.assert_allclose(slab.logits, expected[:, slab.first : slab.last], atol=2e-5)
            seen = slab.last
    assert seen == shape[1]


def test_the_accumulator_is_as_deep_as_a_patch_however_long_the_image_is() -> None:
    spec = SPECS["3D"]
    for length in (20, 200, 2000):
        plan = tile_plan((length, 12, 10), spec, (), 0.5)
        rows = rows_of_plan(plan, spec.patch[0], lambda final: max(0, final - 1))
        assert accumulator_depth(rows) == spec.patch[0] + 1


def test_float16_sums_differ_by_their_rounding_only() -> None:
    spec, data = SPECS["3D"], image((1, 41, 26, 23))
    with null_runner(spec, kind=Bumpy) as runner:
        wide = logits_from_image(data, spec, [runner], (0,), 0.5, lambda done, total: None)
        half = logits_from_image(data, spec, [runner], (0,), 0.5, lambda done, total: None, "float16")
    assert half.dtype == np.float16
    difference = np.abs(half.astype(np.float64) - wide)
    assert 0 < difference.max() <= 16 * 2.0**-11 * np.abs(wide).max()  # 8 windows x 2 flips, half a unit each


class Large(NullRunner):
    """Logits beyond float16."""

    def answer(self, batch: Batch) -> Batch:
        return np.full_like(super().answer(batch), 7e4)


def test_a_logit_beyond_float16_stops_the_case_and_says_so() -> None:
    spec, data = SPECS["3D"], image((1, 9, 13, 11))
    with null_runner(spec, kind=Large) as runner:
        logits_from_image(data, spec, [runner], (), 0.5, lambda done, total: None)
        with pytest.raises(NonFinite, match="float16") as caught:
            logits_from_image(data, spec, [runner], (), 0.5, lambda done, total: None, "float16")
    assert "--max-memory (on a GPU also with --max-device-memory)" in str(caught.value)


def body(shape: tuple[int, ...]) -> np.ndarray:
    """A body in air of one value, as clipped CT."""
    data = np.full(shape, -1.5, dtype=np.float32)
    data[:, 20:28, 14:24, 12:20] = image((shape[0], 8, 10, 8))
    return data


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("axes", [(), (0, 2)])
def test_a_constant_window_is_computed_once_and_the_result_is_the_same_to_the_bit(
    batch: int, axes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, data = SPECS["3D"], body((1, 60, 40, 36))
    plan = tile_plan(data.shape[1:], spec, axes, 0.5)
    starts = list(plan.grid)
    constant = [s for s in starts if constant_of(window_from_image(data, s, spec.patch)) is not None]  # type: ignore[arg-type]
    assert len(constant) > 50
    with null_runner(spec, batch=batch, kind=Bumpy) as runner:
        once = logits_from_image(data, spec, [runner], axes, 0.5, lambda done, total: None)
        assert runner.patches == len(plan) - len(constant) * len(plan.flips) + 1
        monkeypatch.setattr("trtbuild.runtime.slabs.repeated_starts", lambda *_: frozenset())
        every = logits_from_image(data, spec, [runner], axes, 0.5, lambda done, total: None)
    assert once.tobytes() == every.tobytes()


def test_only_windows_of_one_and_the_same_constant_are_shared() -> None:
    data = np.zeros((2, 8, 12, 40), dtype=np.float32)
    data[1, :, :, 20:] = 1
    starts = [(0, 0, x) for x in (0, 5, 10, 20, 25, 30)]
    assert repeated_starts(data, starts, (8, 12, 10)) == {(0, 0, 0), (0, 0, 5), (0, 0, 10)}
    data[0, 0, 0, 7] = -0.0
    assert repeated_starts(data, starts, (8, 12, 10)) == {(0, 0, 20), (0, 0, 25), (0, 0, 30)}
    assert repeated_starts(data, starts[:1], (8, 12, 10)) == frozenset()


@pytest.mark.parametrize("order", [0, 1, 3])
@pytest.mark.parametrize("dimensions", SPECS)
def test_labels_that_leave_in_slabs_are_those_of_the_whole(dimensions: str, order: int) -> None:
    spec = replace(
        SPECS[dimensions],
        transpose_forward=(2, 0, 1),
        transpose_backward=(1, 2, 0),
        resample_probabilities=spline(order),
    )
    data = image((1, 37, 22, 31))
    data[:, :3] = 0
    with null_runner(spec, kind=Bumpy) as runner:
        slabs = prediction_from_array(data, (1.3, 0.7, 1.1), spec, [runner], (0,), Settings())
        whole = prediction_from_array(data, (1.3, 0.7, 1.1), spec, [runner], (0,), Settings(probabilities=True))
    np.testing.assert_array_equal(slabs.segmentation, whole.segmentation)
    assert len(np.unique(slabs.segmentation)) == 3
