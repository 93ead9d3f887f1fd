"""The shapes that an ONNX file's engine is for, from what trtexec's options say of its inputs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from trtbuild.engine.tensorrt.shapes import check_shapes, shapes_from_io
from trtbuild.engine.tensorrt.values import Shapes
from trtbuild.errors import TrtbuildError
from trtbuild.spec import TensorSpec
from trtbuild.steps.compilation.onnx_config import OPTIONS, OnnxFileConfig

# A name in quotes ends where a quote and sizes follow, so that it may hold commas, colons and quotes; a bare one may
# hold all but commas
PART = re.compile(
    r"\s*(?:'(?P<quoted>.+?)'|(?!')(?P<bare>[^,]+)):(?P<sizes>[0-9]{1,9}(?:x[0-9]{1,9})*)\s*(?P<more>,|\Z)", re.DOTALL
)


def profile_of(config: OnnxFileConfig, inputs: Sequence[TensorSpec]) -> Shapes:
    """The optimisation profile of these inputs, as `config` says it.

    Raises:
        TrtbuildError: no shapes, an input without any, or one that the network does not have; an option of the batch
            for a network whose batch is fixed.
        EngineError: shapes that do not fit the network.
    """
    if not config.opt_shapes:
        _check_batch(config, inputs)
        return shapes_from_io(inputs, config.tensorrt)
    texts = (config.min_shapes, config.opt_shapes, config.max_shapes)
    given = {option: text for option, text in zip(OPTIONS, texts, strict=True) if text}
    parsed = {option: _checked(_shapes(text, option), inputs, option) for option, text in given.items()}
    profile: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {}
    for spec in inputs:
        found = [_of(shapes, spec, option) for option, shapes in parsed.items()]
        profile[spec.name] = (found[0], found[len(found) // 2], found[-1])
    check_shapes(inputs, profile, OPTIONS if len(parsed) > 1 else tuple(parsed) * len(OPTIONS))
    return profile


def _check_batch(config: OnnxFileConfig, inputs: Sequence[TensorSpec]) -> None:
    if config.batch_options and not any(isinstance(n, str) for spec in inputs for n in spec.shape[:1]):
        raise TrtbuildError(f"Nothing comes of {config.batch_options[0]}: the network's batch is fixed.",
                            expected="an input whose first dimension is free", where=config.model,
                            got=", ".join(f"{spec.name} {spec.shape}" for spec in inputs),
                            hint=f"leave {config.batch_options[0]} out, or export with a free batch")  # fmt: skip


def _checked(
    shapes: dict[str, tuple[int, ...]], inputs: Sequence[TensorSpec], option: str
) -> Mapping[str, tuple[int, ...]]:
    known = [spec.name for spec in inputs]
    for name in shapes:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise TrtbuildError(f"{option} is for an input that the network does not have.", where=option, got=name,
                                expected=", ".join(known),
                                hint=f"Did you mean {close[0]}?" if close else "name one of these")  # fmt: skip
    return shapes


def _of(shapes: Mapping[str, tuple[int, ...]], spec: TensorSpec, option: str) -> tuple[int, ...]:
    """The shape of an input; one whose shape is fixed needs none."""
    fixed = tuple(n for n in spec.shape if isinstance(n, int))
    found = shapes.get(spec.name, fixed if len(fixed) == len(spec.shape) else None)
    if found is None:
        example = "x".join(str(n) if isinstance(n, int) else "1" for n in spec.shape)
        raise TrtbuildError(f"{option} lacks an input.", expected=f"a shape of {spec.name} {spec.shape}",
                            got=", ".join(shapes), where=option, hint=f"add {spec.name}:{example}")  # fmt: skip
    return found


def _shapes(text: str, option: str) -> dict[str, tuple[int, ...]]:
    """{"x": (1, 1, 64, 64)} from "x:1x1x64x64"; names may be in single quotes, as in trtexec."""
    shapes: dict[str, tuple[int, ...]] = {}
    place, more = 0, True
    while more:
        part = PART.match(text, place)
        name = (part["quoted"] or part["bare"]) if part else ""
        if part is None or name in shapes:
            raise TrtbuildError(f"{option} is not understood.", expected="x:1x1x64x64,y:1x8, each input once",
                                got=text[place:].strip() or "nothing", where=option,
                                hint="put names with commas or colons into single quotes: 'a,b':1x8")  # fmt: skip
        shapes[name] = tuple(map(int, part["sizes"].split("x")))
        place, more = part.end(), bool(part["more"])
    return shapes
