"""Fixtures of the cache folder: another user's files, and a user without a home folder."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

OTHER = 54321
"""A user's number that this process does not have."""


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Gives a file or folder to another user: for real where that is allowed, else as far as the code can see."""
    given: set[int] = set()

    def seen(real: Callable[..., os.stat_result]) -> Callable[..., Any]:
        def status(*args: Any, **kwargs: Any) -> Any:
            found = real(*args, **kwargs)
            if found.st_ino not in given:
                return found
            fields = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
            return SimpleNamespace(**{**fields, "st_uid": OTHER})

        return status

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, OTHER, OTHER)
            return
        given.add(path.stat().st_ino)
        for name in ("stat", "lstat", "fstat"):
            monkeypatch.setattr(os, name, seen(getattr(os, name)))

    return give


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without an entry in the system's list, as containers have it that are started with any number."""

    def nobody(uid: int) -> Any:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("TRTBUILD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", nobody)
