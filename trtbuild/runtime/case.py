"""One case through everything that was opened: the stages of a cascade, the members of an ensemble, post-processing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from numpy.typing import NDArray

from trtbuild.config import Vote
from trtbuild.runtime.ensemble import Consensus, MemberLogits, consensus_from_logits, consensus_from_votes
from trtbuild.runtime.predictor import (
    Clock,
    Member,
    Prediction,
    Progress,
    Settings,
    case_logits,
    prediction_from_prepared,
    tell,
)
from trtbuild.spec import KeepLargestComponent
from trtbuild.volume import Prepared
from trtbuild.volume.back import Segmentation, way_back

Stages = tuple[Member, ...]
Prepare = Callable[[int, int, NDArray[Any] | None], Prepared]
"""Called with (model, stage, labels of the stage before or None); gives the case as that stage's network sees it."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What becomes of the members' results.

    `weights` one per model; `vote` "soft" averages probabilities, "hard" counts labels; `disagreement` asks for the
    entropy map; `postprocessing` is done to the segmentation, in this order.
    """

    weights: tuple[float, ...]
    vote: Vote = "soft"
    disagreement: bool = False
    postprocessing: tuple[KeepLargestComponent, ...] = ()


def prediction_from_models(
    models: Sequence[Stages], prepare: Prepare, recipe: Recipe, settings: Settings, progress: Progress | None
) -> Prediction:
    """Segments one case.

    Args:
        models: of each its stages: one, or two for a cascade, whose first runs first and hands its labels on.
        prepare: reads nothing anew; transposes, crops, normalises and resamples the case for one stage.
        recipe: how the models' results become one.
        settings: of the windows.
        progress: called as the case advances.
    """
    clock = Clock()
    if len(models) == 1 and not recipe.disagreement:
        prepared = _last_stage(models[0], 0, prepare, settings, progress, clock)
        prediction = prediction_from_prepared(prepared, models[0][-1], settings, progress, clock)
    elif recipe.vote == "soft":
        prediction = _averaged(models, prepare, recipe, settings, progress, clock)
    else:
        prediction = _voted(models, prepare, recipe, settings, progress, clock)
    return _postprocessed(prediction, recipe, clock)


def _last_stage(
    stages: Stages, model: int, prepare: Prepare, settings: Settings, progress: Progress | None, clock: Clock
) -> Prepared:
    """The case as the last stage's network sees it, after the stages before it have run."""
    labels = None
    for number, stage in enumerate(stages[:-1]):
        prepared = _prepared(prepare, model, number, labels, progress, clock)
        plain = replace(settings, probabilities=False)
        labels = prediction_from_prepared(prepared, stage, plain, progress, clock).segmentation
    return _prepared(prepare, model, len(stages) - 1, labels, progress, clock)


def _prepared(
    prepare: Prepare, model: int, stage: int, labels: NDArray[Any] | None, progress: Progress | None, clock: Clock
) -> Prepared:
    tell(progress, "prepare", 0, 1)
    prepared = prepare(model, stage, labels)
    tell(progress, "prepare", 1, 1)
    clock.lap("prepare")
    return prepared


def _averaged(
    models: Sequence[Stages],
    prepare: Prepare,
    recipe: Recipe,
    settings: Settings,
    progress: Progress | None,
    clock: Clock,
) -> Prediction:
    def logits() -> Iterator[MemberLogits]:
        for number, stages in enumerate(models):
            prepared = _last_stage(stages, number, prepare, settings, progress, clock)
            logits = case_logits(prepared, stages[-1], settings, progress)
            clock.lap("network")
            spec = stages[-1].spec
            yield MemberLogits(logits=logits, spec=spec, way=way_back(prepared.grid, spec))

    members = tuple(logits())
    tell(progress, "back", 0, 1)
    consensus = consensus_from_logits(
        members,
        recipe.weights,
        probabilities=settings.probabilities,
        disagreement=recipe.disagreement,
        threads=settings.threads,
    )
    tell(progress, "back", 1, 1)
    clock.lap("back")
    return _prediction(consensus, members[0], clock)


def _voted(
    models: Sequence[Stages],
    prepare: Prepare,
    recipe: Recipe,
    settings: Settings,
    progress: Progress | None,
    clock: Clock,
) -> Prediction:
    results = []
    for number, stages in enumerate(models):
        prepared = _last_stage(stages, number, prepare, settings, progress, clock)
        results.append(prediction_from_prepared(prepared, stages[-1], settings, progress, clock))
    votes = consensus_from_votes(
        [r.segmentation for r in results],
        models[0][-1].spec.labels,
        recipe.weights,
        disagreement=recipe.disagreement,
    )
    clock.lap("back")
    return replace(
        results[0],
        segmentation=cast(Segmentation, votes.segmentation),
        probabilities=None,
        disagreement=votes.disagreement,
        seconds=clock.seconds,
    )


def _prediction(consensus: Consensus, first: MemberLogits, clock: Clock) -> Prediction:
    return Prediction(
        segmentation=consensus.segmentation,
        probabilities=consensus.probabilities,
        disagreement=consensus.disagreement,
        grid=first.way.grid,
        seconds=clock.seconds,
    )


def _postprocessed(prediction: Prediction, recipe: Recipe, clock: Clock) -> Prediction:
    if not recipe.postprocessing:
        return prediction
    from trtbuild.volume.postprocessing import postprocessed

    segmentation = cast(Segmentation, postprocessed(prediction.segmentation, recipe.postprocessing))
    clock.lap("back")
    return replace(prediction, segmentation=segmentation, seconds=clock.seconds)
