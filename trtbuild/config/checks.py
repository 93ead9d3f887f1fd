"""Checks of single values, which raise TrtbuildError; several configurations share them."""

from __future__ import annotations

import re
from pathlib import Path

from trtbuild.errors import ModelError, TrtbuildError


def check_threads(threads: int | None) -> None:
    """None (what the process may use) or a positive whole number, else TrtbuildError."""
    if threads is not None and (not isinstance(threads, int) or isinstance(threads, bool) or threads < 1):
        raise TrtbuildError("The number of threads is out of range.", expected="a whole number >= 1", got=threads)


def check_step_size(step_size: float) -> None:
    """A number above 0, at most 1, else TrtbuildError."""
    if not isinstance(step_size, (int, float)) or not 0 < step_size <= 1:
        raise TrtbuildError("The step size is out of range.", expected="0 < step size <= 1", got=step_size)


def check_folds(folds: tuple[str, ...] | None) -> None:
    """None (all folds) or distinct names, else ModelError: an average over a fold taken twice is no ensemble."""
    if folds is not None and (not folds or len(set(folds)) != len(folds)):
        raise ModelError(
            "The list of folds is wrong.",
            expected="distinct folds, at least one",
            got=" ".join(folds) or "no fold",
            hint="leave the folds out to use all of them",
        )


def check_limit(value: object, where: str) -> None:
    """A limit of the gate, 0 to 1, else TrtbuildError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise TrtbuildError("A limit of the gate is out of range.", expected="0 <= limit <= 1", got=value, where=where)


def check_patterns(patterns: tuple[str, ...]) -> None:
    """A tuple of regular expressions, else TrtbuildError: a text alone would be taken letter by letter."""
    if not isinstance(patterns, tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise TrtbuildError(
            "--keep takes regular expressions.",
            expected='a tuple of texts, such as ("decoder",)',
            got=repr(patterns),
            where="keep",
        )
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            raise TrtbuildError(
                "--keep is no regular expression.",
                got=f"{pattern:.80}: {error}",
                hint="a backslash before a sign takes it as it is: --keep '\\('",
            ) from error


def check_path(value: object, where: str, *, optional: bool) -> None:
    if not (isinstance(value, Path) or (optional and value is None)):
        raise TrtbuildError("A path is needed.", expected="a pathlib.Path", got=repr(value), where=where)


def check_flag(value: object, where: str) -> None:
    if not isinstance(value, bool):
        raise TrtbuildError("A yes or a no is needed.", expected="True or False", got=repr(value), where=where)


def check_known(name: str, value: object, known: tuple[object, ...]) -> None:
    if not isinstance(value, (str, type(None))) or value not in known:
        expected = " or ".join(map(str, known))
        raise TrtbuildError(f"There is no such {name}.", expected=expected, got=value)


def check_whole(value: object, least: int, where: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise TrtbuildError("A number is out of range.", expected=f"a whole number >= {least}", got=value, where=where)


def check_device(device: object, memory: object) -> None:
    """The number of a GPU, and bytes of its memory or None, else TrtbuildError."""
    check_whole(device, 0, "device")
    if memory is not None:
        check_whole(memory, 1, "device_memory")
