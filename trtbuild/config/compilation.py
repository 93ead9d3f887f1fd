"""From a trained model to a bundle."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from trtbuild.config.checks import check_flag, check_folds, check_known, check_path, check_patterns, check_threads
from trtbuild.config.precision import CalibrationConfig, GateConfig
from trtbuild.config.tensorrt import TensorRTConfig
from trtbuild.errors import TrtbuildError
from trtbuild.spec import Precision

Rest = Literal["fp32", "fp16", "bf16"]
Method = Literal["auto", "entropy", "percentile", "minmax"]
GATE, TENSORRT = GateConfig(), TensorRTConfig()  # as they are where nothing is said


@dataclass(frozen=True, kw_only=True)
class CompileConfig:
    """From a trained model, or a bundle whose networks are taken over, to a bundle.

    `model` is a trained-model folder, a zip of nnU-Net, or a bundle. Without it the model is looked up below
    `nnUNet_results` by `dataset`, `configuration`, `trainer` and `plans` (None: nnU-Net's defaults), which also choose
    among the models of a zip. `previous_stage` is the model (folder or zip) of a cascade's first stage, which then goes
    into the same bundle. `network` is an importable factory, "module:function", in place of the network of plans and
    trainer. `postprocessing` is a file of nnU-Net's (postprocessing.json or .pkl).
    `folds` None means nnU-Net's default: all numbered folds. `backends` are built in this order; "auto" takes the
    first that runs here. `threads` None means what this process may use.
    `precision` "int8" and "fp16" need a `calibration`, but for FP16 on GPUs. In INT8 `rest` is what everything but
    the quantised layers computes in (None: "fp32" on a CPU, "fp16" in TensorRT), `method` how thresholds are chosen
    ("auto": the gate decides), and `keep` holds regular expressions: layers whose name one of them finds are not
    quantised, and nor are the first and the last ones unless `quantize_ends`. `gate` None compiles ungated; a gate
    needs the `calibration`'s cases. `tensorrt` is how TensorRT builds, and the batch of every engine for GPUs;
    `fp16_norms` lets FP16 norms compute in FP16 there, and `emit_script` is a file for the command lines of trtexec and
    Polygraphy that build the same engines of TensorRT.
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
    rest: Rest | None = None
    method: Method = "auto"
    keep: tuple[str, ...] = ()
    quantize_ends: bool = False
    calibration: CalibrationConfig | None = None
    gate: GateConfig | None = GATE
    tensorrt: TensorRTConfig = TENSORRT
    fp16_norms: bool = False
    emit_script: Path | None = None
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
        for name, values in (
            ("precision", get_args(Precision)),
            ("rest", (None, *get_args(Rest))),
            ("method", get_args(Method)),
        ):
            check_known(name, getattr(self, name), values)
        if not isinstance(self.tensorrt, TensorRTConfig):
            raise TrtbuildError(
                "The build options of TensorRT are of the wrong type.",
                expected="a TensorRTConfig",
                got=repr(self.tensorrt),
                where="tensorrt",
            )
        check_path(self.emit_script, "emit_script", optional=True)
        for name, kind in (("calibration", CalibrationConfig), ("gate", GateConfig)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise TrtbuildError(
                    f"The {name} is of the wrong type.",
                    expected=f"a {kind.__name__}, or None",
                    got=repr(value),
                    where=name,
                )
        check_flag(self.quantize_ends, "quantize_ends")
        check_flag(self.fp16_norms, "fp16_norms")
        check_patterns(self.keep)
        self._check_precision()

    @property
    def cpu_rest(self) -> Precision:
        """What INT8 engines of CPU backends compute in besides INT8."""
        return "bf16" if self.rest == "bf16" else "fp32"

    @property
    def device_rest(self) -> Rest:
        """What INT8 engines of TensorRT compute in besides INT8."""
        return self.rest or "fp16"

    def _check_precision(self) -> None:
        """What belongs to INT8 is for INT8, and what needs ranges gets a calibration.

        FP16 for GPUs does without: it takes the ranges of the golden patch.
        """
        on_gpu = any(name.startswith("tensorrt") or name == "onnxruntime-cuda" for name in self.backends)
        if self.calibration is None and (self.precision == "int8" or (self.precision == "fp16" and not on_gpu)):
            raise TrtbuildError(
                f"{self.precision.upper()} needs patches to measure the network's ranges on.",
                expected="--calibration nnUNet_preprocessed/DatasetX, or --calibration-images FOLDER",
                hint="without any, compile with --precision bf16 or fp32",
            )
        if self.precision == "bf16" and self.calibration is not None:
            self._check_bf16(self.calibration)
        given = {
            "--rest": self.rest is not None,
            "--method": self.method != "auto",
            "--keep": bool(self.keep),
            "--quantize-ends": self.quantize_ends,
        }
        for option, is_given in given.items():
            if is_given and self.precision != "int8":
                raise TrtbuildError(f"{option} is for INT8.", expected="--precision int8", got=self.precision)
        if self.fp16_norms and self.precision != "fp16" and (self.precision, self.device_rest) != ("int8", "fp16"):
            raise TrtbuildError(
                "--fp16-norms is for FP16.", expected="--precision fp16, or int8 with --rest fp16", got=self.precision
            )
        if self.precision == "fp32" and self.calibration is not None:
            raise TrtbuildError(
                "FP32 needs no calibration.", expected="--precision int8, fp16 or bf16", got="--precision fp32"
            )
        if self.calibration is None and self.gate not in (None, GATE):
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
