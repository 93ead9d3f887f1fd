"""Counts, overlaps and surfaces against nnU-Net's functions and against brute force in float64."""

from __future__ import annotations

import builtins
import math
from typing import Any

import numpy as np
import pytest
import surface_distance
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from scipy.spatial.distance import cdist
from skimage.measure import marching_cubes, mesh_surface_area

from trtbuild.accuracy import dice, differing_voxels, metrics, overlaps
from trtbuild.accuracy.metrics import Overlap
from trtbuild.accuracy.summary import mean_of_numbers
from trtbuild.accuracy.surface import require_surface_library, surface_agreement
from trtbuild.errors import InputError, MissingExtra

pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")  # surface-distance's imports


def theirs(reference: Any, prediction: Any, region: tuple[int, ...], ignore: int | None) -> Overlap:
    masks = [region_or_label_to_mask(a.astype(np.float32), region) for a in (reference, prediction)]
    counts = compute_tp_fp_fn_tn(*masks, None if ignore is None else reference == ignore)
    tp, fp, fn, tn = map(int, counts)
    return Overlap(tp=tp, fp=fp, fn=fn, tn=tn)


REGION = st.lists(st.integers(0, 6), min_size=0, max_size=4).map(tuple)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 6), st.integers(1, 7), st.integers(1, 8)),
    dtypes=st.tuples(*[st.sampled_from([np.uint8, np.uint16, np.int32, np.int64])] * 2),
    regions=st.lists(REGION, min_size=1, max_size=5),
    ignore=st.sampled_from([None, 0, 3, 6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_counts_of_all_regions_are_nnunets(
    shape: Any, dtypes: Any, regions: list[tuple[int, ...]], ignore: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    reference, prediction = (rng.integers(0, 6, shape).astype(dtype) for dtype in dtypes)
    expected = tuple(theirs(reference, prediction, region, ignore) for region in regions)
    assert overlaps(reference, prediction, regions, ignore) == expected


@pytest.mark.parametrize("labels", [(-1, 0, 5), (0, 255, 256), (1, 70_000, 2**24 - 1)])
def test_negative_and_large_labels_are_counted(labels: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    reference, prediction = (rng.choice([*labels, 7], (5, 6, 7)).astype(np.int32) for _ in range(2))
    for region in [*((label,) for label in labels), labels]:
        assert overlaps(reference, prediction, [region], -1) == (theirs(reference, prediction, region, -1),)


def test_blocks_and_sorting_give_what_one_table_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    reference, prediction = rng.integers(0, 2000, (2, 10, 30, 40)).astype(np.uint16)
    regions = [(label,) for label in range(0, 1500, 7)] + [tuple(range(500))]
    many = overlaps(reference, prediction, regions, 3)
    monkeypatch.setattr(metrics, "BLOCK", 1000)
    blocks = overlaps(reference, prediction, regions, 3)
    monkeypatch.setattr(metrics, "DENSE_PAIRS", 0)
    assert many == blocks == overlaps(reference, prediction, regions, 3)
    for region, overlap in list(zip(regions, many, strict=True))[::20]:
        assert overlap == theirs(reference, prediction, region, 3)


def test_a_view_of_another_memory_order_is_counted_voxel_by_voxel() -> None:
    rng = np.random.default_rng(4)
    reference = np.asfortranarray(rng.integers(0, 3, (4, 5, 6)).astype(np.uint8))
    prediction = rng.integers(0, 3, (6, 5, 4)).astype(np.uint8).transpose()
    assert overlaps(reference, prediction, [(1,)]) == (theirs(reference, prediction, (1,), None),)


def test_dice_and_iou_are_nan_where_neither_holds_the_label_and_0_where_one_does() -> None:
    empty, full = np.zeros((2, 3, 4), np.uint8), np.ones((2, 3, 4), np.uint8)
    neither = overlaps(empty, empty, [(1,)])[0]
    assert math.isnan(neither.dice)
    assert math.isnan(neither.iou)
    one = overlaps(empty, full, [(1,)])[0]
    assert (one.dice, one.iou, one.n_pred, one.n_ref) == (0.0, 0.0, 24, 0)
    assert dice(full, full, 1) == 1.0
    assert math.isnan(dice(empty, empty, 1))
    assert differing_voxels(empty, full) == 24


def test_segmentations_of_different_shape_are_refused() -> None:
    a, b = np.zeros((1, 3, 4), np.uint8), np.zeros((2, 3, 4), np.uint8)
    for measure in (lambda: overlaps(a, b, [(1,)]), lambda: dice(a, b, 1), lambda: differing_voxels(a, b),
                    lambda: surface_agreement(a, b, (1,), (1, 1, 1), 2)):  # fmt: skip
        with pytest.raises(InputError, match="shape"):
            measure()


def test_a_mean_skips_nan_and_is_nan_where_nothing_is_left() -> None:
    assert mean_of_numbers([1, math.nan, 2]) == 1.5
    assert mean_of_numbers([1, 2]) == 1.5
    assert math.isnan(mean_of_numbers([math.nan]))
    assert math.isnan(mean_of_numbers([]))


def cell_size(corners: Any, spacing: Any) -> float:
    """Area of the marching cubes (length of the marching squares) of one cell, from skimage or by hand."""
    if corners.ndim == 3:
        vertices, faces, _, _ = marching_cubes(corners.astype(float), 0.5, spacing=tuple(spacing), method="lorensen")
        return float(mesh_surface_area(vertices.astype(np.float64), faces))
    half = math.hypot(spacing[0] / 2, spacing[1] / 2)  # cuts off one corner
    if corners.sum() in (1, 3):
        return half
    if corners[0].all() or corners[1].all():
        return float(spacing[1])
    return float(spacing[0]) if corners[:, 0].all() or corners[:, 1].all() else 2 * half


def surfels(mask: Any, spacing: Any) -> tuple[Any, Any]:
    """Places in mm and sizes of the pieces of a mask's surface: one per cell of 2x2(x2) voxels that is cut."""
    padded = np.pad(mask, 1)
    known: dict[bytes, float] = {}
    places, sizes = [], []
    for index in np.ndindex(*(n - 1 for n in padded.shape)):
        corners = padded[tuple(slice(i, i + 2) for i in index)]
        if 0 < corners.sum() < corners.size:
            key = corners.tobytes()
            known[key] = known[key] if key in known else cell_size(corners, spacing)
            places.append(np.array(index) * spacing)
            sizes.append(known[key])
    return np.array(places, np.float64), np.array(sizes, np.float64)


def brute_force(a: Any, b: Any, spacing: Any, tolerance: float) -> tuple[float, float]:
    (places_a, sizes_a), (places_b, sizes_b) = surfels(a, spacing), surfels(b, spacing)
    between = cdist(places_a, places_b)
    far, within = [], 0.0
    for distances, sizes in ((between.min(1), sizes_a), (between.min(0), sizes_b)):
        order = np.argsort(distances, kind="stable")
        share = np.cumsum(sizes[order]) / sizes.sum()
        far.append(float(distances[order][np.flatnonzero(share >= 0.95)[0]]))
        within += float(sizes[distances <= tolerance].sum())
    return max(far), within / float(sizes_a.sum() + sizes_b.sum())


def ellipsoid(shape: tuple[int, ...], centre: tuple[float, ...], radii: tuple[float, ...]) -> Any:
    grid = np.indices(shape)
    return sum(((grid[i] - centre[i]) / radii[i]) ** 2 for i in range(len(shape))) <= 1


VOLUMES = {
    "boxes": (np.pad(np.ones((3, 5, 4), np.uint8), ((2, 3), (1, 4), (3, 3))),
              np.pad(np.ones((4, 3, 6), np.uint8), ((1, 3), (4, 3), (2, 2)))),
    "ellipsoids": (ellipsoid((9, 14, 15), (4, 6, 7), (3, 5, 6)), ellipsoid((9, 14, 15), (4.5, 7.5, 6), (2.5, 5, 5))),
    "at the border": (ellipsoid((6, 9, 9), (0, 0, 0), (4, 5, 6)), ellipsoid((6, 9, 9), (5, 8, 8), (6, 7, 8))),
    "all of it": (np.ones((4, 5, 6), bool), ellipsoid((4, 5, 6), (2, 2, 3), (2, 2, 2))),
    "one voxel": (ellipsoid((5, 5, 5), (1, 1, 1), (1, 1, 1)), ellipsoid((5, 5, 5), (3, 4, 4), (0.5, 0.5, 0.5))),
}  # fmt: skip


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 1.3)])
@pytest.mark.parametrize("name", VOLUMES)
def test_hd95_and_nsd_agree_with_brute_force_in_three_dimensions(name: str, spacing: Any) -> None:
    reference, prediction = (np.asarray(mask).astype(np.uint8) * 4 for mask in VOLUMES[name])
    for tolerance in (0.0, 1.0, 2.0):
        found = surface_agreement(reference, prediction, (4,), spacing, tolerance)
        hd95, nsd = brute_force(reference > 0, prediction > 0, np.array(spacing), tolerance)
        # the areas of skimage's mesh have float32 vertices
        assert found.hd95 == pytest.approx(hd95, rel=1e-9)
        assert found.nsd == pytest.approx(nsd, rel=1e-5, abs=1e-9)
        swapped = surface_agreement(prediction, reference, (4,), spacing, tolerance)
        assert swapped.hd95 == pytest.approx(found.hd95, rel=1e-12)
        assert swapped.nsd == pytest.approx(found.nsd, rel=1e-12)


@pytest.mark.parametrize("density", [0.02, 0.3, 0.9])
@pytest.mark.parametrize("shape", [(1, 14, 9), (6, 9, 8), (2, 1, 7)])
def test_hd95_and_nsd_are_those_of_the_library_alone(shape: Any, density: float) -> None:
    spacing = (2.5, 0.6, 1.1)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        reference, prediction = rng.random((2, *shape)) < density
        reference[0, 0, 0] = prediction[0, 0, 1] = True
        masks = (reference[0], prediction[0]) if shape[0] == 1 else (reference, prediction)
        distances = surface_distance.compute_surface_distances(*masks, spacing[-masks[0].ndim :])
        found = surface_agreement(reference.astype(np.uint8), prediction.astype(np.uint8), (1,), spacing, 1.2)
        assert found.hd95 == pytest.approx(surface_distance.compute_robust_hausdorff(distances, 95), rel=1e-12)
        assert found.nsd == pytest.approx(surface_distance.compute_surface_dice_at_tolerance(distances, 1.2), rel=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_hd95_and_nsd_of_a_single_slice_are_those_of_its_contours(seed: int) -> None:
    rng = np.random.default_rng(seed)
    reference, prediction = (rng.random((2, 1, 11, 13)) < 0.4).astype(np.uint16)
    found = surface_agreement(reference, prediction, (1,), (999.0, 0.5, 2.0), 1.0)
    hd95, nsd = brute_force(reference[0], prediction[0], np.array([0.5, 2.0]), 1.0)
    assert found.hd95 == pytest.approx(hd95, rel=1e-12)
    assert found.nsd == pytest.approx(nsd, rel=1e-12)


def test_a_shift_by_one_slice_is_one_slice_spacing_in_the_right_axis() -> None:
    for axis, spacing in ((0, (5.0, 1.0, 1.0)), (1, (1.0, 5.0, 1.0)), (2, (1.0, 1.0, 5.0))):
        mask = np.pad(np.ones([2 if other == axis else 6 for other in range(3)], np.uint8), 3)
        assert surface_agreement(mask, np.roll(mask, 1, axis), (1,), spacing, 2.0).hd95 == 5.0
        assert surface_agreement(mask, mask, (1,), spacing, 0.0).nsd == 1.0


def test_a_region_is_the_union_of_its_labels() -> None:
    rng = np.random.default_rng(3)
    reference, prediction = rng.integers(0, 4, (2, 5, 8, 8)).astype(np.uint8)
    union = surface_agreement(np.isin(reference, (1, 3)) * 1, np.isin(prediction, (1, 3)) * 1, (1,), (2, 1, 1), 1.0)
    assert surface_agreement(reference, prediction, (1, 3), (2, 1, 1), 1.0) == union


def test_ignored_voxels_are_background_for_both_surfaces() -> None:
    reference, prediction = np.zeros((2, 6, 12, 12), np.uint8)
    reference[1:4, 2:6, 2:6] = prediction[1:4, 2:6, 2:6] = 1
    prediction[1:4, 2:6, 9:12] = 1
    reference[:, :, 8:] = 2
    assert surface_agreement(reference, prediction, (1,), (1, 1, 1), 1.0, ignore=2).hd95 == 0.0
    assert surface_agreement(reference, prediction, (1,), (1, 1, 1), 1.0).hd95 > 0


def test_a_label_that_only_one_holds_is_infinitely_far_and_one_that_none_holds_is_nan() -> None:
    empty, full = np.zeros((3, 4, 5), np.uint8), np.ones((3, 4, 5), np.uint8)
    for pair in ((empty, full), (full, empty)):
        found = surface_agreement(*pair, (1,), (1, 1, 1), 2.0)
        assert (found.hd95, found.nsd, found.one_empty) == (math.inf, 0.0, True)
    neither = surface_agreement(empty, empty, (1,), (1, 1, 1), 2.0)
    assert math.isnan(neither.hd95)
    assert math.isnan(neither.nsd)
    assert not neither.one_empty


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_surface(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "surface_distance":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_surface)
    with pytest.raises(MissingExtra, match=r"trtbuild\[evaluate\]"):
        require_surface_library()
