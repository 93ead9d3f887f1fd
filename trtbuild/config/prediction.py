"""From bundles and images to segmentations."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from trtbuild.config.checks import check_device, check_folds, check_step_size, check_threads
from trtbuild.errors import TrtbuildError

Vote = Literal["soft", "hard"]
CPU_BACKENDS = ("openvino", "onnxruntime", "null")


def check_ensemble(weights: tuple[float, ...] | None, vote: str, members: int) -> tuple[float, ...]:
    """The weights of an ensemble's members, 1 each where None is given; TrtbuildError where they cannot be.

    One positive number per member, with a finite sum. A single bundle has neither weights nor a vote.
    """
    if members < 1:
        raise TrtbuildError("No bundle was given.", hint="trtbuild predict BUNDLE -i IMAGES -o FOLDER")
    if vote not in get_args(Vote):
        raise TrtbuildError("There is no such vote.", expected=" or ".join(get_args(Vote)), got=vote)
    if members == 1 and (weights is not None or vote == "hard"):
        raise TrtbuildError(
            "Weights and votes belong to an ensemble.",
            expected="several bundles",
            got="one",
            hint="leave --weights and --vote out, or name the other bundles",
        )
    if weights is None:
        return (1.0,) * members
    usable = all(isinstance(weight, (int, float)) and 0 < weight < math.inf for weight in weights)
    if len(weights) != members or not usable or not math.isfinite(sum(weights)):
        raise TrtbuildError(
            "The weights do not fit the ensemble.",
            expected=f"{members} positive numbers, one per bundle",
            got=", ".join(map(str, weights)) or "none",
        )
    return weights


def check_devices(devices: tuple[int, ...], memory: int | None, backend: str) -> None:
    """Distinct numbers of GPUs, at least one, and a limit of their memory; TrtbuildError where they cannot be, or where
    a CPU backend is named, which has neither (0 is what everybody has who names no GPU)."""
    numbers = devices if isinstance(devices, tuple) else ()
    for device in numbers:
        check_device(device, memory)
    if not numbers or len(set(numbers)) != len(numbers):
        raise TrtbuildError(
            "The list of GPUs is wrong.",
            expected="distinct numbers, at least one, such as (0, 1)",
            got=repr(devices),
            where="--devices",
        )
    if backend in CPU_BACKENDS and (numbers != (0,) or memory is not None):
        raise TrtbuildError(
            "Only engines for a GPU take --devices and --max-device-memory.",
            expected="a backend for GPUs, such as tensorrt",
            got=f"--backend {backend}",
            hint="leave them out; --max-memory limits the memory of the host",
        )


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """From bundles and images to segmentations.

    Several `bundles` are an ensemble, with one weight each (None: equal ones). `inputs` are a folder, image files, case
    lists or DICOM series; `part_id` of `num_parts` takes every num_parts-th case. `folds` None means all folds of the
    bundles. `continue_prediction` keeps finished outputs of an earlier run with the same bundles and settings.
    `previous_stage` is a folder with the labels of a cascade's first stage. `postprocessing` is a file of nnU-Net's in
    place of the bundle's own rules; Path("none") does without. `max_memory` is in bytes, for the whole process tree.
    `preparing` and `writing` are 0 to do that in turn with the network, else beside it. `dicom_seg` writes DICOM
    segmentations, too. `devices` are the numbers of the GPUs, for engines that need one; `device_memory` is in bytes,
    of each of them, what a case may take.
    """

    bundles: tuple[Path, ...]
    inputs: tuple[Path, ...]
    output: Path
    folds: tuple[str, ...] | None = None
    backend: str = "auto"
    step_size: float = 0.5
    mirroring: bool = True
    save_probabilities: bool = False
    continue_prediction: bool = False
    threads: int | None = None
    weights: tuple[float, ...] | None = None
    vote: Vote = "soft"
    disagreement: bool = False
    previous_stage: Path | None = None
    postprocessing: Path | None = None
    max_memory: int | None = None
    num_parts: int = 1
    part_id: int = 0
    preparing: int = 1
    writing: int = 1
    dicom_seg: bool = False
    devices: tuple[int, ...] = (0,)
    device_memory: int | None = None

    def __post_init__(self) -> None:
        check_threads(self.threads)
        check_devices(self.devices, self.device_memory, self.backend)
        check_folds(self.folds)
        check_ensemble(self.weights, self.vote, len(self.bundles))
        check_step_size(self.step_size)
        if not self.inputs:
            raise TrtbuildError("No input was given.", hint="-i FOLDER, image files, or a case list")
        if not 0 <= self.part_id < self.num_parts:
            raise TrtbuildError(
                "There is no such part.", expected=f"part 0 to {self.num_parts - 1} of {self.num_parts}",
                got=self.part_id,
            )  # fmt: skip
        if self.vote == "hard" and self.save_probabilities:
            raise TrtbuildError(
                "A hard vote has no probabilities.",
                got="--vote hard and --save_probabilities",
                hint="leave one of them out",
            )
        if self.max_memory is not None and self.max_memory < 1:
            raise TrtbuildError("The memory limit is out of range.", expected="bytes >= 1", got=self.max_memory)
