"""JSON that is read strictly: no unknown, missing or repeated keys, no wrong types, no number that is none."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from trtbuild_calibration.errors import CalibrationError

HINT = "calibrate again: the file is damaged, or of another version"


def value_from_bytes(raw: bytes, where: str) -> Any:
    """Dicts, lists and scalars.

    Raises:
        CalibrationError: no JSON in UTF-8, a key twice in one object, or NaN or infinity.
    """
    try:
        return json.loads(raw.decode(), object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CalibrationError("A file is not strict JSON.", got=error, where=where, hint=HINT) from error


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def fields(value: Any, keys: Sequence[str], where: str) -> dict[str, Any]:
    """The object with exactly these keys."""
    found = mapping(value, where)
    if found.keys() != set(keys):
        missing, unknown = sorted(set(keys) - found.keys()), sorted(found.keys() - set(keys))
        got = [f"without {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise wrong(where, f"the keys {', '.join(keys)}", "; ".join(got))
    return found


def mapping(value: Any, where: str) -> dict[str, Any]:
    """An object with any keys."""
    if not isinstance(value, dict):
        raise wrong(where, "an object", value)
    return value


def size(value: Any, where: str) -> float:
    """A finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= sys.float_info.max:
        raise wrong(where, "a finite number of at least 0", value)
    return float(value)


def whole(value: Any, where: str, *, most: int | None = None) -> int:
    """A whole number of at least 0."""
    if type(value) is not int or value < 0 or (most is not None and value > most):
        raise wrong(where, "a whole number of at least 0" + (f" and at most {most}" if most is not None else ""), value)
    return value


def text(value: Any, where: str) -> str:
    """A string."""
    if not isinstance(value, str):
        raise wrong(where, "a string", value)
    return value


def wrong(where: str, expected: str, got: object) -> CalibrationError:
    """The error for a value that is not what its key asks for."""
    return CalibrationError(
        "A value in a file is wrong.",
        expected=expected,
        got=f"{got:.80}" if isinstance(got, str) else f"{got!r:.80}",
        where=where,
        hint=HINT,
    )
