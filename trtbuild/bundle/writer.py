"""Writing a bundle: whole under its name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import BinaryIO

from trtbuild.bundle.decode import text_from_manifest
from trtbuild.bundle.files import MANIFEST_NAME, check_name
from trtbuild.bundle.manifest import Contents, FileEntry, Manifest
from trtbuild.bundle.reader import Bundle, open_bundle
from trtbuild.bundle.swap import clear_leftovers, fsync_folder, interrupted_swap, publish, staging, writing_lock
from trtbuild.errors import BundleFileMissing, BundleMissing, BundleSize, OutputError

ENDING = ".trtb"
_BLOCK = 1 << 20
_HINTS = {
    errno.ENOSPC: "free some space, or write to another disk",
    errno.EDQUOT: "free some space, or write to another disk",
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.ENOENT: "make the folder that it goes into first",
}


def write_bundle(path: Path, contents: Contents, files: Mapping[str, Path | bytes], *, overwrite: bool) -> Bundle:
    """Writes the bundle `path` (NAME.trtb) and opens it.

    `files` maps names inside the bundle to source files or bytes. Everything goes to a folder beside `path`, is read
    back as strictly as `open_bundle` reads, and gets its name last; on any error, Ctrl-C included, `path` is as it was.
    With `overwrite` a bundle that is there is exchanged in one step.

    Raises: OutputError (name, existing output, unwritable folder, full disk, another writer), and BundleKey,
        BundlePath or BundleTooLarge if the contents do not fit together.
    """
    path = _named(path)
    for name in files:
        check_name(name, "files")
    with _output_errors(path), writing_lock(path) as alone:
        if alone:
            clear_leftovers(path)
        _check_free(path, overwrite)
        with staging(path) as folder:
            bundle = _fill(folder / "new", contents, files)
            _check_free(path, overwrite)
            publish(folder, path)
    return replace(bundle, path=path)


def check_target(path: Path, *, overwrite: bool) -> None:
    """Whether `write_bundle` could write `path` as things are now, so that nobody works for a result without a place.

    Raises: OutputError (name, existing output, missing or unwritable folder).
    """
    path = _named(path)
    with _output_errors(path):
        if interrupted_swap(path) is None:  # else the writer puts a bundle back, and judges that
            _check_free(path, overwrite)
        if not os.path.isdir(path.parent):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path.parent))
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path.parent))


def _named(path: Path) -> Path:
    """The absolute path, if it has a bundle's name."""
    path = Path(os.path.abspath(path))
    if path.suffix != ENDING:
        raise OutputError("The name of a bundle ends in .trtb.", expected=f"{path.stem}{ENDING}", got=path.name,
                          hint=f"use {path.with_name(path.name + ENDING) if path.name else 'NAME.trtb'}")  # fmt: skip
    return path


def _fill(folder: Path, contents: Contents, files: Mapping[str, Path | bytes]) -> Bundle:
    folder.mkdir()
    entries = {}
    for name, source in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        with _opened(source) as stream:
            entries[name] = _copied(stream, folder / name)
    parts = {field.name: getattr(contents, field.name) for field in fields(Contents)}
    text = text_from_manifest(Manifest(**parts, files=entries))
    _copied(io.BytesIO(text), folder / MANIFEST_NAME)
    for inner, _, _ in os.walk(folder):
        fsync_folder(Path(inner))
    try:
        return open_bundle(folder)
    except (BundleMissing, BundleFileMissing, BundleSize) as error:
        raise OutputError("The bundle could not be read back as it was written.", got=error.what, where=error.where,
                          hint="look at the disk") from error  # fmt: skip


def _opened(source: Path | bytes) -> BinaryIO:
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        return open(source, "rb")
    except OSError as error:
        raise OutputError("A file that goes into the bundle cannot be read.", got=error.strerror,
                          where=source) from error  # fmt: skip


def _copied(stream: BinaryIO, target: Path) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with open(target, "xb") as output:
        while block := stream.read(_BLOCK):
            output.write(block)
            digest.update(block)
            size += len(block)
        output.flush()
        os.fsync(output.fileno())
    return FileEntry(size=size, sha256=digest.hexdigest())


def _check_free(path: Path, overwrite: bool) -> None:
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise OutputError("The output exists already.", where=path, hint="--overwrite, or another name")
    if path.is_symlink() or not path.is_dir():
        raise OutputError("What exists under this name is a link or a file; it is not overwritten.", where=path,
                          expected="a bundle", hint="choose another name, or remove it yourself")  # fmt: skip
    if not (path / MANIFEST_NAME).exists() and any(path.iterdir()):
        raise OutputError("The folder that exists under this name is no bundle; it is not overwritten.", where=path,
                          expected=MANIFEST_NAME, hint="choose another name, or remove it yourself")  # fmt: skip


@contextlib.contextmanager
def _output_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:
        raise OutputError("Another process writes this bundle at this moment.", where=path,
                          hint="wait for it, or choose another name") from error  # fmt: skip
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "look at the disk and at the folder that it goes into")
        raise OutputError("The bundle cannot be written.", got=error.strerror, where=error.filename or path,
                          hint=hint) from error  # fmt: skip
