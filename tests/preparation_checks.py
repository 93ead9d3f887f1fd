"""The kernels of the preparation, launched as a device would, step by step; and one check that takes all of them.

The property tests draw cases, the mutants and the sanitizers take `check_preparation`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from host_kernels import address
from kernel_checks import Host, same_bits, triple
from numpy.typing import NDArray
from specs import spline

from trtbuild.spec import CT, NoNormalization, Normalization, Resampling, RescaleTo01, RGBTo01, ZScore
from trtbuild.stitch import preparation_launches as prep
from trtbuild.volume.preparation.crop import filled_nonzero_mask, nonzero_box
from trtbuild.volume.preparation.normalize import EPSILON, normalized_channel
from trtbuild.volume.resampling.axis import axis_matrix
from trtbuild.volume.resampling.image import coarse_axis, nearest_index, resample
from trtbuild.volume.resampling.linear import torch_linear_matrix, torch_nearest_index

Volume = NDArray[np.float32]


def on_host(host: Host, image: Volume, forward: tuple[int, ...] = (0, 1, 2)) -> tuple[Volume, prep.Image]:
    """The image (C, Z, Y, X) as read, as a view in the network's order of axes, and the same for the kernels."""
    view = host.put(image).transpose(0, *(axis + 1 for axis in forward))
    return view, image_of(view)


def image_of(view: Volume) -> prep.Image:
    c, z, y, x = (stride // 4 for stride in view.strides)
    return prep.Image(address=address(view), channels=len(view), shape=triple(view.shape[1:]), strides=(c, z, y, x))


def spots(seed: int, channels: int, shape: tuple[int, ...], share: float) -> Volume:
    """Noise in a share of the voxels, and 0 elsewhere."""
    rng = np.random.default_rng(seed)
    values = rng.normal(100, 30, size=(channels, *shape)) * (rng.random((channels, *shape)) < share)
    return values.astype(np.float32)


def box_of(host: Host, image: prep.Image) -> tuple[slice, slice, slice]:
    bounds = host.put(np.full(6, prep.UNSET, dtype=np.int32))
    host.run(prep.nonzero_box(image, address(bounds)))
    return prep.box_from_bounds(bounds, image.shape)


def mask_of(host: Host, image: prep.Image) -> NDArray[np.uint8]:
    state = host.put(np.full(image.shape, 7, dtype=np.uint8))
    host.run(prep.background(image, address(state)))
    for _ in range(1000):
        unchanged = host.put(np.ones(1, dtype=np.int32))
        for launch in prep.floods(address(state), address(unchanged), image.shape):
            host.run(launch)
        if unchanged[0]:
            return state
    raise AssertionError("the flood does not end")


def total(host: Host, channel: prep.Image, mask: int, *, centre: float, power: int) -> float:
    count = channel.shape[1] * channel.shape[2]
    sums, scratch = (host.put(np.full(count, np.nan)) for _ in range(2))
    host.run(prep.column_sums(channel, mask, address(sums), centre=centre, power=power))
    for launch in prep.folds(address(sums), address(scratch), count):
        host.run(launch)
    return float(sums[0])


def moments(host: Host, channel: prep.Image, mask: int) -> tuple[float, float, float]:
    """Count, mean and standard deviation."""
    count = total(host, channel, mask, centre=0.0, power=0)
    mean = total(host, channel, mask, centre=0.0, power=1) / max(count, 1)
    return count, mean, (total(host, channel, mask, centre=mean, power=2) / max(count, 1)) ** 0.5


def constants(
    host: Host, channel: prep.Image, scheme: Normalization, mask: int
) -> tuple[float, float, np.float32, np.float32]:
    """What `normalize` takes for a scheme."""
    low, high = -np.inf, np.inf
    one, zero, least = np.float32(1), np.float32(0), np.float32(EPSILON)
    match scheme:
        case ZScore():
            count, mean, deviation = moments(host, channel, mask)
            return low, high, np.float32(mean), max(np.float32(deviation), least) if count else one
        case CT():
            return scheme.lower, scheme.upper, np.float32(scheme.mean), np.float32(max(scheme.std, EPSILON))
        case RescaleTo01():
            bottom, top = extremes_of(host, channel, None)
            return low, high, bottom[0], max(top[0] - bottom[0], least)
        case RGBTo01():
            return low, high, zero, np.float32(255)
        case NoNormalization():
            return low, high, zero, one
    raise AssertionError(scheme)


def extremes_of(host: Host, image: prep.Image, axis: int | None) -> tuple[Volume, Volume]:
    groups = 1 if axis is None else image.shape[axis]
    keys = host.put(np.full((groups, 2), prep.UNSET, dtype=np.int32))
    host.run(prep.extremes(image, address(keys), axis=axis))
    return prep.range_from_keys(keys)


def normalized(host: Host, channel: prep.Image, scheme: Normalization, mask: int) -> Volume:
    low, high, shift, scale = constants(host, channel, scheme, mask)
    out = host.put(np.full(channel.shape, np.nan, dtype=np.float32))
    host.run(prep.normalize(channel, mask, address(out), low=low, high=high, shift=shift, scale=scale))
    return out


@dataclass(frozen=True, kw_only=True)
class Resized:
    """One channel on its way through `resize` and `clip`."""

    host: Host

    def along(self, volume: Volume, axis: int, matrix: NDArray[np.float64]) -> Volume:
        starts, entries = prep.packed_operator(matrix)
        shape = triple(tuple(len(matrix) if a == axis else n for a, n in enumerate(volume.shape)))
        out = self.host.put(np.full(shape, np.nan, dtype=np.float32))
        tables = (address(self.host.put(starts)), address(self.host.put(entries)))
        launch = prep.resize(
            address(volume), address(out), *tables, band=len(entries), axis=axis, old=volume.shape[axis], shape=shape
        )
        self.host.run(launch)
        return out

    def clipped(self, volume: Volume, source: Volume, axis: int | None) -> Volume:
        keys = self.host.put(np.full((1 if axis is None else source.shape[axis], 2), prep.UNSET, dtype=np.int32))
        self.host.run(prep.extremes(image_of(source[None]), address(keys), axis=axis))
        self.host.run(prep.clip(address(volume), address(keys), axis=axis, shape=triple(volume.shape)))
        return volume

    def resampled(self, channel: Volume, shape: tuple[int, ...], coarse: int | None, how: Resampling) -> Volume:
        """`resample` of volume/resampling, from the kernels."""
        torch, volume = how.method == "torch", self.host.put(channel)
        source = volume
        for axis in (a for a in range(3) if a != coarse and channel.shape[a] != shape[a]):
            old, new = channel.shape[axis], shape[axis]
            volume = self.along(
                volume, axis, torch_linear_matrix(old, new) if torch else axis_matrix(old, new, how.order)
            )
        if not torch and how.order > 0 and channel.shape != shape:
            volume = self.clipped(volume, source, coarse)
        if coarse is None or channel.shape[coarse] == shape[coarse]:
            return volume
        old, new = channel.shape[coarse], shape[coarse]
        if not torch and how.order_z > 0:
            return self.along(volume, coarse, axis_matrix(old, new, how.order_z))
        index = torch_nearest_index(old, new) if torch else nearest_index(old, new)
        return self.along(volume, coarse, np.eye(old)[index])


HOWS = {
    "order 3": (spline(3), (1.0, 1.0, 1.0)),
    "order 1": (spline(1), (1.0, 1.0, 1.0)),
    "order 0": (spline(0), (1.0, 1.0, 1.0)),
    "separate z": (spline(3), (5.0, 1.0, 1.0)),
    "separate x, order 1 along it": (spline(3, order_z=1), (1.0, 1.0, 6.0)),
    "torch": (Resampling(**{**vars(spline(1)), "method": "torch"}), (1.0, 1.0, 1.0)),
    "torch, separate z": (Resampling(**{**vars(spline(1)), "method": "torch"}), (5.0, 1.0, 1.0)),
}


def first_of(host: Host, channel: prep.Image) -> int | None:
    """The first slice with a value that is not finite."""
    first = host.put(np.full(1, prep.UNSET, dtype=np.int32))
    host.run(prep.not_finite(channel, address(first)))
    return None if first[0] == prep.UNSET else int(first[0])


def check_finite(host: Host) -> None:
    for value in (np.nan, np.inf, -np.inf):
        values = np.full((2, 5, 4, 6), np.finfo(np.float32).max, dtype=np.float32)
        values[1, 3, 3, 5] = values[1, 4, 0, 0] = value
        _, image = on_host(host, values)
        assert [first_of(host, image.channel(n)) for n in (0, 1)] == [None, 3]
        _, image = on_host(host, values, (2, 0, 1))
        assert [first_of(host, image.channel(n)) for n in (0, 1)] == [None, 0]


TYPES: dict[prep.Stored, str] = {"u8": "u1", "i8": "i1", "u16": "u2", "i16": "i2", "i32": "i4", "f16": "f2"}


def check_convert(host: Host, kind: prep.Stored, forward: tuple[int, ...] = (1, 0, 2)) -> None:
    """All of a type's values that fit, its ends among them, from an array in any order of axes."""
    dtype = np.dtype(TYPES[kind])
    ends = np.finfo(dtype) if dtype.kind == "f" else np.iinfo(dtype)
    values = np.random.default_rng(0).uniform(float(ends.min) / 2, float(ends.max) / 2, (2, 4, 5, 6)).astype(dtype)
    values[1, :3, 0, 0] = ends.min, ends.max, 0
    view = host.put(values).transpose(0, *(axis + 1 for axis in forward))
    c, z, y, x = (stride // dtype.itemsize for stride in view.strides)
    array = prep.Image(address=address(view), channels=2, shape=triple(view.shape[1:]), strides=(c, z, y, x))
    out = host.put(np.full(view.shape, np.nan, dtype=np.float32))
    host.run(prep.convert(array, address(out), kind=kind))
    same_bits(out, view.astype(np.float32))


def check_preparation(host: Host) -> None:
    check_finite(host)
    for kind in TYPES:
        check_convert(host, kind)
    for axis, name in enumerate(("order 3", "separate z", "separate x, order 1 along it")):
        how, spacing = HOWS[name]
        channel = np.random.default_rng(axis).normal(0, 5, size=(6, 7, 8)).astype(np.float32)
        coarse = coarse_axis(spacing, (1.0, 1.0, 1.0), how)
        ours = Resized(host=host).resampled(channel, (9, 5, 11), coarse, how)
        theirs = resample(channel[None], (9, 5, 11), spacing, (1.0, 1.0, 1.0), how)[0]
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    view, image = on_host(host, spots(3, 2, (9, 9, 9), 0.4))
    thin = np.zeros((2, 5, 6, 7), dtype=np.float32)
    thin[1, 2, 3, 4] = 1
    thin_view, thin_image = on_host(host, thin)
    assert box_of(host, thin_image) == nonzero_box(thin_view)
    mask = mask_of(host, image)
    np.testing.assert_array_equal(mask != prep.OUTSIDE, filled_nonzero_mask(view))
    ours = normalized(host, image.channel(1), ZScore(masked=True), address(mask))
    theirs = normalized_channel(view[1], ZScore(masked=True), mask != prep.OUTSIDE, "channel")
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
