"""How many bytes preparing a case takes, known before it starts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from trtbuild.spec import ModelSpec, Resampling
from trtbuild.volume.preparation.normalize import needs_mask
from trtbuild.volume.preparation.preprocess import uncropped_grid
from trtbuild.volume.resampling.axis import matrix_bytes, slab_bytes
from trtbuild.volume.resampling.image import coarse_axis

FLOAT, SCORE = 4, 8  # bytes of a voxel in float32, and of a label's score in float64
SPLINE_PAD = 24  # scipy pads 12 voxels on either side before it filters a spline of order 2 or more


def preparation_bytes(shape: Sequence[int], spacing: Sequence[float], spec: ModelSpec, previous: bool) -> int:
    """The most bytes that `prepared_from_array` holds besides its arguments, the returned array included.

    Args:
        shape: the image (Z, Y, X) in its own axis order; the prediction is for one that is not cropped.
        spacing: mm in the same order.
        spec: the model.
        previous: whether the previous stage's segmentation is given.

    Counted are the arrays that grow with the image, for a C-ordered float32 image:
    the result; one normalised channel with what its statistics or its resampling need; the nonzero mask.

    Raises:
        InputError: the resampled grid is empty or too large (`new_shape`).
    """
    grid = uncropped_grid(shape, spacing, spec)
    old, new, millimetres, target = grid.shape, grid.resampled, grid.spacing, grid.target
    voxels, result = math.prod(old), FLOAT * spec.network_channels * math.prod(new)

    masked = needs_mask(spec.normalization)
    mask = voxels if masked else 0
    normalising = (FLOAT + 1) * voxels  # the last check makes a bool of every voxel
    resampling = FLOAT * voxels + _resampling_bytes(old, new, millimetres, target, spec.resample_data)
    stages = [result + mask + max(normalising, resampling)]
    if masked or previous:
        stages.append((1 + 4) * voxels)  # the mask and the numbered parts of the background
    if previous:
        item = 2 if max((0, *spec.labels.foreground)) < 2**15 else 4
        labels = _label_bytes(old, new, millimetres, target, spec.resample_segmentation, item)
        stages.append(result + mask + item * voxels + labels)
    return max(stages)


def _resampling_bytes(
    old: tuple[int, ...],
    new: tuple[int, ...],
    spacing: tuple[float, ...],
    target: tuple[float, ...],
    how: Resampling,
) -> int:
    """What one channel takes on its way from `old` to `new`, besides itself and its result."""
    if old == new:
        return 0
    axis = coarse_axis(spacing, target, how)
    if axis is None:
        return slab_bytes(old, new) + matrix_bytes(old, new)
    plane, wider = [tuple(n for a, n in enumerate(grid) if a != axis) for grid in (old, new)]
    bytes_ = FLOAT * (math.prod(plane) + math.prod(wider)) + slab_bytes(plane, wider) + matrix_bytes(plane, wider)
    if how.method == "spline" and how.order_z > 0 and old[axis] != new[axis]:
        bytes_ += FLOAT * old[axis] * math.prod(wider)
    return bytes_


def _label_bytes(
    old: tuple[int, ...],
    new: tuple[int, ...],
    spacing: tuple[float, ...],
    target: tuple[float, ...],
    how: Resampling,
    item: int,
) -> int:
    """What the labels take on their way from `old` to `new`, the new ones included."""
    if old == new:
        return 0
    axis = coarse_axis(spacing, target, how)
    result = item * math.prod(new)
    if how.method == "torch" or (how.order < 2 and (axis is None or how.order_z == 0)):
        return result
    if axis is not None and how.order_z == 0:
        old, new = (tuple(n for a, n in enumerate(grid) if a != axis) for grid in (old, new))
    # the indicator, padded, and filtered; two scores, their comparisons, and the nearest labels
    padded = math.prod(n + SPLINE_PAD for n in old)
    return result + SCORE * (math.prod(old) + 2 * padded) + (2 * SCORE + 2 * item + 3) * math.prod(new)
