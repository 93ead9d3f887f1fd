"""The tile loop: every window, mirror flip and fold goes through a runner into one accumulator."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import NonFinite
from trtbuild.spec import ModelSpec
from trtbuild.stitch import Grid, axis_gaussian, axis_weight_sum, flip_combinations, grid_from_shape

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner

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


def tile_plan(shape: tuple[int, ...], spec: ModelSpec, mirror_axes: tuple[int, ...], step_size: float) -> TilePlan:
    """The passes over an image of `shape` (Z, Y, X); `mirror_axes` count the patch's own axes."""
    lead = 3 - spec.dimensions

    def flip(axes: tuple[int, ...]) -> Flip:
        return (0 - lead in axes, 1 - lead in axes, 2 - lead in axes)

    flips = tuple(flip(axes) for axes in flip_combinations(mirror_axes, spec.dimensions))
    return TilePlan(grid=grid_from_shape(shape, spec.patch, step_size), flips=flips)


def window_from_image(image: NDArray[np.float32], tile: Tile, patch3: tuple[int, int, int]) -> NDArray[np.float32]:
    """A view (C, *patch3) of the padded image (C, Z, Y, X), mirrored as the tile says."""
    cut = image[(slice(None), *(slice(s, s + p) for s, p in zip(tile.start, patch3, strict=True)))]
    return cut[(slice(None), *(slice(None, None, -1) if f else slice(None) for f in tile.flip))]


def _patch3(spec: ModelSpec) -> tuple[int, int, int]:
    z, y, x = (1,) * (3 - spec.dimensions) + spec.patch
    return z, y, x


def _padded(data: NDArray[np.float32], grid: Grid) -> NDArray[np.float32]:
    if data.shape[1:] == grid.shape:
        return data
    padded = np.zeros((len(data), *grid.shape), dtype=np.float32)
    padded[(slice(None), *grid.inside)] = data
    return padded


def _batches(
    image: NDArray[np.float32], tiles: Sequence[Tile], spec: ModelSpec, size: int
) -> Iterator[NDArray[np.float32]]:
    patch3 = _patch3(spec)
    for first in range(0, len(tiles), size):
        group = tiles[first : first + size]
        batch = np.empty((len(group), len(image), *spec.patch), dtype=np.float32)
        for into, tile in zip(batch, group, strict=True):
            into.reshape(len(image), *patch3)[...] = window_from_image(image, tile, patch3)
        yield batch


def logits_from_image(
    data: NDArray[np.float32],
    spec: ModelSpec,
    runners: Sequence[Runner],
    mirror_axes: tuple[int, ...],
    step_size: float,
    on_tiles: Callable[[int, int], None],
) -> NDArray[np.float32]:
    """Mean logits (heads, Z, Y, X) over windows, mirror flips and folds, float32.

    Args:
        data: the prepared case (C, Z, Y, X).
        spec: the model.
        runners: one per fold; each takes (B, C, *patch).
        mirror_axes: axes of the patch to mirror along; () for none.
        step_size: distance between windows as a share of the patch.
        on_tiles: called with (tiles done, tiles in all) after every batch; may raise to stop.

    Raises:
        NonFinite: a network returned NaN or infinity; names engine and window.
    """
    from trtbuild.stitch.accumulate import divide_by_weights

    plan = tile_plan(data.shape[1:], spec, mirror_axes, step_size)
    image, tiles = _padded(data, plan.grid), list(plan)
    total = np.zeros((spec.labels.heads, *plan.grid.shape), dtype=np.float32)
    passes = len(tiles) * len(runners)
    for fold, runner in enumerate(runners):
        for done in _add_fold(total, image, tiles, spec, runner):
            on_tiles(fold * len(tiles) + done, passes)
    weights = _weight_sums(plan.grid, spec)
    if not divide_by_weights(total, weights, len(runners) * len(plan.flips)):
        raise NonFinite(
            "The sum of the logits overflowed float32.",
            expected="finite logits",
            where=spec.configuration,
            hint="the network's output is of the order of 1e37: check the export with `trtbuild inspect`",
        )
    return np.ascontiguousarray(total[(slice(None), *plan.grid.inside)])


def _weight_sums(grid: Grid, spec: ModelSpec) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    sums = [
        axis_weight_sum(n, p, s, spec.sigma_scale)
        for n, p, s in zip(grid.shape[-spec.dimensions :], spec.patch, grid.steps, strict=True)
    ]
    z, y, x = [np.ones(grid.shape[0])] * (3 - spec.dimensions) + sums
    return z, y, x


def _add_fold(
    total: NDArray[np.float32], image: NDArray[np.float32], tiles: Sequence[Tile], spec: ModelSpec, runner: Runner
) -> Iterator[int]:
    """Adds every tile of one fold in index order, whatever the runner finishes first; yields the number done."""
    from trtbuild.stitch.accumulate import add_window

    patch3 = _patch3(spec)
    gz, gy, gx = (axis_gaussian(p, spec.sigma_scale).astype(np.float32) for p in patch3)
    done = 0
    for logits in runner.stream(_batches(image, tiles, spec, runner.describe().batch)):
        for one in logits:
            tile = tiles[done]
            if not add_window(total, one.reshape(-1, *patch3), (gz, gy, gx), tile.start, tile.flip):
                raise _non_finite(runner, tile, spec)
            done += 1
        yield done


def _non_finite(runner: Runner, tile: Tile, spec: ModelSpec) -> NonFinite:
    info = runner.describe()
    mirrored = [axis for axis, f in zip("zyx", tile.flip, strict=True) if f]
    return NonFinite(
        "The network returned NaN or infinity.",
        expected="finite logits",
        where=f"engine {info.backend} ({info.inference_precision}), configuration {spec.configuration}, window at "
        f"{tile.start} (z, y, x of the padded grid), mirrored along {', '.join(mirrored) or 'no axis'}",
        hint="compile with --precision fp32; if that fails too, look for extreme intensities in the image",
    )
