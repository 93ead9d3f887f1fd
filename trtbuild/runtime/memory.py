"""How much memory a case will take, counted before it starts: read and prepared, in the network, written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trtbuild.runtime.case import Recipe, Stages
from trtbuild.runtime.ensemble import BLOCK_BYTES
from trtbuild.runtime.model_memory import (
    FLOAT,
    CaseShape,
    is_raw,
    label_bytes,
    logit_bytes,
    prepared_bytes,
    stages_bytes,
    window_bytes,
)
from trtbuild.runtime.predictor import Settings
from trtbuild.spec import ModelSpec
from trtbuild.volume.preparation.memory import preparation_bytes

__all__ = ["CaseBytes", "CaseShape", "case_bytes", "window_bytes"]


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
    labels, maps = label_bytes(case, models[0][-1].spec), _map_bytes(case, models[0][-1].spec, recipe, settings)
    return CaseBytes(
        preparing=_preparing_bytes(case, models),
        network=max(_network_bytes(case, models, recipe, settings), _postprocessing_bytes(case, recipe, labels) + maps),
        writing=2 * labels + maps + (FLOAT * case.voxels if recipe.disagreement else 0),  # the libraries copy
    )


def _map_bytes(case: CaseShape, spec: ModelSpec, recipe: Recipe, settings: Settings) -> int:
    """Probabilities and disagreement on the image's grid."""
    maps = spec.labels.heads * settings.probabilities + recipe.disagreement
    return FLOAT * case.voxels * maps


def _postprocessing_bytes(case: CaseShape, recipe: Recipe, labels: int) -> int:
    from trtbuild.volume.postprocessing import postprocessing_bytes

    return labels + postprocessing_bytes(case.shape, labels // case.voxels) if recipe.postprocessing else 0


def _image_bytes(case: CaseShape, spec: ModelSpec) -> int:
    return FLOAT * len(spec.channels) * case.voxels


def _preparing_bytes(case: CaseShape, models: Sequence[Stages]) -> int:
    """The file beside the image; then the image beside its preparation; then what is prepared, on both sides of a pipe.

    A cascade keeps the image for its second stage. For a GPU the image itself goes through the pipe.
    """
    specs = [stages[0].spec for stages in models]
    image = _image_bytes(case, specs[0])
    if is_raw(models):
        return max(_reading_bytes(case, specs[0]), 2 * _kept_image_bytes(case, models))
    previous, done, stages = 0, 0, [_reading_bytes(case, specs[0])]
    for spec in specs:
        if spec.previous_stage is not None:
            previous = label_bytes(case, spec)
        step = preparation_bytes(case.shape, case.spacing, spec, previous=spec.previous_stage is not None)
        stages.append(image + previous + done + step)
        done += prepared_bytes(case, spec)
    stages.append(2 * done + _kept_image_bytes(case, models))
    return max(stages)


def _reading_bytes(case: CaseShape, spec: ModelSpec) -> int:
    """One file is the image itself, beside its library's voxels; of several, the first and the latest stay apart."""
    image = _image_bytes(case, spec)
    part = image // case.files
    in_library = case.voxel_bytes * case.voxels * len(spec.channels) // case.files
    return image + in_library + (2 * part if case.files > 1 else 0)


def _kept_image_bytes(case: CaseShape, models: Sequence[Stages]) -> int:
    """The image where it is still needed, with the labels of an earlier stage that come with it."""
    if is_raw(models):
        given = [label_bytes(case, stages[0].spec) for stages in models if stages[0].spec.previous_stage is not None]
        return _image_bytes(case, models[0][0].spec) + max(given, default=0)
    return _image_bytes(case, models[0][0].spec) if any(len(stages) > 1 for stages in models) else 0


def _network_bytes(case: CaseShape, models: Sequence[Stages], recipe: Recipe, settings: Settings) -> int:
    """All models one after the other: the prepared cases of all, what runs, what the ones before have left."""
    soft = recipe.vote == "soft" and (len(models) > 1 or recipe.disagreement)
    raw = is_raw(models)
    firsts = [0 if raw else prepared_bytes(case, stages[0].spec) for stages in models]
    prepared = sum(firsts)
    left, most = 0, 0
    for stages, first in zip(models, firsts, strict=True):
        others = prepared - first
        most = max(most, left + others + stages_bytes(case, stages, settings, keep_logits=soft, raw=raw))
        spec = stages[-1].spec
        left += logit_bytes(case, spec, settings) if soft else label_bytes(case, spec)
    if soft:
        most = max(most, left + prepared + _consensus_bytes(case, models, recipe, settings))
    elif len(models) > 1:
        most = max(most, left + prepared + _vote_bytes(case, models[0][-1].spec, recipe))
    return most + _kept_image_bytes(case, models)


def _consensus_bytes(case: CaseShape, models: Sequence[Stages], recipe: Recipe, settings: Settings) -> int:
    """Labels and maps of the image, and a block: the mean, a member's share of it, or the terms of the entropy."""
    spec = models[0][-1].spec
    plane = FLOAT * spec.labels.heads * math.prod(case.shape[1:])
    block = min(max(BLOCK_BYTES, plane), plane * case.shape[0])
    return (
        label_bytes(case, spec) + _map_bytes(case, spec, recipe, settings) + block * (4 if recipe.disagreement else 3)
    )


def _vote_bytes(case: CaseShape, spec: ModelSpec, recipe: Recipe) -> int:
    """Labels and map of the image, and a block: shares, the best of them, entropy, and their temporaries."""
    plane = math.prod(case.shape[1:])
    block = min(max(BLOCK_BYTES // 16, plane), case.voxels)
    return label_bytes(case, spec) + FLOAT * case.voxels * recipe.disagreement + 6 * FLOAT * block
