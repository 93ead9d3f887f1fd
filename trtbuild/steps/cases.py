"""`predict`: a folder, files or a case list become segmentations under nnU-Net's file names."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trtbuild
from trtbuild.atomic import whole_file, write_whole
from trtbuild.config import PredictConfig
from trtbuild.errors import InputError, NonFinite, OutOfMemory
from trtbuild.runtime import Prediction
from trtbuild.runtime.predictor import Progress
from trtbuild.steps.outputs import COPIES, case_targets, check_folder, check_inputs, prepare_folder, remove_files
from trtbuild.steps.predict import Predictor, open_predictor


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case: `output` where it was written, `error` where it failed, neither where it was kept."""

    case: str
    output: str | None
    error: str | None
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A whole run. `engine` describes what ran; `refused` lists engines that were tried before it, with reasons."""

    bundle: str
    engine: Mapping[str, str]
    refused: tuple[tuple[str, str], ...]
    outcomes: tuple[Outcome, ...]

    @property
    def failed(self) -> tuple[Outcome, ...]:
        """The cases that have an error."""
        return tuple(o for o in self.outcomes if o.error is not None)


@dataclass(frozen=True, kw_only=True)
class Events:
    """Callbacks of a folder run: the number of cases once, each case as it starts and ends, progress inside it."""

    started: Callable[[int, Predictor], None] = lambda count, predictor: None
    case_started: Callable[[str], None] = lambda case: None
    case_ended: Callable[[Outcome], None] = lambda outcome: None
    progress: Progress | None = None


def predict_cases(config: PredictConfig, events: Events | None = None) -> Summary:
    """Predicts every case. A bad image, or one that memory cannot hold, fails its own case only.

    A full disk or a broken engine ends the run. Outputs that an earlier run left for these cases are removed before
    the first case starts, unless `config.continue_prediction` keeps them.

    Args:
        config: bundle, inputs, output folder, settings.
        events: callbacks for progress.

    Raises:
        InputError: there is nothing to predict, or an output would overwrite an input.
        BundleError, EngineError, OutputError: nothing can be done at all; an output that exists by then is whole.
    """
    from trtbuild.volume.cases import cases_from_input

    events = events or Events()
    check_folder(config.output)
    with open_predictor(config.bundle, backend=config.backend, folds=config.folds, threads=config.threads) as predictor:
        spec = predictor.stage.spec
        cases = tuple(cases_from_input(config.inputs, spec.file_ending))
        check_inputs(config.output, cases, config.inputs, spec.file_ending)
        prepare_folder(
            config.output,
            [case.id for case in cases],
            spec.file_ending,
            copies={name: predictor.bundle.file(name).read_bytes() for name in COPIES},
            arguments=_arguments(config, predictor),
            continuing=config.continue_prediction,
        )
        events.started(len(cases), predictor)
        outcomes = []
        for case in cases:
            events.case_started(case.id)
            outcomes.append(_one_case(case.id, case.files, config, predictor, events.progress))
            events.case_ended(outcomes[-1])
        info = predictor.describe()
        engine = {
            "backend": info.backend,
            "version": info.version,
            "precision": info.inference_precision,
            "device": info.device,
            **info.details,
        }
        return Summary(
            bundle=predictor.bundle.identity, engine=engine, refused=predictor.refused, outcomes=tuple(outcomes)
        )


def _one_case(
    case: str, files: tuple[Path, ...], config: PredictConfig, predictor: Predictor, progress: Progress | None
) -> Outcome:
    targets = case_targets(config.output, case, predictor.stage.spec.file_ending)
    if config.continue_prediction and os.path.isfile(targets[0]):
        return Outcome(case=case, output=None, error=None, seconds={}, warnings=())
    try:
        prediction = predictor.predict(
            files,
            step_size=config.step_size,
            mirroring=config.mirroring,
            probabilities=config.save_probabilities,
            progress=progress,
        )
        started = time.perf_counter()
        _write(prediction, case, targets, predictor)
    except (InputError, NonFinite, OutOfMemory) as error:
        message = str(error)
    except MemoryError as error:
        message = str(_out_of_memory(case, error))
    else:
        seconds = {**prediction.seconds, "write": time.perf_counter() - started}
        return Outcome(case=case, output=str(targets[0]), error=None, seconds=seconds, warnings=prediction.warnings)
    remove_files(targets)  # probabilities may be there already
    return Outcome(case=case, output=None, error=message, seconds={}, warnings=())


def _out_of_memory(case: str, error: MemoryError) -> OutOfMemory:
    return OutOfMemory(
        "There is not enough memory for a case.",
        where=case,
        got=str(error) or "MemoryError",
        hint="check the spacing in the file's header, or predict on a machine with more memory",
    )


def _write(prediction: Prediction, case: str, targets: tuple[Path, Path, Path], predictor: Predictor) -> None:
    """Probabilities first, the segmentation last: where it exists, the case is complete."""
    import numpy as np

    from trtbuild.volume.io import reader_named

    spec, image = predictor.stage.spec, prediction.image
    if image is None:
        raise InputError("A case that was not read from files cannot be written.", where=case)
    segmentation, probabilities, beside = targets
    reader = reader_named(spec.reader)
    if prediction.probabilities is not None:
        with whole_file(probabilities) as partial:
            np.savez_compressed(partial, probabilities=prediction.probabilities)
        grid = prediction.grid
        properties = {
            **reader.nnunet_properties(image),
            "shape_before_cropping": grid.shape,
            "bbox_used_for_cropping": [[s.start, s.stop] for s in grid.box],
            "shape_after_cropping_and_before_resampling": grid.cropped,
        }
        write_whole(beside, pickle.dumps(properties))
    reader.write_segmentation(prediction.segmentation, image.geometry, segmentation)


def _arguments(config: PredictConfig, predictor: Predictor) -> dict[str, Any]:
    """nnU-Net's keys, and under "trtbuild" what makes this run reproducible."""
    info = predictor.describe()
    return {
        "list_of_lists_or_source_folder": [str(path) for path in config.inputs],
        "output_folder_or_list_of_truncated_output_files": str(config.output),
        "save_probabilities": config.save_probabilities,
        "overwrite": not config.continue_prediction,
        "folder_with_segs_from_prev_stage": None,
        "num_parts": 1,
        "part_id": 0,
        "trtbuild": {
            "version": trtbuild.__version__,
            "bundle": predictor.bundle.identity,
            "folds": [n.fold for n in predictor.stage.networks if config.folds is None or n.fold in config.folds],
            "backend": info.backend,
            "precision": info.inference_precision,
            "step_size": config.step_size,
            "mirroring": config.mirroring,
            "save_probabilities": config.save_probabilities,
        },
    }
