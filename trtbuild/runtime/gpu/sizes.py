"""What a case is to a GPU, and how many bytes each of its arrays takes there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trtbuild.runtime.gpu.tables import Group, table_bytes
from trtbuild.runtime.slabs import Accumulator, Row, accumulator_depth
from trtbuild.runtime.tiles import TilePlan, patch3
from trtbuild.spec import ModelSpec
from trtbuild.stitch.launches import Float
from trtbuild.volume import CaseGrid
from trtbuild.volume.back import WayBack, label_type

BYTES: Mapping[Float, int] = {"f32": 4, "f16": 2}
KINDS: Mapping[Accumulator, Float] = {"float32": "f32", "float16": "f16"}
Labels = Literal["whole", "slabs", "none"]


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceCase:
    """What a case is to the device.

    `shape` of the prepared case (C, Z, Y, X), `tiles` its windows and flips, `grid` and `way` the way back, `kinds`
    the types of the network's input and output, `smallest` and `largest` the tiles that every fold's engine takes;
    `wants_logits` where they are the result; `resident` where the prepared case is on the device already,
    `labels_stay` where the labels are wanted there, in memory that is not the case's. `first` is the slice of the whole
    that the case begins with, where it is a part of one that several GPUs share.
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
    wants_logits: bool = False
    resident: bool = False
    labels_stay: bool = False
    first: int = 0

    @property
    def patch(self) -> tuple[int, int, int]:
        """(pz, py, px)."""
        return patch3(self.spec)

    @property
    def ends_on_host(self) -> bool:
        """Whether logits leave, and not labels."""
        return self.wants_logits or not self.way.streams

    @property
    def image_bytes(self) -> int:
        """Of the prepared case."""
        return BYTES["f32"] * math.prod(self.shape)

    @property
    def whole_label_bytes(self) -> int:
        """Of the labels of the whole image."""
        return math.prod(self.grid.shape) * label_bytes(self.spec)

    @property
    def held(self) -> tuple[int, ...]:
        """Bytes of what is on the device before the case begins."""
        return (self.image_bytes,) * self.resident + (self.whole_label_bytes,) * self.labels_stay

    @property
    def logit_bytes(self) -> int:
        """Of one tile."""
        return BYTES[self.kinds[1]] * self.spec.labels.heads * math.prod(self.patch)

    @property
    def flips(self) -> int:
        """Tiles of one window."""
        return len(self.tiles.flips)


def buffer_bytes(
    case: DeviceCase,
    groups: Sequence[Sequence[Group]],
    rows: Sequence[Row],
    accumulator: Accumulator,
    labels: Labels,
    slices: tuple[int, int],
) -> Mapping[str, int]:
    """Bytes of all device memory of a case, by what it is for.

    Args:
        case: what runs.
        groups: the calls, by row.
        rows: of the windows.
        accumulator: what the sum is held in.
        labels: how they leave.
        slices: of labels and of probabilities that leave at once.
    """
    spec, voxels = case.spec, math.prod(case.patch)
    calls = [group for row in groups for group in row]
    batch = max(group.batch for group in calls)
    plane = math.prod(case.tiles.grid.shape[1:])
    sizes = {} if case.resident else {"image": case.image_bytes}
    sizes |= {
        "tables": table_bytes(case.tiles, calls, case.patch, case.way),
        "patches": BYTES[case.kinds[0]] * batch * case.shape[0] * voxels,
        "logits": batch * case.logit_bytes,
        "accumulator": BYTES[KINDS[accumulator]] * spec.labels.heads * accumulator_depth(rows) * plane,
    }
    if labels == "whole" and not case.labels_stay:
        sizes["labels"] = case.whole_label_bytes
    elif labels == "slabs":
        sizes["labels"] = slices[0] * label_plane(case)
    if case.probabilities and labels != "none":
        sizes["probabilities"] = slices[1] * probability_plane(case)
    return sizes


def label_bytes(spec: ModelSpec) -> int:
    """Of one voxel's label."""
    return np.dtype(label_type(spec.labels)).itemsize


def label_plane(case: DeviceCase) -> int:
    """Of one output slice of labels, in bytes."""
    return label_bytes(case.spec) * math.prod(case.grid.cropped[1:])


def probability_plane(case: DeviceCase) -> int:
    """Of one output slice of all probabilities, in bytes."""
    return BYTES["f32"] * case.spec.labels.heads * math.prod(case.grid.cropped[1:])
