"""Resampling of integer segmentations as nnU-Net does it: every voxel keeps one of the labels, ties included.

The default (`resample_data_or_seg_to_shape` with is_seg) interpolates the indicator of every label and takes the
largest (batchgenerators 0.25.5, `resize_segmentation`); `resample_torch_fornnunet` does so with torch's interpolation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import ModelError
from trtbuild.spec import Resampling
from trtbuild.volume.resampling.image import coarse_axis, nearest_index
from trtbuild.volume.resampling.linear import torch_linear_taps, torch_nearest_index

Label = TypeVar("Label", bound=np.integer[Any])
Taps = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.floating[Any]]]
"""Low and high old index and the weight of high, each (new,)."""


def resample_segmentation(
    seg: NDArray[Label],
    shape: tuple[int, ...],
    spacing: tuple[float, ...],
    target: tuple[float, ...],
    how: Resampling,
) -> NDArray[Label]:
    """`seg` (Z, Y, X) on the grid `shape` (Z', Y', X'), same dtype; equal to nnU-Net's in every voxel.

    Args:
        seg: integer labels, negative ones too (nnU-Net marks the outside of the nonzero region by -1), at `spacing`.
        shape: target grid. Where it is the shape of `seg`, that is returned as it is.
        spacing: current spacing (mm, array axis order); decides, with `target`, about a coarse axis.
        target: spacing of the target grid.
        how: a Resampling for segmentations.

    Raises:
        ModelError: `how` is for intensities, or is no resampling at all and the shapes differ.
    """
    if seg.shape == shape:
        return seg
    if how.method == "none" or not how.is_segmentation:
        raise ModelError(
            "The plans give no way to resample a segmentation to the images' grid.",
            expected="is_seg: true in resampling_fn_seg_kwargs, or the shape of the images",
            got="no_resampling_hack" if how.method == "none" else "is_seg: false",
            where=f"from {seg.shape} to {shape}",
        )
    axis = coarse_axis(spacing, target, how)
    if how.method == "torch":
        return _voted_torch(seg, shape, axis)
    if axis is None or how.order_z == 0 or seg.shape[axis] == shape[axis]:
        return _resampled_spline(seg, shape, axis, how.order)
    between = tuple(n if a == axis else shape[a] for a, n in enumerate(seg.shape))
    return _over_half(_resampled_spline(seg, between, axis, how.order), shape, how.order_z)


def _chosen(index: NDArray[np.int64], dtype: type[np.floating[Any]]) -> Taps:
    return index, index, np.zeros(len(index), dtype=dtype)


def _voted_torch(seg: NDArray[Label], shape: tuple[int, ...], axis: int | None) -> NDArray[Label]:
    from trtbuild.volume.resampling.label_vote import vote_torch

    taps: list[Taps] = [
        _chosen(torch_nearest_index(old, new), np.float32) if a == axis else torch_linear_taps(old, new)
        for a, (old, new) in enumerate(zip(seg.shape, shape, strict=True))
    ]
    low, high, weight = zip(*taps, strict=True)
    out = np.empty(shape, dtype=seg.dtype)
    vote_torch(seg, low, high, weight, out)
    return out


def _linear_taps(old: int, new: int) -> Taps:
    """Order 1 at (i + 0.5) old/new - 0.5. Beyond the edge both taps are the edge voxel, each with its own weight, as in
    scipy's `zoom`: their sum is 1 but for rounding, which decides some ties."""
    coordinate = (np.arange(new) + 0.5) * (old / new) - 0.5
    low = np.floor(coordinate).astype(np.int64)
    return np.clip(low, 0, old - 1), np.clip(low + 1, 0, old - 1), coordinate - low


def _resampled_spline(seg: NDArray[Label], shape: tuple[int, ...], axis: int | None, order: int) -> NDArray[Label]:
    """All axes with `order`, or the axes across `axis` slice by slice and `axis` by the nearest slice."""
    nearest = [nearest_index(old, new) for old, new in zip(seg.shape, shape, strict=True)]
    if order == 0:
        return seg[np.ix_(*nearest)]
    if order == 1:
        return _voted_spline(seg, shape, axis, nearest)
    if axis is None:
        return _best_label(seg, shape, order, nearest)
    out = np.empty(shape, dtype=seg.dtype)
    slices, into = np.moveaxis(seg, axis, 0), np.moveaxis(out, axis, 0)
    across = [index for a, index in enumerate(nearest) if a != axis]
    for k, source in enumerate(nearest[axis]):
        repeated = k > 0 and source == nearest[axis][k - 1]
        into[k] = into[k - 1] if repeated else _best_label(slices[source], into.shape[1:], order, across)
    return out


def _voted_spline(
    seg: NDArray[Label], shape: tuple[int, ...], axis: int | None, nearest: list[NDArray[np.int64]]
) -> NDArray[Label]:
    from trtbuild.volume.resampling.label_vote import vote_spline

    taps = [
        _chosen(nearest[a], np.float64) if a == axis else _linear_taps(old, new)
        for a, (old, new) in enumerate(zip(seg.shape, shape, strict=True))
    ]
    low, high, weight = zip(*taps, strict=True)
    out = np.empty(shape, dtype=seg.dtype)
    vote_spline(seg, low, high, weight, tuple(nearest), out)
    return out


def _indicator_zoom(seg: NDArray[Label], shape: tuple[int, ...], order: int) -> Callable[[Label], NDArray[np.float64]]:
    """The function that interpolates the indicator of one label to `shape`, by the very function that nnU-Net uses."""
    from scipy import ndimage

    zoom = [new / old for old, new in zip(seg.shape, shape, strict=True)]

    def score(label: Label) -> NDArray[np.float64]:
        indicator = (seg == label).astype(np.float64)
        return np.asarray(ndimage.zoom(indicator, zoom, order=order, mode="nearest", grid_mode=True))

    return score


def _best_label(
    seg: NDArray[Label], shape: tuple[int, ...], order: int, nearest: list[NDArray[np.int64]]
) -> NDArray[Label]:
    """Orders above 1, label after label over the whole grid: the largest score; the nearest label among equals."""
    labels = np.unique(seg)
    if len(labels) == 1:
        return np.full(shape, labels[0], dtype=seg.dtype)
    score_of = _indicator_zoom(seg, shape, order)
    close = seg[np.ix_(*nearest)]
    out = np.full(shape, labels[0], dtype=seg.dtype)
    best = np.full(shape, -1.0)
    close_leads = np.zeros(shape, dtype=bool)
    for label in labels:
        score = score_of(label)
        np.clip(score, 0.0, 1.0, out=score)  # as skimage clips to the indicator's range
        close_leads |= (score == best) & (close == label)
        better = score > best
        close_leads[better] = close[better] == label
        out[better] = label
        np.maximum(best, score, out=best)
        del score  # before the next one is made
    return np.where(close_leads, close, out)


def _over_half(seg: NDArray[Label], shape: tuple[int, ...], order_z: int) -> NDArray[Label]:
    """The coarse axis with `order_z` above 0: a label is written where its score exceeds 0.5, elsewhere stays 0."""
    score_of = _indicator_zoom(seg, shape, order_z)
    out = np.zeros(shape, dtype=seg.dtype)
    for label in np.unique(seg):
        out[np.round(score_of(label)) > 0.5] = label  # rounded as in nnU-Net: exactly a half does not count
    return out
