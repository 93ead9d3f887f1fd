"""`predict`: a folder, files, case lists or DICOM series become segmentations under nnU-Net's file names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trtbuild
from trtbuild.config import PredictConfig
from trtbuild.machine import keep_no_large_block
from trtbuild.runtime import Settings
from trtbuild.spec import json_from_value
from trtbuild.steps.folder_run.devices import run_cases_on_devices
from trtbuild.steps.folder_run.ending import Ending, Outcome
from trtbuild.steps.folder_run.flow import Events, Run, Source, run_cases
from trtbuild.steps.folder_run.inputs import files_beside_case
from trtbuild.steps.folder_run.local import LocalWorker
from trtbuild.steps.folder_run.opened import joined_predictor, opened_predictors
from trtbuild.steps.folder_run.outputs import COPIES, Folder, check_folder, check_inputs, prepared_folder
from trtbuild.steps.folder_run.planning import Planner, host_growth, planner_of_run
from trtbuild.steps.folder_run.worker import open_worker
from trtbuild.steps.folder_run.workers import open_workers
from trtbuild.steps.prediction.predictor import Predictor

if TYPE_CHECKING:
    from trtbuild.runtime.gpu.uploads import Uploads
    from trtbuild.volume.cases import Case


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A whole run. `engine` describes what ran; `refused` lists engines that were tried before it, with reasons.

    In `engine`, `network_precision` is that of the network (int8), `precision` what the backend computes the rest in.
    """

    bundle: str
    engine: Mapping[str, str]
    refused: tuple[tuple[str, str], ...]
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The cases that have an error."""
        return tuple(o for o in self.outcomes if o.error is not None)


def predict_cases(config: PredictConfig, events: Events | None = None) -> Summary:
    """Predicts every case. A bad image, or one that memory cannot hold, fails its own case only.

    A full disk or a broken engine ends the run. Outputs that an earlier run left for these cases are removed before
    the first case starts, unless `config.continue_prediction` keeps them: it keeps what the same settings made of
    inputs that have not changed since. A case of other inputs is predicted anew, and a warning says so.

    Args:
        config: bundles, inputs, output folder, settings.
        events: callbacks for progress.

    Raises:
        InputError: there is nothing to predict, or an output would overwrite an input.
        BundleError, EngineError, OutputError: nothing can be done at all; an output that exists by then is whole.
    """
    events = events or Events()
    check_folder(config.output)
    keep_no_large_block()
    with ExitStack() as stack:
        source = stack.enter_context(_source(config))
        predictors = opened_predictors(config, stack)
        predictor = predictors[config.devices[0]]
        spec = predictor.spec
        folder = Folder(path=config.output, ending=spec.file_ending, reader=spec.reader)
        beside = partial(files_beside_case, reader=spec.reader, ending=spec.file_ending, previous=config.previous_stage)
        cases = _cases(config, folder, beside)
        shared = _is_shared(config, cases)
        changed = stack.enter_context(
            prepared_folder(
                folder,
                cases,
                beside,
                copies={name: predictor.models[0].bundle.file(name).read_bytes() for name in COPIES},
                arguments=_arguments(config, predictor, shared=shared),
                continuing=config.continue_prediction,
            )
        )
        events.started(len(cases), predictor)
        if shared:
            predictor = joined_predictor(tuple(predictors.values()))
        ending = stack.enter_context(Ending(events.case_ended, background=config.writing > 0))
        run = Run(
            config=config,
            folder=folder,
            changed=changed,
            predictor=predictor,
            source=source,
            planner=_planner(config, predictor, predictors, source),
            ending=ending,
            events=events,
            uploads=_uploads(config, predictor, stack),
        )
        if len(predictors) > 1 and not shared:
            outcomes = run_cases_on_devices(cases, run, predictors)
        else:
            run_cases(cases, run)
            outcomes = ending.finish()
        return _summary(tuple(predictors.values()), outcomes)


@contextmanager
def _source(config: PredictConfig) -> Iterator[Source]:
    """Who reads: a process per GPU, or this one."""
    if not config.preparing:
        yield LocalWorker()
        return
    with open_worker() if len(config.devices) == 1 else open_workers(len(config.devices)) as source:
        yield source


def _planner(
    config: PredictConfig, predictor: Predictor, predictors: Mapping[int, Predictor], source: Source
) -> Planner:
    """The memory of the run, with what the engines of all GPUs will still take on the host."""
    _, *others = predictors.values()
    planner = planner_of_run(predictor, _settings(config, predictor), config.max_memory, source)
    return replace(planner, base=planner.base + sum(map(host_growth, others)))


def _uploads(config: PredictConfig, predictor: Predictor, stack: ExitStack) -> Uploads | None:
    """What takes images ahead to the only GPU. A limit to its memory is one for each case, and has no room for two."""
    gpu = predictor.models[0].gpu
    if gpu is None or len(config.devices) > 1 or not config.preparing or config.device_memory is not None:
        return None
    from trtbuild.runtime.gpu.uploads import opened_uploads

    return stack.enter_context(opened_uploads(gpu)) if predictor.on_device else None


def _cases(config: PredictConfig, folder: Folder, beside: Callable[[Case], Sequence[Path]]) -> Sequence[Case]:
    """This part's cases. Of no case, of whatever part, an output would overwrite an input."""
    from trtbuild.volume.cases import cases_from_input, part_of

    cases = cases_from_input(config.inputs, folder.ending)
    check_inputs(folder, cases, chain(config.inputs, (file for case in cases for file in beside(case))))
    return part_of(cases, config.num_parts, config.part_id)


def _is_shared(config: PredictConfig, cases: Sequence[Case]) -> bool:
    """Whether the GPUs share the windows of one case. Not where it is one of several parts (`-num_parts`), all of which
    must compute in one way, however many cases each has."""
    return len(config.devices) > 1 and len(cases) == 1 and config.num_parts == 1


def _settings(config: PredictConfig, predictor: Predictor) -> Settings:
    return Settings(
        step_size=config.step_size,
        mirroring=config.mirroring,
        probabilities=config.save_probabilities,
        threads=predictor.threads,
    )


def _summary(predictors: Sequence[Predictor], outcomes: tuple[Outcome, ...]) -> Summary:
    predictor, info = predictors[0], predictors[0].describe()
    engine = {
        "backend": info.backend,
        "version": info.version,
        "precision": info.inference_precision,
        "network_precision": predictor.models[0].records[-1].precision,
        "device": ", ".join(one.describe().device for one in predictors),
        **info.details,
    }
    return Summary(
        bundle=predictor.identity,
        engine=engine,
        refused=tuple(reason for model in predictor.models for reason in model.refused),
        outcomes=outcomes,
    )


def _arguments(config: PredictConfig, predictor: Predictor, *, shared: bool) -> dict[str, Any]:
    """nnU-Net's keys, and under "trtbuild" what makes this run reproducible."""
    recipe = predictor.recipe
    engines = [stage.runners[0].describe() for model in predictor.models for stage in model.stages]
    previous = None if config.previous_stage is None else str(config.previous_stage)
    return {
        "list_of_lists_or_source_folder": [str(path) for path in config.inputs],
        "output_folder_or_list_of_truncated_output_files": str(config.output),
        "save_probabilities": config.save_probabilities,
        "overwrite": not config.continue_prediction,
        "folder_with_segs_from_prev_stage": previous,
        "num_parts": config.num_parts,
        "part_id": config.part_id,
        "trtbuild": {
            "version": trtbuild.__version__,
            "bundle": [model.bundle.identity for model in predictor.models],
            "networks": [[network.id for network in model.networks] for model in predictor.models],
            "backends": [engine.backend for engine in engines],
            "precisions": [engine.inference_precision for engine in engines],
            "step_size": config.step_size,
            "mirroring": config.mirroring,
            "save_probabilities": config.save_probabilities,
            "weights": list(recipe.weights),
            "vote": recipe.vote,
            "disagreement": recipe.disagreement,
            "dicom_seg": config.dicom_seg,
            "max_memory": config.max_memory,
            "device_memory": config.device_memory,
            "gpus_per_case": len(config.devices) if shared else 1,  # where their windows meet, sums round otherwise
            "postprocessing": json_from_value(recipe.postprocessing),
            "previous_stage": None if previous is None else os.path.realpath(previous),
        },
    }
