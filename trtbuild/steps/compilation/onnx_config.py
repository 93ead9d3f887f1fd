"""What to make of an ONNX file that is no nnU-Net's, and for which shapes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import get_args

from trtbuild.config import QuantizedRest, TensorRTConfig, Threshold, check_patterns, check_threads
from trtbuild.engine.tensorrt.shapes import check_shapes, shapes_from_io
from trtbuild.engine.tensorrt.values import Shapes
from trtbuild.errors import TrtbuildError
from trtbuild.nvinfer import Backend
from trtbuild.spec import Precision, TensorSpec

ENDING = ".engine"
OPTIONS = ("--minShapes", "--optShapes", "--maxShapes")


@dataclass(frozen=True, kw_only=True)
class OnnxFileConfig:
    """From any ONNX file with its weights inside to an engine.

    `output` is NAME.engine; the typed graph goes to NAME.onnx beside it, what is known of the engine to
    NAME.engine.json. `min_shapes`, `opt_shapes` and `max_shapes` are of the inputs with free dimensions,
    "x:1x1x64x64,y:1x8" as trtexec writes them: all three, the usual ones alone, or none where the batch alone is free
    (`tensorrt` then says the batches). `calibration` is a file of arrays (.npy, .npz, Polygraphy's .json); INT8 needs
    one, and FP16 without one keeps no tensor from overflowing. In INT8 `rest` is what everything but the quantised
    layers computes in; `method`, `keep` and `quantize_ends` are those of `quantize`. `fp16_norms` lets norms compute in
    FP16. `emit_script` is a file for the commands of trtexec and Polygraphy that build the same engine.
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
                                got=", ".join(o for o, g in zip(OPTIONS, given, strict=True) if g))  # fmt: skip

    @property
    def onnx(self) -> Path:
        """Where the typed graph goes."""
        return self.output.with_suffix(".onnx")

    @property
    def facts(self) -> Path:
        """Where what is known of the engine goes."""
        return self.output.with_name(f"{self.output.name}.json")

    def _check_output(self) -> None:
        if self.output.suffix != ENDING:
            raise TrtbuildError("The output is an engine.", expected=f"NAME{ENDING}", got=self.output.name, where="-o")
        if self.onnx.resolve() == self.model.resolve():
            raise TrtbuildError("The typed graph would replace the model.", expected="another name", got=self.output,
                                where=self.model, hint=f"-o {self.output.stem}_{self.precision}{ENDING}")  # fmt: skip

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


def profile_of(config: OnnxFileConfig, inputs: Sequence[TensorSpec]) -> Shapes:
    """The optimisation profile of these inputs, as `config` says it.

    Raises:
        TrtbuildError: no shapes, an input without any, or one that the network does not have.
        EngineError: shapes that do not fit the network.
    """
    if not config.opt_shapes:
        return shapes_from_io(inputs, config.tensorrt)
    texts = [config.min_shapes or config.opt_shapes, config.opt_shapes, config.max_shapes or config.opt_shapes]
    parsed = [_shapes(text, option) for text, option in zip(texts, OPTIONS, strict=True)]
    known = [spec.name for spec in inputs]
    for shapes, option in zip(parsed, OPTIONS, strict=True):
        for name in shapes:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                raise TrtbuildError(f"{option} is for an input that the network does not have.", where=option, got=name,
                                    expected=", ".join(known),
                                    hint=f"Did you mean {close[0]}?" if close else None)  # fmt: skip
    profile = {}
    for spec in inputs:
        fixed = tuple(n for n in spec.shape if isinstance(n, int))
        fallback = fixed if len(fixed) == len(spec.shape) else None
        profile[spec.name] = tuple(_of(shapes, spec, fallback, o) for shapes, o in zip(parsed, OPTIONS, strict=True))
    result: Shapes = {name: (three[0], three[1], three[2]) for name, three in profile.items()}
    check_shapes(inputs, result)
    return result


def _of(
    shapes: Mapping[str, tuple[int, ...]], spec: TensorSpec, fallback: tuple[int, ...] | None, option: str
) -> tuple[int, ...]:
    found = shapes.get(spec.name, fallback)
    if found is None:
        raise TrtbuildError(f"{option} lacks an input.", expected=f"a shape of {spec.name} {spec.shape}",
                            got=", ".join(shapes), where=option)  # fmt: skip
    return found


def _shapes(text: str, option: str) -> dict[str, tuple[int, ...]]:
    """{"x": (1, 1, 64, 64)} from "x:1x1x64x64"; names may be in single quotes and hold colons, as in trtexec."""
    shapes: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, _, numbers = part.strip().rpartition(":")
        sizes = numbers.split("x")
        name = name.strip("'")
        if (
            not name
            or name in shapes
            or not all(size.isascii() and size.isdigit() and len(size) < 10 for size in sizes)
        ):
            raise TrtbuildError(f"{option} is not understood.", expected="x:1x1x64x64,y:1x8, each input once",
                                got=part.strip() or "nothing", where=option)  # fmt: skip
        shapes[name] = tuple(map(int, sizes))
    return shapes
