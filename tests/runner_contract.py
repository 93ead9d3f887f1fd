"""The contract of every runner (tests/test_runners.py) for runners that another test file opens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any

import pytest
import test_runners
from test_runners import Subject


def contract_of(subjects: Sequence[Any]) -> dict[str, Callable[..., None]]:
    """The tests that hold for every runner, with `subjects` (or pytest.param of them) in place of their own.

    They use the fixture `start` of the file that takes them: `start(subject, dimensions, ...)` opens a runner.
    """
    every = test_runners.every.mark
    found = {
        name: _copied(function, subjects)
        for name, function in vars(test_runners).items()
        if isinstance(function, FunctionType) and any(mark is every for mark in getattr(function, "pytestmark", ()))
    }
    assert len(found) >= 20, "the contract was not found"
    return found


def _copied(test: FunctionType, subjects: Sequence[Any]) -> Callable[..., None]:
    copy = FunctionType(test.__code__, test.__globals__, test.__name__, test.__defaults__, test.__closure__)
    copy.__annotations__ = test.__annotations__
    mine = pytest.mark.parametrize("subject", subjects, ids=_name).mark
    copy.pytestmark = [  # type: ignore[attr-defined]
        mine if mark is test_runners.every.mark else mark
        for mark in test.pytestmark  # type: ignore[attr-defined]
    ]
    return copy


def _name(value: Any) -> str | None:
    return str(value) if isinstance(value, Subject) else None
