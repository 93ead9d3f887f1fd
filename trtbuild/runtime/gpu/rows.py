"""Rows of windows added into the accumulator on the device, as `slabs` does it on the CPU.

Per call of a network: gather -> engine -> blend, all on one stream; all mirror flips of a window are added in one
blend. After a row the status word tells whether every sum was finite. While the host reads it and begins what comes
after the row, the network is at the next row's first tiles already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.runtime.gpu.pace import Pace
from trtbuild.runtime.gpu.run import Run
from trtbuild.runtime.gpu.shared import DeviceEngine
from trtbuild.runtime.gpu.sizes import KINDS
from trtbuild.runtime.gpu.tables import TILE_BYTES, Group, windows_of_group
from trtbuild.runtime.predictor import Progress
from trtbuild.runtime.slabs import Row, not_finite_logits
from trtbuild.runtime.tiles import Tile
from trtbuild.stitch.launches import NO_TILE, blend, gather, shift


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """A call of a fold's network. `number` is its first tile's in the order of additions; the case makes `alike` calls
    of this engine with this batch."""

    engine: DeviceEngine
    group: Group
    number: int
    alike: int


def added_rows(run: Run, engines: Sequence[DeviceEngine], progress: Progress | None) -> Iterator[tuple[int, Row]]:
    """After each row: the slice of the padded image that the accumulator begins with, and the row."""
    tiles, base, before = list(run.case.tiles), 0, 0
    rows = [*_calls(run, engines)]
    following = chain.from_iterable(rows)
    with ExitStack() as stack:
        pace = Pace(run.gpu, progress, len(tiles) * len(engines))
        stack.callback(pace.close)
        _begin(run, next(following))
        for row, calls in zip(run.plan.rows, rows, strict=True):
            _add_row(run, calls, following, pace, tiles, base)
            _check_status(run, engines, row, tiles, before)
            yield base, row
            if row.keep > base:
                _shift(run, row.keep - base)
                base = row.keep
            before += row.tiles


def _calls(run: Run, engines: Sequence[DeviceEngine]) -> Iterator[list[Call]]:
    """Of each row: of every fold, in index order."""
    counts = Counter(group.batch for groups in run.plan.groups for group in groups)
    for row, groups in zip(run.plan.rows, run.plan.groups, strict=True):
        before, calls = groups[0].first, []
        for fold, engine in enumerate(engines):
            for group in groups:
                number = before * len(engines) + fold * row.tiles + group.first - before
                calls.append(Call(engine=engine, group=group, number=number, alike=counts[group.batch]))
        yield calls


def _add_row(
    run: Run, calls: Sequence[Call], following: Iterator[Call], pace: Pace, tiles: Sequence[Tile], base: int
) -> None:
    """Adds the row's tiles; they are done at the end. The network of its first call was begun already, and so is that
    of the next row's at the end."""
    for call in calls:
        _add(run, call, tiles, base)
        last = call is calls[-1]
        if last:
            run.gpu.stream.copy_out(_status(run), run.memory["tables"], run.tables.status)
        pace.mark(call.number + call.group.size, now=last)
        behind = next(following, None)
        if behind is not None:
            _begin(run, behind)
        pace.wait(left=0 if last else 1)


def _begin(run: Run, call: Call) -> None:
    """Begins gather -> engine; the logits of the call before were added."""
    case, memory, group = run.case, run.memory, call.group
    z, y, x = (part.start for part in case.tiles.grid.inside)
    run.gpu.launch(
        gather(
            memory["image"].address, memory["patches"].address, run.table(run.tables.tiles) + TILE_BYTES * group.at,
            kind=case.kinds[0], batch=group.batch, channels=case.shape[0], shape=_three(case.shape[1:]),
            offset=(z, y, x), patch=case.patch,
        )
    )  # fmt: skip
    run.gpu.run(call.engine, memory["patches"].address, memory["logits"].address, group.batch, call.alike)


def _add(run: Run, call: Call, tiles: Sequence[Tile], base: int) -> None:
    """Begins to blend a call's logits."""
    case, memory, group = run.case, run.memory, call.group
    grid, table = case.tiles.grid, run.table(run.tables.tiles)
    for first, count in windows_of_group(group, case.flips):
        z, y, x = tiles[first].start
        weights = [run.table(axis[at]) for axis, at in zip(run.tables.weights, (z, y, x), strict=True)]
        skipped = first - group.first
        run.gpu.launch(
            blend(
                memory["logits"].address + case.logit_bytes * skipped, memory["accumulator"].address, _three(weights),
                table + TILE_BYTES * (group.at + skipped), run.table(run.tables.status),
                kinds=(case.kinds[1], KINDS[run.plan.accumulator]), first_tile=call.number + skipped, batch=count,
                heads=case.spec.labels.heads, shape=(run.plan.depth, *_three(grid.shape)[1:]), start=(z - base, y, x),
                patch=case.patch,
            )
        )  # fmt: skip


def _status(run: Run) -> NDArray[Any]:
    """The status word on the host, in page-locked memory that nothing else uses between a row's end and its wait."""
    word: NDArray[Any] = run.gpu.staging.array[:4].view(np.int32)
    return word


def _check_status(run: Run, engines: Sequence[DeviceEngine], row: Row, tiles: Sequence[Tile], before: int) -> None:
    """Raises where a sum of this row is not finite; `before` is the number of tiles in the rows before."""
    status = _status(run)
    if status[0] != NO_TILE:
        fold, tile = divmod(int(status[0]) - before * len(engines), row.tiles)
        raise not_finite_logits(
            engines[fold].runner, _in_whole(tiles[before + tile], run), run.case.spec, run.plan.accumulator
        )


def _in_whole(tile: Tile, run: Run) -> Tile:
    """The window where it lies in the whole case, of which several GPUs may have a part each."""
    z, y, x = tile.start
    return replace(tile, start=(z + run.case.first, y, x))


def _shift(run: Run, slices: int) -> None:
    shape = (run.plan.depth, *_three(run.case.tiles.grid.shape)[1:])
    run.gpu.launch(
        shift(run.memory["accumulator"].address, kind=KINDS[run.plan.accumulator],
              heads=run.case.spec.labels.heads, shape=shape, slices=slices)
    )  # fmt: skip


def _three(numbers: Sequence[int]) -> tuple[int, int, int]:
    z, y, x = numbers
    return z, y, x
