"""Which old voxels make a new one along one axis: linear or nearest, as each of nnU-Net's ways does it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import ModelError
from trtbuild.spec import Resampling
from trtbuild.volume.resampling.image import coarse_axis, nearest_index
from trtbuild.volume.resampling.linear import torch_linear_taps, torch_nearest_index

LANES = 16
"""New voxels along x that the compiled loops make at a time."""


class Taps(NamedTuple):
    """Linear interpolation along one axis: value = (1 - weight) * old[low] + weight * old[high], each (new,).

    `low` and `high` never fall from one new voxel to the next; where the weight is 0, `high` is `low`. A named tuple,
    because compiled loops take one.
    """

    low: NDArray[np.int64]
    high: NDArray[np.int64]
    weight: NDArray[np.float32]


class Columns(NamedTuple):
    """Taps along x for boxes of `LANES` new voxels: box b reads old voxels [starts[b], stops[b]).

    `low` and `high` (boxes * LANES,) int32 count from there; what is beyond the last new voxel repeats the box's first.
    """

    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    low: NDArray[np.int32]
    high: NDArray[np.int32]
    weight: NDArray[np.float32]


def columns_from_taps(taps: Taps) -> Columns:
    """The same interpolation, cut into boxes of `LANES` new voxels."""
    new = len(taps.low)
    boxes = -(-new // LANES)
    last = np.minimum(np.arange(boxes) * LANES + LANES, new) - 1
    starts, stops = taps.low[::LANES], taps.high[last] + 1
    padding = (0, boxes * LANES - new)
    offset = np.repeat(starts, LANES)
    low, high = (np.maximum(np.pad(index, padding) - offset, 0).astype(np.int32) for index in (taps.low, taps.high))
    return Columns(starts=starts.copy(), stops=stops, low=low, high=high, weight=np.pad(taps.weight, padding))


def chosen_taps(index: NDArray[np.int64]) -> Taps:
    """One old voxel per new voxel: order 0, or no resampling at all."""
    return Taps(low=index, high=index, weight=np.zeros(len(index), dtype=np.float32))


def _tightened(low: NDArray[np.int64], high: NDArray[np.int64], weight: NDArray[np.float32]) -> Taps:
    return Taps(low=low, high=np.where(weight > 0, high, low), weight=weight)


def linear_taps(old: int, new: int) -> Taps:
    """Order 1 at coordinate (i + 0.5) old/new - 0.5, the edge repeated (skimage's resize with mode "edge")."""
    coordinate = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
    low = np.floor(coordinate).astype(np.int64)
    return _tightened(low, np.minimum(low + 1, old - 1), (coordinate - low).astype(np.float32))


def nearest_taps(old: int, new: int) -> Taps:
    """Order 0 as skimage's resize does it, by the very function that it calls."""
    from scipy import ndimage

    index = ndimage.zoom(np.arange(old, dtype=np.float64), new / old, order=0, mode="nearest", grid_mode=True)
    return chosen_taps(index.astype(np.int64))


def taps_of_axes(
    old: tuple[int, ...],
    new: tuple[int, ...],
    spacing: tuple[float, ...],
    target: tuple[float, ...],
    how: Resampling,
) -> tuple[Taps, Taps, Taps] | None:
    """Taps of the three axes from grid `old` at `spacing` to grid `new` at `target`; None where `how` is not linear.

    Linear or nearest along every axis are: splines of order 0 and 1, PyTorch's resampling, none at all, and any where
    the grids are equal.

    Raises:
        ModelError: `how.method` is "none" and the grids differ (nnU-Net fails there, too, when it pastes the crop).
    """
    if old == new:
        z, y, x = (chosen_taps(np.arange(n)) for n in new)
        return z, y, x
    if how.method == "none":
        raise ModelError(
            "The model does not resample its logits, but the network's grid is not the image's.",
            expected=new,
            got=old,
            hint="the plans name no_resampling_hack for the probabilities but another function for the data",
        )
    coarse = coarse_axis(spacing, target, how)
    orders = tuple(how.order_z if axis == coarse else how.order for axis in range(3))
    if how.is_segmentation or (how.method == "spline" and any(order > 1 for order in orders)):
        return None
    z, y, x = (_axis_taps(old[a], new[a], how.method == "torch", orders[a], a == coarse) for a in range(3))
    return z, y, x


def _axis_taps(old: int, new: int, torch: bool, order: int, coarse: bool) -> Taps:
    if old == new:
        return chosen_taps(np.arange(new))
    if torch:
        return chosen_taps(torch_nearest_index(old, new)) if coarse else _tightened(*torch_linear_taps(old, new))
    if order == 1:
        return linear_taps(old, new)
    return chosen_taps(nearest_index(old, new)) if coarse else nearest_taps(old, new)
