"""JSON as bundle.json may hold it: bounded, without duplicate keys, without numbers that C++ could not hold."""

from __future__ import annotations

import json
import math
import re
from typing import Any, NoReturn

from trtbuild.bundle.files import COMPILE_AGAIN, short
from trtbuild.errors import BundleFormat, BundleTooLarge

MAX_JSON_SIZE = 16 << 20
"""Bytes; a real bundle.json has 10 to 200 kB."""
MAX_DEPTH = 32
"""Nested objects and lists; format 1 itself needs 7, the rest is room for `extensions`."""
MAX_VALUES = 500_000
"""Objects, lists and commas together: the number of values, with some to spare."""


def value_from_text(raw: bytes) -> Any:
    """Dicts, lists and scalars from the bytes of a bundle.json.

    Raises: BundleTooLarge (size, depth, number of values, integers beyond 64 bits), BundleFormat (all else).
    """
    if len(raw) > MAX_JSON_SIZE:
        raise too_large("bundle.json is larger than any real one.", f"at most {MAX_JSON_SIZE} bytes", len(raw))
    try:
        text = raw.decode("utf-8")
        _check_extent(text)
        data = json.loads(text, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float, parse_int=_int)
        json.dumps(data, ensure_ascii=False).encode("utf-8")  # half a surrogate pair, "\ud800", ends here
    except ValueError as error:
        raise _no_json("bundle.json is not JSON in UTF-8.", str(error)) from error
    return data


def too_large(what: str, expected: object, got: object) -> BundleTooLarge:
    """The error for something beyond a limit of this file."""
    return BundleTooLarge(what, expected=expected, got=got, hint="do not use this bundle unless you know who made it")


def _no_json(what: str, got: object) -> BundleFormat:
    return BundleFormat(what, expected="JSON (RFC 8259)", got=got, hint=COMPILE_AGAIN)


def _check_extent(text: str) -> None:
    """Bounds what the parser is given: it recurses into nested values and builds an object for each value."""
    bare = re.sub(r'"[^"]*"?', "", text.replace("\\\\", "").replace('\\"', ""))
    depth = values = 0
    for match in re.finditer(r"[\[\]{},]", bare):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1, ",": 0}[match[0]]
        values += match[0] not in "]}"
        if depth > MAX_DEPTH:
            raise too_large("bundle.json is nested deeper than any real one.", f"{MAX_DEPTH} levels", f"{depth} levels")
        if values > MAX_VALUES:
            raise too_large("bundle.json holds more values than any real one.", f"at most {MAX_VALUES}", "more")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _no_json("A key of bundle.json stands twice in one object.", short(twice))
    return found


def _constant(name: str) -> NoReturn:
    raise _no_json("bundle.json holds a number that is none.", name)


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _no_json("bundle.json holds a number that is none.", short(text))
    return value


def _int(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**63:
        raise too_large("An integer in bundle.json is larger than any real one.", "64 bits", short(text))
    return int(text)
