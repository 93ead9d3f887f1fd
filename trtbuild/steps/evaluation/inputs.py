"""What `evaluate` compares: which files, which labels, read by which reader. Nothing is guessed in silence."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from trtbuild.accuracy.summary import LabelOrRegion
from trtbuild.errors import InputError, OutputError
from trtbuild.source.fields import Field, field_from_json, listed
from trtbuild.spec import Reader
from trtbuild.steps.evaluation.labels import labels_from_dataset_json, names_in_summary

READERS: Mapping[Reader, tuple[str, ...]] = {
    "NaturalImage2DIO": (".png", ".bmp", ".tif"),
    "SimpleITKIO": (".nii.gz", ".nrrd", ".mha", ".gipl"),
    "Tiff3DIO": (".tif", ".tiff"),
    "NibabelIO": (".nii.gz", ".nii"),
}
"""nnU-Net's readers with their file endings, in the order in which it tries them (`LIST_OF_IO_CLASSES`)."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """From two folders of segmentations to a summary.json.

    `dataset` and `plans` None mean those that lie in the prediction folder, if any; `labels` replaces `dataset`, and
    `ignore` goes with it. `output` None means summary.json in the prediction folder. `processes` None means what this
    machine may use. `chill` allows references without a prediction. `nsd_tolerance` is in mm; 2 is about a slice of a
    usual scan and of the order by which contours of two experts differ. Radiotherapy has values per organ (Nikolov et
    al. 2021, https://doi.org/10.2196/26151).
    """

    reference: Path
    prediction: Path
    dataset: Path | None = None
    plans: Path | None = None
    labels: tuple[int, ...] | None = None
    ignore: int | None = None
    output: Path | None = None
    processes: int | None = None
    chill: bool = False
    surface: bool = False
    nsd_tolerance: float = 2.0

    def __post_init__(self) -> None:
        if self.labels is not None and self.dataset is not None:
            raise InputError("The labels are given twice.", expected="-l LABELS or -djfile FILE", got="both")
        if self.ignore is not None and self.labels is None:
            raise InputError("An ignore label is only given together with labels.", got=f"-il {self.ignore}",
                             hint="leave it out: dataset.json has its own")  # fmt: skip
        if self.labels is not None and not self.labels:
            raise InputError("No label is given.", expected="-l 1 2 …")
        if self.processes is not None and self.processes < 1:
            raise InputError("The number of processes is out of range.", expected=">= 1", got=self.processes)
        if not 0 <= self.nsd_tolerance < float("inf"):
            raise InputError("The tolerance is out of range.", expected=">= 0 mm", got=self.nsd_tolerance)
        if self.target.suffix != ".json":
            raise InputError("The output is no JSON file.", expected="a name ending in .json", got=self.target.name)

    @property
    def target(self) -> Path:
        """Where the summary goes."""
        return self.prediction / "summary.json" if self.output is None else self.output


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One case: its reference and its prediction."""

    case: str
    reference: Path
    prediction: Path


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is compared. `names` gives the label names for a key of summary.json; `not_predicted` has no prediction."""

    pairs: tuple[Pair, ...]
    labels: tuple[LabelOrRegion, ...]
    names: Mapping[str, str]
    ignore: int | None
    reader: Reader
    not_predicted: tuple[str, ...]


def evaluation_from_config(config: EvaluateConfig) -> Evaluation:
    """Looks at both folders and at the descriptions of the dataset; reads one reference to find out its reader.

    Raises:
        InputError: a folder, a prediction or a reference is missing; it is not said which labels count.
        ModelError: dataset.json or plans.json is not nnU-Net's.
        OutputError: the summary has no folder to go to.
    """
    dataset = _description(config.dataset, config.prediction / "dataset.json") if config.labels is None else None
    if config.labels is None and dataset is None:
        raise InputError("It is not known which labels to evaluate.", expected="a dataset.json, or labels",
                         got="neither", where=config.prediction,
                         hint="-djfile DATASET.JSON, or -l 1 2 3")  # fmt: skip
    references = _files(config.reference)
    ending = _common_ending(references, config.reference) if dataset is None else dataset["file_ending"].text()
    pairs, missing = _pairs(config, references, ending)
    _require_target(config)
    if dataset is not None:
        labels, ignore = labels_from_dataset_json(dataset)
        names = names_in_summary(dataset, labels)
    else:
        labels, ignore, names = tuple(dict.fromkeys(config.labels or ())), config.ignore, {}
    plans = _description(config.plans, config.prediction / "plans.json")
    return Evaluation(
        pairs=pairs, labels=labels, names=names, ignore=ignore, not_predicted=missing,
        reader=_reader(plans, dataset, ending, pairs[0].reference),
    )  # fmt: skip


def _description(given: Path | None, beside: Path) -> Field | None:
    """The JSON file that the user names, else the one in the prediction folder, else None."""
    path = given if given is not None else beside if beside.is_file() else None
    if path is None:
        return None
    try:
        return field_from_json(path.read_bytes(), str(path))
    except OSError as error:
        raise InputError("A file cannot be read.", got=error.strerror, where=path, hint="check the path") from error


def _files(folder: Path) -> list[str]:
    """Names of the files in a folder, sorted as nnU-Net does; hidden ones are no segmentations."""
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if not entry.name.startswith(".") and entry.is_file())
    except OSError as error:
        raise InputError(
            "The folder cannot be read.", got=error.strerror, where=folder, hint="check the path"
        ) from error
    return names


def _common_ending(names: Sequence[str], folder: Path) -> str:
    """The file ending of the references, where no dataset.json says it. nnU-Net takes that of the first file."""
    known = sorted({ending for endings in READERS.values() for ending in endings}, key=len, reverse=True)
    found = {next((ending for ending in known if name.endswith(ending)), None) for name in names} - {None}
    if len(found) != 1:
        raise InputError("The references have no common file ending.", expected=f"one of {listed(known)}",
                         got=listed(sorted(map(str, found))), where=folder,
                         hint="-djfile DATASET.JSON says it")  # fmt: skip
    return str(found.pop())


def _pairs(config: EvaluateConfig, references: Sequence[str], ending: str) -> tuple[tuple[Pair, ...], tuple[str, ...]]:
    """The predictions with their references, and the references without a prediction."""
    there = {name for name in references if name.endswith(ending)}
    predicted = [name for name in _files(config.prediction) if name.endswith(ending)]
    without = [name for name in predicted if name not in there]
    missing = sorted(there.difference(predicted))
    if not predicted:
        raise InputError("The folder holds no prediction.", expected=f"*{ending}", where=config.prediction,
                         got=listed(_files(config.prediction)))  # fmt: skip
    if without:
        raise InputError("Predictions have no reference.", got=listed(without), where=config.reference,
                         expected="a file of the same name for each prediction",
                         hint="add the references, or move these predictions away")  # fmt: skip
    if missing and not config.chill:
        raise InputError("References have no prediction.", got=listed(missing), where=config.prediction,
                         expected="a file of the same name for each reference",
                         hint="predict them, or use --chill to evaluate what is there")  # fmt: skip
    pairs = tuple(
        Pair(case=name.removesuffix(ending), reference=config.reference / name, prediction=config.prediction / name)
        for name in predicted
    )
    return pairs, tuple(name.removesuffix(ending) for name in missing)


def _require_target(config: EvaluateConfig) -> None:
    """The summary has a folder to go to, and must not take the place of what is read."""
    if not config.target.parent.is_dir():
        raise OutputError("The folder of the output does not exist.", where=config.target, hint="another name with -o")
    target = os.path.realpath(config.target)
    beside = (config.prediction / "dataset.json", config.prediction / "plans.json")
    for path in (*beside, *(p for p in (config.dataset, config.plans) if p is not None)):
        if os.path.realpath(path) == target:
            raise InputError("The output would overwrite an input.", where=config.target, hint="another name with -o")


def _reader(plans: Field | None, dataset: Field | None, ending: str, example: Path) -> Reader:
    """That of the plans; else what dataset.json prescribes; else the first one that can read the first reference."""
    named = plans["image_reader_writer"] if plans is not None else None
    if named is None and dataset is not None:
        wish = dataset.get("overwrite_image_reader_writer")
        named = None if wish is None or wish.value == "None" else wish
    if named is None:
        return _reader_by_ending(ending, example)
    named.one_of(get_args(Reader), "reader")
    known: tuple[Reader, ...] = get_args(Reader)
    return next(reader for reader in known if reader == named.value)


def _reader_by_ending(ending: str, example: Path) -> Reader:
    from trtbuild.volume.io import reader_named

    refused = []
    for name in (name for name, endings in READERS.items() if ending.lower() in endings):
        try:
            reader_named(name).read_segmentation(example, allow_negative=True)
        except InputError as error:
            refused.append(f"{name}: {error}")
        else:
            return name
    raise InputError("No reader takes the first reference.", where=example, got="\n".join(refused) or ending,
                     expected=listed(sorted({e for endings in READERS.values() for e in endings})))  # fmt: skip
