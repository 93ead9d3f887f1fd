"""How the kernels of kernels.cu are launched: names, geometry and arguments, from plain numbers and addresses.

No CUDA here: a launch is a value. A device runs it, and so do the tests, on kernels that are compiled for the host.
Addresses are numbers; what lies at them is said per function, and kernels.cu says what is done with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Float = Literal["f32", "f16"]
"""Type of an array on the device."""
Label = Literal["u8", "u16"]
Three = tuple[int, int, int]

NO_TILE = 2**31 - 1
"""What stands in `blend`'s status where every sum is finite; to be put there before the first launch."""
MAX_BLOCKS = 65535
"""Blocks along y and z that CUDA launches at most; the kernels' loops do the rest."""
ROW_BLOCK, PLANE_BLOCK = (32, 8, 1), (256, 1, 1)
"""Threads: 32 along x read neighbours in memory, 8 rows make a block of 256 also where a row is short."""
TAP = np.dtype([("low", np.int32), ("high", np.int32), ("weight", np.float32)])

KERNELS = (
    *(f"gather_{out}" for out in ("f32", "f16")),
    *(f"blend_{logits}_{total}" for logits in ("f32", "f16") for total in ("f32", "f16")),
    *(f"shift_{total}" for total in ("f32", "f16")),
    *(f"labels_{logits}_{out}" for logits in ("f32", "f16") for out in ("u8", "u16")),
    *(f"probabilities_{logits}_{out}" for logits in ("f32", "f16") for out in ("f32", "f16")),
)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One launch of a kernel: blocks of threads along (x, y, z), and the arguments, of the kernel's types in its order.

    Addresses are uint64.
    """

    kernel: str
    grid: Three
    block: Three
    arguments: tuple[np.generic, ...]


@dataclass(frozen=True, kw_only=True)
class Logits:
    """Logits (heads, n, Y, X) on the device, rows contiguous.

    `address` is that of the voxel at slice `origin_z`, row 0, column 0 of the network's grid (without padding) in head
    0; `strides` count elements from one head, slice and row to the next.
    """

    address: int
    kind: Float
    heads: int
    origin_z: int
    strides: Three


@dataclass(frozen=True, kw_only=True)
class TapAddresses:
    """Packed taps (`packed_taps`) of the new voxels to write, along z, y and x, and their numbers.

    Those of new slices [a, b) begin 12 * a bytes after those of all slices, and are b - a.
    """

    z: int
    y: int
    x: int
    shape: Three


def packed_taps(low: NDArray[np.int64], high: NDArray[np.int64], weight: NDArray[np.float32]) -> NDArray[np.void]:
    """Taps of one axis, each (new,), as `labels` and `probabilities` read them: (new,) of `TAP`."""
    taps = np.empty(len(low), dtype=TAP)
    taps["low"], taps["high"], taps["weight"] = low, high, weight
    return taps


def packed_tile(start: Three, flip: tuple[bool, bool, bool]) -> tuple[int, int, int, int]:
    """One row of the tiles (B, 4) int32: the start (z, y, x) in the padded grid, and 1, 2, 4 for a mirrored z, y, x."""
    return (*start, sum(bit for bit, mirrored in zip((1, 2, 4), flip, strict=True) if mirrored))


def gather(
    image: int,
    out: int,
    tiles: int,
    *,
    kind: Float,
    batch: int,
    channels: int,
    shape: Three,
    offset: Three,
    patch: Three,
) -> Launch:
    """Windows of the image, mirrored, zero outside it.

    Args:
        image: (channels, *shape) float32, without padding.
        out: (batch, channels, *patch) of `kind`.
        tiles: (batch, 4) int32, see `packed_tile`.
        kind: the network's input type.
        batch: number of tiles.
        channels: of the network's input.
        shape: of the image, (Z, Y, X).
        offset: of the image inside the padded grid, (z, y, x).
        patch: (pz, py, px), pz 1 for a 2-D patch.
    """
    numbers = (batch, channels, *shape, *offset, *patch)
    grid = blocks((patch[2], patch[0] * patch[1], batch * channels), ROW_BLOCK)
    return _launch(f"gather_{kind}", grid, ROW_BLOCK, addresses(image, out, tiles), ints(*numbers))


def blend(
    logits: int,
    total: int,
    weights: Three,
    tiles: int,
    status: int,
    *,
    kinds: tuple[Float, Float],
    first_tile: int,
    batch: int,
    heads: int,
    shape: Three,
    start: Three,
    patch: Three,
) -> Launch:
    """Adds the weighted logits of tiles that have the same start to the accumulator, tile after tile.

    Args:
        logits: (batch, heads, *patch).
        total: the accumulator (heads, *shape).
        weights: addresses of the float32 weights (pz,), (py,), (px,).
        tiles: (batch, 4) int32, see `packed_tile`; only the flips are read.
        status: one int32, `NO_TILE` at first; then the smallest number of a tile with a sum that is not finite.
        kinds: types of the logits and of the accumulator.
        first_tile: number of the first of these tiles.
        batch: number of tiles.
        heads: of the network.
        shape: of one head of the accumulator (depth, Y, X).
        start: of the tiles, counted from the accumulator's first voxel: (z - base, y, x).
        patch: (pz, py, px).

    Raises:
        ValueError: the windows do not lie in the accumulator.
    """
    if not all(s >= 0 and s + p <= n for s, p, n in zip(start, patch, shape, strict=True)):
        raise ValueError(f"windows of {patch} at {start} leave the accumulator {shape}")
    grid = blocks((patch[2], patch[0] * patch[1], heads), ROW_BLOCK)
    places = addresses(logits, total, *weights, tiles, status)
    numbers = ints(first_tile, batch, heads, *shape, *start, *patch)
    return _launch(f"blend_{kinds[0]}_{kinds[1]}", grid, ROW_BLOCK, places, numbers)


def shift(total: int, *, kind: Float, heads: int, shape: Three, slices: int) -> Launch:
    """Drops the first `slices` slices of the accumulator `total` (heads, *shape) in place; zeros follow the rest."""
    plane = shape[1] * shape[2]
    grid = blocks((plane, 1, heads), PLANE_BLOCK)
    numbers = (*ints(heads, shape[0]), np.int64(plane), *ints(slices))
    return _launch(f"shift_{kind}", grid, PLANE_BLOCK, addresses(total), numbers)


def labels(
    logits: Logits, taps: TapAddresses, values: int, out: int, *, kind: Label, strides: Three, regions: bool
) -> Launch:
    """Labels of the new voxels that `taps` name.

    Args:
        logits: all slices that the taps read.
        taps: of the new voxels.
        values: (heads,) uint16, the label of each head.
        out: the first new voxel's label.
        kind: type of the labels.
        strides: from one new voxel to the next along z, y, x (the network's axes), in elements of `out`.
        regions: the decision rule; else the largest logit decides.
    """
    places = addresses(logits.address, out, values, taps.z, taps.y, taps.x)
    return _on_new_voxels(f"labels_{logits.kind}_{kind}", logits, taps, places, strides, regions)


def probabilities(
    logits: Logits, taps: TapAddresses, out: int, *, kind: Float, strides: tuple[int, int, int, int], regions: bool
) -> Launch:
    """Softmax (for regions sigmoid) of every head at the new voxels; `strides` from one head, z, y, x to the next."""
    places = addresses(logits.address, out, taps.z, taps.y, taps.x)
    return _on_new_voxels(f"probabilities_{logits.kind}_{kind}", logits, taps, places, strides, regions)


def _on_new_voxels(
    name: str,
    logits: Logits,
    taps: TapAddresses,
    places: tuple[np.generic, ...],
    strides: tuple[int, ...],
    regions: bool,
) -> Launch:
    numbers = (
        *ints(logits.heads, int(regions), logits.origin_z),
        *map(np.int64, logits.strides),
        *ints(*taps.shape),
        *map(np.int64, strides),
    )
    z, y, x = taps.shape
    return _launch(name, blocks((x, y, z), ROW_BLOCK), ROW_BLOCK, places, numbers)


def addresses(*numbers: int) -> tuple[np.generic, ...]:
    """Addresses as arguments of a kernel."""
    return tuple(map(np.uint64, numbers))


def ints(*numbers: int) -> tuple[np.generic, ...]:
    """Numbers as `int` arguments of a kernel; OverflowError where one does not fit."""
    return tuple(map(np.int32, numbers))


def blocks(counts: Three, block: Three) -> Three:
    """Blocks that hold `counts` (x, y, z) threads, as far as CUDA launches so many.

    Raises:
        ValueError: nothing to do, or an axis that the kernels cannot count.
    """
    if not all(0 < count < 2**31 for count in counts):
        raise ValueError(f"a kernel works on 1 to 2**31 - 1 voxels along an axis, not on {counts}")
    x, y, z = (math.ceil(count / threads) for count, threads in zip(counts, block, strict=True))
    return x, min(y, MAX_BLOCKS), min(z, MAX_BLOCKS)


def _launch(
    name: str, grid: Three, block: Three, places: tuple[np.generic, ...], numbers: tuple[np.generic, ...]
) -> Launch:
    return Launch(kernel=name, grid=grid, block=block, arguments=(*places, *numbers))
