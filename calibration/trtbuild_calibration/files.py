"""Files of this package that appear whole or not at all, and their SHA-256. A leaf."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from trtbuild_calibration.errors import CalibrationError

PIECE = 1 << 20
"""Bytes that are hashed at a time."""


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside `path` under another name and renames: a reader never sees a part.

    Raises:
        CalibrationError: the system refused; `path` is as it was.
    """
    try:
        handle, partial = tempfile.mkstemp(prefix=".calibration-", suffix=".partial", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(partial, 0o644)
            os.replace(partial, path)
        finally:
            Path(partial).unlink(missing_ok=True)
    except OSError as error:
        raise CalibrationError(
            "A file cannot be written.",
            got=error.strerror or type(error).__name__,
            where=path,
            hint="choose a folder that exists, that you may write to, and that has space left",
        ) from error


def read_whole(path: Path, what: str) -> bytes:
    """The bytes of a file; `what` names it in the message.

    Raises:
        CalibrationError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            f"{what} cannot be read.", got=error.strerror or type(error).__name__, where=path, hint="check the path"
        ) from error


def sha256_of(paths: Iterable[Path]) -> str:
    """Hex digest over the sizes and contents of files, in this order.

    Raises:
        CalibrationError: one of them cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(os.fstat(file.fileno()).st_size.to_bytes(8, "big"))
                while piece := file.read(PIECE):
                    digest.update(piece)
        except OSError as error:
            raise CalibrationError(
                "A file of a case cannot be read.", got=error.strerror, where=path, hint="preprocess the case again"
            ) from error
    return digest.hexdigest()
