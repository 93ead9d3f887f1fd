"""How the kernels of preparation.cu are launched; see `launches`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trtbuild.stitch.launches import PLANE_BLOCK, ROW_BLOCK, Launch, Three, addresses, blocks, ints

PREPARATION_KERNELS = (
    *(f"convert_{kind}" for kind in ("u8", "i8", "u16", "i16", "i32", "f16")),
    "not_finite",
    "nonzero_box",
    "background",
    "flood",
    "column_sums",
    "fold",
    "extremes",
    "clip",
    "normalize",
    "resize",
)
Stored = Literal["u8", "i8", "u16", "i16", "i32", "f16"]
"""Types of images that `convert` makes float32 of."""
UNSET = 2**31 - 1
"""What stands in `nonzero_box`'s and `extremes`' results before their launch."""
OUTSIDE = 2
"""In a mask: not in the body. 0 and 1 are."""
FOLD = 256
"""How many sums become one."""
NEGLIGIBLE = 1e-10
"""Entries of an operator below this are left out, as `volume/resampling/axis.py` does."""


@dataclass(frozen=True, kw_only=True)
class Image:
    """A part of an image (channels, Z, Y, X) float32 on the device; the kernels take the network's order of axes.

    `address` is that of its first voxel in its first channel; `strides` (c, z, y, x) count elements of the whole image.
    """

    address: int
    channels: int
    shape: Three
    strides: tuple[int, int, int, int]

    def channel(self, index: int) -> Image:
        """One channel of it."""
        address = self.address + 4 * index * self.strides[0]
        return Image(address=address, channels=1, shape=self.shape, strides=self.strides)

    def cropped(self, box: tuple[slice, slice, slice]) -> Image:
        """The part of it in a box (z, y, x)."""
        skipped = sum(part.start * stride for part, stride in zip(box, self.strides[1:], strict=True))
        z, y, x = (part.stop - part.start for part in box)
        return Image(address=self.address + 4 * skipped, channels=self.channels, shape=(z, y, x), strides=self.strides)

    def turned(self, forward: tuple[int, ...]) -> Image:
        """The same with its axes in another order: axis `forward[i]` becomes axis i."""
        z, y, x = forward
        c, *strides = self.strides
        return Image(
            address=self.address, channels=self.channels, shape=(self.shape[z], self.shape[y], self.shape[x]),
            strides=(c, strides[z], strides[y], strides[x]),
        )  # fmt: skip


def contiguous(address: int, shape: Three, channels: int = 1) -> Image:
    """An image whose voxels follow one another in C order."""
    _, height, width = shape
    strides = (math.prod(shape), height * width, width, 1)
    return Image(address=address, channels=channels, shape=shape, strides=strides)


def convert(array: Image, out: int, *, kind: Stored) -> Launch:
    """The array, of values of `kind`, as float32 in C order into `out`; its strides count its own values."""
    return _over_image(f"convert_{kind}", array, addresses(array.address, out), channels=True)


def not_finite(channel: Image, first: int) -> Launch:
    """Where a channel is NaN or infinite: `first` one int32, `UNSET` before, then the smallest such z."""
    return _over_image("not_finite", channel, addresses(channel.address, first))


def nonzero_box(image: Image, box: int) -> Launch:
    """The bounding box of what is not 0: `box` (6,) int32, `UNSET` before, see `box_from_bounds`."""
    return _over_image("nonzero_box", image, addresses(image.address, box), channels=True)


def box_from_bounds(bounds: NDArray[np.int32], shape: Three) -> tuple[slice, slice, slice]:
    """The box that `nonzero_box` found; everything where every voxel is 0."""
    if bounds[0] == UNSET:
        return slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2])
    z, y, x = (slice(int(low), 1 - int(high)) for low, high in zip(bounds[:3], bounds[3:], strict=True))
    return z, y, x


def background(image: Image, state: int) -> Launch:
    """Begins a mask, `state` (Z, Y, X) uint8, which `floods` finish."""
    return _over_image("background", image, addresses(image.address, state), channels=True)


def floods(state: int, unchanged: int, shape: Three) -> tuple[Launch, Launch, Launch]:
    """One round over the three axes; the mask is finished when `unchanged`, one int32, 1 before, is 1 after it."""
    strides = (shape[1] * shape[2], shape[2], 1)

    def along(axis: int) -> Launch:
        row, column = (other for other in range(3) if other != axis)
        numbers = (
            *ints(shape[row], shape[column], shape[axis]),
            *map(np.int64, (strides[row], strides[column], strides[axis])),
        )
        grid = blocks((shape[column], shape[row], 1), ROW_BLOCK)
        arguments = (*addresses(state, unchanged), *numbers)
        return Launch(kernel="flood", grid=grid, block=ROW_BLOCK, arguments=arguments)

    return along(0), along(1), along(2)


def column_sums(channel: Image, mask: int, sums: int, *, centre: float, power: int) -> Launch:
    """Sums (Y, X) float64 over z of (value - centre)**power inside the mask; `mask` 0 is none, `power` 0, 1 or 2."""
    _, height, width = channel.shape
    numbers = (np.float64(centre), *ints(power, *channel.shape), *map(np.int64, channel.strides[1:]))
    grid = blocks((width, height, 1), ROW_BLOCK)
    arguments = (*addresses(channel.address, mask, sums), *numbers)
    return Launch(kernel="column_sums", grid=grid, block=ROW_BLOCK, arguments=arguments)


def folds(values: int, scratch: int, count: int) -> tuple[Launch, ...]:
    """Sums `count` float64 values at `values` into the first one, by way of as many at `scratch`."""
    launches, at, other = [], values, scratch
    while count > 1 or at != values:
        fewer = -(-count // FOLD)
        grid = blocks((fewer, 1, 1), PLANE_BLOCK)
        arguments = (*addresses(at, other), np.int64(count), *ints(fewer))
        launches.append(Launch(kernel="fold", grid=grid, block=PLANE_BLOCK, arguments=arguments))
        at, other, count = other, at, fewer
    return tuple(launches)


def extremes(channel: Image, keys: int, *, axis: int | None) -> Launch:
    """Ranges as integer keys, `keys` (groups, 2) int32, `UNSET` before: one of all, or one per slice along `axis`."""
    numbers = ints(-1 if axis is None else axis)
    return _over_image("extremes", channel, (*addresses(channel.address, keys), *numbers))


def range_from_keys(keys: NDArray[np.int32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The smallest and the largest value of each group, from `extremes`' keys (groups, 2)."""
    ordered = np.stack([keys[:, 0], ~keys[:, 1]])
    low, high = (ordered ^ ((ordered >> 31) & np.int32(0x7FFFFFFF))).view(np.float32)
    return low, high


def clip(volume: int, keys: int, *, axis: int | None, shape: Three) -> Launch:
    """Clips a volume in place to the ranges of `extremes`."""
    return _over(shape, "clip", (*addresses(volume, keys), *ints(-1 if axis is None else axis, *shape)))


def normalize(
    channel: Image, mask: int, out: int, *, low: float, high: float, shift: np.float32, scale: np.float32
) -> Launch:
    """(clip(value, low, high) - shift) / scale in float32 into `out` (Z, Y, X); values outside the mask stay."""
    constants = (np.float32(low), np.float32(high), shift, scale)
    return _over_image("normalize", channel, (*addresses(channel.address, mask, out), *constants))


def packed_operator(matrix: NDArray[np.float64]) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """The operator (new, old) of one axis as `resize` reads it: starts (new,) and entries (band, new)."""
    used = np.abs(matrix) > NEGLIGIBLE
    first = used.argmax(axis=1)
    last = matrix.shape[1] - used[:, ::-1].argmax(axis=1)
    band = int((last - first).max())
    starts = np.minimum(first, matrix.shape[1] - band)
    entries = np.take_along_axis(matrix, starts[:, None] + np.arange(band), axis=1)
    return starts.astype(np.int32), np.ascontiguousarray(entries.T, dtype=np.float32)


def resize(volume: int, out: int, starts: int, entries: int, *, band: int, axis: int, old: int, shape: Three) -> Launch:
    """Resizes one axis of `old` voxels into `out` (*shape), with an operator of `packed_operator`."""
    return _over(shape, "resize", (*addresses(volume, out, starts, entries), *ints(band, axis, old, *shape)))


def _over_image(name: str, image: Image, first: tuple[np.generic, ...], *, channels: bool = False) -> Launch:
    many = (*ints(image.channels), np.int64(image.strides[0])) if channels else ()
    numbers = (*ints(*image.shape), *map(np.int64, image.strides[1:]))
    return _over(image.shape, name, (*first, *many, *numbers))


def _over(shape: Three, name: str, arguments: tuple[np.generic, ...]) -> Launch:
    z, y, x = shape
    return Launch(kernel=name, grid=blocks((x, y, z), ROW_BLOCK), block=ROW_BLOCK, arguments=arguments)
