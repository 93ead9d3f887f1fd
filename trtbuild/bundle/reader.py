"""Opening a bundle: everything about it is checked at once but the hashes, which are checked where a file is used."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trtbuild.bundle.decode import manifest_from_text
from trtbuild.bundle.files import COPY_AGAIN, MANIFEST_NAME, check_hash, check_listing, open_plain
from trtbuild.bundle.manifest import Manifest
from trtbuild.bundle.strictjson import MAX_JSON_SIZE, too_large
from trtbuild.bundle.swap import interrupted_swap, restore
from trtbuild.errors import BundleError, BundleFileMissing, BundleHash, BundleKey, BundleMissing, BundlePath

MAKE_ONE = "trtbuild compile MODEL_FOLDER -o NAME.trtb"


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """An opened bundle. `identity` is the SHA-256 of bundle.json and, since that holds the hashes, of the whole."""

    path: Path
    manifest: Manifest
    identity: str
    _verified: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def file(self, name: str) -> Path:
        """Path of the file `name`, whose hash is checked the first time it is asked for.

        Raises: BundleFileMissing, BundlePath, BundleSize, BundleHash.
        """
        if name not in self.manifest.files:
            raise BundleFileMissing("The bundle has no such file.", got=name, where=self.path,
                                    hint=f"trtbuild inspect {self.path}")  # fmt: skip
        if name not in self._verified:
            check_hash(self.path, name, self.manifest.files[name])
            self._verified.add(name)
        return self.path / name

    def network_file(self, network_id: str) -> Path:
        """Path of a network's ONNX file, hash checked. Raises BundleKey if there is no such network, and as `file`."""
        files = {network.id: network.file for stage in self.manifest.stages for network in stage.networks}
        if network_id not in files:
            raise BundleKey("The bundle has no such network.", expected=f"one of {sorted(files)}", got=network_id,
                            where=self.path, hint=f"trtbuild inspect {self.path}")  # fmt: skip
        return self.file(files[network_id])


def open_bundle(path: Path) -> Bundle:
    """Reads and checks the bundle in the folder `path`; a replacement of it that was cut short is undone first.

    Raises: BundleMissing, BundleFormat, BundleKey, BundleTooLarge, BundlePath, BundleFileMissing, BundleFileExtra,
        BundleSize.
    """
    if not os.path.lexists(path):
        _restore_old(path)
    raw = _read_manifest(path)
    with _located(path):
        manifest = manifest_from_text(raw)
    try:
        _check_files(path, manifest)
    except BundleError:
        if _read_manifest(path) == raw:
            raise
        return open_bundle(path)  # a writer exchanged the folder between our reading and our looking through it
    return Bundle(path=path, manifest=manifest, identity=hashlib.sha256(raw).hexdigest())


def verify_bundle(bundle: Bundle) -> tuple[str, ...]:
    """Checks every byte of the bundle against what it was when `bundle` was opened; gives the names of its files.

    bundle.json is the root of trust: whoever changes it and a file alike can only be told by its `identity`.
    Raises: as `open_bundle`, and BundleHash.
    """
    now = open_bundle(bundle.path)
    if now.identity != bundle.identity:
        raise BundleHash(f"{MANIFEST_NAME} was changed since the bundle was opened.", where=bundle.path / MANIFEST_NAME,
                         expected=f"sha256 {bundle.identity}", got=f"sha256 {now.identity}",
                         hint="open the bundle again if you replaced it; else copy it again")  # fmt: skip
    for name in now.manifest.files:
        check_hash(now.path, name, now.manifest.files[name])
    return tuple(now.manifest.files)


def _check_files(path: Path, manifest: Manifest) -> None:
    try:
        check_listing(path, manifest.files)
    except OSError as error:
        raise BundleFileMissing("The bundle cannot be looked through.", got=error.strerror, where=error.filename,
                                hint="look at the permissions of the folder") from error  # fmt: skip


def _read_manifest(path: Path) -> bytes:
    file = path / MANIFEST_NAME
    try:
        if not path.is_dir():
            raise BundleMissing("This is no bundle." if os.path.lexists(path) else "There is no bundle here.",
                                expected="a folder NAME.trtb", where=path, hint=MAKE_ONE)  # fmt: skip
        info = os.lstat(file)
        if not stat.S_ISREG(info.st_mode):
            raise BundlePath(f"{MANIFEST_NAME} is a link or no file.", expected="a plain file", where=file,
                             hint=COPY_AGAIN)  # fmt: skip
        with open_plain(file) as stream:
            raw = stream.read(MAX_JSON_SIZE + 1)
    except OSError as error:
        raise BundleMissing(f"This folder is no bundle: {MANIFEST_NAME} cannot be read.", expected=MANIFEST_NAME,
                            got=error.strerror, where=path, hint=MAKE_ONE) from error  # fmt: skip
    if len(raw) > MAX_JSON_SIZE:
        with _located(path):
            raise too_large(f"{MANIFEST_NAME} is larger than any real one.", f"at most {MAX_JSON_SIZE} bytes",
                            f"{info.st_size} bytes")  # fmt: skip
    return raw


@contextmanager
def _located(path: Path) -> Iterator[None]:
    """Puts the file's name before the key in an error of the manifest."""
    try:
        yield
    except BundleError as error:
        where = f"{path / MANIFEST_NAME}" if error.where is None else f"{path / MANIFEST_NAME}: {error.where}"
        raise type(error)(error.what, expected=error.expected, got=error.got, where=where, hint=error.hint) from error


def _restore_old(path: Path) -> None:
    old = interrupted_swap(path)
    if old is None:
        return
    try:
        restore(path)
    except BlockingIOError as error:
        raise BundleMissing("The bundle is being replaced at this moment.", where=path,
                            hint="try again in a moment") from error  # fmt: skip
    except OSError as error:
        raise BundleMissing("The replacement of this bundle was cut short, and the old one cannot be put back.",
                            got=error.strerror, where=path, hint=f"mv '{old}' '{path}'") from error  # fmt: skip
