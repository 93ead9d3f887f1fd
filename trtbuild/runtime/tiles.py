"""Where the network runs: every window of a case, and every mirror flip of it, as one ordered list of tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtbuild.spec import ModelSpec
from trtbuild.stitch import Grid, flip_combinations, grid_from_shape

Start = tuple[int, int, int]
Flip = tuple[bool, bool, bool]


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One pass of the network: the window's first voxel (z, y, x) and the axes it is mirrored along."""

    start: Start
    flip: Flip


@dataclass(frozen=True, kw_only=True)
class TilePlan:
    """All passes of one network over one case, in the order in which they are accumulated."""

    grid: Grid
    flips: tuple[Flip, ...]

    def __len__(self) -> int:
        return len(self.grid) * len(self.flips)

    def __iter__(self) -> Iterator[Tile]:
        for start, flip in itertools.product(self.grid, self.flips):
            yield Tile(start=start, flip=flip)

    @property
    def rows(self) -> tuple[tuple[int, int], ...]:
        """The tiles by row: (first slice z of the row's windows, number of its tiles), z ascending."""
        if len(self.grid.patch) < len(self.grid.shape):
            starts, windows = tuple(range(self.grid.slices)), self.grid.steps
        else:
            starts, windows = self.grid.steps[0], self.grid.steps[1:]
        tiles = len(self.flips)
        for steps in windows:
            tiles *= len(steps)
        return tuple((start, tiles) for start in starts)


def tile_plan(shape: tuple[int, ...], spec: ModelSpec, mirror_axes: tuple[int, ...], step_size: float) -> TilePlan:
    """The passes over an image of `shape` (Z, Y, X); `mirror_axes` count the patch's own axes."""
    lead = 3 - spec.dimensions

    def flip(axes: tuple[int, ...]) -> Flip:
        return (0 - lead in axes, 1 - lead in axes, 2 - lead in axes)

    flips = tuple(flip(axes) for axes in flip_combinations(mirror_axes, spec.dimensions))
    return TilePlan(grid=grid_from_shape(shape, spec.patch, step_size), flips=flips)


def patch3(spec: ModelSpec) -> tuple[int, int, int]:
    """The patch with three axes; a 2-D one is a slice thick."""
    z, y, x = (1,) * (3 - spec.dimensions) + spec.patch
    return z, y, x


def window_from_image(image: NDArray[np.float32], start: Start, size: tuple[int, int, int]) -> NDArray[np.float32]:
    """A view (C, *size) of the padded image (C, Z, Y, X)."""
    return image[(slice(None), *(slice(s, s + p) for s, p in zip(start, size, strict=True)))]


def mirrored(window: NDArray[np.float32], flip: Flip) -> NDArray[np.float32]:
    """A view of the window (C, z, y, x), mirrored as the tile says."""
    return window[(slice(None), *(slice(None, None, -1) if f else slice(None) for f in flip))]


def padded(data: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    """The image (C, Z, Y, X) with zeros around it up to the grid; itself where it is large enough."""
    if data.shape[1:] == grid.shape:
        return data
    result = np.zeros((len(data), *grid.shape), dtype=np.float32)
    result[(slice(None), *grid.inside)] = data
    return result
