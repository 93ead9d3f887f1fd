"""`predict`: a folder, files or a case list become segmentations under nnU-Net's file names."""

from __future__ import annotations

import json
import pickle
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trtbuild
from trtbuild.atomic import output_error, whole_file, write_whole
from trtbuild.config import PredictConfig
from trtbuild.errors import InputError, NonFinite, OutOfMemory, OutputError
from trtbuild.runtime import Prediction
from trtbuild.runtime.predictor import Progress
from trtbuild.steps.predict import Predictor, open_predictor

ARGUMENTS = "predict_from_raw_data_args.json"


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
    """Predicts every case. A bad image fails its own case only; a full disk or a broken engine ends the run.

    Args:
        config: bundle, inputs, output folder, settings.
        events: callbacks for progress.

    Raises:
        BundleError, EngineError, OutputError: nothing can be done at all; an output that exists by then is whole.
    """
    from trtbuild.volume.cases import cases_from_input

    events = events or Events()
    with open_predictor(config.bundle, backend=config.backend, folds=config.folds, threads=config.threads) as predictor:
        spec = predictor.stage.spec
        cases = tuple(cases_from_input(config.inputs, spec.file_ending))
        _prepare_output(config, predictor)
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
    target = config.output / (case + predictor.stage.spec.file_ending)
    if config.continue_prediction and target.is_file():
        return Outcome(case=case, output=None, error=None, seconds={}, warnings=())
    try:
        prediction = predictor.predict(
            files,
            step_size=config.step_size,
            mirroring=config.mirroring,
            probabilities=config.save_probabilities,
            progress=progress,
        )
    except (InputError, NonFinite) as error:
        return Outcome(case=case, output=None, error=str(error), seconds={}, warnings=())
    except MemoryError as error:
        raise OutOfMemory(
            "There is not enough memory for a case.",
            where=case,
            got=str(error) or "MemoryError",
            hint="close other programs, or predict on a machine with more memory",
        ) from error
    started = time.perf_counter()
    _write(prediction, case, target, config, predictor)
    seconds = {**prediction.seconds, "write": time.perf_counter() - started}
    return Outcome(case=case, output=str(target), error=None, seconds=seconds, warnings=prediction.warnings)


def _write(prediction: Prediction, case: str, target: Path, config: PredictConfig, predictor: Predictor) -> None:
    """Probabilities first, the segmentation last: where it exists, the case is complete."""
    import numpy as np

    from trtbuild.volume.io import reader_named

    spec, image = predictor.stage.spec, prediction.image
    if image is None:
        raise InputError("A case that was not read from files cannot be written.", where=case)
    reader = reader_named(spec.reader)
    if prediction.probabilities is not None:
        with whole_file(config.output / f"{case}.npz") as partial:
            np.savez_compressed(partial, probabilities=prediction.probabilities)
        grid = prediction.grid
        properties = {
            **reader.nnunet_properties(image),
            "shape_before_cropping": grid.shape,
            "bbox_used_for_cropping": [[s.start, s.stop] for s in grid.box],
            "shape_after_cropping_and_before_resampling": grid.cropped,
        }
        write_whole(config.output / f"{case}.pkl", pickle.dumps(properties))
    reader.write_segmentation(prediction.segmentation, image.geometry, target)


def _prepare_output(config: PredictConfig, predictor: Predictor) -> None:
    """Makes the folder and the three files that nnU-Net puts beside its predictions."""
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, config.output) from error
    arguments = _arguments(config, predictor)
    _check_continued(config, arguments)
    for name in ("dataset.json", "plans.json"):
        write_whole(config.output / name, predictor.bundle.file(name).read_bytes())
    write_whole(config.output / ARGUMENTS, json.dumps(arguments, indent=4).encode())


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


def _check_continued(config: PredictConfig, arguments: Mapping[str, Any]) -> None:
    """Outputs of another bundle or of other settings must not be mixed with this run's."""
    path = config.output / ARGUMENTS
    if not config.continue_prediction or not path.exists():
        return
    try:
        before = json.loads(path.read_bytes()).get("trtbuild")
    except (OSError, ValueError, AttributeError) as error:
        raise OutputError(
            "The record of the run to continue cannot be read.", where=path, got=error, hint="predict into a new folder"
        ) from error
    if before != arguments["trtbuild"]:
        now = arguments["trtbuild"]
        keys = [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]]
        raise OutputError(
            "The outputs in this folder were made in another way.",
            where=path,
            expected={k: now[k] for k in keys},
            got={k: before.get(k) for k in keys} if isinstance(before, dict) else before,
            hint="predict into a new folder, or without --continue_prediction",
        )
