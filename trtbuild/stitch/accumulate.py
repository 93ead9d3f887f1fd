"""The accumulator: windows, mirror flips and folds all add into one buffer of logits, float32 or float16.

Weights are normalised beforehand (`normalised_weights`), so the sum is the mean: a voxel is finished as soon as the
last window that covers it is added, and what lies in the buffer never exceeds the largest logit. Compiled with Numba
(imported with this module, so import this module late). Each function says in NumPy what it does; the tests hold it
to that in float64.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trtbuild.compiled import compiled
from trtbuild.half import float_from_half, half_from_float

F32 = np.float32
Accumulator = NDArray[np.float32] | NDArray[np.float16]
Weights = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]


def empty_accumulator(shape: tuple[int, ...], kind: Literal["float32", "float16"]) -> Accumulator:
    """Zeros (C, Z, Y, X); untouched pages cost no memory yet."""
    return np.zeros(shape, dtype=kind)


@compiled
def _add_row(into, row, weight, gx, backwards):  # type: ignore[no-untyped-def]  # compiled, see add_window
    bad = np.int32(0)  # counted in integers: a float sum would keep the loop from being vectorised
    nx = len(into)
    if backwards:
        for x in range(nx):
            stored = into[x] + row[nx - 1 - x] * (weight * gx[x])
            bad += np.int32(stored - stored != F32(0))  # NaN for NaN and infinity, 0 for all else
            into[x] = stored
    else:
        for x in range(nx):
            stored = into[x] + row[x] * (weight * gx[x])
            bad += np.int32(stored - stored != F32(0))
            into[x] = stored
    return bad


@compiled
def _add_half_row(into, row, weight, gx, backwards):  # type: ignore[no-untyped-def]  # compiled, see add_window
    bad = np.int32(0)
    nx = len(into)
    if backwards:
        for x in range(nx):
            stored = half_from_float(float_from_half(into[x]) + row[nx - 1 - x] * (weight * gx[x]))
            bad += np.int32(np.uint16(stored & np.uint16(0x7C00)) == np.uint16(0x7C00))  # infinity and NaN
            into[x] = stored
    else:
        for x in range(nx):
            stored = half_from_float(float_from_half(into[x]) + row[x] * (weight * gx[x]))
            bad += np.int32(np.uint16(stored & np.uint16(0x7C00)) == np.uint16(0x7C00))
            into[x] = stored
    return bad


@compiled
def _add_window(total, logits, gz, gy, gx, start, flip):  # type: ignore[no-untyped-def]  # compiled, see add_window
    heads, nz, ny, nx = logits.shape
    bad = np.int32(0)
    for c in range(heads):
        for z in range(nz):
            from_z = nz - 1 - z if flip[0] else z
            for y in range(ny):
                row = logits[c, from_z, ny - 1 - y if flip[1] else y]
                into = total[c, start[0] + z, start[1] + y, start[2] : start[2] + nx]
                bad |= _add_row(into, row, gz[z] * gy[y], gx, flip[2])
    return bad == 0


@compiled
def _add_half_window(total, logits, gz, gy, gx, start, flip):  # type: ignore[no-untyped-def]  # compiled
    heads, nz, ny, nx = logits.shape
    bad = np.int32(0)
    for c in range(heads):
        for z in range(nz):
            from_z = nz - 1 - z if flip[0] else z
            for y in range(ny):
                row = logits[c, from_z, ny - 1 - y if flip[1] else y]
                into = total[c, start[0] + z, start[1] + y, start[2] : start[2] + nx]
                bad |= _add_half_row(into, row, gz[z] * gy[y], gx, flip[2])
    return bad == 0


def add_window(
    total: Accumulator,
    logits: NDArray[np.float32],
    weights: Weights,
    start: tuple[int, int, int],
    flip: tuple[bool, bool, bool],
) -> bool:
    """Adds one window's weighted logits in place; False if any of them, or any sum, is NaN or infinite.

    ``total[:, z0:z0+nz, y0:y0+ny, x0:x0+nx] += np.flip(logits, flip) * wz[:, None, None] * wy[:, None] * wx``, added
    in float32; a float16 accumulator rounds each sum to the nearest half. With normalised weights a sum overflows a
    half only where the mean logit lies beyond 65504.

    Args:
        total: accumulator (C, Z, Y, X), any strides but X contiguous.
        logits: the network's output (C, nz, ny, nx) for the window, mirrored along the axes where `flip` is True.
        weights: weights (nz,), (ny,), (nx,).
        start: the window's first voxel (z0, y0, x0).
        flip: which of (z, y, x) the window was mirrored along.
    """
    if total.dtype == np.float16:
        return bool(_add_half_window(total.view(np.uint16), logits, *weights, start, flip))
    return bool(_add_window(total, logits, *weights, start, flip))


def shift_down(total: Accumulator, slices: int) -> None:
    """Drops the first `slices` slices in place: the rest moves to the front, the freed end becomes 0.

    ``total[:, :-slices] = total[:, slices:]; total[:, -slices:] = 0``, for (C, Z, Y, X); all 0 where `slices` >= Z.

    Raises:
        ValueError: `total` is not C-contiguous.
    """
    if not total.flags.c_contiguous:
        raise ValueError("an accumulator is C-contiguous")
    plane = math.prod(total.shape[2:])
    keep = max(total.shape[1] - slices, 0) * plane
    for channel in total:
        voxels = channel.reshape(-1)  # NumPy moves overlapping voxels in place along one axis, else through a copy
        voxels[:keep] = voxels[len(voxels) - keep :]
        voxels[keep:] = 0
