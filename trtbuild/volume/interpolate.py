"""The compiled way back: logits on the network's grid to labels on the image's grid, one slab of slices at a time.

nnU-Net resizes every class to the full image and takes the argmax of the stack. Here every output slice is
interpolated class after class and folded into (best value, best label), so no full-resolution logits exist and memory
does not grow with the number of classes. Compiled with Numba (imported with this module, so import this module late).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtbuild.compiled import compiled

F32 = np.float32


@dataclass(frozen=True, kw_only=True)
class Taps:
    """Linear interpolation along one axis: value = (1 - weight) * old[low] + weight * old[high], each (new,)."""

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    weight: NDArray[np.float32]


def linear_taps(old: int, new: int) -> Taps:
    """Order 1 at coordinate (i + 0.5) old/new - 0.5, the edge repeated (skimage's resize with mode "edge")."""
    coordinate = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    low = np.floor(coordinate).astype(np.int64)
    return Taps(low=low, high=np.minimum(low + 1, old - 1), weight=(coordinate - low).astype(np.float32))


def chosen_taps(index: NDArray[np.int64]) -> Taps:
    """One old voxel per new voxel: order 0, or no resampling at all."""
    return Taps(low=index, high=index, weight=np.zeros(len(index), dtype=np.float32))


@compiled
def _plane(logits, low, high, weight, plane):  # type: ignore[no-untyped-def]  # compiled
    """plane = the slice (ny, nx) between logits[low] and logits[high]."""
    ny, nx = plane.shape
    keep = F32(1) - weight
    for y in range(ny):
        for x in range(nx):
            plane[y, x] = keep * logits[low, y, x] + weight * logits[high, y, x]


@compiled
def _row(plane, low, high, weight, row):  # type: ignore[no-untyped-def]  # compiled
    """row = the row (nx,) between plane[low] and plane[high]."""
    keep = F32(1) - weight
    for x in range(len(row)):
        row[x] = keep * plane[low, x] + weight * plane[high, x]


@compiled
def label_slab(logits, zl, zh, zw, yl, yh, yw, xl, xh, xw, values, regions, out, first, last):  # type: ignore[no-untyped-def]
    """Writes the labels of output slices [first, last) into `out` (Z', Y', X'), any strides.

    ``out[k] = values[argmax over c of interpolated logits[c]]``, the first of equals; with `regions` every head above
    0 (sigmoid above 0.5) writes its value, later heads over earlier ones. `logits` is (C, Z, Y, X) float32; the nine
    arrays are the `Taps` of the three axes.
    """
    heads, _, ny, nx = logits.shape
    height, width = out.shape[1], out.shape[2]
    plane, row = np.empty((ny, nx), F32), np.empty(nx, F32)
    best, label = np.empty((height, width), F32), np.empty((height, width), np.int32)
    for k in range(first, last):
        best[:] = F32(0) if regions else F32(-np.inf)
        label[:] = 0
        for c in range(heads):
            _plane(logits[c], zl[k], zh[k], zw[k], plane)
            for y in range(height):
                _row(plane, yl[y], yh[y], yw[y], row)
                for x in range(width):
                    value = (F32(1) - xw[x]) * row[xl[x]] + xw[x] * row[xh[x]]
                    if value > best[y, x]:
                        label[y, x] = values[c]
                        if not regions:
                            best[y, x] = value
        for y in range(height):
            for x in range(width):
                out[k, y, x] = label[y, x]


@compiled
def value_slab(channel, zl, zh, zw, yl, yh, yw, xl, xh, xw, out, first, last):  # type: ignore[no-untyped-def]
    """Writes interpolated values of one channel (Z, Y, X) into output slices [first, last) of `out`, any strides."""
    _, ny, nx = channel.shape
    plane, row = np.empty((ny, nx), F32), np.empty(nx, F32)
    for k in range(first, last):
        _plane(channel, zl[k], zh[k], zw[k], plane)
        for y in range(out.shape[1]):
            _row(plane, yl[y], yh[y], yw[y], row)
            for x in range(out.shape[2]):
                out[k, y, x] = (F32(1) - xw[x]) * row[xl[x]] + xw[x] * row[xh[x]]
