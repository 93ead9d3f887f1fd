"""What to make of an ONNX file that is no nnU-Net's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import get_args

from trtbuild.config import QuantizedRest, TensorRTConfig, Threshold, check_patterns, check_threads
from trtbuild.errors import TrtbuildError
from trtbuild.nvinfer import Backend
from trtbuild.spec import Precision

ENDING = ".engine"
PERCENTILE: Threshold = "percentile"
"""What decides where nothing else does: there is no gate that could hold a contest."""
OPTIONS = ("--minShapes", "--optShapes", "--maxShapes")


@dataclass(frozen=True, kw_only=True)
class OnnxFileConfig:
    """From any ONNX file with its weights inside to an engine.

    `output` is NAME.engine; the typed graph goes to NAME.onnx beside it, what is known of the engine to
    NAME.engine.json. `min_shapes`, `opt_shapes` and `max_shapes` are of the inputs with free dimensions,
    "x:1x1x64x64,y:1x8" as trtexec writes them: all three, the usual ones alone, or none where the batch alone is free
    (`tensorrt` then says the batches). `calibration` is a file of arrays (.npy, .npz, Polygraphy's .json); INT8 needs
    one, and FP16 without one keeps no tensor from overflowing. In INT8 `rest` is what everything but the quantised
    layers computes in; `method` (None: percentile), `keep` and `quantize_ends` are those of `quantize`. `fp16_norms`
    lets norms compute in FP16. `emit_script` is a file for the commands of trtexec and Polygraphy that build the same
    engine. `batch_options` are the options of the batch that the user wrote: an error where nothing comes of them.
    """

    model: Path
    output: Path
    backend: Backend
    precision: Precision = "fp32"
    rest: QuantizedRest | None = None
    method: Threshold | None = None
    keep: tuple[str, ...] = ()
    quantize_ends: bool = False
    fp16_norms: bool = False
    calibration: Path | None = None
    min_shapes: str = ""
    opt_shapes: str = ""
    max_shapes: str = ""
    tensorrt: TensorRTConfig = field(default_factory=TensorRTConfig)
    batch_options: tuple[str, ...] = ()
    emit_script: Path | None = None
    threads: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        known: Mapping[str, Sequence[object]] = {
            "backend": get_args(Backend),
            "precision": get_args(Precision),
            "rest": (None, *get_args(QuantizedRest)),
            "method": (None, *get_args(Threshold)),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise TrtbuildError(f"There is no such {name}.", got=repr(getattr(self, name)),
                                    expected=", ".join(str(value) for value in values if value))  # fmt: skip
        check_threads(self.threads)
        check_patterns(self.keep)
        self._check_output()
        self._check_precision()
        given = [bool(text) for text in (self.min_shapes, self.opt_shapes, self.max_shapes)]
        if any(given) and given not in ([True] * 3, [False, True, False]):
            raise TrtbuildError("The shapes are incomplete.", expected="all three, or --optShapes alone",
                                got=", ".join(o for o, g in zip(OPTIONS, given, strict=True) if g),
                                hint="add the others, as in --optShapes x:1x1x64x64")  # fmt: skip
        if any(given) and self.batch_options:
            raise TrtbuildError("The batch is said twice.", expected="either shapes or batches",
                                got=f"--optShapes and {', '.join(self.batch_options)}",
                                hint=f"leave {self.batch_options[0]} out: the shapes hold the batch")  # fmt: skip

    @property
    def threshold(self) -> Threshold | None:
        """How INT8 thresholds are chosen; None where nothing is quantised on arrays."""
        return (self.method or PERCENTILE) if self.precision == "int8" and self.calibration is not None else None

    @property
    def onnx(self) -> Path:
        """Where the typed graph goes."""
        return self.output.with_suffix(".onnx")

    @property
    def facts(self) -> Path:
        """Where what is known of the engine goes."""
        return self.output.with_name(f"{self.output.name}.json")

    @property
    def outputs(self) -> tuple[Path, ...]:
        """All that is written; the engine, which the others describe, first."""
        return (self.output, self.onnx, self.facts)

    def _check_output(self) -> None:
        if self.output.suffix != ENDING:
            raise TrtbuildError("The output is an engine.", expected=f"NAME{ENDING}", got=self.output.name, where="-o",
                                hint=f"-o {self.output.stem}{ENDING}")  # fmt: skip
        if self.onnx.resolve() == self.model.resolve():
            raise TrtbuildError("The typed graph would replace the model.", expected="another name", got=self.output,
                                where=self.model, hint=f"-o {self.output.stem}_{self.precision}{ENDING}")  # fmt: skip
        for source in (self.model, *([self.calibration] if self.calibration else ())):
            for path in self.outputs:
                if path.resolve() == source.resolve():
                    raise TrtbuildError("An output would replace an input.", expected="another name", got=path,
                                        where=source, hint="choose another name with -o")  # fmt: skip

    def _check_precision(self) -> None:
        """What belongs to INT8 is for INT8, and only INT8 and FP16 look at arrays."""
        for option, is_given in {"--rest": self.rest is not None, "--method": self.method is not None,
                                 "--keep": bool(self.keep), "--quantize-ends": self.quantize_ends}.items():  # fmt: skip
            if is_given and self.precision != "int8":
                raise TrtbuildError(f"{option} is for INT8.", expected="--precision int8", got=self.precision)
        if self.calibration is not None and self.precision not in ("int8", "fp16"):
            raise TrtbuildError(f"{self.precision.upper()} needs no calibration.", expected="--precision int8 or fp16",
                                got=f"--precision {self.precision}")  # fmt: skip
        if self.fp16_norms and "fp16" not in (self.precision, self.computed):
            raise TrtbuildError("--fp16-norms is for FP16.", expected="FP16", got=self.computed)

    @property
    def computed(self) -> Precision:
        """What everything but quantised layers computes in."""
        return self.precision if self.precision != "int8" else self.rest or "fp16"
