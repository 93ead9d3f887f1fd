"""Files that appear whole or not at all. A leaf: it knows only the error tree."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from trtbuild.errors import OutputError

HINTS = {
    errno.ENOSPC: "free some space on the disk and run the command again",
    errno.EDQUOT: "your disk quota is used up; free some space and run the command again",
    errno.EACCES: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
}


def output_error(error: OSError, path: Path) -> OutputError:
    """The message for a write that the system refused."""
    return OutputError(
        "A file cannot be written.",
        got=error.strerror or type(error).__name__,
        where=path,
        hint=HINTS.get(error.errno or 0, "check the path"),
    )


PREFIX, MARK = ".trtbuild-", ".partial"
SCRATCH, LOCK = "trtbuild-scratch-", "lock"


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with the same ending; renames it when the block ends well.

    On any exception, Ctrl-C included, the temporary file is removed and `path` stays as it was. The file is locked as
    long as its writer lives, so that `remove_strays` can tell what a killed process left behind. The block must write
    into the file, not put another one in its place.

    Raises:
        OutputError: the system refused to create, write or rename.
    """
    try:
        handle, partial = _locked_temporary(path)
    except OSError as error:
        raise output_error(error, path) from error
    try:
        partial.chmod(0o666 & ~_umask())
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise output_error(error, path) from error
    finally:
        os.close(handle)
        partial.unlink(missing_ok=True)


def _locked_temporary(path: Path) -> tuple[int, Path]:
    """A new file beside `path`, open and locked."""
    while True:
        handle, name = tempfile.mkstemp(prefix=PREFIX, suffix=MARK + "".join(path.suffixes[-2:]), dir=path.parent)
        _lock(handle, wait=True)
        if os.path.lexists(name):
            return handle, Path(name)
        os.close(handle)  # `remove_strays` of another process took it for a stray before it was locked


def remove_strays(folder: Path) -> int:
    """Removes the temporary files in `folder` whose writers are dead, and returns how many there were.

    Nothing is removed where the system has no file locks (flock), or the file system does not do them.
    """
    with os.scandir(folder) as entries:
        names = [e.path for e in entries if e.name.startswith(PREFIX) and MARK in e.name]
    return sum(map(_removed_stray, names))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Only one process at a time is in this block for the same folder.

    Yields False where that is not so because there are no locks, or none of folders (Windows, NFS).
    """
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # a folder that cannot be opened as a file (Windows)
        yield False
        return
    try:
        yield _lock(handle, wait=True)
    finally:
        os.close(handle)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder for temporary files that goes with the block; those of killed processes are removed first.

    Each holds a file that is locked as long as its process lives.
    """
    root = Path(tempfile.gettempdir())
    for folder in root.glob(f"{SCRATCH}*"):
        _remove_scratch(folder)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=root) as name, (Path(name) / LOCK).open("w") as lock:
        _lock(lock.fileno())
        yield Path(name)


def _remove_scratch(folder: Path) -> None:
    """Removes a scratch folder that nobody holds; one that is just being made has no lock yet and stays."""
    try:
        with (folder / LOCK).open("r+") as lock:
            if _lock(lock.fileno()):
                shutil.rmtree(folder, ignore_errors=True)
    except OSError:  # somebody else's, or gone in this moment
        return


def _removed_stray(path: str) -> bool:
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:  # finished in this moment, or somebody else's
        return False
    try:
        if not _lock(handle):
            return False
        os.unlink(path)  # while it is locked: who makes it at this moment waits, and then sees that it is gone
    except FileNotFoundError:  # it has got its final name
        return False
    finally:
        os.close(handle)
    return True


def try_lock(handle: int, *, shared: bool = False, wait: bool = False) -> bool | None:
    """Takes the lock of an open file until it is closed, alone or with others that share it.

    Gives False where others have it (not with `wait`), and None where the system or the file system has no locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lock(handle: int, *, wait: bool = False) -> bool:
    """Takes the lock of an open file until it is closed; False where another process has it, or there are no locks."""
    return bool(try_lock(handle, wait=wait))


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(content)
