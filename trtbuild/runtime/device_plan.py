"""How one case fits into a GPU's memory: counted before it starts, from the very sizes that are allocated then.

The accumulator holds no more slices than the windows and the way back need at once, as on the CPU (`slabs`), so that
memory does not grow with the image's length. What else gives way, in this order: the labels leave the device slab by
slab; fewer tiles go into one call; the accumulator is float16, only where the user named a limit, as on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trtbuild.errors import OutOfMemory
from trtbuild.runtime.device_tables import Group, groups_of_rows, table_bytes
from trtbuild.runtime.slabs import Accumulator, Row, accumulator_depth, rows_of_plan
from trtbuild.runtime.tiles import TilePlan, patch3
from trtbuild.spec import ModelSpec
from trtbuild.stitch.launches import Float
from trtbuild.volume import CaseGrid
from trtbuild.volume.back import WayBack, first_needed, label_type, ready_slices

BYTES: Mapping[Float, int] = {"f32": 4, "f16": 2}
KINDS: Mapping[Accumulator, Float] = {"float32": "f32", "float16": "f16"}
GRAIN = 2 << 20
"""Bytes in which a GPU gives memory (cuMemGetAllocationGranularity: 2 MiB on every GPU since Pascal)."""
SLAB_BYTES = 32 << 20
"""Of labels or probabilities that leave the device at once: 1 ms of copying, of which a launch is nothing."""
MEGABYTE = 1e6

Labels = Literal["whole", "slabs", "none"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceCase:
    """What a case is to the device.

    `shape` of the prepared case (C, Z, Y, X), `tiles` its windows and flips, `grid` and `way` the way back, `kinds`
    the types of the network's input and output, `smallest` and `largest` the tiles that every fold's engine takes.
    """

    spec: ModelSpec
    shape: tuple[int, ...]
    tiles: TilePlan
    grid: CaseGrid
    way: WayBack
    folds: int
    probabilities: bool
    kinds: tuple[Float, Float]
    smallest: int
    largest: int

    @property
    def patch(self) -> tuple[int, int, int]:
        """(pz, py, px)."""
        return patch3(self.spec)

    @property
    def flips(self) -> int:
        """Tiles of one window."""
        return len(self.tiles.flips)


@dataclass(frozen=True, kw_only=True, eq=False)
class DevicePlan:
    """How a case runs: tiles per call, what the sum is held in, and how the labels leave.

    `labels` "whole" lets them stay on the device until all are there, "slabs" does not, and "none" is for a way back
    that is not linear: logits leave, and the host goes on. `label_slices` and `probability_slices` are output slices
    per launch. `buffers` are the bytes of all device memory by what it is for.
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
        return sum(-(-size // GRAIN) * GRAIN for size in self.buffers.values())

    def __str__(self) -> str:
        leaving = {"whole": "labels at once", "slabs": "labels slab by slab", "none": "logits to the host"}
        return (
            f"batch {self.batch}, {self.accumulator} accumulator, {leaving[self.labels]}, "
            f"{self.nbytes / MEGABYTE:.0f} MB"
        )


def device_plans(case: DeviceCase, accumulators: Sequence[Accumulator]) -> tuple[DevicePlan, ...]:
    """All plans, from the best to the smallest; each takes less memory than the one before.

    Args:
        case: what runs.
        accumulators: types that are allowed, the best one first.
    """
    plans: list[DevicePlan] = []
    for plan in _plans(case, accumulators):
        if not plans or plan.nbytes < plans[-1].nbytes:
            plans.append(plan)
    return tuple(plans)


def fitting_plan(plans: Sequence[DevicePlan], free: int, engines: int) -> DevicePlan:
    """The best plan that fits.

    Args:
        plans: of `device_plans`.
        free: bytes of device memory that the case may take.
        engines: bytes of it that the engines will still allocate, for the activations of their first call.

    Raises:
        OutOfMemory: none fits; says what the smallest one takes.
    """
    for plan in plans:
        if plan.nbytes + engines <= free:
            return plan
    least = plans[-1]
    largest = max(least.buffers, key=lambda name: least.buffers[name])
    raise OutOfMemory(
        "The case does not fit into the GPU's memory.",
        expected=f"{(least.nbytes + engines) / MEGABYTE:.0f} MB free, for the smallest plan ({least}; the engines' "
        f"activations take {engines / MEGABYTE:.0f} MB, the {largest} {least.buffers[largest] / MEGABYTE:.0f} MB)",
        got=f"{free / MEGABYTE:.0f} MB",
        hint=_levers(plans),
    )


def smaller_plan(plans: Sequence[DevicePlan], failed: DevicePlan) -> DevicePlan | None:
    """The next plan that takes less than one that found no memory."""
    return next((plan for plan in plans if plan.nbytes < failed.nbytes), None)


def _levers(plans: Sequence[DevicePlan]) -> str:
    levers = ["close other programs that use the GPU", "compile with a smaller --max-batch", "use a CPU engine"]
    if all(plan.accumulator == "float32" for plan in plans):
        levers.insert(1, "allow a float16 accumulator by naming the limit yourself with --max-memory")
    return ", or ".join(levers)


def _plans(case: DeviceCase, accumulators: Sequence[Accumulator]) -> Iterator[DevicePlan]:
    ways: tuple[Labels, ...] = ("whole", "slabs") if case.way.streams else ("none",)
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
    rows = joined_rows(
        rows_of_plan(case.tiles, case.patch[0], lambda final: first_needed(case.way, ready_slices(case.way, final))),
        batch,
    )
    groups = groups_of_rows(rows, case.flips, case.smallest, batch)
    slices = (_slices(case, _label_plane(case)), _slices(case, _probability_plane(case)))
    return DevicePlan(
        batch=batch, accumulator=accumulator, labels=labels, rows=rows, groups=groups, label_slices=slices[0],
        probability_slices=slices[1], buffers=_buffers(case, groups, rows, accumulator, labels, slices),
    )  # fmt: skip


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


def _buffers(
    case: DeviceCase,
    groups: Sequence[Sequence[Group]],
    rows: Sequence[Row],
    accumulator: Accumulator,
    labels: Labels,
    slices: tuple[int, int],
) -> Mapping[str, int]:
    spec, voxels = case.spec, math.prod(case.patch)
    calls = [group for row in groups for group in row]
    batch = max(group.batch for group in calls)
    plane = math.prod(case.tiles.grid.shape[1:])
    sizes = {
        "image": BYTES["f32"] * math.prod(case.shape),
        "tables": table_bytes(case.tiles, calls, case.patch, case.way),
        "patches": BYTES[case.kinds[0]] * batch * case.shape[0] * voxels,
        "logits": BYTES[case.kinds[1]] * batch * spec.labels.heads * voxels,
        "accumulator": BYTES[KINDS[accumulator]] * spec.labels.heads * accumulator_depth(rows) * plane,
    }
    if labels == "whole":
        sizes["labels"] = math.prod(case.grid.shape) * label_bytes(spec)
    elif labels == "slabs":
        sizes["labels"] = slices[0] * _label_plane(case)
    if case.probabilities and labels != "none":
        sizes["probabilities"] = slices[1] * _probability_plane(case)
    return sizes


def label_bytes(spec: ModelSpec) -> int:
    """Of one voxel's label."""
    return np.dtype(label_type(spec.labels)).itemsize


def _label_plane(case: DeviceCase) -> int:
    return label_bytes(case.spec) * math.prod(case.grid.cropped[1:])


def _probability_plane(case: DeviceCase) -> int:
    return BYTES["f32"] * case.spec.labels.heads * math.prod(case.grid.cropped[1:])


def _slices(case: DeviceCase, plane: int) -> int:
    return max(1, min(case.grid.cropped[0], SLAB_BYTES // plane))
