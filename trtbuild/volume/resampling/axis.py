"""One axis resized by a matrix, and channels resized as products of such matrices, in little memory.

skimage's `resize(order, mode="edge", anti_aliasing=False)` is `scipy.ndimage.zoom(mode="nearest", grid_mode=True)`, and
torch's `interpolate(align_corners=False)` is linear interpolation: both are linear and tensor products over the axes.
So one axis after the other is multiplied with a matrix. The influence of a sample decays by 0.27 per voxel (the pole of
the cubic B-spline), so the matrices are banded and multiplied in blocks. The rows of one block go through all axes
before the next one starts, so that besides the channel and its result there are only slabs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import ModelError
from trtbuild.volume.resampling.linear import torch_linear_matrix

Kind = int | Literal["torch"]
"""What an axis is resized with: a spline of this order (scipy's), or torch's linear interpolation."""

BLOCK = (
    48  # output rows per block: the fewest operations for 2 x 16 voxels of spline tail (counted for 100..600 voxels)
)
NEGLIGIBLE = 1e-10  # entries below are dropped: together they change a result by < 1e-8 of the range


def axis_matrix(old: int, new: int, order: int) -> NDArray[np.float64]:
    """The operator (new, old) that resizes one axis with a spline of `order`: scipy's function of unit vectors."""
    from scipy import ndimage

    matrix = np.empty((new, old))
    for index, unit in enumerate(np.eye(old)):
        column = ndimage.zoom(unit, new / old, order=order, mode="nearest", grid_mode=True)
        if column.shape != (new,):
            raise ModelError("An axis was resized to a wrong length.", expected=new, got=column.shape)
        matrix[:, index] = column
    return matrix


@dataclass(frozen=True, kw_only=True)
class Block:
    """Some rows of an operator, and the columns that they read."""

    rows: slice
    columns: slice
    entries: NDArray[np.float32]


@lru_cache(maxsize=64)
def axis_blocks(old: int, new: int, kind: Kind) -> tuple[Block, ...]:
    """The operator (new, old) of one axis in blocks of rows."""
    matrix = torch_linear_matrix(old, new) if kind == "torch" else axis_matrix(old, new, kind)
    blocks = []
    for first in range(0, new, BLOCK):
        rows = matrix[first : first + BLOCK]
        used = np.flatnonzero(np.abs(rows).max(axis=0) > NEGLIGIBLE)
        columns = slice(int(used[0]), int(used[-1]) + 1)
        entries = np.ascontiguousarray(rows[:, columns], dtype=np.float32)
        blocks.append(Block(rows=slice(first, first + len(rows)), columns=columns, entries=entries))
    return tuple(blocks)


def _along(axis: int, part: slice) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, part)


def _multiply(entries: NDArray[np.float32], volume: NDArray[np.float32], axis: int, out: NDArray[np.float32]) -> None:
    """``out = entries @ volume`` along `axis` of a 3-D volume."""
    if axis == 2:
        np.matmul(volume, entries.T, out=out)
    elif axis == 1:
        np.matmul(entries, volume, out=out)
    elif volume.flags.c_contiguous and out.flags.c_contiguous:
        np.matmul(entries, volume.reshape(len(volume), -1), out=out.reshape(len(out), -1))
    else:
        np.matmul(entries, volume.transpose(1, 0, 2), out=out.transpose(1, 0, 2))


def resize_axis(volume: NDArray[np.float32], axis: int, kind: Kind, out: NDArray[np.float32]) -> None:
    """Writes `volume` (3-D) with one axis resized into `out`; not clipped."""
    for block in axis_blocks(volume.shape[axis], out.shape[axis], kind):
        _multiply(block.entries, volume[_along(axis, block.columns)], axis, out[_along(axis, block.rows)])


def axes_by_gain(old: Sequence[int], new: Sequence[int]) -> list[int]:
    """The axes that change, in the order that keeps the volumes in between small."""
    return sorted((a for a in range(len(old)) if old[a] != new[a]), key=lambda axis: new[axis] / old[axis])


def resize_axes(volume: NDArray[np.float32], kind: Kind, out: NDArray[np.float32]) -> None:
    """Writes `volume` (3-D) with all axes resized into `out`; not clipped."""
    axes = axes_by_gain(volume.shape, out.shape)
    if not axes:
        out[...] = volume
        return
    first, *others = axes
    for block in axis_blocks(volume.shape[first], out.shape[first], kind):
        into = out[_along(first, block.rows)]
        shape = list(volume.shape)
        shape[first] = into.shape[first]
        slab = np.empty(shape, dtype=np.float32) if others else into
        _multiply(block.entries, volume[_along(first, block.columns)], first, slab)
        for axis in others:
            shape[axis] = out.shape[axis]
            wider = into if axis == others[-1] else np.empty(shape, dtype=np.float32)
            resize_axis(slab, axis, kind, wider)
            slab = wider


def resize_slices(
    volume: NDArray[np.float32],
    axis: int,
    index: NDArray[np.int64],
    kind: Kind,
    out: NDArray[np.float32],
    *,
    clip: bool,
) -> None:
    """Slice k of `out` along `axis` becomes slice ``index[k]`` of `volume` (3-D), resized in-plane.

    With `clip` every slice stays within its own range. `index` ascends.
    """
    slices, into = np.moveaxis(volume, axis, 0), np.moveaxis(out, axis, 0)
    for k, source in enumerate(index):
        if k and source == index[k - 1]:
            into[k] = into[k - 1]
            continue
        plane = np.ascontiguousarray(slices[source])[None]
        resized = np.empty((1, *into.shape[1:]), dtype=np.float32)
        resize_axes(plane, kind, resized)
        if clip:
            clip_to_range(resized, plane)
        into[k] = resized[0]


def clip_to_range(result: NDArray[np.float32], source: NDArray[np.float32]) -> None:
    """Keeps `result` within the values of `source`, in place, as skimage's `resize` does."""
    np.clip(result, source.min(), source.max(), out=result)


def slab_bytes(old: Sequence[int], new: Sequence[int]) -> int:
    """The most bytes that `resize_axes` holds between a channel of shape `old` and its result of shape `new`."""
    axes = axes_by_gain(old, new)
    shape = list(old)
    slabs = []
    for axis in axes[:-1]:
        shape[axis] = min(BLOCK, new[axis]) if axis == axes[0] else new[axis]
        slabs.append(4 * math.prod(shape))
    return max((first + second for first, second in itertools.pairwise([*slabs, 0])), default=0)


def matrix_bytes(old: Sequence[int], new: Sequence[int]) -> int:
    """The most bytes of the matrices of all axes: the largest while it is made, and all of them in blocks."""
    changed = [(o, n) for o, n in zip(old, new, strict=True) if o != n]
    return max((8 * o * (o + n) for o, n in changed), default=0) + 4 * sum(o * n for o, n in changed)
