"""nnU-Net's inference from an array to its labels, in float64, written from its semantics and nothing of ours.

Prepare (`DefaultPreprocessor.run_case_npy`), windows (`predict_from_raw_data.py`), way back (`export_prediction.py`).
SciPy, skimage and batchgenerators do what they do there; the Gaussian is a dense volume, the weights a dense sum, the
logits a full stack. Where the best two classes are closer than `Reference.margin` says, rounding decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from batchgenerators.augmentations.utils import resize_segmentation
from numpy.typing import NDArray
from scipy import ndimage
from skimage.transform import resize

from trtbuild.spec import CT, ModelSpec, Normalization, Resampling, RescaleTo01, ZScore

F64 = NDArray[np.float64]
Network = Callable[[F64], F64]
"""Logits (heads, *patch) of one patch (C, *patch)."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """`labels` (Z, Y, X) of the image, and per voxel how far the decision is from another one (infinite outside the
    crop). `scale` is the largest logit."""

    labels: NDArray[np.int64]
    margin: F64
    scale: float


def reference_prediction(
    data: NDArray[np.float32],
    spacing: Sequence[float],
    spec: ModelSpec,
    networks: Sequence[Network],
    mirror_axes: tuple[int, ...],
    step_size: float,
    previous: NDArray[np.integer[Any]] | None = None,
) -> Reference:
    """The labels of one image (C, Z, Y, X); one network per fold; `previous` are the labels of the stage before."""
    forward = spec.transpose_forward
    turned = data.astype(np.float64).transpose(0, *(a + 1 for a in forward))
    current = [float(spacing[a]) for a in forward]
    target = [current[0], *spec.spacing] if spec.dimensions == 2 else list(spec.spacing)
    mask = ndimage.binary_fill_holes((turned != 0).any(axis=0))
    box = _bounding_box(mask)
    cropped = turned[(slice(None), *box)]
    shape = tuple(round(c / t * n) for c, t, n in zip(current, target, cropped.shape[1:], strict=True))
    seg = np.zeros(turned.shape[1:]) if previous is None else previous.transpose(forward).astype(np.float64)
    seg = np.where((seg == 0) & ~mask, -1, seg)[box]
    normal = np.stack([_normalized(c, s, seg >= 0) for c, s in zip(cropped, spec.normalization, strict=True)])
    image = _resampled(normal, shape, current, target, spec.resample_data)
    if previous is not None:
        stage = _labels_resampled(seg, shape, _coarse(current, target, spec.resample_segmentation))
        image = np.concatenate([image, [stage == label for label in spec.labels.foreground]])

    logits = _window_mean(image, spec, networks, mirror_axes, step_size)
    logits = _resampled(logits, cropped.shape[1:], target, current, spec.resample_probabilities)
    inside, margin = _decided(logits, spec)
    labels = np.zeros(turned.shape[1:], dtype=np.int64)
    margins = np.full(turned.shape[1:], np.inf)
    labels[box], margins[box] = inside, margin
    back = np.argsort(forward)
    return Reference(
        labels=labels.transpose(back), margin=margins.transpose(back), scale=float(np.abs(logits).max())
    )  # fmt: skip


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    if not mask.any():
        return tuple(slice(0, n) for n in mask.shape)
    where = np.argwhere(mask)
    return tuple(slice(int(a), int(b) + 1) for a, b in zip(where.min(axis=0), where.max(axis=0), strict=True))


def _normalized(channel: F64, scheme: Normalization, mask: NDArray[np.bool_]) -> F64:
    match scheme:
        case ZScore():
            where = mask if scheme.masked else np.ones_like(mask)
            if not where.any():
                return channel
            values = channel[where]
            result = channel.copy()
            result[where] = (values - values.mean()) / max(values.std(), 1e-8)
            return result
        case CT():
            return (np.clip(channel, scheme.lower, scheme.upper) - scheme.mean) / max(scheme.std, 1e-8)
        case RescaleTo01():
            low = channel - channel.min()
            return np.asarray(low / max(low.max(), 1e-8))
        case _:
            return channel


def _coarse(current: Sequence[float], target: Sequence[float], how: Resampling) -> int | None:
    for spacing in (current, target):
        if how.separate_z == "always" or (
            how.separate_z == "auto" and max(spacing) / min(spacing) > how.anisotropy_threshold
        ):
            axes = [a for a in range(3) if spacing[a] == max(spacing)]
            return axes[0] if len(axes) == 1 else None
    return None


def _resampled(
    data: F64, shape: tuple[int, ...], current: Sequence[float], target: Sequence[float], how: Resampling
) -> F64:
    if data.shape[1:] == shape:
        return data
    axis = _coarse(current, target, how)
    return np.stack([_channel_resampled(c, shape, axis, how) for c in data])


def _channel_resampled(channel: F64, shape: tuple[int, ...], axis: int | None, how: Resampling) -> F64:
    def one(values: F64, to: tuple[int, ...], order: int) -> F64:
        if how.method == "torch":  # linear, not clipped
            zoom = [n / o for n, o in zip(to, values.shape, strict=True)]
            return np.asarray(ndimage.zoom(values, zoom, order=1, mode="nearest", grid_mode=True))
        return np.asarray(resize(values, to, order, mode="edge", anti_aliasing=False))

    if axis is None:
        return one(channel, shape, how.order)
    plane = tuple(n for a, n in enumerate(shape) if a != axis)
    slices = np.stack([one(s, plane, how.order) for s in np.moveaxis(channel, axis, 0)], axis)
    old, new = channel.shape[axis], shape[axis]
    if old == new:
        return slices
    if how.method == "torch":
        ramp = torch.arange(old, dtype=torch.float32)[None, None]
        nearest = torch.nn.functional.interpolate(ramp, (new,), mode="nearest-exact")[0, 0].numpy()
        return np.asarray(slices.take(nearest.astype(int), axis))
    points = np.indices(shape, dtype=np.float64)
    points[axis] = old / new * (points[axis] + 0.5) - 0.5
    return np.asarray(ndimage.map_coordinates(slices, points, order=how.order_z, mode="nearest"))


def _labels_resampled(seg: F64, shape: tuple[int, ...], axis: int | None) -> F64:
    """nnU-Net's default for segmentations: order 1, slice by slice and order_z 0 where `axis` is the coarse one."""
    if seg.shape == shape:
        return seg
    if axis is None:
        return np.asarray(resize_segmentation(seg, shape, 1))
    plane = tuple(n for a, n in enumerate(shape) if a != axis)
    slices = np.stack([resize_segmentation(s, plane, 1) for s in np.moveaxis(seg, axis, 0)], axis)
    points = seg.shape[axis] / shape[axis] * (np.arange(shape[axis]) + 0.5) - 0.5
    nearest = ndimage.map_coordinates(np.arange(seg.shape[axis], dtype=float), [points], order=0, mode="nearest")
    return np.asarray(slices.take(nearest.astype(int), axis))


def _steps(size: int, patch: int, step_size: float) -> list[int]:
    count = int(np.ceil((size - patch) / (patch * step_size))) + 1
    distance = (size - patch) / (count - 1) if count > 1 else 0
    return [int(np.round(distance * i)) for i in range(count)]


def dense_gaussian(patch: tuple[int, ...], sigma_scale: float) -> F64:
    """Weights of one window, maximum 10 (`compute_gaussian`)."""
    impulse = np.zeros(patch)
    impulse[tuple(n // 2 for n in patch)] = 1
    weights = ndimage.gaussian_filter(impulse, [n * sigma_scale for n in patch], 0, mode="constant", cval=0)
    weights *= 10 / weights.max()
    weights[weights == 0] = weights[weights != 0].min()
    return np.asarray(weights)


def _window_mean(
    image: F64, spec: ModelSpec, networks: Sequence[Network], mirror_axes: tuple[int, ...], step_size: float
) -> F64:
    """Mean logits over windows (Gaussian weights), mirror flips and folds; a 2-D network runs slice by slice."""
    if spec.dimensions == 2:
        planes = [_plane_mean(image[:, z], spec, networks, mirror_axes, step_size) for z in range(image.shape[1])]
        return np.stack(planes, axis=1)
    return _plane_mean(image, spec, networks, mirror_axes, step_size)


def _plane_mean(
    image: F64, spec: ModelSpec, networks: Sequence[Network], mirror_axes: tuple[int, ...], step_size: float
) -> F64:
    size, patch = image.shape[1:], spec.patch
    missing = [max(p - n, 0) for n, p in zip(size, patch, strict=True)]
    pads = [(m // 2, m - m // 2) for m in missing]
    padded = np.pad(image, [(0, 0), *pads])
    total, weights = np.zeros((spec.labels.heads, *padded.shape[1:])), np.zeros(padded.shape[1:])
    gaussian = dense_gaussian(patch, spec.sigma_scale)
    flips = [c for n in range(len(mirror_axes) + 1) for c in itertools.combinations(mirror_axes, n)]
    steps = [_steps(n, p, step_size) for n, p in zip(padded.shape[1:], patch, strict=True)]
    for start in itertools.product(*steps):
        window = tuple(slice(s, s + p) for s, p in zip(start, patch, strict=True))
        for network, axes in itertools.product(networks, flips):
            flipped = tuple(a + 1 for a in axes)
            logits = np.flip(network(np.flip(padded[(slice(None), *window)], flipped)), flipped)
            total[(slice(None), *window)] += logits * gaussian / (len(flips) * len(networks))
        weights[window] += gaussian
    inside = tuple(slice(low, low + n) for (low, _), n in zip(pads, size, strict=True))
    return np.asarray((total / weights)[(slice(None), *inside)])


def _decided(logits: F64, spec: ModelSpec) -> tuple[NDArray[np.int64], F64]:
    """Labels and the distance to another decision."""
    values = np.array(spec.labels.values)
    if spec.labels.decision == "argmax":
        best = np.sort(logits, axis=0)
        return values[logits.argmax(axis=0)], best[-1] - best[-2]
    labels = np.zeros(logits.shape[1:], dtype=np.int64)
    for value, head in zip(values, logits, strict=True):
        labels[head > 0] = value  # sigmoid above 0.5
    return labels, np.abs(logits).min(axis=0)
