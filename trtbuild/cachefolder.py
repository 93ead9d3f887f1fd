"""The user's cache folder, and files in it that tell whether they are still what was written. A leaf.

A kept file may be cut by a full disk, or damaged; what reads it must notice before it uses it. So its first line holds
the length and SHA-256 of a JSON header behind it, and that header those of the content, which is the rest of the file.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from trtbuild.atomic import whole_file
from trtbuild.errors import OutputError

VARIABLE = "TRTBUILD_CACHE"
FIRST = re.compile(rb"trtbuild-cache 1 (\d{1,9}) ([0-9a-f]{64})\n")
MAX_HEADER = 64 << 20
"""Bytes; the layer table of a large network has 1 MB."""
PRIVATE = 0o700
"""Engines are code that will run: nobody else may put one here."""


class Damaged(Exception):
    """A kept file is not what was written; the text says how that shows."""


def cache_folder(part: str) -> Path:
    """A folder for `part` in the user's cache, made where it is missing.

    The cache is $TRTBUILD_CACHE, else trtbuild in $XDG_CACHE_HOME, else in ~/.cache (Windows: in %LOCALAPPDATA%).

    Raises:
        OutputError: it cannot be made, or written to.
    """
    folder = _root() / part
    try:
        for path in (*reversed(folder.parents), folder):
            if not path.exists():
                path.mkdir(mode=PRIVATE, exist_ok=True)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise OutputError(
            "The cache folder cannot be used.",
            expected="a folder that you may write to, with space left",
            got=error.strerror or type(error).__name__,
            where=folder,
            hint=f"name another folder with the variable {VARIABLE}",
        ) from error
    return folder


def _root() -> Path:
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named).expanduser().absolute()
    variable, usual = ("LOCALAPPDATA", "~/AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", "~/.cache")
    return Path(os.environ.get(variable) or usual).expanduser().absolute() / "trtbuild"


def write_kept(path: Path, facts: Mapping[str, Any], content: bytes) -> None:
    """Writes `content` with JSON `facts` about it, whole or not at all.

    Raises:
        OutputError: the system refused.
    """
    about = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "facts": dict(facts)}
    header = json.dumps(about).encode()
    with whole_file(path) as partial, partial.open("wb") as stream:
        stream.write(b"trtbuild-cache 1 %d %s\n" % (len(header), hashlib.sha256(header).hexdigest().encode()))
        stream.write(header)
        stream.write(content)


def read_kept(path: Path) -> tuple[dict[str, Any], bytes]:
    """The facts and the content of a kept file.

    Raises:
        Damaged: it is not what was written.
        FileNotFoundError: there is none.
    """
    with _opened(path) as stream:
        about = _header(stream)
        content = stream.read()
    if len(content) != about["size"]:
        raise Damaged(f"{len(content)} bytes instead of {about['size']}")
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise Damaged("its SHA-256 is another one")
    return about["facts"], content


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone, without a look at the content; errors as `read_kept`."""
    with _opened(path) as stream:
        facts: dict[str, Any] = _header(stream)["facts"]
    return facts


def _opened(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise Damaged(f"it cannot be read: {error.strerror or error}") from error


def _header(stream: BinaryIO) -> dict[str, Any]:
    first = FIRST.fullmatch(stream.readline(100))
    if first is None or int(first[1]) > MAX_HEADER:
        raise Damaged("it does not begin as it should")
    raw = stream.read(int(first[1]))
    if hashlib.sha256(raw).hexdigest() != first[2].decode():
        raise Damaged("its header was cut off or changed")
    about: dict[str, Any] = json.loads(raw)
    return about
