"""Rows of windows added into the accumulator on the device, as `slabs` does it on the CPU.

Per call of a network: gather -> engine -> blend, all on one stream; all mirror flips of a window are added in one
blend. After a row the status word tells whether every sum was finite.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from trtbuild.runtime.device_gpu import DeviceEngine
from trtbuild.runtime.device_run import Run
from trtbuild.runtime.device_sizes import KINDS
from trtbuild.runtime.device_tables import TILE_BYTES, Group, windows_of_group
from trtbuild.runtime.predictor import Progress, tell
from trtbuild.runtime.slabs import Row, _non_finite
from trtbuild.runtime.tiles import Tile
from trtbuild.stitch.launches import NO_TILE, blend, gather, shift

PACE = 16
"""Calls of a network between two waits: often enough to report and to stop, seldom enough to keep the device busy."""


def added_rows(run: Run, engines: Sequence[DeviceEngine], progress: Progress | None) -> Iterator[tuple[int, Row]]:
    """After each row: the slice of the padded image that the accumulator begins with, and the row."""
    tiles, base, before = list(run.case.tiles), 0, 0
    for row, groups in zip(run.plan.rows, run.plan.groups, strict=True):
        _add_row(run, engines, row, groups, tiles, base, progress)
        _check_status(run, engines, row, tiles, before)
        yield base, row
        if row.keep > base:
            _shift(run, row.keep - base)
            base = row.keep
        before += row.tiles


def _add_row(
    run: Run,
    engines: Sequence[DeviceEngine],
    row: Row,
    groups: Sequence[Group],
    tiles: Sequence[Tile],
    base: int,
    progress: Progress | None,
) -> None:
    """Adds the row's tiles of every fold, in index order; it is done at the end."""
    before, calls = groups[0].first, len(groups) * len(engines)
    for fold, engine in enumerate(engines):
        for number, group in enumerate(groups):
            done = before * len(engines) + fold * row.tiles + group.first - before
            _add_group(run, engine, group, tiles, base, done)
            call = fold * len(groups) + number + 1
            if call % PACE == 0 or call == calls:
                run.gpu.stream.synchronize()
                tell(progress, "network", done + group.size, len(tiles) * len(engines))


def _add_group(run: Run, engine: DeviceEngine, group: Group, tiles: Sequence[Tile], base: int, number: int) -> None:
    """Begins gather -> engine -> blend of one call; `number` is the first tile's in the order of additions."""
    case, gpu, memory = run.case, run.gpu, run.memory
    grid, tables = case.tiles.grid, run.table(run.tables.tiles)
    z, y, x = (part.start for part in grid.inside)
    gpu.launch(
        gather(
            memory["image"].address, memory["patches"].address, tables + TILE_BYTES * group.at, kind=case.kinds[0],
            batch=group.batch, channels=case.shape[0], shape=_three(case.shape[1:]), offset=(z, y, x), patch=case.patch,
        )
    )  # fmt: skip
    gpu.run(engine, memory["patches"].address, memory["logits"].address, group.batch)
    for first, count in windows_of_group(group, case.flips):
        z, y, x = tiles[first].start
        weights = [run.table(axis[at]) for axis, at in zip(run.tables.weights, (z, y, x), strict=True)]
        skipped = first - group.first
        gpu.launch(
            blend(
                memory["logits"].address + case.logit_bytes * skipped, memory["accumulator"].address, _three(weights),
                tables + TILE_BYTES * (group.at + skipped), run.table(run.tables.status),
                kinds=(case.kinds[1], KINDS[run.plan.accumulator]), first_tile=number + skipped, batch=count,
                heads=case.spec.labels.heads, shape=(run.plan.depth, *_three(grid.shape)[1:]), start=(z - base, y, x),
                patch=case.patch,
            )
        )  # fmt: skip


def _check_status(run: Run, engines: Sequence[DeviceEngine], row: Row, tiles: Sequence[Tile], before: int) -> None:
    """Raises where a sum of this row is not finite; `before` is the number of tiles in the rows before."""
    status = np.empty(1, dtype=np.int32)
    run.gpu.download(status, run.memory["tables"], run.tables.status)
    if status[0] != NO_TILE:
        fold, tile = divmod(int(status[0]) - before * len(engines), row.tiles)
        raise _non_finite(engines[fold].runner, tiles[before + tile], run.case.spec, run.plan.accumulator)


def _shift(run: Run, slices: int) -> None:
    shape = (run.plan.depth, *_three(run.case.tiles.grid.shape)[1:])
    run.gpu.launch(
        shift(run.memory["accumulator"].address, kind=KINDS[run.plan.accumulator],
              heads=run.case.spec.labels.heads, shape=shape, slices=slices)
    )  # fmt: skip


def _three(numbers: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = numbers
    return z, y, x
