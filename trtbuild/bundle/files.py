"""The files of a bundle on disk: which names are allowed, what lies there, what it hashes to."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Protocol

from trtbuild.errors import BundleFileExtra, BundleFileMissing, BundleHash, BundlePath, BundleSize

MANIFEST_NAME = "bundle.json"
MAX_NAME = 200
"""Longest file name: with a temporary folder's name before it, it still fits Windows' 260 characters in most places."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*(?:/[A-Za-z0-9_][A-Za-z0-9._+-]*)*")
_BLOCK = 1 << 20
COMPILE_AGAIN = "compile the model again; this bundle.json was edited, damaged, or made by something else than trtbuild"
COPY_AGAIN = "copy the bundle again, or compile the model again"


class Entry(Protocol):
    """What bundle.json says of a file."""

    @property
    def size(self) -> int: ...
    @property
    def sha256(self) -> str: ...


def short(value: object) -> str:
    """`repr` of a foreign value, cut to a length that a terminal bears; control characters come out escaped."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def check_name(name: str, where: str) -> None:
    """Raises BundlePath unless `name` is a relative path that means the same file on every system."""
    if len(name) > MAX_NAME or not _NAME.fullmatch(name) or any(part.endswith(".") for part in name.split("/")):
        raise BundlePath("A file name in the bundle is not allowed.", got=short(name), where=where,
                         expected=f"a relative path of at most {MAX_NAME} ASCII letters, digits and . _ + -, its parts "
                                  "split by /, none of them starting or ending with a dot",
                         hint="do not use this bundle unless you know who made it")  # fmt: skip
    if name.lower() == MANIFEST_NAME:
        raise BundlePath(f"{MANIFEST_NAME} cannot list itself.", got=short(name), where=where,
                         hint="give the file another name")  # fmt: skip


def parents_of(name: str) -> tuple[str, ...]:
    """The folders above a file: "a/b/c" has "a" and "a/b"."""
    parts = name.split("/")
    return tuple("/".join(parts[:n]) for n in range(1, len(parts)))


def check_listing(folder: Path, files: Mapping[str, Entry]) -> None:
    """Raises unless `folder` holds bundle.json and exactly `files`, each a plain file of the size it should have.

    Raises: BundlePath (a link, or neither file nor folder), BundleFileExtra, BundleSize, BundleFileMissing.
    """
    folders = {parent for name in files for parent in parents_of(name)}
    found = set()
    for name, info in _walk(folder, folders):
        if name == MANIFEST_NAME:
            continue
        if name not in files:
            raise BundleFileExtra(f"The bundle holds a file that {MANIFEST_NAME} does not list.", got=short(name),
                                  where=folder, hint="remove it, if you know where it comes from")  # fmt: skip
        _check_size(folder / name, files[name].size, info.st_size)
        found.add(name)
    for name in sorted(set(files) - found):
        raise BundleFileMissing("A file of the bundle is missing.", expected=name, where=folder, hint=COPY_AGAIN)


def _walk(folder: Path, folders: set[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Every plain file below `folder` with its name from there; never follows a link or enters a foreign folder."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        with os.scandir(folder / prefix) as listing:
            entries = sorted(listing, key=lambda entry: entry.name)
        for entry in entries:
            name, info = prefix + entry.name, entry.stat(follow_symlinks=False)
            if stat.S_ISREG(info.st_mode):
                yield name, info
            elif not stat.S_ISDIR(info.st_mode):
                raise _no_plain_file(folder / name)
            elif name in folders:
                pending.append(name + "/")
            else:
                raise BundleFileExtra(f"The bundle holds a folder that no file of {MANIFEST_NAME} is in.",
                                      got=short(name), where=folder,
                                      hint="remove it, if you know where it comes from")  # fmt: skip


def _no_plain_file(path: Path) -> BundlePath:
    return BundlePath("Something in the bundle is a link or a device.", expected="plain files and folders", where=path,
                      hint="copy the bundle again, with links resolved (cp -rL)")  # fmt: skip


def _check_size(path: Path, expected: int, got: int) -> None:
    if expected != got:
        raise BundleSize("A file of the bundle has the wrong size; it is truncated or was changed.", where=path,
                         expected=f"{expected} bytes", got=f"{got} bytes", hint=COPY_AGAIN)  # fmt: skip


def check_hash(folder: Path, name: str, entry: Entry) -> None:
    """Raises unless the file `name` is a plain file, reached without links, with the size and SHA-256 of `entry`.

    Raises: BundleFileMissing, BundlePath, BundleSize, BundleHash.
    """
    path = folder / name
    try:
        if any(stat.S_ISLNK(os.lstat(folder / parent).st_mode) for parent in parents_of(name)):
            raise _no_plain_file(path)
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise _no_plain_file(path)
        digest, size = _sha256_of(path)
    except OSError as error:
        raise BundleFileMissing("A file of the bundle cannot be read.", got=error.strerror, where=path,
                                hint=COPY_AGAIN) from error  # fmt: skip
    _check_size(path, entry.size, size)
    if digest != entry.sha256:
        raise BundleHash("A file of the bundle was changed.", expected=f"sha256 {entry.sha256}", got=f"sha256 {digest}",
                         where=path, hint=COPY_AGAIN)  # fmt: skip


def open_plain(path: Path) -> BinaryIO:
    """Opens a file for reading; if it is a link, that is an OSError (where the system can tell)."""
    return open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)), "rb")


def _sha256_of(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with open_plain(path) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size
