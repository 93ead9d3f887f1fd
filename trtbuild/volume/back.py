"""The way back: logits on the network's grid to labels (and probabilities) on the image's grid.

Follows `export_prediction.py`: resample, decide, paste into the uncropped shape, transpose back.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import ModelError
from trtbuild.spec import ModelSpec
from trtbuild.volume.preprocess import CaseGrid
from trtbuild.volume.resample import coarse_axis, nearest_index, resample

if TYPE_CHECKING:
    from trtbuild.volume.interpolate import Taps

SLAB = 8  # output slices per task: enough work to hide a thread's hand-over, few enough to share evenly
Segmentation = NDArray[np.uint8] | NDArray[np.uint16]


def segmentation_from_logits(
    logits: NDArray[np.float32], grid: CaseGrid, spec: ModelSpec, *, threads: int
) -> Segmentation:
    """Labels (Z, Y, X) in the image's own axis order; background outside the crop.

    Args:
        logits: (heads, *grid.resampled) float32, C-contiguous, finite.
        grid: the way back of the case.
        spec: the model; `spec.labels` holds the decision rule.
        threads: slabs worked on at once. The result does not depend on it.

    Returns:
        uint8 where every value of the model fits, else uint16.
    """
    rule = spec.labels
    full = np.zeros(grid.shape, dtype=np.uint8 if max(rule.values) < 256 else np.uint16)
    cropped = full[grid.box]
    how = spec.resample_probabilities
    if how.method == "spline" and not how.is_segmentation and _is_linear(grid, spec):
        _label_linear(logits, grid, spec, cropped, threads)
    else:
        _label_by_class(logits, grid, spec, cropped)
    return np.ascontiguousarray(full.transpose(spec.transpose_backward))


def probabilities_from_logits(
    logits: NDArray[np.float32], grid: CaseGrid, spec: ModelSpec, *, threads: int
) -> NDArray[np.float32]:
    """Softmax (or sigmoid, for regions) after resampling, (heads, Z, Y, X) in the image's own axis order.

    Outside the crop the background's probability is 1 (for regions all are 0). This needs the full-resolution stack
    that `segmentation_from_logits` avoids: 4 bytes per class and voxel.
    """
    full = np.zeros((len(logits), *grid.shape), dtype=np.float32)
    if spec.labels.decision == "argmax":
        full[0] = 1.0
    inside = full[(slice(None), *grid.box)]
    if _is_linear(grid, spec):
        _values_linear(logits, grid, spec, inside, threads)
    else:
        inside[...] = resample(logits, grid.cropped, grid.target, grid.spacing, spec.resample_probabilities)
    if spec.labels.decision == "argmax":
        inside -= inside.max(axis=0, keepdims=True)
        np.exp(inside, out=inside)
        inside /= inside.sum(axis=0, keepdims=True)
    else:
        with np.errstate(over="ignore"):  # exp(-x) may overflow to infinity, whose reciprocal is the right 0
            inside[...] = 1.0 / (1.0 + np.exp(-inside))
    return np.ascontiguousarray(full.transpose(0, *(axis + 1 for axis in spec.transpose_backward)))


def _is_linear(grid: CaseGrid, spec: ModelSpec) -> bool:
    """Whether the way back is linear or nearest along every axis, which the compiled loops do."""
    how = spec.resample_probabilities
    if grid.resampled == grid.cropped:
        return True
    axis = coarse_axis(grid.target, grid.spacing, how)
    return how.order == 1 and (axis is None or how.order_z in (0, 1))


def _taps(grid: CaseGrid, spec: ModelSpec) -> tuple[Taps, Taps, Taps]:
    from trtbuild.volume.interpolate import chosen_taps, linear_taps

    how = spec.resample_probabilities
    coarse = coarse_axis(grid.target, grid.spacing, how)

    def one(axis: int) -> Taps:
        old, new = grid.resampled[axis], grid.cropped[axis]
        if old == new:
            return chosen_taps(np.arange(new))
        if axis == coarse and how.order_z == 0:
            return chosen_taps(nearest_index(old, new))
        return linear_taps(old, new)

    return one(0), one(1), one(2)


def _tap_arrays(taps: tuple[Taps, Taps, Taps]) -> tuple[NDArray[Any], ...]:
    return tuple(array for t in taps for array in (t.low, t.high, t.weight))


def _in_slabs(task: Callable[[int, int], None], slices: int, threads: int) -> None:
    """Runs task(first, last) over all slices, `threads` slabs at a time; the first error is raised."""
    bounds = [(first, min(first + SLAB, slices)) for first in range(0, slices, SLAB)]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for done in [pool.submit(task, *b) for b in bounds]:
            done.result()


def _label_linear(
    logits: NDArray[np.float32], grid: CaseGrid, spec: ModelSpec, out: Segmentation, threads: int
) -> None:
    from trtbuild.volume.interpolate import label_slab

    arrays = _tap_arrays(_taps(grid, spec))
    values = np.array(spec.labels.values, dtype=np.int32)
    regions = spec.labels.decision == "regions"
    _in_slabs(lambda a, b: label_slab(logits, *arrays, values, regions, out, a, b), grid.cropped[0], threads)


def _values_linear(
    logits: NDArray[np.float32], grid: CaseGrid, spec: ModelSpec, out: NDArray[np.float32], threads: int
) -> None:
    from trtbuild.volume.interpolate import value_slab

    arrays = _tap_arrays(_taps(grid, spec))
    for channel, into in zip(logits, out, strict=True):
        _in_slabs(lambda a, b, c=channel, o=into: value_slab(c, *arrays, o, a, b), grid.cropped[0], threads)  # type: ignore[misc]


def _label_by_class(logits: NDArray[np.float32], grid: CaseGrid, spec: ModelSpec, out: Segmentation) -> None:
    """Any other order of resampling: class after class at full resolution, keeping the best value and label."""
    if len(logits) != spec.labels.heads:
        raise ModelError("The logits do not fit the labels.", expected=spec.labels.heads, got=len(logits))
    regions = spec.labels.decision == "regions"
    best = np.full(grid.cropped, 0.0 if regions else -np.inf, dtype=np.float32)
    for value, channel in zip(spec.labels.values, logits, strict=True):
        here = resample(channel[None], grid.cropped, grid.target, grid.spacing, spec.resample_probabilities)[0]
        wins = here > best
        out[wins] = value
        if not regions:
            best[wins] = here[wins]
