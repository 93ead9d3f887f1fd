"""How much memory a case will take, counted before it starts.

Every number is a sum of buffers that the code allocates, in bytes; the shapes follow from the image's header. The crop
is not known then, so that an image with a rim of zeros needs less than is said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trtbuild.runtime.case import Recipe, Stages
from trtbuild.runtime.ensemble import BLOCK_BYTES
from trtbuild.runtime.predictor import Member, Settings
from trtbuild.runtime.slabs import accumulator_depth, rows_of_plan
from trtbuild.runtime.tiles import TilePlan, patch3, tile_plan
from trtbuild.spec import ModelSpec
from trtbuild.volume import CaseGrid
from trtbuild.volume.back import WayBack, first_needed, ready_slices, way_back, way_back_bytes
from trtbuild.volume.resample import new_shape
from trtbuild.volume.way import label_type

FLOAT, HALF = 4, 2


@dataclass(frozen=True, kw_only=True)
class CaseShape:
    """What an image's header says: shape (Z, Y, X), spacing (z, y, x) in mm, bytes per voxel in the file."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    voxel_bytes: int

    @property
    def voxels(self) -> int:
        """Of one channel."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True)
class CaseBytes:
    """Largest sums of a case's buffers while it is read and prepared (in both processes until it has arrived), in the
    network and on the way back, and being written. A case goes through them one after the other."""

    preparing: int
    network: int
    writing: int

    @property
    def alone(self) -> int:
        """Of a case that shares the memory with no other."""
        return max(self.preparing, self.network, self.writing)


def uncropped_grid(case: CaseShape, spec: ModelSpec) -> CaseGrid:
    """The way back of an image without a rim of zeros.

    Raises:
        InputError: the resampled grid is empty or too large (`new_shape`).
    """
    shape = tuple(case.shape[axis] for axis in spec.transpose_forward)
    spacing = tuple(case.spacing[axis] for axis in spec.transpose_forward)
    target = spec.spacing if spec.dimensions == 3 else (spacing[0], *spec.spacing)
    resampled = shape if spec.resample_data.method == "none" else new_shape(shape, spacing, target)
    box = (slice(0, shape[0]), slice(0, shape[1]), slice(0, shape[2]))
    return CaseGrid(shape=shape, box=box, spacing=spacing, target=target, resampled=resampled)


def case_bytes(case: CaseShape, models: Sequence[Stages], recipe: Recipe, settings: Settings) -> CaseBytes:
    """The buffers of one case.

    Args:
        case: its image.
        models: what runs.
        recipe: what becomes of the models' results.
        settings: of the windows.

    Raises:
        InputError: see `uncropped_grid`.
    """
    labels, maps = _label_bytes(case, models[0][-1].spec), _map_bytes(case, models[0][-1].spec, recipe, settings)
    return CaseBytes(
        preparing=_preparing_bytes(case, models),
        network=max(_network_bytes(case, models, recipe, settings), _postprocessing_bytes(case, recipe, labels) + maps),
        writing=2 * labels + maps + (FLOAT * case.voxels if recipe.disagreement else 0),  # the libraries copy
    )


def window_bytes(member: Member, fold: int) -> int:
    """Inputs and outputs of the windows that a runner has under way (`stream` keeps one more than it computes)."""
    info, spec = member.runners[fold].describe(), member.spec
    one = FLOAT * (spec.network_channels + spec.labels.heads) * math.prod(spec.patch)
    return (info.parallel + 1) * info.batch * one


def _label_bytes(case: CaseShape, spec: ModelSpec) -> int:
    return case.voxels * np.dtype(label_type(spec.labels)).itemsize


def _map_bytes(case: CaseShape, spec: ModelSpec, recipe: Recipe, settings: Settings) -> int:
    """Probabilities and disagreement on the image's grid."""
    maps = spec.labels.heads * settings.probabilities + recipe.disagreement
    return FLOAT * case.voxels * maps


def _postprocessing_bytes(case: CaseShape, recipe: Recipe, labels: int) -> int:
    from trtbuild.volume.postprocessing import postprocessing_bytes

    return labels + postprocessing_bytes(case.shape, labels // case.voxels) if recipe.postprocessing else 0


def _prepared_bytes(case: CaseShape, spec: ModelSpec) -> int:
    return FLOAT * spec.network_channels * math.prod(uncropped_grid(case, spec).resampled)


def _image_bytes(case: CaseShape, spec: ModelSpec) -> int:
    return FLOAT * len(spec.channels) * case.voxels


def _preparing_bytes(case: CaseShape, models: Sequence[Stages]) -> int:
    """The file beside the image; then the image beside its preparation; then what is prepared, on both sides of a pipe.

    A cascade keeps the image for its second stage.
    """
    from trtbuild.volume.preparation_memory import preparation_bytes

    specs = [stages[0].spec for stages in models]
    image = _image_bytes(case, specs[0])
    one_file = case.voxels * (case.voxel_bytes + (FLOAT if len(specs[0].channels) > 1 else 0))
    previous = 0
    stages, done = [image + one_file], 0
    for spec in specs:
        if spec.previous_stage is not None:
            previous = _label_bytes(case, spec)
        step = preparation_bytes(case.shape, case.spacing, spec, previous=spec.previous_stage is not None)
        stages.append(image + previous + done + step)
        done += _prepared_bytes(case, spec)
    stages.append(2 * done + _kept_image_bytes(case, models))
    return max(stages)


def _kept_image_bytes(case: CaseShape, models: Sequence[Stages]) -> int:
    return _image_bytes(case, models[0][0].spec) if any(len(stages) > 1 for stages in models) else 0


def _network_bytes(case: CaseShape, models: Sequence[Stages], recipe: Recipe, settings: Settings) -> int:
    """All models one after the other: the prepared cases of all, what runs, what the ones before have left."""
    soft = recipe.vote == "soft" and (len(models) > 1 or recipe.disagreement)
    prepared = sum(_prepared_bytes(case, stages[0].spec) for stages in models)
    left, most = 0, 0
    for stages in models:
        others = prepared - _prepared_bytes(case, stages[0].spec)
        most = max(most, left + others + _stages_bytes(case, stages, settings, keep_logits=soft))
        spec = stages[-1].spec
        left += _logit_bytes(case, spec, settings) if soft else _label_bytes(case, spec)
    if soft:
        most = max(most, left + prepared + _consensus_bytes(case, models, recipe, settings))
    return most + _kept_image_bytes(case, models)


def _consensus_bytes(case: CaseShape, models: Sequence[Stages], recipe: Recipe, settings: Settings) -> int:
    """Labels and maps of the image, and a block: the mean, a member's share, and what becomes of them."""
    spec = models[0][-1].spec
    plane = FLOAT * spec.labels.heads * math.prod(case.shape[1:])
    block = min(max(BLOCK_BYTES, plane), plane * case.shape[0])
    return _label_bytes(case, spec) + _map_bytes(case, spec, recipe, settings) + 3 * block


def _stages_bytes(case: CaseShape, stages: Stages, settings: Settings, *, keep_logits: bool) -> int:
    """One model. The second stage of a cascade is prepared from the first one's labels, which are on both sides."""
    from trtbuild.volume.preparation_memory import preparation_bytes

    last = stages[-1]
    if keep_logits:
        needed = [_loop_bytes(case, last, settings, whole=True)]
    elif settings.probabilities or not _way(case, last).streams:
        needed = [_loop_bytes(case, last, settings, whole=True), _whole_back_bytes(case, last, settings)]
    else:
        needed = [_loop_bytes(case, last, settings, whole=False) + _back_bytes(case, last, settings)]
    if len(stages) == 1:
        return max(needed)
    labels = _label_bytes(case, stages[0].spec)
    needed = [labels + size for size in needed]
    needed.append(2 * labels + preparation_bytes(case.shape, case.spacing, last.spec, previous=True))
    needed.append(labels + 2 * _prepared_bytes(case, last.spec))
    plain = replace(settings, probabilities=False)
    return max(*needed, _stages_bytes(case, stages[:1], plain, keep_logits=False))


def _way(case: CaseShape, member: Member) -> WayBack:
    return way_back(uncropped_grid(case, member.spec), member.spec)


def _logit_bytes(case: CaseShape, spec: ModelSpec, settings: Settings) -> int:
    return _item(settings) * spec.labels.heads * math.prod(uncropped_grid(case, spec).resampled)


def _item(settings: Settings) -> int:
    return HALF if settings.accumulator == "float16" else FLOAT


def _plan(case: CaseShape, member: Member, settings: Settings) -> TilePlan:
    return tile_plan(uncropped_grid(case, member.spec).resampled, member.spec, (), settings.step_size)


def _loop_bytes(case: CaseShape, member: Member, settings: Settings, *, whole: bool) -> int:
    """The tile loop: the case and its padded copy, the accumulator, the windows under way, the logits of a constant
    window per fold."""
    spec, plan = member.spec, _plan(case, member, settings)
    resampled = uncropped_grid(case, spec).resampled
    window = FLOAT * spec.labels.heads * math.prod(spec.patch)
    padded = plan.grid.shape != resampled
    voxels = math.prod(plan.grid.shape)
    depth = plan.grid.shape[0] if whole else _depth(case, member, plan)
    return (
        _prepared_bytes(case, spec)
        + (FLOAT * spec.network_channels * voxels if padded else 0)
        + _item(settings) * spec.labels.heads * voxels // plan.grid.shape[0] * depth
        + (_logit_bytes(case, spec, settings) if padded and whole else 0)
        + sum(window_bytes(member, fold) for fold in range(len(member.runners)))
        + (window * len(member.runners) if len(plan.grid) > 1 else 0)
    )


def _depth(case: CaseShape, member: Member, plan: TilePlan) -> int:
    """Slices that the accumulator holds where the labels leave slab by slab."""
    way = _way(case, member)
    rows = rows_of_plan(plan, patch3(member.spec)[0], lambda final: first_needed(way, ready_slices(way, final)))
    return accumulator_depth(rows)


def _back_bytes(case: CaseShape, member: Member, settings: Settings) -> int:
    """The segmentation and the scratch of the loops, besides the logits."""
    return way_back_bytes(uncropped_grid(case, member.spec), member.spec, settings.threads)


def _whole_back_bytes(case: CaseShape, member: Member, settings: Settings) -> int:
    """The way back from the logits of the whole case, with the probabilities where they are asked for."""
    spec = member.spec
    stack = FLOAT * spec.labels.heads * case.voxels if settings.probabilities else 0
    kept = _prepared_bytes(case, spec) + _logit_bytes(case, spec, settings)
    # the probabilities are made in the network's axis order, and with a maximum and a sum per voxel
    return kept + _back_bytes(case, member, settings) + (2 * stack + FLOAT * case.voxels if stack else 0)
