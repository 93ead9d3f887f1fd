"""One frozen configuration per step. A configuration that cannot work cannot be built."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from trtbuild.errors import ModelError, TrtbuildError

CpuPrecision = Literal["fp32", "bf16"]


def check_threads(threads: int | None) -> None:
    """None (what the process may use) or a positive number, else TrtbuildError."""
    if threads is not None and threads < 1:
        raise TrtbuildError("The number of threads is out of range.", expected=">= 1", got=threads)


def check_folds(folds: tuple[str, ...] | None) -> None:
    """None (all folds) or distinct names, else ModelError: an average over a fold taken twice is no ensemble."""
    if folds is not None and (not folds or len(set(folds)) != len(folds)):
        raise ModelError(
            "The list of folds is wrong.",
            expected="distinct folds, at least one",
            got=" ".join(folds) or "no fold",
            hint="leave the folds out to use all of them",
        )


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """From a trained-model folder, or a bundle whose networks are taken over, to a bundle.

    `folds` None means nnU-Net's default: all numbered folds. `backends` are built in this order; "auto" takes the
    first CPU backend that is installed. `threads` None means what this process may use.
    """

    model: Path
    output: Path
    folds: tuple[str, ...] | None = None
    checkpoint: str = "checkpoint_final.pth"
    backends: tuple[str, ...] = ("auto",)
    precision: CpuPrecision = "fp32"
    threads: int | None = None
    tune: bool = True
    overwrite: bool = False
    trust_checkpoint: bool = False
    assume_plans_architecture: bool = False

    def __post_init__(self) -> None:
        check_threads(self.threads)
        check_folds(self.folds)
        if isinstance(self.backends, str) or not self.backends or len(set(self.backends)) != len(self.backends):
            raise TrtbuildError(
                "The list of backends is wrong.",
                expected='a tuple of distinct names, such as ("openvino",)',
                got=repr(self.backends),
            )
        if self.precision not in get_args(CpuPrecision):
            raise TrtbuildError(
                "There is no such precision.", expected=" or ".join(get_args(CpuPrecision)), got=self.precision
            )


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    """From a bundle and images to segmentations.

    `inputs` are a folder, image files or case lists. `folds` None means all folds of the bundle. `continue_prediction`
    keeps finished outputs of an earlier run with the same bundle and settings.
    """

    bundle: Path
    inputs: tuple[Path, ...]
    output: Path
    folds: tuple[str, ...] | None = None
    backend: str = "auto"
    step_size: float = 0.5
    mirroring: bool = True
    save_probabilities: bool = False
    continue_prediction: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        check_threads(self.threads)
        check_folds(self.folds)
        if not 0 < self.step_size <= 1:
            raise TrtbuildError("The step size is out of range.", expected="0 < step size <= 1", got=self.step_size)
        if not self.inputs:
            raise TrtbuildError("No input was given.", hint="-i FOLDER, image files, or a case list")
