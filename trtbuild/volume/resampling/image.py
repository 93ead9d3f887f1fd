"""Resampling of images and logits as nnU-Net does it (`default_resampling.py`, `resample_torch.py`).

nnU-Net's default (`resample_data_or_seg_to_shape`) calls `skimage.transform.resize(order, mode="edge",
anti_aliasing=False)` per channel and clips to the channel's range; with a coarse axis it does so slice by slice and the
coarse axis follows. `resample_torch_fornnunet` calls torch's linear `interpolate`, without a clip.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError, ModelError
from trtbuild.spec import Resampling
from trtbuild.volume.resampling.axis import clip_to_range, resize_axes, resize_axis, resize_slices
from trtbuild.volume.resampling.linear import torch_nearest_index

MAX_VOXELS = 2**33
"""Largest resampled grid: 2048 voxels along every axis, 32 GiB per float32 channel. More comes of a wrong header."""


def new_shape(shape: tuple[int, ...], spacing: tuple[float, ...], target: tuple[float, ...]) -> tuple[int, ...]:
    """The grid at the target spacing: ``int(round(spacing / target * n))`` per axis (nnU-Net's `compute_new_shape`).

    Raises:
        InputError: a spacing is no positive finite number, an axis has no voxel, or there are more than `MAX_VOXELS`.
    """
    if not all(0 < s < math.inf for s in spacing):  # NaN is not either
        raise InputError("The spacing is not usable.", expected="positive numbers (mm)", got=spacing,
                         hint="check the spacing in the file's header")  # fmt: skip
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


def nearest_index(old: int, new: int) -> NDArray[np.int64]:
    """The old index (new,) nearest to each new voxel's centre: order 0 at (i + 0.5) old/new - 0.5.

    The product is formed as nnU-Net forms it (`scale * (i + 0.5) - 0.5`), halves go up as in scipy.
    """
    coordinate = (float(old) / new) * (np.arange(new) + 0.5) - 0.5
    index: NDArray[np.int64] = np.clip(np.floor(coordinate + 0.5), 0, old - 1).astype(np.int64)
    return index


def _resample_channel(
    channel: NDArray[np.float32], axis: int | None, how: Resampling, out: NDArray[np.float32]
) -> None:
    """One channel (Z, Y, X) into `out`; `axis` is the coarse axis, if there is one."""
    if how.method == "torch":
        if axis is None:
            resize_axes(channel, "torch", out)
        else:
            index = torch_nearest_index(channel.shape[axis], out.shape[axis])
            resize_slices(channel, axis, index, "torch", out, clip=False)
        return
    clip = how.order > 0
    if axis is None:
        resize_axes(channel, how.order, out)
        if clip:
            clip_to_range(out, channel)
        return
    old, new = channel.shape[axis], out.shape[axis]
    if how.order_z == 0 or old == new:
        resize_slices(channel, axis, nearest_index(old, new), how.order, out, clip=clip)
        return
    between = np.empty((*out.shape[:axis], old, *out.shape[axis + 1 :]), dtype=np.float32)
    resize_slices(channel, axis, np.arange(old), how.order, between, clip=clip)
    resize_axis(between, axis, how.order_z, out)


def resample_into(
    out: NDArray[np.float32],
    data: NDArray[np.float32],
    spacing: tuple[float, ...],
    target: tuple[float, ...],
    how: Resampling,
) -> None:
    """Writes `data` (C, Z, Y, X), resampled to the grid of `out` (C, Z', Y', X'), into `out`; see `resample`."""
    if data.shape == out.shape:
        out[...] = data
        return
    if how.is_segmentation:
        raise ModelError(
            "Intensities and logits cannot be resampled as a segmentation.",
            expected="is_seg: false in the plans' resampling of images and probabilities",
            got="is_seg: true",
        )
    if how.method == "none":
        raise ModelError(
            "The plans resample the images, but not what is resampled here.",
            expected=f"the shape {out.shape[1:]}",
            got=f"{data.shape[1:]} and no_resampling_hack",
            hint="name the same resampling function for images, segmentations and probabilities",
        )
    axis = coarse_axis(spacing, target, how)
    for channel, into in zip(data, out, strict=True):
        _resample_channel(channel, axis, how, into)


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

    Raises:
        ModelError: `how` is for segmentations, or is no resampling at all and the shapes differ.

    Equal to nnU-Net's result within 1e-6 of the input's range.
    """
    if data.shape[1:] == shape:
        return data
    result = np.empty((len(data), *shape), dtype=np.float32)
    resample_into(result, data, spacing, target, how)
    return result
