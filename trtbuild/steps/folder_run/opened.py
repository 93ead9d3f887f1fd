"""The bundles of a run, opened once for each GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace

from trtbuild.config import PredictConfig
from trtbuild.errors import EngineError
from trtbuild.runtime import Member
from trtbuild.steps.prediction.predictor import Predictor, open_predictor, rules_from


def opened_predictors(config: PredictConfig, stack: ExitStack) -> dict[int, Predictor]:
    """A predictor for each GPU, by its number.

    Args:
        config: of the run.
        stack: closes them.

    Raises:
        EngineError: several GPUs are named, and the engines do not run on them, or differ; or see `open_predictor`.
        BundleError, ModelError: see there.
    """
    predictors: dict[int, Predictor] = {}
    for device in config.devices:
        predictors[device] = stack.enter_context(_opened_on(config, device))
        if len(config.devices) > 1 and not predictors[device].on_device:
            raise EngineError(
                "The cases cannot go over several GPUs.",
                expected="engines that all run on a GPU",
                got="; ".join(_engines_and_refusals(predictors[device])),
                where=f"GPU {device}",
                hint="leave --devices out, or name a backend for GPUs with --backend",
            )
    _check_same_engines(predictors)
    return predictors


def joined_predictor(predictors: Sequence[Predictor]) -> Predictor:
    """The first predictor with the others' GPUs: all of them share the windows of every case.

    Args:
        predictors: of `opened_predictors`, several; they stay open as long as this one is used.
    """
    first, *others = predictors
    models = [
        replace(
            model,
            stages=tuple(
                _joined(stage, [other.models[number].stages[at] for other in others])
                for at, stage in enumerate(model.stages)
            ),
        )
        for number, model in enumerate(first.models)
    ]
    return replace(first, models=tuple(models))


def _joined(stage: Member, others: Sequence[Member]) -> Member:
    if stage.device is None:
        raise ValueError("only a stage on a GPU can be shared")
    places = tuple(other.device for other in others if other.device is not None)
    return replace(stage, device=replace(stage.device, others=places))


def _opened_on(config: PredictConfig, device: int) -> Predictor:
    return open_predictor(
        config.bundles,
        backend=config.backend,
        folds=config.folds,
        threads=config.threads,
        previous_stage=config.previous_stage is not None,
        weights=config.weights,
        vote=config.vote,
        disagreement=config.disagreement,
        postprocessing=() if str(config.postprocessing) == "none" else rules_from(config.postprocessing),
        device=device,
        device_memory=config.device_memory,
    )


def _engines_and_refusals(predictor: Predictor) -> list[str]:
    """What runs, and why not what was tried before it."""
    return [
        " ".join((model.backend, *(f"(not {name}: {' '.join(reason.split())})" for name, reason in model.refused)))
        for model in predictor.models
    ]


def _check_same_engines(predictors: Mapping[int, Predictor]) -> None:
    """The outputs of a case must not depend on which GPU takes it: one of another kind may round in another way."""
    (first, expected), *others = ((device, _engines(predictor)) for device, predictor in predictors.items())
    for device, engines in others:
        if engines != expected:
            raise EngineError(
                "The GPUs do not run the same engines.",
                expected=f"on all what GPU {first} runs: {', '.join(expected)}",
                got=", ".join(engines),
                where=f"GPU {device}",
                hint="name GPUs of one kind with --devices, or one backend with --backend",
            )


def _engines(predictor: Predictor) -> list[str]:
    infos = [runner.describe() for model in predictor.models for stage in model.stages for runner in stage.runners]
    return [f"{info.backend} {info.version} in {info.inference_precision} on {info.device}" for info in infos]
