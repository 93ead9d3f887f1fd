"""Which of several models is meant: nnU-Net's names for them, and its folder of results."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import ModelError
from trtbuild.source.fields import listed

TRAINER, PLANS = "nnUNetTrainer", "nnUNetPlans"  # nnU-Net's defaults
RESULTS = "nnUNet_results"
DATASET = re.compile(r"Dataset(\d{3,})_.+", re.ASCII)  # as nnU-Net writes numbers: at least three digits


@dataclass(frozen=True, kw_only=True)
class ModelName:
    """What the user said of a model. None leaves it open; `dataset` is a name or a number."""

    dataset: str | None = None
    configuration: str | None = None
    trainer: str | None = None
    plans: str | None = None

    @property
    def said(self) -> bool:
        """Whether anything was said."""
        return any(part is not None for part in (self.dataset, self.configuration, self.trainer, self.plans))

    def fits(self, dataset: str, folder: str) -> bool:
        """Whether `Dataset123_Name` and `<Trainer>__<Plans>__<configuration>` are what was said."""
        parts = folder.split("__")
        if len(parts) != 3:
            return not self.said
        wanted = (self.trainer, self.plans, self.configuration)
        return (self.dataset is None or is_dataset(dataset, self.dataset)) and all(
            want is None or want == part for want, part in zip(wanted, parts, strict=True)
        )

    def __str__(self) -> str:
        words = (("-d", self.dataset), ("-c", self.configuration), ("-tr", self.trainer), ("-p", self.plans))
        return " ".join(f"{option} {word}" for option, word in words if word is not None)


def is_dataset(name: str, wanted: str) -> bool:
    """Whether a dataset has this name, or this number ("4" is Dataset004_X)."""
    number = DATASET.fullmatch(name)
    return name == wanted or (number is not None and wanted.isdecimal() and int(number.group(1)) == int(wanted))


def folder_from_results(name: ModelName) -> Path:
    """The trained-model folder `$nnUNet_results/<dataset>/<Trainer>__<Plans>__<configuration>`.

    Trainer and plans are nnU-Net's defaults where they are left open.

    Raises:
        ModelError: the variable is not set, or there is no such model; the message lists what is there.
    """
    if name.dataset is None or name.configuration is None:
        raise ModelError("The model is not named.", expected="a model folder or zip, or -d DATASET -c CONFIGURATION",
                         got=str(name) or "neither")  # fmt: skip
    results = os.environ.get(RESULTS)
    if not results:
        raise ModelError(f"{RESULTS} is not set.", expected="nnU-Net's folder of trained models",
                         where=f"-d {name.dataset}",
                         hint=f"set {RESULTS}, or give the model folder itself")  # fmt: skip
    datasets = [folder for folder in _folders(Path(results)) if is_dataset(folder.name, name.dataset)]
    if len(datasets) != 1:
        what = "no dataset" if not datasets else "more than one dataset"
        found = datasets or [folder for folder in _folders(Path(results)) if DATASET.fullmatch(folder.name)]
        raise ModelError(f"There is {what} {name.dataset}.", expected=f"one Dataset{name.dataset.zfill(3)}_NAME",
                         got=listed(folder.name for folder in found), where=results)  # fmt: skip
    wanted = f"{name.trainer or TRAINER}__{name.plans or PLANS}__{name.configuration}"
    if not (datasets[0] / wanted).is_dir():
        models = [folder.name for folder in _folders(datasets[0]) if len(folder.name.split("__")) == 3]
        raise ModelError("There is no such trained model.", expected=wanted, got=listed(models), where=datasets[0],
                         hint="name trainer, plans and configuration with -tr, -p and -c")  # fmt: skip
    return datasets[0] / wanted


def _folders(folder: Path) -> Iterable[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except OSError as error:
        raise ModelError("The folder of trained models cannot be read.", got=error.strerror, where=folder,
                         hint=f"look at {RESULTS}") from error  # fmt: skip
