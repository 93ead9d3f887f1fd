"""Putting a finished folder under its name at one stroke, and cleaning up after writers that died.

Beside `NAME.trtb` live, while it is written, `.NAME.trtb.lock` (flock; the system lets go of it when its holder dies)
and a staging folder `.NAME.trtb.????????.tmp` with `new` in it. Where folders cannot be exchanged, the bundle that is
replaced is moved to `old` in there, then `new` to its name: whoever finds no bundle but an `old` puts that back.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


@contextlib.contextmanager
def writing_lock(path: Path) -> Iterator[bool]:
    """Holds the one lock for writing `path`; False where the system or file system has no locks.

    Raises: BlockingIOError while another process or thread writes the same bundle, OSError.
    """
    lock = path.with_name(f".{path.name}.lock")
    descriptor = _locked(lock)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def _locked(lock: Path) -> int | None:
    if sys.platform == "win32":
        return None
    import fcntl

    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the last holder may have removed the file between our open and our lock: then the lock is worth nothing
            if lock.exists() and os.path.samestat(os.fstat(descriptor), os.lstat(lock)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            os.close(descriptor)
            if error.errno in _NO_LOCKS:
                lock.unlink(missing_ok=True)
                return None
            raise
        os.close(descriptor)


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A staging folder for `path`, gone afterwards whatever happens."""
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent))
    try:
        yield folder
    finally:
        _discard(folder, path)


def publish(folder: Path, path: Path) -> None:
    """Gives `folder/new` the name `path`; what had it stays in `folder`. Then both survive a loss of power."""
    new, old = folder / "new", folder / "old"
    if not os.path.lexists(path):
        os.rename(new, path)
    elif not exchange(new, path):
        os.rename(path, old)
        os.rename(new, path)
    fsync_folder(path.parent)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two names of one file system atomically (renameat2, RENAME_EXCHANGE); False where that is not possible."""
    if sys.platform != "linux":
        return False
    import ctypes

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc >= 2.28
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2  # <fcntl.h>, <linux/fs.h>
    if renameat2(at_fdcwd, os.fsencode(first), at_fdcwd, os.fsencode(second), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def clear_leftovers(path: Path) -> None:
    """Removes what dead writers of `path` left, and puts back a bundle they took away. Only under `writing_lock`."""
    for folder in _leftovers(path):
        _discard(folder, path)


def interrupted_swap(path: Path) -> Path | None:
    """The bundle that a replacement of `path`, cut short, took away and did not put back; None if there is none."""
    if os.path.lexists(path):
        return None
    return next((folder / "old" for folder in _leftovers(path) if (folder / "old").is_dir()), None)


def restore(path: Path) -> None:
    """Puts the result of `interrupted_swap` back. Raises BlockingIOError while its writer lives, OSError."""
    with writing_lock(path) as alone:
        if not alone:
            raise OSError(errno.ENOLCK, "no file locks here, so the writer may still be at work")
        old = interrupted_swap(path)
        if old is not None:
            os.rename(old, path)


def _leftovers(path: Path) -> list[Path]:
    pattern = re.compile(re.escape(f".{path.name}.") + r"[a-z0-9_]{8}\.tmp")  # as tempfile.mkdtemp names them
    try:
        with os.scandir(path.parent) as listing:
            folders = [Path(entry.path) for entry in listing
                       if pattern.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)]  # fmt: skip
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return []  # the next step, which opens or makes something there, says so better
    return sorted(folder for folder in folders if {part.name for part in folder.iterdir()} <= {"new", "old", "trash"})


def _discard(folder: Path, path: Path) -> None:
    old = folder / "old"
    if old.is_dir():  # renamed in both cases: an `old` must never be half removed, since it may be put back
        os.rename(old, folder / "trash" if os.path.lexists(path) else path)
    with contextlib.suppress(OSError):  # the bundle is safe either way; the next writer tries again
        shutil.rmtree(folder)


def fsync_folder(folder: Path) -> None:
    """Makes the names in a folder durable; Windows has no such call and does it by itself."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
