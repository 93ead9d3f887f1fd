"""Where patches come from: the cases that calibrate a stage, and the disjoint ones that its gate judges by."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trtbuild.bundle import Stage
from trtbuild.config import CalibrationConfig
from trtbuild.errors import InputError
from trtbuild.spec import ModelSpec
from trtbuild.steps.precision.raw import raw_cases
from trtbuild_calibration import (
    CalibrationError,
    Source,
    cases_from_folder,
    digest,
    open_case,
    split_cases,
    validation_cases,
)

SPLITS = "splits_final.json"
Report = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StageData:
    """The cases of one stage of a model: `sources` by name, and the digest of each one's files (on demand)."""

    sources: Mapping[str, Source] = field(repr=False)
    digest: Callable[[str], str] = field(repr=False)
    splits: Path | None

    def split(self, fold: str, seed: int, *, gated: bool) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
        """Cases to calibrate on, and cases for the gate: the fold's validation cases where nnU-Net's splits say them.

        Without a gate the calibration takes the same cases, so that its scales can be used with one; and all of them
        where there is nothing to split.

        Raises:
            InputError: the split leaves nothing to one side of a gate, or the file of splits is none.
        """
        with as_input_errors():
            splits = self._splits_of(fold)
            validation = None if splits is None else validation_cases(splits, int(fold))
            held_out = len(self.sources.keys() & set(validation or ()))
            if not gated and validation is not None and held_out in (0, len(self.sources)):
                return tuple(self.sources.values()), ()
            sides = split_cases(tuple(self.sources), seed, validation)
        calibration, gate = (tuple(self.sources[name] for name in side) for side in sides)
        return calibration, gate

    def held_out_by(self, fold: str) -> str:
        """How `split` finds the gate's cases, in words. FP32 is known not to have seen them only where a fold says it:
        on cases of its own training it looks better than it is, and a loss may not show."""
        if self._splits_of(fold) is None:
            return "drawn by the seed: FP32 may have been trained on them"
        return f"validation cases of fold {fold} ({SPLITS})"

    def _splits_of(self, fold: str) -> Path | None:
        """nnU-Net's splits where they say anything of this fold; of "all" they do not."""
        return self.splits if fold.isdigit() else None


@contextmanager
def as_input_errors() -> Iterator[None]:
    """What the calibration package raises, as an error of ours."""
    try:
        yield
    except CalibrationError as error:
        raise InputError(
            error.what, expected=error.expected, got=error.got, where=error.where, hint=error.hint
        ) from error


def stage_data(
    config: CalibrationConfig,
    spec: ModelSpec,
    *,
    plans: bytes,
    dataset: bytes,
    scratch: Path,
    report: Report,
) -> StageData:
    """The cases for a stage.

    Args:
        config: where they are.
        spec: of the stage.
        plans: the model's plans.json, which names the folder of each configuration.
        dataset: the model's dataset.json; that of the preprocessed folder must name the same channels and labels.
        scratch: a folder for prepared raw images.
        report: called with one line per step.

    Raises:
        InputError: no cases, or cases of another model.
    """
    if config.images is not None:
        return _of_images(config, spec, scratch, report)
    if config.data is None:
        raise InputError("There are no cases to calibrate on.", expected="--calibration or --calibration-images")
    with as_input_errors():
        folder = _folder(config.data, data_identifier(plans, spec.configuration), dataset)
        found = cases_from_folder(folder, previous=_previous(config, spec))
        one_hot = spec.labels.foreground if spec.previous_stage is not None else ()
        sources = {case.name: open_case(case, channels=len(spec.channels), one_hot=one_hot) for case in found}
    report(f"{len(found)} preprocessed cases in {folder}")
    by_name = {case.name: case for case in found}
    splits = folder.parent / SPLITS
    return StageData(
        sources=sources, digest=lambda name: digest(by_name[name]), splits=splits if splits.is_file() else None
    )


def check_previous(config: CalibrationConfig, stages: Sequence[Stage]) -> None:
    """Predictions of a first stage are for a cascade.

    Raises:
        InputError: they are given, and no stage takes them.
    """
    if config.previous is not None and all(stage.spec.previous_stage is None for stage in stages):
        raise InputError(
            "--calibration-previous is for the second stage of a cascade.",
            expected="a bundle with one",
            got=", ".join(stage.spec.configuration for stage in stages),
            where=config.previous,
            hint="leave it out",
        )


def data_identifier(plans: bytes, configuration: str) -> str:
    """The name of a configuration's folder in nnUNet_preprocessed/DatasetX, through `inherits_from`."""
    known = json.loads(plans)
    configurations, name, seen = known["configurations"], configuration, set()
    while name not in seen:
        seen.add(name)
        entry = configurations.get(name, {})
        if "data_identifier" in entry:
            return str(entry["data_identifier"])
        name = entry.get("inherits_from", name)
    return f"{known.get('plans_name', 'nnUNetPlans')}_{configuration}"


def _folder(path: Path, identifier: str, dataset: bytes) -> Path:
    """`path` itself, or the configuration's folder in it; checked to be of this configuration and dataset."""
    folder = path / identifier if (path / identifier).is_dir() else path
    described = folder.parent / "dataset.json" if folder.name == identifier or folder is path else None
    if folder is path and (path / "dataset.json").is_file():
        raise InputError(
            "The dataset was not preprocessed for the model's configuration.",
            expected=f"the folder {identifier}",
            got=", ".join(sorted(entry.name for entry in path.iterdir() if entry.is_dir())) or "no folder",
            where=path,
            hint="nnUNetv2_preprocess with the model's plans and configuration",
        )
    if described is not None and described.is_file():
        if folder.name != identifier:
            raise InputError(
                "These cases are preprocessed for another configuration.",
                expected=identifier,
                got=folder.name,
                where=folder.parent,
                hint=f"give {folder.parent / identifier}",
            )
        _check_dataset(described, dataset)
    return folder


def _check_dataset(file: Path, dataset: bytes) -> None:
    """The same channels and labels as those of the model."""
    try:
        theirs, ours = json.loads(file.read_bytes()), json.loads(dataset)
    except (OSError, ValueError) as error:
        raise InputError("The dataset.json beside the cases cannot be read.", got=error, where=file) from error
    for names in (("channel_names", "modality"), ("labels",)):
        here, there = (_first(facts, names) for facts in (ours, theirs))
        if here != there:
            raise InputError(
                "The cases are of another dataset than the model.",
                expected=f"{names[0]} {here}",
                got=f"{names[0]} {there}",
                where=file,
                hint="give the preprocessed folder of the dataset that the model was trained on",
            )


def _first(facts: Any, names: Sequence[str]) -> Any:
    return next((facts[name] for name in names if isinstance(facts, dict) and name in facts), None)


def _previous(config: CalibrationConfig, spec: ModelSpec) -> Path | None:
    """The folder of the first stage's predictions, which only a second stage has and needs."""
    if spec.previous_stage is None:
        return None
    if config.previous is None:
        raise InputError(
            "The second stage of a cascade is calibrated with the first one's predictions.",
            expected=f"the labels that {spec.previous_stage} predicted for the training cases",
            got="none",
            hint="--calibration-previous nnUNet_results/DATASET/TRAINER__PLANS__"
            f"{spec.previous_stage}/predicted_next_stage/{spec.configuration}",
        )
    return config.previous


def _of_images(config: CalibrationConfig, spec: ModelSpec, scratch: Path, report: Report) -> StageData:
    found = raw_cases(config, spec, _previous(config, spec), scratch, report)
    return StageData(
        sources={case.name: case.source for case in found},
        digest=lambda name: next(case.digest for case in found if case.name == name),
        splits=None,
    )
