"""Typed access to parsed JSON that remembers the key path, so that every complaint says where."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from trtbuild.errors import ModelError


@dataclass(frozen=True)
class Field:
    """A JSON value and the path of keys under which it stands, file first. Every accessor raises `ModelError`."""

    value: Any
    path: str

    def __getitem__(self, key: str) -> Field:
        """The entry under `key`, which must be there."""
        entries = self.entries()
        if key not in entries:
            raise ModelError(f"The key {key!r} is missing.", expected=key, got=listed(entries), where=self.path)
        return Field(entries[key], f"{self.path}.{key}")

    def get(self, key: str) -> Field | None:
        """The entry under `key`, or None where it is missing or null."""
        value = self.entries().get(key)
        return None if value is None else Field(value, f"{self.path}.{key}")

    def entries(self) -> Mapping[str, Any]:
        """The JSON object itself."""
        if not isinstance(self.value, Mapping):
            raise self.wrong("a JSON object")
        return self.value

    def items(self, length: int | None = None) -> tuple[Field, ...]:
        """The entries of a JSON array, of exactly `length` where one is given."""
        if not isinstance(self.value, (list, tuple)) or (length is not None and len(self.value) != length):
            raise self.wrong("an array" if length is None else f"an array of {length}")
        return tuple(Field(value, f"{self.path}[{i}]") for i, value in enumerate(self.value))

    def text(self) -> str:
        """A string that is not empty."""
        if not isinstance(self.value, str) or not self.value:
            raise self.wrong("a string")
        return self.value

    def one_of(self, known: Iterable[str], what: str) -> str:
        """A string out of `known`; `what` names the kind of thing in the message."""
        known = tuple(known)
        if self.text() not in known:
            raise ModelError(f"This {what} is not known: {self.value}.", expected=listed(known), got=self.value,
                             where=self.path,
                             hint=f"trtbuild cannot reproduce a {what} of somebody else's code")  # fmt: skip
        return self.text()

    def integer(self, minimum: int, maximum: int) -> int:
        """A whole number within the bounds, both included."""
        if type(self.value) is not int or not minimum <= self.value <= maximum:
            raise self.wrong(f"a whole number from {minimum} to {maximum}")
        return self.value

    def number(self) -> float:
        """A finite number."""
        if type(self.value) not in (int, float) or not math.isfinite(self.value):
            raise self.wrong("a finite number")
        return float(self.value)

    def flag(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            raise self.wrong("true or false")
        return self.value

    def wrong(self, expected: str) -> ModelError:
        """The error for a value of another type than `expected`."""
        shown = repr(self.value)
        got = shown if len(shown) <= 200 else shown[:200] + " …"
        return ModelError("A value has the wrong type or size.", expected=expected, got=got, where=self.path)


def field_from_json(content: bytes, file: str) -> Field:
    """The JSON object that `content` holds; `file` is the name for messages.

    NaN is let through: nnU-Net writes it as the statistics of an empty foreground, which only CT normalisation reads.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise ModelError(f"{file} is not JSON.", got=error, where=file, hint="copy the model folder again") from error
    field = Field(value, file)
    field.entries()
    return field


def listed(names: Iterable[object]) -> str:
    """Names in one line, at most twenty of them."""
    shown = [str(name) for name in names]
    return ", ".join(shown[:20]) + (f" and {len(shown) - 20} more" if len(shown) > 20 else "") if shown else "nothing"
