"""How many bytes one model takes for a case: its tile loops and its way back, before the case starts.

Every number is a sum of buffers that the code allocates; the shapes follow from the image's header. The crop is not
known then, so that an image with a rim of zeros needs less than is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from trtbuild.runtime.case import Stages
from trtbuild.runtime.gpu.plan import CALLS, SLAB_BYTES, joined_rows
from trtbuild.runtime.gpu.prepare_plan import bytes_on_device
from trtbuild.runtime.predictor import Member, Settings
from trtbuild.runtime.slabs import Row, accumulator_depth, rows_of_plan
from trtbuild.runtime.tiles import TilePlan, patch3, tile_plan
from trtbuild.spec import ModelSpec
from trtbuild.volume import CaseGrid
from trtbuild.volume.back import (
    WayBack,
    first_needed,
    label_type,
    probabilities_bytes,
    ready_slices,
    way_back,
    way_back_bytes,
)
from trtbuild.volume.preparation import uncropped_grid
from trtbuild.volume.preparation.memory import preparation_bytes

FLOAT, HALF = 4, 2


@dataclass(frozen=True, kw_only=True)
class CaseShape:
    """What an image's header says: shape (Z, Y, X), spacing (z, y, x) in mm, the bytes that a voxel of one channel
    takes in its library besides the float32 of the image, and in how many files the channels stand."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    voxel_bytes: int
    files: int = 1

    @property
    def voxels(self) -> int:
        """Of one channel."""
        return math.prod(self.shape)


def _grid(case: CaseShape, spec: ModelSpec) -> CaseGrid:
    return uncropped_grid(case.shape, case.spacing, spec)


def window_bytes(member: Member, fold: int) -> int:
    """Inputs and outputs of the windows that a runner has under way (`stream` keeps one more than it computes)."""
    info, spec = member.runners[fold].describe(), member.spec
    one = FLOAT * (spec.network_channels + spec.labels.heads) * math.prod(spec.patch)
    return (info.parallel + 1) * info.batch * one


def label_bytes(case: CaseShape, spec: ModelSpec) -> int:
    """Of a segmentation on the image's grid."""
    return case.voxels * np.dtype(label_type(spec.labels)).itemsize


def prepared_bytes(case: CaseShape, spec: ModelSpec) -> int:
    """Of a case as the network's windows are cut from it."""
    return FLOAT * spec.network_channels * math.prod(_grid(case, spec).resampled)


def is_raw(models: Sequence[Stages]) -> bool:
    """Whether a case comes as it was read, because every stage runs on a GPU, which also prepares it."""
    return all(stage.device is not None for stages in models for stage in stages)


def stages_bytes(case: CaseShape, stages: Stages, settings: Settings, *, keep_logits: bool, raw: bool = False) -> int:
    """One model. The second stage of a cascade is prepared from the first one's labels, which are on both sides.

    With `raw` see `is_raw`: there is one side, and few stages are prepared on the host (`_is_prepared_on_host`).
    """
    last, sides = stages[-1], 1 if raw else 2
    needed = _member_bytes(case, last, settings, keep_logits=keep_logits, raw=raw)
    if raw and _is_prepared_on_host(case, last):
        previous = last.spec.previous_stage is not None
        needed = max(needed, preparation_bytes(case.shape, case.spacing, last.spec, previous=previous))
    if len(stages) == 1:
        return needed
    labels = label_bytes(case, stages[0].spec)
    plain = replace(settings, probabilities=False)
    return max(
        labels + needed,
        sides * labels + preparation_bytes(case.shape, case.spacing, last.spec, previous=True),
        labels + sides * prepared_bytes(case, last.spec),
        stages_bytes(case, stages[:1], plain, keep_logits=False, raw=raw),
    )


def _member_bytes(case: CaseShape, member: Member, settings: Settings, *, keep_logits: bool, raw: bool) -> int:
    """One stage, with its prepared case where that is on the host."""
    if member.device is not None:
        on_host = not raw or bool(member.device.others) or _is_prepared_on_host(case, member)
        prepared = prepared_bytes(case, member.spec) if on_host else 0
        return prepared + _result_bytes(case, member, settings, keep_logits=keep_logits)
    if keep_logits:
        return _loop_bytes(case, member, settings, whole=True)
    if settings.probabilities or not _way(case, member).streams:
        return max(_loop_bytes(case, member, settings, whole=True), _whole_back_bytes(case, member, settings))
    return _loop_bytes(case, member, settings, whole=False) + _back_bytes(case, member, settings)


def _is_prepared_on_host(case: CaseShape, member: Member) -> bool:
    """Of a member on a GPU: a second stage is, and a case that the user's limit does not let the GPU prepare."""
    limit = None if member.device is None else member.device.limit
    if member.spec.previous_stage is not None or limit is None:
        return member.spec.previous_stage is not None
    return bytes_on_device(case.shape, case.spacing, member.spec) > limit


def _result_bytes(case: CaseShape, member: Member, settings: Settings, *, keep_logits: bool) -> int:
    """What comes from a GPU: the labels with the probabilities, slab by slab, or the logits of the whole case."""
    spec, plan = member.spec, _plan(case, member, settings)
    channel = _item(settings) * math.prod(plan.grid.shape)  # one class at a time comes with its padding
    others = 0 if member.device is None else len(member.device.others)
    logits = channel + logit_bytes(case, spec, settings)
    if others:  # what each GPU has found, and a copy of its part of the case, beside the logits of the whole
        overlap = others * patch3(spec)[0] / plan.grid.shape[0]
        logits += int((1 + overlap) * (logit_bytes(case, spec, settings) + prepared_bytes(case, spec)))
    if keep_logits:
        return logits
    if others or not _way(case, member).streams:
        return max(logits, _whole_back_bytes(case, member, settings) - prepared_bytes(case, spec))
    result = label_bytes(case, spec) + (FLOAT * spec.labels.heads * case.voxels if settings.probabilities else 0)
    return result + min(SLAB_BYTES, result // _grid(case, spec).cropped[0] * _leaving(case, member, plan))


def _leaving(case: CaseShape, member: Member, plan: TilePlan) -> int:
    """The most slices that leave a GPU at once: those that one row of windows makes ready."""
    way = _way(case, member)
    most = min(engine.largest for engine in member.device.engines) if member.device is not None else 1
    rows = joined_rows(_rows(way, member, plan), CALLS * most)
    ready = [0, *(ready_slices(way, min(row.final, plan.grid.inside[0].stop)) for row in rows)]
    return max(b - a for a, b in pairwise(ready))


def _way(case: CaseShape, member: Member) -> WayBack:
    return way_back(_grid(case, member.spec), member.spec)


def logit_bytes(case: CaseShape, spec: ModelSpec, settings: Settings) -> int:
    """Of the logits of the whole case on the network's grid."""
    return _item(settings) * spec.labels.heads * math.prod(_grid(case, spec).resampled)


def _item(settings: Settings) -> int:
    return HALF if settings.accumulator == "float16" else FLOAT


def _plan(case: CaseShape, member: Member, settings: Settings) -> TilePlan:
    return tile_plan(_grid(case, member.spec).resampled, member.spec, (), settings.step_size)


def _loop_bytes(case: CaseShape, member: Member, settings: Settings, *, whole: bool) -> int:
    """The tile loop: the case and its padded copy, the accumulator, the windows under way, the logits of a constant
    window per fold."""
    spec, plan = member.spec, _plan(case, member, settings)
    resampled = _grid(case, spec).resampled
    window = FLOAT * spec.labels.heads * math.prod(spec.patch)
    padded = plan.grid.shape != resampled
    voxels = math.prod(plan.grid.shape)
    depth = plan.grid.shape[0] if whole else _depth(case, member, plan)
    return (
        prepared_bytes(case, spec)
        + (FLOAT * spec.network_channels * voxels if padded else 0)
        + _item(settings) * spec.labels.heads * voxels // plan.grid.shape[0] * depth
        + (logit_bytes(case, spec, settings) if padded and whole else 0)
        + sum(window_bytes(member, fold) for fold in range(len(member.runners)))
        + (window * len(member.runners) if len(plan.grid) > 1 else 0)
    )


def _depth(case: CaseShape, member: Member, plan: TilePlan) -> int:
    """Slices that the accumulator holds where the labels leave slab by slab."""
    return accumulator_depth(_rows(_way(case, member), member, plan))


def _rows(way: WayBack, member: Member, plan: TilePlan) -> Sequence[Row]:
    return rows_of_plan(plan, patch3(member.spec)[0], lambda final: first_needed(way, ready_slices(way, final)))


def _back_bytes(case: CaseShape, member: Member, settings: Settings) -> int:
    """The segmentation and the scratch of the loops, besides the logits."""
    return way_back_bytes(_grid(case, member.spec), member.spec, settings.threads)


def _whole_back_bytes(case: CaseShape, member: Member, settings: Settings) -> int:
    """The way back from the logits of the whole case, with the probabilities where they are asked for."""
    spec = member.spec
    grid = _grid(case, spec)
    stack = probabilities_bytes(grid, spec, settings.threads) if settings.probabilities else 0
    kept = prepared_bytes(case, spec) + logit_bytes(case, spec, settings)
    return kept + label_bytes(case, spec) + max(_back_bytes(case, member, settings) - label_bytes(case, spec), stack)
