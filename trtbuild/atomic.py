"""Files that appear whole or not at all. A leaf: it knows only the error tree."""

from __future__ import annotations

import contextlib
import errno
import os
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


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with the same ending; renames it when the block ends well.

    On any exception, Ctrl-C included, the temporary file is removed and `path` stays as it was.

    Raises:
        OutputError: the system refused to create, write or rename.
    """
    ending = "".join(path.suffixes[-2:])
    try:
        handle, name = tempfile.mkstemp(prefix=".", suffix=".partial" + ending, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise output_error(error, path) from error
    partial = Path(name)
    try:
        partial.chmod(0o666 & ~_umask())
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise output_error(error, path) from error
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_whole(path: Path, content: bytes) -> None:
    """Writes `content` to `path`, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_bytes(content)
