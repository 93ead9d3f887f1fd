"""One frozen configuration per step. A configuration that cannot work cannot be built."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from trtbuild.errors import ModelError, TrtbuildError
from trtbuild.spec import Precision

Rest = Literal["fp32", "bf16"]
Method = Literal["auto", "entropy", "percentile", "minmax"]
Vote = Literal["soft", "hard"]
Target = Literal["openvino", "onnxruntime", "tensorrt"]
Threshold = Literal["entropy", "percentile", "minmax"]
QuantizedRest = Literal["fp32", "fp16", "bf16"]


def check_threads(threads: int | None) -> None:
    """None (what the process may use) or a positive whole number, else TrtbuildError."""
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise TrtbuildError("The number of threads is out of range.", expected="a whole number >= 1", got=threads)


def check_step_size(step_size: float) -> None:
    """A number above 0, at most 1, else TrtbuildError."""
    if not isinstance(step_size, (int, float)) or not 0 < step_size <= 1:
        raise TrtbuildError("The step size is out of range.", expected="0 < step size <= 1", got=step_size)


def check_folds(folds: tuple[str, ...] | None) -> None:
    """None (all folds) or distinct names, else ModelError: an average over a fold taken twice is no ensemble."""
    if folds is not None and (not folds or len(set(folds)) != len(folds)):
        raise ModelError(
            "The list of folds is wrong.",
            expected="distinct folds, at least one",
            got=" ".join(folds) or "no fold",
            hint="leave the folds out to use all of them",
        )


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


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """Training patches, and how many of them a calibration looks at.

    Either `data`, nnUNet_preprocessed/DatasetX or the folder of one configuration in it, or `images` (raw, in the
    model's format), with their `labels` where there are any. `previous` holds, for the second stage of a cascade, the
    first one's predictions: nnU-Net's predicted_next_stage/CONFIGURATION for `data`, segmentations for `images`.
    `scales` is a folder in which the calibration is kept; an interrupted one is resumed from there, a finished one
    is used again.
    """

    data: Path | None = None
    images: Path | None = None
    labels: Path | None = None
    previous: Path | None = None
    patches: int = 32
    seed: int = 0
    scales: Path | None = None

    def __post_init__(self) -> None:
        for name in ("data", "images", "labels", "previous", "scales"):
            _check_path(getattr(self, name), name, optional=True)
        if (self.data is None) == (self.images is None):
            raise TrtbuildError(
                "A calibration takes its patches from one place.",
                expected="--calibration FOLDER, or --calibration-images FOLDER",
                got="both" if self.data is not None else "neither",
            )
        if self.labels is not None and self.images is None:
            raise TrtbuildError(
                "Labels belong to raw images; preprocessed cases bring theirs along.",
                expected="--calibration-images",
                got="--calibration-labels without it",
            )
        for name, least, option in (("patches", 1, "--calibration-patches"), ("seed", 0, "--seed")):
            _check_whole(getattr(self, name), least, option)


def check_limit(value: object, where: str) -> None:
    """A limit of the gate, 0 to 1, else TrtbuildError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise TrtbuildError("A limit of the gate is out of range.", expected="0 <= limit <= 1", got=value, where=where)


@dataclass(frozen=True, kw_only=True)
class GateConfig:
    """What decides whether an engine in lower precision is good enough, on cases that the calibration did not see.

    `mean_loss` and `class_loss` are the largest losses of Dice against the labels, on average and of any class;
    `agreement` is the least Dice against FP32's output, which judges where there are no labels. `roll_back` lets the
    layers that hurt go back to higher precision where the gate fails.
    """

    patches: int = 16
    mean_loss: float = 0.005
    class_loss: float = 0.02
    agreement: float = 0.985
    roll_back: bool = True

    def __post_init__(self) -> None:
        _check_whole(self.patches, 1, "--gate-patches")
        _check_flag(self.roll_back, "roll_back")
        for name in ("mean_loss", "class_loss", "agreement"):
            check_limit(getattr(self, name), name)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """From a clean ONNX network and its scales (a table, or a calibration cache of TensorRT) to INT8.

    A network with Q/DQ of its own takes no scales: None, and `keep`, `quantize_ends` and `method` stay as they are.
    `method` None takes the table's percentile thresholds, or those that a cache holds.
    """

    source: Path
    scales: Path | None = None
    output: Path
    backend: Target = "openvino"
    method: Threshold | None = None
    rest: QuantizedRest = "fp32"
    fp16_norms: bool = False
    keep: tuple[str, ...] = ()
    quantize_ends: bool = False
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("source", "output", "scales"):
            _check_path(getattr(self, name), name, optional=name == "scales")
        known = {"backend": get_args(Target), "method": (None, *get_args(Threshold)), "rest": get_args(QuantizedRest)}
        for name, values in known.items():
            _check_known(name, getattr(self, name), values)
        for name in ("fp16_norms", "quantize_ends", "overwrite"):
            _check_flag(getattr(self, name), name)
        check_patterns(self.keep)
        if self.rest != "fp32" and self.backend != "tensorrt":
            raise TrtbuildError(
                "On a CPU the rest is an FP32 graph, which the backend computes in what it is told.",
                expected="--rest fp32, or --backend tensorrt",
                got=f"--rest {self.rest}",
            )
        if self.fp16_norms and self.rest != "fp16":
            raise TrtbuildError("--fp16-norms is for FP16.", expected="--rest fp16", got=f"--rest {self.rest}")


def check_patterns(patterns: tuple[str, ...]) -> None:
    """A tuple of regular expressions, else TrtbuildError: a text alone would be taken letter by letter."""
    if not isinstance(patterns, tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TrtbuildError(
            "--keep takes regular expressions.",
            expected='a tuple of texts, such as ("decoder",)',
            got=repr(patterns),
            where="keep",
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise TrtbuildError("--keep is no regular expression.", got=f"{pattern:.80}: {error}") from error


def _check_path(value: object, where: str, *, optional: bool) -> None:
    if not (isinstance(value, Path) or (optional and value is None)):
        raise TrtbuildError("A path is needed.", expected="a pathlib.Path", got=repr(value), where=where)


def _check_flag(value: object, where: str) -> None:
    if not isinstance(value, bool):
        raise TrtbuildError("A yes or a no is needed.", expected="True or False", got=repr(value), where=where)


def _check_known(name: str, value: object, known: tuple[object, ...]) -> None:
    if not isinstance(value, (str, type(None))) or value not in known:
        expected = " or ".join(map(str, known))
        raise TrtbuildError(f"There is no such {name}.", expected=expected, got=value)


def _check_whole(value: object, least: int, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TrtbuildError("A number is out of range.", expected=f"a whole number >= {least}", got=value, where=where)


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """From a trained model, or a bundle whose networks are taken over, to a bundle.

    `model` is a trained-model folder, a zip of nnU-Net, or a bundle. Without it the model is looked up below
    `nnUNet_results` by `dataset`, `configuration`, `trainer` and `plans` (None: nnU-Net's defaults), which also choose
    among the models of a zip. `previous_stage` is the model (folder or zip) of a cascade's first stage, which then goes
    into the same bundle. `network` is an importable factory, "module:function", in place of the network of plans and
    trainer. `postprocessing` is a file of nnU-Net's (postprocessing.json or .pkl).
    `folds` None means nnU-Net's default: all numbered folds. `backends` are built in this order; "auto" takes the
    first CPU backend that is installed. `threads` None means what this process may use.
    `precision` "int8" and "fp16" need a `calibration`. In INT8 `rest` is what everything but the quantised layers
    computes in, `method` how thresholds are chosen ("auto": the gate decides), and `keep` holds regular expressions:
    layers whose name one of them finds are not quantised, and nor are the first and the last ones unless
    `quantize_ends`. `gate` None compiles ungated; a gate needs the `calibration`'s cases.
    """

    model: Path | None = None
    output: Path
    dataset: str | None = None
    configuration: str | None = None
    trainer: str | None = None
    plans: str | None = None
    folds: tuple[str, ...] | None = None
    checkpoint: str = "checkpoint_final.pth"
    previous_stage: Path | None = None
    network: str | None = None
    postprocessing: Path | None = None
    backends: tuple[str, ...] = ("auto",)
    precision: Precision = "fp32"
    rest: Rest = "fp32"
    method: Method = "auto"
    keep: tuple[str, ...] = ()
    quantize_ends: bool = False
    calibration: CalibrationConfig | None = None
    gate: GateConfig | None = GateConfig()
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
        for name, known in (("precision", Precision), ("rest", Rest), ("method", Method)):
            _check_known(name, getattr(self, name), get_args(known))
        for name, kind in (("calibration", CalibrationConfig), ("gate", GateConfig)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TrtbuildError(
                    f"The {name} is of the wrong type.",
                    expected=f"a {kind.__name__}, or None",
                    got=repr(value),
                    where=name,
                )
        _check_flag(self.quantize_ends, "quantize_ends")
        check_patterns(self.keep)
        self._check_precision()

    def _check_precision(self) -> None:
        """What belongs to INT8 is for INT8, and what needs ranges gets a calibration."""
        if self.precision in ("int8", "fp16") and self.calibration is None:
            raise TrtbuildError(
                f"{self.precision.upper()} needs patches to measure the network's ranges on.",
                expected="--calibration nnUNet_preprocessed/DatasetX, or --calibration-images FOLDER",
                hint="without any, compile with --precision bf16 or fp32",
            )
        if self.precision == "bf16" and self.calibration is not None:
            self._check_bf16(self.calibration)
        given = {
            "--rest": self.rest != "fp32",
            "--method": self.method != "auto",
            "--keep": bool(self.keep),
            "--quantize-ends": self.quantize_ends,
        }
        for option, is_given in given.items():
            if is_given and self.precision != "int8":
                raise TrtbuildError(f"{option} is for INT8.", expected="--precision int8", got=self.precision)
        if self.precision == "fp32" and self.calibration is not None:
            raise TrtbuildError(
                "FP32 needs no calibration.", expected="--precision int8, fp16 or bf16", got="--precision fp32"
            )
        if self.calibration is None and self.gate not in (None, GateConfig()):
            raise TrtbuildError(
                "The gate has no cases to judge on.",
                expected="--calibration, and a precision below FP32",
                got=f"limits for a gate, and --precision {self.precision}",
            )
        if self.precision == "int8" and self.method == "auto" and self.gate is None:
            raise TrtbuildError(
                "Without a gate nothing decides between the calibration methods.",
                expected="--method entropy, percentile or minmax with --no-gate",
                got="--method auto",
            )

    def _check_bf16(self, calibration: CalibrationConfig) -> None:
        """BF16 has FP32's range: nothing is calibrated, the cases are for the gate alone."""
        if self.gate is None or calibration.scales is not None:
            raise TrtbuildError(
                "BF16 needs no scales: the cases are for its gate.",
                expected="--calibration with the gate, or neither",
                got="--scales" if calibration.scales is not None else "--no-gate",
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
    segmentations, too.
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

    def __post_init__(self) -> None:
        check_threads(self.threads)
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
