"""The small numbers of a case that its kernels read: tiles, weights, taps, labels, and the status word.

They are one block of bytes, so that one copy takes them to the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtbuild.runtime.slabs import Row
from trtbuild.runtime.tiles import Tile, TilePlan
from trtbuild.stitch.launches import NO_TILE, packed_taps, packed_tile
from trtbuild.volume.back import WayBack

ALIGNMENT = 16
"""Bytes; no number is larger."""
TILE_BYTES, TAP_BYTES, FLOAT = 16, 12, 4


@dataclass(frozen=True, kw_only=True)
class Group:
    """Tiles that the network computes in one call: `size` of them from number `first` on (in the order of the case).

    `batch` is how many the network gets: at least as many as it takes. `at` is where they stand in the table of tiles.
    """

    first: int
    size: int
    batch: int
    at: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Tables:
    """`content` (n,) uint8 and where in it things stand, in bytes.

    `weights` per axis (z, y, x) by the window's start; `taps` per axis, of all new voxels of the crop.
    """

    content: NDArray[np.uint8]
    tiles: int
    weights: tuple[Mapping[int, int], ...]
    taps: tuple[int, int, int]
    values: int
    status: int


def groups_of_row(row: Row, before: int, at: int, flips: int, smallest: int, largest: int) -> tuple[Group, ...]:
    """The calls for one row: whole windows with all their mirror flips, or parts of one window's flips.

    Args:
        row: of the case.
        before: number of tiles in the rows before it.
        at: where its tiles begin in the table.
        flips: tiles of one window.
        smallest: fewest tiles that the networks take.
        largest: most tiles of a call.
    """
    step = largest // flips * flips or flips
    groups = []
    for first in range(0, row.tiles, step):
        for part in range(first, min(first + step, row.tiles), largest):
            size = min(largest, row.tiles - part, first + step - part)
            groups.append(Group(first=before + part, size=size, batch=max(size, smallest), at=at))
            at += groups[-1].batch
    return tuple(groups)


def groups_of_rows(rows: Sequence[Row], flips: int, smallest: int, largest: int) -> tuple[tuple[Group, ...], ...]:
    """The calls of every row."""
    before, at, result = 0, 0, []
    for row in rows:
        result.append(groups_of_row(row, before, at, flips, smallest, largest))
        before, at = before + row.tiles, at + sum(group.batch for group in result[-1])
    return tuple(result)


def windows_of_group(group: Group, flips: int) -> Iterator[tuple[int, int]]:
    """(first tile, tiles) of each window in a group: what one `blend` adds."""
    first, last = group.first, group.first + group.size
    while first < last:
        stop = min(last, first // flips * flips + flips)
        yield first, stop - first
        first = stop


def tables_of_case(
    plan: TilePlan,
    groups: Sequence[Group],
    weights: Sequence[Mapping[int, NDArray[np.float32]]],
    way: WayBack,
) -> Tables:
    """All tables of a case.

    Args:
        plan: its tiles.
        groups: of all rows.
        weights: per axis (z, y, x) those of a window by its start, with the passes divided out.
        way: the way back; without taps, the tables of the labels are empty.
    """
    block = _Block()
    tiles = block.put(_tile_table(list(plan), groups))
    places = tuple({start: block.put(weight) for start, weight in axis.items()} for axis in weights)
    z, y, x = (block.put(packed_taps(*axis)) for axis in way.taps) if way.taps is not None else (0, 0, 0)
    values = block.put(np.array(way.labels.values, dtype=np.uint16))
    status = block.put(np.array([NO_TILE], dtype=np.int32))
    return Tables(content=block.content(), tiles=tiles, weights=places, taps=(z, y, x), values=values, status=status)


def table_bytes(plan: TilePlan, groups: Sequence[Group], patch: tuple[int, int, int], way: WayBack) -> int:
    """The length of `tables_of_case`'s content."""
    steps = [len(axis) for axis in plan.grid.steps]
    counts = [plan.grid.slices, *steps] if len(steps) < len(patch) else steps
    sizes = [TILE_BYTES * sum(group.batch for group in groups)]
    sizes += [FLOAT * n for n, count in zip(patch, counts, strict=True) for _ in range(count)]
    sizes += [TAP_BYTES * len(axis.low) for axis in way.taps or ()]
    sizes += [2 * len(way.labels.values), FLOAT]
    return sum(map(_aligned, sizes))


def _tile_table(tiles: Sequence[Tile], groups: Sequence[Group]) -> NDArray[np.int32]:
    """(n, 4); a call that the network wants larger repeats its last tile."""
    table = np.empty((sum(group.batch for group in groups), 4), dtype=np.int32)
    for group in groups:
        for i in range(group.batch):
            tile = tiles[group.first + min(i, group.size - 1)]
            table[group.at + i] = packed_tile(tile.start, tile.flip)
    return table


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class _Block:
    """Arrays behind one another, each at a multiple of ALIGNMENT."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._length = 0

    def put(self, array: NDArray[np.generic]) -> int:
        at, part = self._length, array.tobytes()
        self._parts.append(part.ljust(_aligned(len(part)), b"\0"))
        self._length += len(self._parts[-1])
        return at

    def content(self) -> NDArray[np.uint8]:
        return np.frombuffer(b"".join(self._parts), dtype=np.uint8)
