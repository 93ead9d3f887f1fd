"""The kernels that move much, with arrays as large as a default case's: what kernels.py times."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.stitch import launches
from trtbuild.stitch.launches import NO_TILE, Float, Launch, Logits, TapAddresses, Three, packed_taps
from trtbuild.stitch.preparation_launches import packed_operator, resize
from trtbuild.volume.resampling.axis import axis_matrix

COPY = 256 << 20
BYTES = {"f32": 4, "f16": 2}
Arrays = Sequence[NDArray[Any] | int]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the arrays: those of a default 3d_fullres network, or small ones."""

    patch: Three = (128, 128, 128)
    grid: Three = (192, 256, 256)
    heads: tuple[int, ...] = (3, 14, 105)
    batch: int = 2
    copy: int = COPY
    repeats: int = 20


@dataclass(frozen=True, kw_only=True)
class Job:
    """A kernel: the bytes that it must move, its arrays (contents, or bytes of zeros), and the launch at their addresses."""

    name: str
    nbytes: int
    arrays: Arrays
    launch: Callable[..., Launch]


def jobs(sizes: Sizes) -> Iterator[Job]:
    """All kernels of a case that move much."""
    for kind in ("f32", "f16"):
        yield gather_job(sizes, kind)
    for heads in sizes.heads:
        for kinds in (("f32", "f32"), ("f16", "f32"), ("f16", "f16")):
            yield blend_job(sizes, heads, kinds)
        yield labels_job(sizes, heads)
    for axis in range(3):
        yield resize_job(sizes, axis)


def gather_job(sizes: Sizes, kind: Float) -> Job:
    """Windows of one channel, from the middle of the image."""
    voxels = sizes.batch * math.prod(sizes.patch)
    tiles = np.array([launches.packed_tile((0, 0, 0), (False, False, False))] * sizes.batch, dtype=np.int32)

    def launch(image: int, out: int, table: int) -> Launch:
        return launches.gather(
            image,
            out,
            table,
            kind=kind,
            batch=sizes.batch,
            channels=1,
            shape=sizes.grid,
            offset=(0, 0, 0),
            patch=sizes.patch,
        )

    arrays: Arrays = (4 * math.prod(sizes.grid), BYTES[kind] * voxels, tiles)
    return Job(name=f"gather {kind}", nbytes=voxels * (4 + BYTES[kind]), arrays=arrays, launch=launch)


def blend_job(sizes: Sizes, heads: int, kinds: tuple[Float, Float]) -> Job:
    """One window of all heads into an accumulator that is as large as the window."""
    voxels = heads * math.prod(sizes.patch)
    weights = [np.full(size, 0.5, dtype=np.float32) for size in sizes.patch]
    tiles = np.array([launches.packed_tile((0, 0, 0), (False, False, False))], dtype=np.int32)

    def launch(logits: int, total: int, wz: int, wy: int, wx: int, table: int, status: int) -> Launch:
        return launches.blend(
            logits, total, (wz, wy, wx), table, status, kinds=kinds, first_tile=0, batch=1, heads=heads, shape=sizes.patch,
            start=(0, 0, 0), patch=sizes.patch,
        )  # fmt: skip

    status = np.array([NO_TILE], dtype=np.int32)
    arrays: Arrays = (BYTES[kinds[0]] * voxels, BYTES[kinds[1]] * voxels, *weights, tiles, status)
    nbytes = voxels * (BYTES[kinds[0]] + 2 * BYTES[kinds[1]])
    return Job(name=f"blend {kinds[0]} into {kinds[1]}, {heads} classes", nbytes=nbytes, arrays=arrays, launch=launch)


def labels_job(sizes: Sizes, heads: int) -> Job:
    """Labels on a grid as large as the logits', half a voxel away: each reads eight neighbours, each voxel counts once."""
    shape = _labels_grid(sizes, heads)
    voxels = math.prod(shape)
    taps = [_half_taps(size) for size in shape]

    def launch(logits: int, out: int, values: int, z: int, y: int, x: int) -> Launch:
        strides = (voxels, shape[1] * shape[2], shape[2])
        given = Logits(address=logits, kind="f32", heads=heads, origin_z=0, strides=strides)
        places = TapAddresses(z=z, y=y, x=x, shape=shape)
        return launches.labels(
            given, places, values, out, kind="u8", strides=(strides[1], strides[2], 1), regions=False
        )

    arrays: Arrays = (4 * heads * voxels, voxels, np.arange(heads, dtype=np.uint16), *taps)
    return Job(name=f"labels, {heads} classes", nbytes=voxels * (4 * heads + 1), arrays=arrays, launch=launch)


def resize_job(sizes: Sizes, axis: int) -> Job:
    """One axis of one channel by 1.25, with the entries that order 3 leaves."""
    new = sizes.grid
    old = round(new[axis] / 1.25)
    shape = (*new[:axis], old, *new[axis + 1 :])
    starts, entries = packed_operator(axis_matrix(old, new[axis], 3))
    nbytes = 4 * (math.prod(shape) + math.prod(new))

    def launch(volume: int, out: int, first: int, table: int) -> Launch:
        return resize(volume, out, first, table, band=len(entries), axis=axis, old=old, shape=new)

    arrays: Arrays = (4 * math.prod(shape), 4 * math.prod(new), starts, entries)
    return Job(name=f"resize along {'zyx'[axis]}", nbytes=nbytes, arrays=arrays, launch=launch)


def _labels_grid(sizes: Sizes, heads: int) -> Three:
    """At most some 2 GB of logits."""
    depth, height, width = sizes.grid
    return max(2, min(depth, (2 << 30) // (4 * heads * height * width))), height, width


def _half_taps(size: int) -> NDArray[np.void]:
    low = np.arange(size)
    return packed_taps(low, np.minimum(low + 1, size - 1), np.full(size, 0.5, dtype=np.float32))
