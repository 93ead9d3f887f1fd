"""The optimisation profile: for which batches an engine is built, and whether that fits the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.values import Shapes
from trtbuild.errors import EngineError
from trtbuild.spec import TensorSpec

KINDS = ("smallest", "usual", "largest")


def shapes_from_io(inputs: Sequence[TensorSpec], config: TensorRTConfig) -> Shapes:
    """The profile of a network's inputs (batch, C, *patch), whose batch may be free and whose patch is fixed.

    Raises:
        EngineError: another dimension than the first is free.
    """
    batches = (config.min_batch, config.opt_batch, config.max_batch)
    result = {}
    for spec in inputs:
        rest = tuple(n for n in spec.shape[1:] if isinstance(n, int))
        if len(rest) != len(spec.shape[1:]):
            raise EngineError("An input has no fixed patch.", expected="(batch, C, *patch) with numbers but for batch",
                              got=_text(spec.shape), where=f"input {spec.name}",
                              hint="give its shapes: --minShapes, --optShapes, --maxShapes")  # fmt: skip
        first = spec.shape[:1]
        free = bool(first) and isinstance(first[0], str)
        smallest, usual, largest = (((n,) if free else tuple(map(int, first))) + rest for n in batches)
        result[spec.name] = (smallest, usual, largest)
    return result


def check_shapes(inputs: Sequence[TensorSpec], shapes: Shapes, kinds: Sequence[str] = KINDS) -> None:
    """Whether a profile is one of these inputs; `kinds` are what messages call its three shapes.

    Raises:
        EngineError: a name that is no input, an input without shapes though it has free dimensions, another number of
            dimensions, another number where the network has a fixed one, or sizes out of order.
    """
    known = {spec.name: spec for spec in inputs}
    for name in shapes:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            raise EngineError("The profile is for an input that the network does not have.", expected=", ".join(known),
                              got=name, hint=f"Did you mean {close[0]}?" if close else None)  # fmt: skip
    for name, spec in known.items():
        if name in shapes:
            _check(spec, shapes, kinds)
        elif not all(isinstance(n, int) for n in spec.shape):
            raise EngineError("The profile lacks an input with free dimensions.", where=f"input {name}",
                              expected=f"smallest, usual and largest shape of {_text(spec.shape)}",
                              got=", ".join(shapes) or "no shapes", hint="give its shapes")  # fmt: skip


def _check(spec: TensorSpec, shapes: Mapping[str, Sequence[Sequence[int]]], kinds: Sequence[str]) -> None:
    where = f"input {spec.name}"
    for kind, shape in zip(kinds, shapes[spec.name], strict=True):
        fits = len(shape) == len(spec.shape) and all(
            have >= 1 if isinstance(want, str) else have == want for have, want in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            raise EngineError(f"The {kind} shape of the profile does not fit the network's input.",
                              expected=_text(spec.shape), got=_text(shape), where=where,
                              hint="the patch is fixed in the network; only named dimensions are free")  # fmt: skip
    smallest, usual, largest = shapes[spec.name]
    if not all(a <= b <= c for a, b, c in zip(smallest, usual, largest, strict=True)):
        raise EngineError("The shapes of the profile are out of order.", expected="smallest <= usual <= largest",
                          got=" ".join(map(_text, (smallest, usual, largest))), where=where,
                          hint="give them in this order: --minShapes, --optShapes, --maxShapes")  # fmt: skip


def _text(shape: Sequence[int | str]) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"
