"""Resampling as nnU-Net does it, as products of one-dimensional matrices.

nnU-Net's default (`resample_data_or_seg_to_shape`) calls `skimage.transform.resize(order, mode="edge",
anti_aliasing=False)` per channel. That is `scipy.ndimage.zoom(mode="nearest", grid_mode=True)`, a linear operator that
is a tensor product over the axes, followed by a clip to the input's range. So one axis after the other is multiplied
with a matrix whose entries come from that very function applied to unit vectors. The influence of a sample decays by
0.27 per voxel (the pole of the cubic B-spline), so the matrices are banded and multiplied in blocks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError, ModelError
from trtbuild.spec import Resampling

BLOCK = (
    48  # output rows per block: the fewest operations for 2 x 16 voxels of spline tail (counted for 100..600 voxels)
)
NEGLIGIBLE = 1e-10  # entries below are dropped: together they change a result by < 1e-8 of the range
MAX_VOXELS = 2**33
"""Largest resampled grid: 2048 voxels along every axis, 32 GiB per float32 channel. More comes of a wrong header."""


def new_shape(shape: tuple[int, ...], spacing: tuple[float, ...], target: tuple[float, ...]) -> tuple[int, ...]:
    """The grid at the target spacing: ``int(round(spacing / target * n))`` per axis (nnU-Net's `compute_new_shape`).

    Raises:
        InputError: an axis has no voxel, or there are more than `MAX_VOXELS`.
    """
    # cut off where it is too large in any case: an infinite quotient has no integer
    result = tuple(round(min(s / t * n, 2.0 * MAX_VOXELS)) for s, t, n in zip(spacing, target, shape, strict=True))
    if min(result) < 1:
        raise InputError(
            "The image is thinner than half a voxel of the model.",
            expected="at least 1 voxel per axis",
            got=f"{result} voxels from {shape} at {spacing} mm",
            hint="check the spacing in the file's header",
        )
    if math.prod(result) > MAX_VOXELS:
        raise InputError(
            "The image has too many voxels at the spacing of the model.",
            expected=f"at most {MAX_VOXELS}",
            got=f"{' x '.join(map(str, result))} from {shape} at {spacing} mm",
            hint="check the spacing in the file's header",
        )
    return result


def coarse_axis(spacing: tuple[float, ...], target: tuple[float, ...], how: Resampling) -> int | None:
    """The axis that is resampled apart, or None (nnU-Net's `determine_do_sep_z_and_axis`).

    "auto" looks at the current spacing, then at the target: where largest / smallest exceeds the threshold, the
    coarsest axis is taken; if two or three axes share the largest spacing, none is.
    """
    if how.separate_z == "never":
        return None
    for candidate in (spacing, target):
        largest = max(candidate)
        if how.separate_z == "always" or largest / min(candidate) > how.anisotropy_threshold:
            axes = [axis for axis, s in enumerate(candidate) if largest / s == 1]
            return axes[0] if len(axes) == 1 else None
    return None


@lru_cache(maxsize=64)
def axis_matrix(old: int, new: int, order: int) -> NDArray[np.float64]:
    """The operator (new, old) that resizes one axis with a spline of `order`."""
    from scipy import ndimage

    units = np.eye(old)
    matrix = np.stack([ndimage.zoom(unit, new / old, order=order, mode="nearest", grid_mode=True) for unit in units], 1)
    if matrix.shape != (new, old):
        raise ModelError("An axis was resized to a wrong length.", expected=(new, old), got=matrix.shape)
    return np.asarray(matrix)


@dataclass(frozen=True, kw_only=True)
class _Block:
    """Rows [first, last) of an operator, which read columns [low, high)."""

    first: int
    last: int
    low: int
    high: int
    entries: NDArray[np.float32]


@lru_cache(maxsize=64)
def _blocks(old: int, new: int, order: int) -> tuple[_Block, ...]:
    matrix = axis_matrix(old, new, order)
    blocks = []
    for first in range(0, new, BLOCK):
        rows = matrix[first : first + BLOCK]
        used = np.flatnonzero(np.abs(rows).max(axis=0) > NEGLIGIBLE)
        low, high = int(used[0]), int(used[-1]) + 1
        entries = np.ascontiguousarray(rows[:, low:high], dtype=np.float32)
        blocks.append(_Block(first=first, last=first + len(rows), low=low, high=high, entries=entries))
    return tuple(blocks)


def _resize_axis(volume: NDArray[np.float32], axis: int, new: int, order: int) -> NDArray[np.float32]:
    """`volume` (3-D) with one axis resized; not clipped."""
    old = volume.shape[axis]
    if old == new:
        return volume
    result = np.empty((*volume.shape[:axis], new, *volume.shape[axis + 1 :]), dtype=np.float32)
    for block in _blocks(old, new, order):
        rows, columns = slice(block.first, block.last), slice(block.low, block.high)
        if axis == 0:
            flat = volume[columns].reshape(block.high - block.low, -1)
            np.matmul(block.entries, flat, out=result[rows].reshape(block.last - block.first, -1))
        elif axis == 1:
            np.matmul(block.entries, volume[:, columns], out=result[:, rows])
        else:
            result[:, :, rows] = np.matmul(volume[:, :, columns], block.entries.T)
    return result


def _by_gain(old: tuple[int, ...], new: tuple[int, ...], axes: tuple[int, ...]) -> list[int]:
    """The axes in the order that keeps the intermediate volumes small."""
    return sorted(axes, key=lambda axis: new[axis] / old[axis])


def nearest_index(old: int, new: int) -> NDArray[np.int64]:
    """The old index (new,) nearest to each new voxel's centre: order 0 at (i + 0.5) old/new - 0.5.

    The product is formed as nnU-Net forms it (`scale * (i + 0.5) - 0.5`), halves go up as in scipy.
    """
    coordinate = (float(old) / new) * (np.arange(new) + 0.5) - 0.5
    index: NDArray[np.int64] = np.clip(np.floor(coordinate + 0.5), 0, old - 1).astype(np.int64)
    return index


def _resize_volume(volume: NDArray[np.float32], shape: tuple[int, ...], order: int) -> NDArray[np.float32]:
    """One channel (Z, Y, X) with all axes resized and clipped to the input's range."""
    result = volume
    for axis in _by_gain(volume.shape, shape, (0, 1, 2)):
        result = _resize_axis(result, axis, shape[axis], order)
    return result if order == 0 else np.clip(result, volume.min(), volume.max(), out=result)


def _resize_slices(volume: NDArray[np.float32], shape: tuple[int, ...], order: int, axis: int) -> NDArray[np.float32]:
    """One channel with the axes across `axis` resized, every slice clipped to its own range."""
    across = tuple(a for a in range(3) if a != axis)
    result = volume
    for other in _by_gain(volume.shape, shape, across):
        result = _resize_axis(result, other, shape[other], order)
    if order == 0 or result is volume:
        return result
    low, high = volume.min(axis=across, keepdims=True), volume.max(axis=across, keepdims=True)
    return np.clip(result, low, high, out=result)


def resample(
    data: NDArray[np.float32],
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    target: tuple[float, ...],
    how: Resampling,
) -> NDArray[np.float32]:
    """`data` (C, Z, Y, X) on the grid `shape` (Z', Y', X'), float32.

    Args:
        data: channels at `spacing` (mm, array axis order). Returned as it is when the shapes are equal.
        shape: target grid.
        spacing: current spacing; decides, with `target`, whether the coarse axis is resampled apart.
        target: spacing of the target grid.
        how: order, order of the coarse axis, rule for separate z.

    Equal to nnU-Net's result within 1e-6 of the input's range.
    """
    if how.method != "spline" or how.is_segmentation:
        raise ModelError(
            "This way of resampling is not implemented yet.",
            expected="resample_data_or_seg_to_shape for data",
            got=f"{how.method}{' of a segmentation' if how.is_segmentation else ''}",
        )
    if data.shape[1:] == shape:
        return data
    axis = coarse_axis(spacing, target, how)
    result = np.empty((len(data), *shape), dtype=np.float32)
    for channel, out in zip(data, result, strict=True):
        if axis is None:
            out[...] = _resize_volume(channel, shape, how.order)
        else:
            out[...] = _resize_coarse(_resize_slices(channel, shape, how.order, axis), axis, shape[axis], how.order_z)
    return result


def _resize_coarse(volume: NDArray[np.float32], axis: int, new: int, order: int) -> NDArray[np.float32]:
    """The coarse axis by `map_coordinates(order, mode="nearest")`, not clipped, as nnU-Net does it."""
    if volume.shape[axis] == new:
        return volume
    if order == 0:
        return volume.take(nearest_index(volume.shape[axis], new), axis=axis)
    return _resize_axis(volume, axis, new, order)
