"""One case through everything that was opened: the stages of a cascade, the members of an ensemble, post-processing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Union, cast

from numpy.typing import NDArray

from trtbuild.config import Vote
from trtbuild.runtime.ensemble import Consensus, MemberLogits, consensus_from_logits, consensus_from_votes
from trtbuild.runtime.on_device import PreparedInstead, given_back, member_logits, member_prediction
from trtbuild.runtime.predictor import Clock, Member, Prediction, Progress, Settings, tell
from trtbuild.spec import KeepLargestComponent
from trtbuild.volume import Prepared
from trtbuild.volume.back import Segmentation, way_back

if TYPE_CHECKING:
    from trtbuild.runtime.gpu.prepare import DevicePrepared

Stages = tuple[Member, ...]
Prepare = Callable[[int, int, NDArray[Any] | None], Union[Prepared, "DevicePrepared"]]
"""Called with (model, stage, labels of the stage before or None); gives the case as that stage's network sees it. Each
is called for once it is needed, so that only one lies on a GPU."""


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


@dataclass(frozen=True, kw_only=True, eq=False)
class _Running:
    """One case while it runs; `notes` are what members report, which becomes warnings of the case."""

    prepare: Prepare
    settings: Settings
    progress: Progress | None
    clock: Clock = field(default_factory=Clock)
    notes: list[str] = field(default_factory=list)


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
    run = _Running(prepare=prepare, settings=settings, progress=progress)
    if len(models) == 1 and not recipe.disagreement:
        prediction = _of_model(models[0], 0, run)
    elif recipe.vote == "soft":
        prediction = _averaged(models, recipe, run)
    else:
        prediction = _voted(models, recipe, run)
    return _postprocessed(replace(prediction, warnings=tuple(dict.fromkeys(run.notes))), recipe, run.clock)


def _of_model(stages: Stages, model: int, run: _Running) -> Prediction:
    """The last stage's result."""
    return _of_stage(_last_stage(stages, model, run), stages[-1], run, run.settings)


def _of_stage(prepared: Prepared | DevicePrepared, stage: Member, run: _Running, settings: Settings) -> Prediction:
    return member_prediction(prepared, stage, settings, run.progress, run.clock, run.notes.append)


def _last_stage(stages: Stages, model: int, run: _Running) -> Prepared | DevicePrepared:
    """The case as the last stage's network sees it, after the stages before it have run."""
    labels = None
    plain = replace(run.settings, probabilities=False)
    for number, stage in enumerate(stages[:-1]):
        prepared = _prepared(run, model, number, labels)
        labels = _of_stage(prepared, stage, run, plain).segmentation
    return _prepared(run, model, len(stages) - 1, labels)


def _prepared(run: _Running, model: int, stage: int, labels: NDArray[Any] | None) -> Prepared | DevicePrepared:
    tell(run.progress, "prepare", 0, 1)
    prepared = run.prepare(model, stage, labels)
    try:
        tell(run.progress, "prepare", 1, 1)
    except BaseException:  # nobody else would give it back
        given_back(prepared)
        raise
    if isinstance(prepared, PreparedInstead):
        run.notes.append(prepared.note)
    run.clock.lap("prepare")
    return prepared


def _averaged(models: Sequence[Stages], recipe: Recipe, run: _Running) -> Prediction:
    def logits() -> Iterator[MemberLogits]:
        for number, stages in enumerate(models):
            prepared = _last_stage(stages, number, run)
            logits = member_logits(prepared, stages[-1], run.settings, run.progress, run.notes.append)
            run.clock.lap("network")
            spec = stages[-1].spec
            yield MemberLogits(logits=logits, spec=spec, way=way_back(prepared.grid, spec))

    members = tuple(logits())
    tell(run.progress, "back", 0, 1)
    consensus = consensus_from_logits(
        members,
        recipe.weights,
        probabilities=run.settings.probabilities,
        disagreement=recipe.disagreement,
        threads=run.settings.threads,
    )
    tell(run.progress, "back", 1, 1)
    run.clock.lap("back")
    return _prediction(consensus, members[0], run.clock)


def _voted(models: Sequence[Stages], recipe: Recipe, run: _Running) -> Prediction:
    results = [_of_model(stages, number, run) for number, stages in enumerate(models)]
    votes = consensus_from_votes(
        [r.segmentation for r in results],
        models[0][-1].spec.labels,
        recipe.weights,
        disagreement=recipe.disagreement,
    )
    run.clock.lap("back")
    return replace(
        results[0],
        segmentation=cast(Segmentation, votes.segmentation),
        probabilities=None,
        disagreement=votes.disagreement,
        seconds=run.clock.seconds,
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
