"""Which labels a case holds and where, found slab by slab: no case has to fit into memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtbuild_calibration.sources import Source

SLAB = 32 << 20
"""Voxels that are read at a time."""
PIECE = 1 << 20
"""Voxels that are looked at at a time: NumPy needs some 16 bytes for each of them."""


@dataclass(frozen=True, kw_only=True)
class LabelIndex:
    """How many voxels of each label every slab of a case has; negative labels stand under -1 together.

    Attributes:
        slabs: (first, one past the last) slice of Z, and label -> voxels.
    """

    slabs: tuple[tuple[tuple[int, int], Mapping[int, int]], ...]

    @property
    def counts(self) -> Mapping[int, int]:
        """Label -> voxels of the whole case."""
        total: Counter[int] = Counter()
        for _, counts in self.slabs:
            total.update(counts)
        return dict(sorted(total.items()))


def index_labels(source: Source) -> LabelIndex | None:
    """Reads all labels of a case once; None where it has none."""
    found = []
    for bounds in _slabs(source.shape):
        labels = _read_slab(source, bounds)
        if labels is None:
            return None
        found.append((bounds, count_labels(labels)))
    return LabelIndex(slabs=tuple(found))


def count_labels(labels: NDArray[np.int16]) -> dict[int, int]:
    """Label -> voxels, for the labels that occur; all below 0 count as -1."""
    total: Counter[int] = Counter()
    for piece in _pieces(labels):
        counts = np.bincount(np.maximum(piece, np.int16(-1)).astype(np.int64) + 1)
        total.update({int(label) - 1: int(counts[label]) for label in np.flatnonzero(counts)})
    return dict(sorted(total.items()))


def voxel_of(source: Source, index: LabelIndex, wanted: Callable[[int], bool], number: int) -> tuple[int, int, int]:
    """Where the voxel `number`, from 0 and in memory order, among those whose label is wanted lies: (z, y, x)."""
    for bounds, counts in index.slabs:
        inside = sum(count for label, count in counts.items() if wanted(label))
        if number < inside:
            values = [label for label in counts if wanted(label)]
            return _voxel_in_slab(source, bounds, np.array(values, dtype=np.int16), number)
        number -= inside
    raise IndexError(number)


def _voxel_in_slab(
    source: Source, bounds: tuple[int, int], values: NDArray[np.int16], number: int
) -> tuple[int, int, int]:
    labels = _read_slab(source, bounds)
    if labels is None:
        raise IndexError(number)
    before = 0
    for piece in _pieces(labels):
        hits = np.flatnonzero(np.isin(np.maximum(piece, np.int16(-1)), values))
        if number < len(hits):
            z, y, x = np.unravel_index(before + int(hits[number]), labels.shape)
            return bounds[0] + int(z), int(y), int(x)
        number -= len(hits)
        before += len(piece)
    raise IndexError(number)


def _slabs(shape: tuple[int, int, int, int]) -> Iterator[tuple[int, int]]:
    _, nz, ny, nx = shape
    thick = max(1, SLAB // (ny * nx))
    for start in range(0, nz, thick):
        yield start, min(nz, start + thick)


def _read_slab(source: Source, bounds: tuple[int, int]) -> NDArray[np.int16] | None:
    _, _, ny, nx = source.shape
    return source.read_labels((bounds, (0, ny), (0, nx)))


def _pieces(labels: NDArray[np.int16]) -> Iterator[NDArray[np.int16]]:
    flat = np.ascontiguousarray(labels).reshape(-1)
    for start in range(0, flat.size, PIECE):
        yield flat[start : start + PIECE]
