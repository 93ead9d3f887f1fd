"""The user's cache folder, and files in it that tell whether they are still what was written. A leaf.

A kept file may be cut by a full disk, or damaged; what reads it must notice before it uses it. So its first line holds
the length and SHA-256 of a JSON header behind it, and that header those of the content, which is the rest of the file.
Engines are code that will run: a folder or a file that somebody else could have written is not used.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from trtbuild.atomic import locked, remove_strays, whole_file
from trtbuild.errors import OutputError

VARIABLE = "TRTBUILD_CACHE"
FIRST = re.compile(rb"trtbuild-cache 1 (\d{1,9}) ([0-9a-f]{64})\n")
MAX_HEADER = 64 << 20
"""Bytes; the layer table of a large network has 1 MB."""
PRIVATE, PRIVATE_FILE = 0o700, 0o600
"""Engines are code that will run: nobody else may put one here, or change one."""
SYSTEM_USER = 0
"""What the system's own user wrote is trusted: who has that right needs no cache to run code."""
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
ANOTHER = f"name another folder with the variable {VARIABLE}"


class Damaged(Exception):
    """A kept file is not what was written; the text says how that shows."""


class Foreign(Damaged):
    """What stands in a kept file's place is not this user's: it is neither used nor removed."""


def cache_folder(part: str) -> Path:
    """A folder for `part` in the user's cache, made where it is missing.

    The cache is $TRTBUILD_CACHE, else trtbuild in $XDG_CACHE_HOME, else in ~/.cache (Windows: in %LOCALAPPDATA%).

    Raises:
        OutputError: it cannot be made or written to, there is no home folder for it, or others can write into it.
    """
    folder = _root() / part
    try:
        for path in (*reversed(folder.parents), folder):
            if not path.exists():
                path.mkdir(mode=PRIVATE, exist_ok=True)
        status = folder.stat()
        if not stat.S_ISDIR(status.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except OSError as error:
        raise _unusable(error.strerror or type(error).__name__, folder, ANOTHER) from error
    reason = _distrust(status)
    if reason:
        mine = status.st_uid == _user()
        raise _unusable(reason, folder, f"run chmod go-w on it, or {ANOTHER}" if mine else ANOTHER)
    return folder


def _root() -> Path:
    named = os.environ.get(VARIABLE)
    variable, usual = ("LOCALAPPDATA", "~/AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", "~/.cache")
    place = Path(named) if named else Path(os.environ.get(variable) or usual) / "trtbuild"
    try:
        return place.expanduser().absolute()
    except RuntimeError as error:  # neither $HOME nor an entry of the user, as in a container with any user
        raise _unusable("there is no home folder", place, ANOTHER) from error


def _unusable(got: str, folder: Path, hint: str) -> OutputError:
    return OutputError(
        "The cache folder cannot be used.",
        expected="a folder of yours that nobody else may write to, with space left",
        got=got,
        where=folder,
        hint=hint,
    )


def _user() -> int | None:
    """The user's number, None where files do not tell whose they are (Windows)."""
    return None if sys.platform == "win32" else os.geteuid()


def _distrust(status: os.stat_result) -> str:
    """Why somebody else could have written this, "" where nobody could."""
    if _user() is None:
        return ""
    if status.st_uid not in (_user(), SYSTEM_USER):
        return f"it belongs to another user (number {status.st_uid})"
    if status.st_mode & OTHERS_WRITE:
        return f"others may write to it (mode {stat.S_IMODE(status.st_mode):o})"
    return ""


def write_kept(path: Path, facts: Mapping[str, Any], content: bytes) -> None:
    """Writes `content` with JSON `facts` about it, whole or not at all; only the user can write to the file.

    Raises:
        OutputError: the system refused, or another user's file is in the way.
    """
    about = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "facts": dict(facts)}
    header = json.dumps(about).encode()
    if os.path.lexists(path) and not _is_mine(path):
        raise OutputError("Another user's file is in the way.", where=path, hint=f"ask for its removal, or {ANOTHER}")
    with whole_file(path) as partial:
        partial.chmod(PRIVATE_FILE)
        with partial.open("wb") as stream:
            stream.write(b"trtbuild-cache 1 %d %s\n" % (len(header), hashlib.sha256(header).hexdigest().encode()))
            stream.write(header)
            stream.write(content)


def read_kept(path: Path) -> tuple[dict[str, Any], bytes]:
    """The facts and the content of a kept file, which becomes the one that was used last.

    Raises:
        Damaged: it is not what was written.
        Foreign: it is another user's, or no file.
        FileNotFoundError: there is none.
    """
    with _opened(path) as stream:
        about = _header(stream)
        content = stream.read()
    if len(content) != about["size"]:
        raise Damaged(f"{len(content)} bytes instead of {about['size']}")
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise Damaged("its SHA-256 is another one")
    with suppress(OSError):  # it is read all the same, and goes a little earlier
        os.utime(path)
    return about["facts"], content


def read_facts(path: Path) -> dict[str, Any]:
    """The facts alone, without a look at the content; errors as `read_kept`."""
    with _opened(path) as stream:
        facts: dict[str, Any] = _header(stream)["facts"]
    return facts


def discard(path: Path, aside: Path | None = None) -> bool:
    """Removes a file of the user's, or sets it aside under another name; another user's stays.

    Returns:
        Whether it is gone.
    """
    with suppress(OSError):
        if _is_mine(path):
            if aside is None:
                path.unlink()
            else:
                path.replace(aside)
    return not os.path.lexists(path)


def bound(folder: Path, endings: tuple[str, ...], *, newest: Path, limit: int) -> None:
    """Removes what killed writers left, and then what was not used for the longest time.

    Args:
        folder: of the cache; `locked` must not be held.
        endings: of the files that count; what another process is writing has the same behind a dot, and stays.
        newest: was just written and stays, even where it alone exceeds the limit.
        limit: bytes that the files together may have.
    """
    with locked(folder):
        remove_strays(folder)
        found = {}
        for path in folder.iterdir():
            with suppress(FileNotFoundError):  # another process removed it
                if path.name.endswith(endings) and not path.name.startswith("."):
                    status = path.lstat()
                    found[path] = (status.st_mtime_ns, status.st_size)
        total = sum(size for _, size in found.values())
        for path in sorted(found.keys() - {newest}, key=lambda path: found[path][0]):
            if total <= limit:
                return
            total -= found[path][1] if discard(path) else 0  # in use (Windows): it goes another time


def _is_mine(path: Path) -> bool:
    return _user() is None or path.lstat().st_uid == _user()


def _opened(path: Path) -> BinaryIO:
    """A kept file, judged when it is open, so that nobody can put another in its place in between.

    Neither a link is followed nor a pipe waited for.
    """
    more = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        stream = open(path, "rb", opener=lambda name, flags: os.open(name, flags | more))  # noqa: SIM115 - is returned
    except FileNotFoundError:
        raise
    except OSError as error:
        kind = Foreign if error.errno == errno.ELOOP else Damaged
        raise kind(f"it cannot be read: {error.strerror or error}") from error
    try:
        _check_trusted(os.fstat(stream.fileno()))
    except BaseException:
        stream.close()
        raise
    return stream


def _check_trusted(status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise Foreign("it is no file")
    reason = _distrust(status)
    if reason:
        raise (Damaged if status.st_uid == _user() else Foreign)(reason)


def _header(stream: BinaryIO) -> dict[str, Any]:
    """Size, SHA-256 and facts; the content's size and sum are those of a whole and unaltered header."""
    first = FIRST.fullmatch(stream.readline(100))
    if first is None or int(first[1]) > MAX_HEADER:
        raise Damaged("it does not begin as it should")
    raw = stream.read(int(first[1]))
    if hashlib.sha256(raw).hexdigest() != first[2].decode():
        raise Damaged("its header was cut off or changed")
    try:
        about: Any = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise Damaged("its header is no JSON") from error
    if not isinstance(about, dict) or not isinstance(about.get("facts"), dict):
        raise Damaged("its header is none of this version")
    if not isinstance(about.get("size"), int) or not isinstance(about.get("sha256"), str):
        raise Damaged("its header lacks the content's size or SHA-256")
    return about
