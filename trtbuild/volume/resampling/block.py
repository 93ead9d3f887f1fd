"""A block of what `resample` makes of a channel, for the splines that are no linear interpolation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtbuild.spec import Resampling
from trtbuild.volume.resampling.axis import axis_blocks
from trtbuild.volume.resampling.image import coarse_axis, nearest_index


class _Operator(NamedTuple):
    """Some rows of an axis' operator, and the columns that they read."""

    columns: slice
    entries: NDArray[np.float32]


def resampled_block(
    channel: NDArray[Any],
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    target: tuple[float, ...],
    how: Resampling,
    block: tuple[range, ...],
) -> NDArray[np.float32]:
    """``resample(channel[None], shape, spacing, target, how)[0][block]`` of splines, without the rest of it.

    Args:
        channel: (Z, Y, X) float32 or float16.
        shape, spacing, target, how: see `resample`; `how.method` is "spline".
        block: positions along each axis of `shape`, in steps of 1.
    """
    coarse = coarse_axis(spacing, target, how)
    z, y, x = (_operator(channel.shape[a], shape[a], _order(how, a, coarse), a == coarse, block[a]) for a in range(3))
    operators = (z, y, x)
    across = tuple(a for a in range(3) if a != coarse)
    result = channel[z.columns, y.columns, x.columns].astype(np.float32)
    for axis in across:
        result = _times(operators[axis].entries, result, axis)
    if how.order > 0:  # to the range of the channel, or of each slice across the coarse axis
        source = channel
        if coarse is not None:
            source = channel[tuple(operators[a].columns if a == coarse else slice(None) for a in range(3))]
        low, high = source.min(axis=across, keepdims=True), source.max(axis=across, keepdims=True)
        np.clip(result, low, high, out=result)
    return result if coarse is None else _times(operators[coarse].entries, result, coarse)


def _order(how: Resampling, axis: int, coarse: int | None) -> int:
    return how.order_z if axis == coarse else how.order


def _operator(old: int, new: int, order: int, coarse: bool, part: range) -> _Operator:
    entries = np.zeros((len(part), old), dtype=np.float32)
    if old == new or (coarse and order == 0):
        chosen = np.arange(new) if old == new else nearest_index(old, new)
        entries[np.arange(len(part)), chosen[part.start : part.stop]] = 1
    else:
        for rows in axis_blocks(old, new, order):
            first, last = max(rows.rows.start, part.start), min(rows.rows.stop, part.stop)
            if first < last:
                here = rows.entries[first - rows.rows.start : last - rows.rows.start]
                entries[first - part.start : last - part.start, rows.columns] = here
    used = np.flatnonzero(entries.any(axis=0))
    columns = slice(int(used[0]), int(used[-1]) + 1)
    return _Operator(columns=columns, entries=np.ascontiguousarray(entries[:, columns]))


def _times(entries: NDArray[np.float32], volume: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    return np.moveaxis(np.tensordot(entries, volume, axes=(1, axis)), 0, axis)
