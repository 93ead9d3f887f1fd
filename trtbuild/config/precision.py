"""What lower precision is measured and judged on, and the verb `quantize`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from trtbuild.config.checks import check_flag, check_known, check_limit, check_path, check_patterns, check_whole
from trtbuild.errors import TrtbuildError

Target = Literal["openvino", "onnxruntime", "tensorrt"]
Threshold = Literal["entropy", "percentile", "minmax"]
QuantizedRest = Literal["fp32", "fp16", "bf16"]


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
            check_path(getattr(self, name), name, optional=True)
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
            check_whole(getattr(self, name), least, option)


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
        check_whole(self.patches, 1, "--gate-patches")
        check_flag(self.roll_back, "roll_back")
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
            check_path(getattr(self, name), name, optional=name == "scales")
        known = {"backend": get_args(Target), "method": (None, *get_args(Threshold)), "rest": get_args(QuantizedRest)}
        for name, values in known.items():
            check_known(name, getattr(self, name), values)
        for name in ("fp16_norms", "quantize_ends", "overwrite"):
            check_flag(getattr(self, name), name)
        check_patterns(self.keep)
        if self.rest != "fp32" and self.backend != "tensorrt":
            raise TrtbuildError(
                "On a CPU the rest is an FP32 graph, which the backend computes in what it is told.",
                expected="--rest fp32, or --backend tensorrt",
                got=f"--rest {self.rest}",
            )
        if self.fp16_norms and self.rest != "fp16":
            raise TrtbuildError("--fp16-norms is for FP16.", expected="--rest fp16", got=f"--rest {self.rest}")
