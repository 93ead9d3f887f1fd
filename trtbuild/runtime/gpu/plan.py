"""How one case fits into a GPU's memory: counted before it starts, from the very sizes that are allocated then.

The accumulator holds no more slices than the windows and the way back need at once, as on the CPU (`slabs`), so that
memory does not grow with the image's length. What else gives way, in this order: the labels leave the device slab by
slab; fewer tiles go into one call; the accumulator is float16, only where the user named a limit, as on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trtbuild.errors import OutOfMemory
from trtbuild.runtime.gpu.sizes import DeviceCase, Labels, buffer_bytes, label_plane, probability_plane
from trtbuild.runtime.gpu.tables import Group, groups_of_rows
from trtbuild.runtime.slabs import Accumulator, Row, accumulator_depth, rows_of_plan
from trtbuild.volume.back import first_needed, ready_slices

GRAIN = 2 << 20
"""Bytes of the pieces in which CUDA takes a device's memory. Small allocations may share one: this counts the most."""
SLAB_BYTES = 32 << 20
"""Of labels or probabilities that leave the device at once: 1 ms of copying, of which a launch is nothing."""
CALLS = 8
"""Of the network between two looks at the status word, at least: each costs a wait, and a short call before it."""
MEGABYTE = 1e6


@dataclass(frozen=True, kw_only=True, eq=False)
class DevicePlan:
    """How a case runs: tiles per call, what the sum is held in, and how the labels leave.

    `labels` "whole" lets them stay on the device until all are there, "slabs" does not, and "none" is for logits that
    leave, because they are wanted or the way back is not linear. `label_slices` and `probability_slices` are output
    slices per launch. `buffers` are the bytes of all device memory by what it is for.
    """

    batch: int
    accumulator: Accumulator
    labels: Labels
    rows: tuple[Row, ...]
    groups: tuple[tuple[Group, ...], ...]
    label_slices: int
    probability_slices: int
    buffers: Mapping[str, int]

    @property
    def depth(self) -> int:
        """Slices of the accumulator."""
        return accumulator_depth(self.rows)

    @property
    def nbytes(self) -> int:
        """Device memory, in whole grains."""
        return in_grains(self.buffers.values())

    def __str__(self) -> str:
        leaving = {"whole": "labels at once", "slabs": "labels slab by slab", "none": "logits to the host"}
        return (
            f"batch {self.batch}, {self.accumulator} accumulator, {leaving[self.labels]}, "
            f"{self.nbytes / MEGABYTE:.0f} MB"
        )


def in_grains(sizes: Iterable[int]) -> int:
    """Bytes of device memory that allocations of these sizes take at most."""
    return sum(-(-size // GRAIN) * GRAIN for size in sizes)


def device_plans(case: DeviceCase, accumulators: Sequence[Accumulator]) -> Iterator[DevicePlan]:
    """All plans, from the best to the smallest; each takes less memory than the one before.

    Args:
        case: what runs.
        accumulators: types that are allowed, the best one first.
    """
    least = math.inf
    for plan in candidate_plans(case, accumulators):
        if plan.nbytes < least:
            least = plan.nbytes
            yield plan


def fitting_plan(plans: Iterator[DevicePlan], free: int, engines: int, hint: str | None = None) -> DevicePlan:
    """The best plan that fits; those that are left in `plans` are smaller.

    Args:
        plans: of `device_plans`.
        free: bytes of device memory that the case may take.
        engines: bytes of it that the engines will still allocate, for the activations of their first call.
        hint: what the user can do where none fits.

    Raises:
        OutOfMemory: none fits; says what the smallest one takes.
    """
    for plan in plans:
        if plan.nbytes + engines <= free:
            return plan
    largest = max(plan.buffers, key=lambda name: plan.buffers[name])
    raise OutOfMemory(
        "The case does not fit into the GPU's memory.",
        expected=f"{(plan.nbytes + engines) / MEGABYTE:.0f} MB free, for the smallest plan ({plan}; the engines' "
        f"activations take {engines / MEGABYTE:.0f} MB, the {largest} {plan.buffers[largest] / MEGABYTE:.0f} MB)",
        got=f"{max(0, free) / MEGABYTE:.0f} MB",
        hint=hint,
    )


def candidate_plans(case: DeviceCase, accumulators: Sequence[Accumulator]) -> Iterator[DevicePlan]:
    """Every combination, in the order in which they are tried."""
    there: tuple[Labels, ...] = ("whole",) if case.labels_stay else ("whole", "slabs")
    ways: tuple[Labels, ...] = ("none",) if case.ends_on_host else there
    for accumulator in accumulators:
        for batch in _batches(case):
            for labels in ways:
                yield _plan(case, batch, accumulator, labels)


def _batches(case: DeviceCase) -> Iterator[int]:
    """From the largest that the case can fill, in halves, to the smallest that the networks take."""
    batch = max(case.smallest, min(case.largest, len(case.tiles)))
    while batch > case.smallest:
        yield batch
        batch = max(case.smallest, batch // 2)
    yield batch


def _plan(case: DeviceCase, batch: int, accumulator: Accumulator, labels: Labels) -> DevicePlan:
    rows = joined_rows(rows_of_plan(case.tiles, case.patch[0], _needed_from(case)), CALLS * batch)
    groups = groups_of_rows(rows, case.flips, case.smallest, batch)
    slices = (_slices(case, label_plane(case)), _slices(case, probability_plane(case)))
    return DevicePlan(
        batch=batch, accumulator=accumulator, labels=labels, rows=rows, groups=groups, label_slices=slices[0],
        probability_slices=slices[1], buffers=buffer_bytes(case, groups, rows, accumulator, labels, slices),
    )  # fmt: skip


def _needed_from(case: DeviceCase) -> Callable[[int], int]:
    """See `rows_of_plan`; logits that are the host's leave as soon as they are final."""
    if case.ends_on_host:
        return lambda final: final
    return lambda final: first_needed(case.way, ready_slices(case.way, final))


def joined_rows(rows: Sequence[Row], tiles: int) -> tuple[Row, ...]:
    """Rows that share no voxel become one until it has `tiles` tiles: one slice of a 2-D model seldom fills a batch.

    A voxel's windows still add up in the same order, because it has windows in one of the rows only.
    """
    result = [rows[0]]
    for row in rows[1:]:
        last = result[-1]
        if last.tiles < tiles and row.start >= last.stop:
            result[-1] = Row(
                start=last.start, stop=row.stop, tiles=last.tiles + row.tiles, final=row.final, keep=row.keep
            )
        else:
            result.append(row)
    return tuple(result)


def _slices(case: DeviceCase, plane: int) -> int:
    return max(1, min(case.grid.cropped[0], SLAB_BYTES // plane))
