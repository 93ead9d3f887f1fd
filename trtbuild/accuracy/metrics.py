"""Agreement of two segmentations, from the counts of one pass over their voxels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError

Labels = NDArray[np.integer[Any]]

BLOCK = 1 << 18
"""Voxels that are counted together: their codes, 8 bytes each, stay in a processor's cache."""
DENSE_PAIRS = 1 << 20
"""Pairs of labels that are counted in one array (8 MB): up to 1023 labels. More labels are counted by sorting."""


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """How many voxels of a label or region are true and false positives and negatives."""

    tp: int
    fp: int
    fn: int
    tn: int

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN); NaN where neither segmentation holds the label (nnU-Net's `compute_metrics`)."""
        total = 2 * self.tp + self.fp + self.fn
        return 2 * self.tp / total if total else float("nan")

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN); NaN as for `dice`."""
        total = self.tp + self.fp + self.fn
        return self.tp / total if total else float("nan")

    @property
    def n_pred(self) -> int:
        """Voxels of the prediction."""
        return self.tp + self.fp

    @property
    def n_ref(self) -> int:
        """Voxels of the reference."""
        return self.tp + self.fn


def differing_voxels(a: Labels, b: Labels) -> int:
    """Number of voxels with different labels."""
    _require_same_shape(a, b)
    return int(np.count_nonzero(a != b))


def dice(a: Labels, b: Labels, label: int) -> float:
    """2 |A and B| / (|A| + |B|) of one label; NaN where neither holds it (as in nnU-Net's summary.json)."""
    return overlaps(a, b, [(label,)])[0].dice


def overlaps(
    reference: Labels, prediction: Labels, regions: Iterable[Collection[int]], ignore: int | None = None
) -> tuple[Overlap, ...]:
    """The counts of every region (a label is a region of one), as nnU-Net's `compute_tp_fp_fn_tn`, in one pass.

    Args:
        reference: labels, any shape.
        prediction: labels, of the same shape.
        regions: the labels of each region.
        ignore: voxels where the reference holds this label do not count at all.

    Raises:
        InputError: the shapes differ.
    """
    _require_same_shape(reference, prediction)
    regions = [frozenset(region) for region in regions]
    labels = np.array(sorted(frozenset().union(*regions, () if ignore is None else (ignore,))), np.int64)
    of_reference, of_prediction, counts = _pairs(reference, prediction, labels)
    if ignore is not None:
        kept = of_reference != np.searchsorted(labels, ignore)
        of_reference, of_prediction, counts = of_reference[kept], of_prediction[kept], counts[kept]
    total = int(counts.sum())
    result = []
    for region in regions:
        members = np.append(np.isin(labels, list(region)), False)  # the last code is every other label
        in_reference, in_prediction = members[of_reference], members[of_prediction]
        tp = int(counts[in_reference & in_prediction].sum())
        fp, fn = int(counts[in_prediction].sum()) - tp, int(counts[in_reference].sum()) - tp
        result.append(Overlap(tp=tp, fp=fp, fn=fn, tn=total - tp - fp - fn))
    return tuple(result)


def _pairs(
    reference: Labels, prediction: Labels, labels: NDArray[np.int64]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.int64]]:
    """How often the codes of a reference and of a prediction voxel meet; code i is `labels[i]`, the last any other."""
    codes = len(labels) + 1
    reference_code, prediction_code = _encoder(reference, labels, codes), _encoder(prediction, labels, 1)
    ours, theirs = reference.reshape(-1), prediction.reshape(-1)
    dense = codes * codes <= DENSE_PAIRS
    table = np.zeros(codes * codes if dense else 0, np.int64)
    sparse: dict[int, int] = {}
    for start in range(0, ours.size, BLOCK):
        block = slice(start, start + BLOCK)
        pairs = reference_code(ours[block])
        pairs += prediction_code(theirs[block])
        if dense:
            table += np.bincount(pairs, minlength=table.size)
        else:
            for pair, count in zip(*(a.tolist() for a in np.unique(pairs, return_counts=True)), strict=True):
                sparse[pair] = sparse.get(pair, 0) + count
    met = np.flatnonzero(table) if dense else np.fromiter(sparse, np.intp, len(sparse))
    counts = table[met] if dense else np.fromiter(sparse.values(), np.int64, len(sparse))
    return met // codes, met % codes, counts


def _encoder(segmentation: Labels, labels: NDArray[np.int64], factor: int) -> Callable[[Labels], NDArray[np.intp]]:
    """A function from labels to `factor` times their codes, as a new array."""
    if segmentation.dtype in (np.uint8, np.uint16):
        table = np.full(np.iinfo(segmentation.dtype).max + 1, len(labels) * factor, np.intp)
        here = np.flatnonzero((labels >= 0) & (labels < table.size))
        table[labels[here]] = here * factor
        return lambda block: table[block]
    return lambda block: _searched(block, labels) * factor


def _searched(block: Labels, labels: NDArray[np.int64]) -> NDArray[np.intp]:
    if not len(labels):
        return np.zeros(block.shape, np.intp)
    codes = np.searchsorted(labels, block)
    codes[codes == len(labels)] = 0
    codes[labels[codes] != block] = len(labels)
    return codes


def _require_same_shape(a: Labels, b: Labels) -> None:
    if a.shape != b.shape:
        raise InputError("Two segmentations differ in shape.", expected=a.shape, got=b.shape)
