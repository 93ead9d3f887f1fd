"""Segmentations resampled as nnU-Net does it: every voxel equal, ties included."""

from __future__ import annotations

import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from trtbuild.errors import ModelError
from trtbuild.spec import Resampling
from trtbuild.volume.resampling.labels import resample_segmentation

FORCE = {"auto": None, "always": True, "never": False}


def rule(method: str = "spline", order: int = 1, order_z: int = 0, separate_z: str = "auto") -> Resampling:
    return Resampling(
        method=method, is_segmentation=True, order=order, order_z=order_z, separate_z=separate_z,
        anisotropy_threshold=3.0,
    )  # type: ignore[arg-type]  # fmt: skip


def nnunet(seg: NDArray[Any], shape: Any, spacing: Any, target: Any, how: Resampling) -> NDArray[Any]:
    """What nnU-Net makes of `seg`, which its readers give it as float32."""
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

    data, force = seg[None].astype(np.float32), FORCE[how.separate_z]
    if how.method == "torch":
        return resample_torch_fornnunet(
            data, shape, spacing, target, is_seg=True, num_threads=1, force_separate_z=force
        )[0]  # fmt: skip
    return resample_data_or_seg_to_shape(
        data, np.array(shape), spacing, target, is_seg=True, order=how.order, order_z=how.order_z,
        force_separate_z=force,
    )[0]  # fmt: skip


def labels(shape: tuple[int, ...], count: int, seed: int, *, blocks: bool) -> NDArray[np.int16]:
    """Random labels -1 .. count - 2, voxel by voxel or in blocks of three."""
    rng = np.random.default_rng(seed)
    if not blocks:
        return rng.integers(-1, count - 1, shape).astype(np.int16)
    coarse = rng.integers(-1, count - 1, [-(-n // 3) for n in shape])
    return np.kron(coarse, np.ones((3, 3, 3)))[tuple(slice(n) for n in shape)].astype(np.int16)


GRIDS = [
    ((14, 17, 11), (1, 1, 1), (20, 9, 22)),
    ((14, 17, 11), (1, 1, 1), (28, 34, 22)),  # every boundary voxel is a tie
    ((14, 17, 12), (1, 1, 1), (7, 34, 6)),
    ((6, 17, 11), (5, 1, 1), (9, 30, 12)),
    ((17, 6, 11), (1, 5, 1), (12, 10, 22)),
    ((17, 11, 6), (1, 1, 5), (12, 22, 3)),
    ((1, 17, 21), (999, 1, 1), (1, 33, 14)),
    ((2, 1, 9), (1, 1, 1), (5, 3, 20)),
    ((6, 9, 9), (5, 1, 1), (9, 9, 9)),
]


@pytest.mark.parametrize("separate_z", list(FORCE))
@pytest.mark.parametrize(("shape", "spacing", "grid"), GRIDS)
@pytest.mark.parametrize(
    ("method", "order", "order_z"),
    [("spline", 1, 0), ("spline", 0, 0), ("spline", 2, 0), ("spline", 3, 0), ("spline", 1, 1), ("torch", 1, 0)],
)
def test_every_voxel_equals_nnunets(  # type: ignore[no-untyped-def]
    method, order, order_z, shape, spacing, grid, separate_z
) -> None:
    how = rule(method, order, order_z, separate_z)
    for count, blocks in ((2, True), (5, False), (6, True)):
        seg = labels(shape, count, count, blocks=blocks)
        ours = resample_segmentation(seg, grid, spacing, (1, 1, 1), how)
        assert ours.dtype == seg.dtype
        np.testing.assert_array_equal(ours, nnunet(seg, grid, spacing, (1, 1, 1), how))


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_random_grids_equal_nnunet_in_every_voxel(draw: Any) -> None:
    shape = draw.draw(st.tuples(*[st.integers(1, 20)] * 3))
    grid = draw.draw(st.tuples(*[st.integers(1, 30)] * 3))
    spacing = draw.draw(st.tuples(*[st.sampled_from([0.5, 0.7, 1.0, 2.0, 5.0])] * 3))
    how = rule(draw.draw(st.sampled_from(["spline", "torch"])), separate_z=draw.draw(st.sampled_from(list(FORCE))))
    seg = labels(
        shape, draw.draw(st.sampled_from([2, 4, 30])), draw.draw(st.integers(0, 99)), blocks=draw.draw(st.booleans())
    )
    np.testing.assert_array_equal(
        resample_segmentation(seg, grid, spacing, spacing, how), nnunet(seg, grid, spacing, spacing, how)
    )


@pytest.mark.parametrize("order_z", [2, 3, 5])
def test_a_spline_along_the_coarse_axis_equals_nnunet_but_for_scores_of_a_half(order_z: int) -> None:
    """nnU-Net filters all three axes, which is the identity in-plane but for rounding: a score of 0.5 may differ."""
    seg, how = labels((7, 9, 8), 4, 0, blocks=True), rule(order_z=order_z, separate_z="always")
    ours = resample_segmentation(seg, (12, 15, 13), (5, 1, 1), (1, 1, 1), how)
    expected = nnunet(seg, (12, 15, 13), (5, 1, 1), (1, 1, 1), how)
    plane = resample_segmentation(seg, (7, 15, 13), (5, 1, 1), (1, 1, 1), how)
    near = np.zeros(ours.shape, dtype=bool)
    for label in np.unique(plane):
        score = ndimage.zoom(
            (plane == label).astype(float), (12 / 7, 1, 1), order=order_z, mode="nearest", grid_mode=True
        )
        near |= np.abs(score - 0.5) < 1e-12
    np.testing.assert_array_equal(ours[~near], expected[~near])


def test_more_labels_than_a_byte_holds_take_seconds_and_little_memory() -> None:
    rng = np.random.default_rng(0)
    seg = np.kron(rng.integers(-1, 5000, (10, 12, 14)), np.ones((8, 8, 8))).astype(np.int16)
    small = (slice(30), slice(30), slice(30))
    np.testing.assert_array_equal(  # also compiles the loop
        resample_segmentation(seg[small], (44, 37, 50), (1, 1, 1), (1, 1, 1), rule()),
        nnunet(seg[small], (44, 37, 50), (1, 1, 1), (1, 1, 1), rule()),
    )
    tracemalloc.start()
    start = time.perf_counter()
    ours = resample_segmentation(seg, (120, 140, 170), (1, 1, 1), (0.7, 0.7, 0.7), rule())
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(seg)) > 1000
    assert seconds < 20  # measured: 0.3
    assert peak < 1.1 * ours.nbytes


def test_labels_beyond_int16_are_kept_where_nnunet_wraps_them() -> None:
    seg = np.full((4, 4, 4), 40000, dtype=np.int32)
    seg[2:] = 70000
    for method in ("spline", "torch"):
        ours = resample_segmentation(seg, (7, 7, 7), (1, 1, 1), (1, 1, 1), rule(method))
        assert set(np.unique(ours)) == {40000, 70000}


def test_equal_grids_are_returned_untouched() -> None:
    seg = labels((3, 4, 5), 3, 0, blocks=False)
    for method in ("spline", "torch", "none"):
        assert resample_segmentation(seg, (3, 4, 5), (1, 1, 1), (2, 2, 2), rule(method)) is seg


def test_a_rule_that_cannot_resample_labels_is_refused_by_name() -> None:
    seg = labels((3, 4, 5), 3, 0, blocks=False)
    with pytest.raises(ModelError, match="no_resampling_hack"):
        resample_segmentation(seg, (4, 4, 5), (1, 1, 1), (1, 1, 1), rule("none"))
    intensities = Resampling(
        method="spline", is_segmentation=False, order=3, order_z=0, separate_z="auto", anisotropy_threshold=3.0
    )
    with pytest.raises(ModelError, match="is_seg: false"):
        resample_segmentation(seg, (4, 4, 5), (1, 1, 1), (1, 1, 1), intensities)
