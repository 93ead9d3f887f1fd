"""One run at a time in an output folder, but for runs with equal settings, such as the parts of one (-num_parts).

While a run lives it holds a shared lock (flock) on `CLAIM`, which says its settings. The system takes the lock away
with the process, however that ends; the last run that ends by itself removes the file. Nobody looks at the file or
removes it without the folder's own lock (`atomic.locked`). Where that has no effect (Windows, NFS), this has none.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trtbuild.atomic import PREFIX, locked, output_error, try_lock
from trtbuild.errors import OutputError

CLAIM = f"{PREFIX}run"


@contextlib.contextmanager
def claimed(folder: Path, settings: Mapping[str, Any]) -> Iterator[bool]:
    """Enter it inside of `locked(folder)` and leave it outside. Yields whether other runs live in the folder.

    Args:
        folder: exists.
        settings: what outputs depend on, as JSON can hold it.

    Raises:
        OutputError: a run with other settings lives, or the file cannot be written.
    """
    path = folder / CLAIM
    try:
        handle, others = _entered(path, settings)
    except OSError as error:
        raise output_error(error, path) from error
    try:
        yield others
    finally:
        with locked(folder) as alone:
            if alone and try_lock(handle) and _is_at(handle, path):  # the last one
                path.unlink(missing_ok=True)
            os.close(handle)


def _entered(path: Path, settings: Mapping[str, Any]) -> tuple[int, bool]:
    """The open file with its shared lock, and whether others have it, too."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return _new(path, settings), False
    try:
        if try_lock(handle) is False:
            _require_equal(_settings(handle), settings, path)
            try_lock(handle, shared=True)
            return handle, True
        path.unlink()  # left by a run that was killed
    except BaseException:
        os.close(handle)
        raise
    os.close(handle)
    return _new(path, settings), False


def _new(path: Path, settings: Mapping[str, Any]) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        try_lock(handle, shared=True)
        with open(handle, "wb", closefd=False) as file:
            file.write(json.dumps(settings).encode())
    except BaseException:
        path.unlink(missing_ok=True)
        os.close(handle)
        raise
    return handle


def _settings(handle: int) -> dict[str, Any]:
    with open(handle, "rb", closefd=False) as file:
        content = file.read()
    try:
        settings = json.loads(content)
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _require_equal(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: Path) -> None:
    keys = sorted(key for key in {*theirs, *ours} if theirs.get(key) != ours.get(key))
    if keys:
        raise OutputError(
            "Another run with other settings writes here.",
            expected={key: ours.get(key) for key in keys},
            got={key: theirs.get(key) for key in keys},
            where=path.parent,
            hint="wait until it has ended, or choose another folder with -o",
        )


def _is_at(handle: int, path: Path) -> bool:
    """Whether the open file is still the one of this name: somebody may have removed the whole folder."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except OSError:
        return False
