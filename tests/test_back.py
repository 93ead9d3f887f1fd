"""The way back against a float64 reference built from skimage, as nnU-Net's export does it."""

from __future__ import annotations

import numpy as np
import pytest
from specs import make_spec, spline

from trtbuild.spec import Labels, ModelSpec
from trtbuild.volume import CaseGrid, probabilities_from_logits, segmentation_from_logits

REGIONS = Labels(
    decision="regions",
    values=(1, 3, 2),
    names={"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)},
    foreground=(1, 2, 3),
    ignore=None,
)


def many(heads: int) -> Labels:
    return Labels(
        decision="argmax", values=tuple(range(heads)), names={}, foreground=tuple(range(1, heads)), ignore=None
    )


def grid_for(resampled: tuple[int, ...], cropped: tuple[int, ...], spacing=(1.0, 1.0, 1.0), target=None) -> CaseGrid:  # type: ignore[no-untyped-def]
    target = target or tuple(s * c / r for s, c, r in zip(spacing, cropped, resampled, strict=True))
    box = tuple(slice(2, 2 + n) for n in cropped)
    return CaseGrid(shape=tuple(n + 5 for n in cropped), box=box, spacing=spacing, target=target, resampled=resampled)  # type: ignore[arg-type]


def reference(logits: np.ndarray, grid: CaseGrid, spec: ModelSpec) -> tuple[np.ndarray, np.ndarray]:
    """(labels, probabilities) from nnU-Net's resampling in float64 and its decision rule, written out in NumPy."""
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    how = spec.resample_probabilities
    full = resample_data_or_seg_to_shape(
        logits.astype(np.float64),
        np.array(grid.cropped),
        grid.target,
        grid.spacing,
        order=how.order,
        order_z=how.order_z,
        force_separate_z=None,
    )
    labels = np.zeros(grid.shape, dtype=np.int64)
    probabilities = np.zeros((len(logits), *grid.shape))
    if spec.labels.decision == "argmax":
        inside = np.array(spec.labels.values)[full.argmax(0)]
        soft = np.exp(full - full.max(0))
        soft /= soft.sum(0)
        probabilities[0] = 1
    else:
        soft = 1 / (1 + np.exp(-full))
        inside = np.zeros(grid.cropped, dtype=np.int64)
        for head, value in zip(soft, spec.labels.values, strict=True):
            inside[head > 0.5] = value
    labels[grid.box] = inside
    probabilities[(slice(None), *grid.box)] = soft
    return labels.transpose(spec.transpose_backward), probabilities.transpose(
        0, *(a + 1 for a in spec.transpose_backward)
    )


CASES = {
    "finer and coarser": ((21, 26, 17), (31, 20, 25), {}),
    "no resampling": ((13, 14, 15), (13, 14, 15), {}),
    "one axis alone": ((13, 14, 15), (13, 14, 40), {}),
    "separate z": ((7, 20, 18), (11, 31, 27), {"spacing": (5.0, 1.0, 1.0)}),
    "one slice": ((1, 20, 18), (1, 31, 27), {"spacing": (999.0, 1.0, 1.0)}),
    "one voxel": ((1, 1, 1), (2, 3, 1), {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("labels", [many(2), many(5), REGIONS], ids=["2 labels", "5 labels", "regions"])
@pytest.mark.parametrize("order", [1, 3])
def test_labels_and_probabilities_equal_the_float64_reference(case: str, labels: Labels, order: int) -> None:
    resampled, cropped, spacing = CASES[case]
    spec = make_spec(
        labels=labels, resample_probabilities=spline(order), transpose_forward=(2, 0, 1), transpose_backward=(1, 2, 0)
    )
    grid = grid_for(resampled, cropped, **spacing)
    logits = np.random.default_rng(7).normal(0, 3, size=(labels.heads, *resampled)).astype(np.float32)
    expected, soft = reference(logits, grid, spec)
    ours = segmentation_from_logits(logits, grid, spec, threads=2)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, expected)
    np.testing.assert_allclose(probabilities_from_logits(logits, grid, spec, threads=2), soft, atol=3e-6)


def test_ties_take_the_first_label() -> None:
    spec = make_spec(labels=many(4))
    logits = np.zeros((4, 5, 5, 5), dtype=np.float32)
    logits[2:] = 1.5
    ours = segmentation_from_logits(logits, grid_for((5, 5, 5), (9, 8, 7)), spec, threads=1)
    assert set(np.unique(ours)) == {0, 2}
    assert (ours[2:11, 2:10, 2:9] == 2).all()


def test_more_than_255_labels_keep_their_values() -> None:
    spec = make_spec(labels=many(300))
    logits = np.zeros((300, 3, 3, 3), dtype=np.float32)
    logits[299] = 1
    ours = segmentation_from_logits(logits, grid_for((3, 3, 3), (3, 3, 3)), spec, threads=1)
    assert ours.dtype == np.uint16
    assert ours.max() == 299


def test_the_number_of_threads_does_not_change_a_voxel() -> None:
    spec = make_spec(labels=many(5))
    grid = grid_for((20, 21, 22), (37, 30, 29))
    logits = np.random.default_rng(8).normal(size=(5, 20, 21, 22)).astype(np.float32)
    one = segmentation_from_logits(logits, grid, spec, threads=1)
    assert one.tobytes() == segmentation_from_logits(logits, grid, spec, threads=5).tobytes()


def test_very_large_logits_give_finite_probabilities() -> None:
    for labels in (many(3), REGIONS):
        spec = make_spec(labels=labels)
        logits = np.full((3, 4, 4, 4), -3e4, dtype=np.float32)
        logits[1] = 3e4
        soft = probabilities_from_logits(logits, grid_for((4, 4, 4), (6, 6, 6)), spec, threads=1)
        assert np.isfinite(soft).all()
        assert soft[1].max() == 1
