"""Windows, mirror flips and folds add into one accumulator; slices that no later window covers leave it at once.

Windows come in rows along z. After a row (all its windows, flips and folds) the slices before the next row are final,
because the weights are normalised beforehand: gaussian / sum of all gaussians over the voxel / passes, which is a
product of three vectors. So the accumulator holds about one patch along z, however long the image is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import NonFinite
from trtbuild.runtime.tiles import Tile, TilePlan, padded, patch3, tile_plan
from trtbuild.runtime.windows import logits_of_tiles, repeated_starts
from trtbuild.spec import ModelSpec
from trtbuild.stitch import Grid

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner

Accumulator = Literal["float32", "float16"]
Logits = NDArray[Any]
OnTiles = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class Slab:
    """Mean logits (heads, n, Y, X) of the case's slices [first, first + n), float32 or float16; Y and X are contiguous.

    All of them are final. `logits` is a view of the accumulator and holds until the next slab is asked for.
    """

    first: int
    logits: Logits

    @property
    def last(self) -> int:
        """One past the last slice: so many slices of the case are final."""
        return self.first + int(self.logits.shape[1])


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of windows: the padded image's slices [start, stop) that it covers, how many tiles it has, the slices
    [0, final) that no later row covers, and the first slice that must stay in the accumulator after it."""

    start: int
    stop: int
    tiles: int
    final: int
    keep: int


def rows_of_plan(plan: TilePlan, depth: int, needed_from: Callable[[int], int]) -> tuple[Row, ...]:
    """The rows of a case.

    Args:
        plan: its tiles.
        depth: slices that a window covers.
        needed_from: for a number of final slices of the case (without padding), the first that is needed afterwards.
    """
    offset, length = plan.grid.inside[0].start, plan.grid.inside[0].stop - plan.grid.inside[0].start
    starts = [*(start for start, _ in plan.rows), plan.grid.shape[0]]
    rows = []
    for (start, tiles), following in zip(plan.rows, starts[1:], strict=True):
        first_needed = needed_from(max(0, min(following - offset, length)))
        keep = min(following, first_needed + offset if first_needed > 0 else 0)
        rows.append(Row(start=start, stop=start + depth, tiles=tiles, final=following, keep=keep))
    return tuple(rows)


def accumulator_depth(rows: Sequence[Row]) -> int:
    """Slices that the accumulator must hold at once."""
    kept = [0, *(row.keep for row in rows)]
    return max(row.stop - low for row, low in zip(rows, kept[:-1], strict=True))


def slabs_from_image(
    data: NDArray[np.float32],
    spec: ModelSpec,
    runners: Sequence[Runner],
    plan: TilePlan,
    accumulator: Accumulator,
    needed_from: Callable[[int], int],
    on_tiles: OnTiles,
) -> Iterator[Slab]:
    """The mean logits over windows, mirror flips and folds, slab by slab along z.

    Args:
        data: the prepared case (C, Z, Y, X).
        spec: the model.
        runners: one per fold; each takes (B, C, *patch).
        plan: of `tile_plan`.
        accumulator: what the sum is held in. In float16 every addition rounds to 11 bits.
        needed_from: see `rows_of_plan`; slices before it are not in the next slab.
        on_tiles: called with (tiles done, tiles in all); may raise to stop.

    Raises:
        NonFinite: a network returned NaN or infinity, or logits too large for float16; names engine and window.
    """
    from trtbuild.stitch.accumulate import empty_accumulator, shift_down

    grid, size = plan.grid, patch3(spec)
    rows = rows_of_plan(plan, size[0], needed_from)
    total = empty_accumulator((spec.labels.heads, accumulator_depth(rows), *grid.shape[1:]), accumulator)
    image, tiles = padded(data, grid), list(plan)
    same = repeated_starts(image, list(grid), size)
    base = 0
    with ExitStack() as stack:  # a case that is stopped half-way must not leave work in the engines
        streams = [stack.enter_context(closing(logits_of_tiles(image, tiles, same, spec, r))) for r in runners]
        add = _row_adder(total, tiles, spec, list(zip(runners, streams, strict=True)), plan, on_tiles)
        for row in rows:
            add(row.tiles, base)
            yield _slab(total, grid, base, row.final)
            if row.keep > base:
                shift_down(total, row.keep - base)
                base = row.keep


def _row_adder(
    total: Logits,
    tiles: Sequence[Tile],
    spec: ModelSpec,
    folds: Sequence[tuple[Runner, Iterator[NDArray[np.float32]]]],
    plan: TilePlan,
    on_tiles: OnTiles,
) -> Callable[[int, int], None]:
    """A function that adds the next `count` tiles of every fold, in index order, into `total`, whose first slice is
    slice `base` of the padded image. `folds` holds each fold's runner and its logits of all tiles."""
    from trtbuild.stitch.accumulate import add_window

    weights = window_weights(plan, spec, len(folds) * len(plan.flips))
    done = 0

    def add(count: int, base: int) -> None:
        nonlocal done
        for fold, (runner, stream) in enumerate(folds):
            for number, tile in enumerate(tiles[done : done + count], start=1):
                z, y, x = tile.start
                here = (weights[0][z], weights[1][y], weights[2][x])
                if not add_window(total, next(stream), here, (z - base, y, x), tile.flip):
                    raise not_finite_logits(runner, tile, spec, str(total.dtype))
                on_tiles(done * len(folds) + fold * count + number, len(tiles) * len(folds))
        done += count

    return add


def window_weights(plan: TilePlan, spec: ModelSpec, passes: int) -> tuple[dict[int, NDArray[np.float32]], ...]:
    """Per axis (z, y, x) the normalised weights of a window by its start; z also carries 1 / passes."""
    from trtbuild.stitch import normalised_weights

    grid = plan.grid
    axes: list[dict[int, NDArray[np.float32]]] = []
    if spec.dimensions == 2:
        axes.append({z: np.ones(1, dtype=np.float32) for z in range(grid.slices)})
    for length, patch, steps in zip(grid.shape[-spec.dimensions :], spec.patch, grid.steps, strict=True):
        axes.append(dict(zip(steps, normalised_weights(length, patch, steps, spec.sigma_scale), strict=True)))
    axes[0] = {start: weight / np.float32(passes) for start, weight in axes[0].items()}
    return tuple(axes)


def _slab(total: Logits, grid: Grid, base: int, final: int) -> Slab:
    """The final slices that the accumulator holds, without the padding."""
    offset, stop = grid.inside[0].start, grid.inside[0].stop
    first, last = max(base, offset), min(final, stop)
    view = total[:, first - base : last - base, grid.inside[1], grid.inside[2]]
    if view.shape[2:] != total.shape[2:]:  # an image smaller than the patch: the copy is small, too
        view = np.ascontiguousarray(view)
    return Slab(first=first - offset, logits=view)


def logits_from_image(
    data: NDArray[np.float32],
    spec: ModelSpec,
    runners: Sequence[Runner],
    mirror_axes: tuple[int, ...],
    step_size: float,
    on_tiles: OnTiles,
    accumulator: Accumulator = "float32",
) -> Logits:
    """Mean logits (heads, Z, Y, X) of the whole case, in the accumulator's type; see `slabs_from_image`."""
    plan = tile_plan(data.shape[1:], spec, mirror_axes, step_size)
    slabs = slabs_from_image(data, spec, runners, plan, accumulator, lambda final: 0, on_tiles)
    whole = None
    for slab in slabs:
        whole = slab
    if whole is None:
        raise NonFinite("The case has no windows.", got=f"shape {data.shape}", where=spec.configuration)
    return np.ascontiguousarray(whole.logits)


def not_finite_logits(runner: Runner, tile: Tile, spec: ModelSpec, accumulator: str) -> NonFinite:
    """The error of a window after which a sum is not finite; names engine and window."""
    info = runner.describe()
    axes = [axis for axis, f in zip("zyx", tile.flip, strict=True) if f]
    half = accumulator == "float16"
    return NonFinite(
        "The network returned NaN or infinity" + (", or logits beyond float16." if half else "."),
        expected="finite logits" + (" up to 65504" if half else ""),
        where=f"engine {info.backend} ({info.inference_precision}), configuration {spec.configuration}, window at "
        f"{tile.start} (z, y, x of the padded grid), mirrored along {', '.join(axes) or 'no axis'}",
        hint="allow more memory with --max-memory (on a GPU also with --max-device-memory), so that float32 is used"
        if half
        else "compile with --precision fp32; if that fails too, look for extreme intensities in the image",
    )
