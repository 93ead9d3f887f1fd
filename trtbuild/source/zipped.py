"""Models inside a zip, as `nnUNetv2_export_model_to_zip` makes it. Read in place: nothing is unpacked to the disk.

A zip comes from elsewhere. Its list is checked whole before anything is read, and what is read is bounded: `zipfile`
gives no more bytes than a member declares and checks their CRC, so the declared sizes are what has to be judged.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from trtbuild.errors import ModelError
from trtbuild.source.fields import listed
from trtbuild.source.files import ModelFile, folds_of
from trtbuild.source.names import ModelName

MAX_MEMBERS = 1_000_000  # five folds have about forty; with all validation segmentations some ten thousand
MAX_JSON = 64 << 20  # bytes; plans.json has some ten thousand
MAX_CHECKPOINT = 8 << 30  # bytes; nnU-Net's largest presets have 4 GiB with the optimizer's state
MAX_RATIO = 200  # weights shrink by 1.1 and the zeros of a fresh optimizer by 2 in all; JSON by up to 50
ALWAYS_FINE = 1 << 20  # bytes below which the ratio says nothing
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # what nnU-Net and file managers write
# ValueError: names that are not UTF-8 though they say so
READ_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError, EOFError, OSError, ValueError)


@dataclass(frozen=True, kw_only=True)
class ZipFiles:
    """One trained model inside a zip. `members` are the files below `folder` ("" or with a "/" at its end)."""

    archive: Path
    folder: str
    members: dict[str, zipfile.ZipInfo]

    @property
    def where(self) -> Path:
        return self.archive / self.folder

    def listing(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self.members})

    def has(self, name: str) -> bool:
        return name in self.members

    def folds(self) -> list[str]:
        return folds_of(self.listing())

    def checkpoints(self) -> list[str]:
        return sorted(name for name in self.members if re.fullmatch(r"fold_[^/]*/[^/]*\.pth", name))

    def read(self, name: str) -> bytes:
        return self._content(name, MAX_JSON)

    def file(self, name: str) -> ModelFile:
        return ModelFile(name=name.rpartition("/")[2], where=self.where / name, path=None,
                         open=lambda: self._opened(name))  # fmt: skip

    def _opened(self, name: str) -> BinaryIO:
        """The member in memory: a compressed one can only be read from front to back, and torch jumps."""
        return io.BytesIO(self._content(name, MAX_CHECKPOINT))

    def _content(self, name: str, limit: int) -> bytes:
        member, where = self.members[name], self.where / name
        _check_size(member, limit, where)
        try:
            with zipfile.ZipFile(self.archive) as archive:
                content = archive.read(member)
        except READ_ERRORS as error:
            raise ModelError("A file inside the zip cannot be read: it is damaged.", got=error, where=where,
                             hint="copy the zip again from where it was made") from error  # fmt: skip
        if len(content) != member.file_size:
            raise ModelError("A file inside the zip is shorter than it says.", expected=member.file_size,
                             got=len(content), where=where, hint="copy the zip again")  # fmt: skip
        return content


def is_zip(path: Path) -> bool:
    """Whether the path is a file and not a folder, which makes it a zip to be judged."""
    return os.path.isfile(path)  # unlike Path.is_file, False for a name that the system cannot take


def files_from_zip(archive: Path, name: ModelName) -> ZipFiles:
    """The one model of the zip that fits the name.

    Raises:
        ModelError: no zip, a member that no honest zip has, no model that fits, or several; the message lists them.
    """
    members = _members(archive)
    models = _models(members)
    if not models:
        raise ModelError("The zip holds no trained nnU-Net v2 model.", where=archive, got=listed(list(members)),
                         expected="Dataset123_NAME/<Trainer>__<Plans>__<configuration>/ with plans.json, dataset.json "
                         "and fold_X")  # fmt: skip
    fitting = [folder for folder in models if name.fits(*_names(folder))]
    if len(fitting) != 1:
        what = "No model of the zip is the one that was named." if not fitting else "The zip holds several models."
        raise ModelError(what, expected=str(name) or "one model", got=listed(folder or "." for folder in models),
                         where=archive, hint="choose one with -d, -c, -tr and -p")  # fmt: skip
    folder = fitting[0]
    inside = {key[len(folder) :]: member for key, member in members.items() if key.startswith(folder)}
    return ZipFiles(archive=archive, folder=folder, members=inside)


def _members(archive: Path) -> dict[str, zipfile.ZipInfo]:
    """All files of the zip by name, each of which is one that an honest zip may hold."""
    try:
        with zipfile.ZipFile(archive) as opened:
            infos = opened.infolist()
    except READ_ERRORS as error:
        raise ModelError("The file is no zip, or a damaged one.", got=error, where=archive,
                         expected="what nnUNetv2_export_model_to_zip wrote, or a model folder") from error  # fmt: skip
    if len(infos) > MAX_MEMBERS:
        raise ModelError("The zip has more files than any model.", expected=f"at most {MAX_MEMBERS}", got=len(infos),
                         where=archive)  # fmt: skip
    members: dict[str, zipfile.ZipInfo] = {}
    for info in infos:
        _check_member(info, archive)
        if info.is_dir():
            continue
        if info.filename in members:
            raise _refused("Two files of the zip have the same name.", info, archive)
        members[info.filename] = info
    return members


def _check_member(info: zipfile.ZipInfo, archive: Path) -> None:
    # `orig_filename` is what stands in the file; `filename` has the system's separators replaced and ends at a NUL
    name, kind = info.orig_filename, stat.S_IFMT(info.external_attr >> 16)
    parts = name.removesuffix("/").split("/")
    if "\\" in name or "\0" in name or name.startswith("/") or re.match("[A-Za-z]:", name):
        raise _refused("A file of the zip has an absolute path or a foreign separator.", info, archive)
    if any(part in ("", ".", "..") for part in parts):
        raise _refused("A file of the zip leaves its folder.", info, archive)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise _refused("The zip holds a link or a device.", info, archive)
    if info.flag_bits & 0x1:
        raise _refused("A file of the zip is encrypted.", info, archive)


def _check_size(member: zipfile.ZipInfo, limit: int, where: Path) -> None:
    size = member.file_size
    if member.compress_type not in METHODS:
        raise ModelError("A file inside the zip is compressed in a way that trtbuild does not read.", where=where,
                         expected="stored or deflated", got=f"method {member.compress_type}",
                         hint="make the zip with nnUNetv2_export_model_to_zip")  # fmt: skip
    if size > limit:
        raise ModelError("A file inside the zip is larger than any real one.", expected=f"at most {limit} bytes",
                         got=size, where=where)  # fmt: skip
    if size > ALWAYS_FINE and size > MAX_RATIO * max(member.compress_size, 1):
        raise ModelError("A file inside the zip unpacks to far more than a real one would.", where=where,
                         expected=f"at most {MAX_RATIO} times its size in the zip",
                         got=f"{size} bytes out of {member.compress_size}")  # fmt: skip


def _refused(what: str, info: zipfile.ZipInfo, archive: Path) -> ModelError:
    return ModelError(what, expected="what nnUNetv2_export_model_to_zip writes", got=repr(info.orig_filename),
                      where=archive, hint="do not use this zip unless you know who made it")  # fmt: skip


def _models(members: dict[str, zipfile.ZipInfo]) -> list[str]:
    """Folders with plans.json, dataset.json and a fold; those with predictions have no fold."""
    in_fold = (re.match(r"((?:.*/)?)fold_[^/]+/[^/]+$", name) for name in members)
    with_fold = {found.group(1) for found in in_fold if found}
    return sorted(folder for folder in with_fold
                  if f"{folder}plans.json" in members and f"{folder}dataset.json" in members)  # fmt: skip


def _names(folder: str) -> tuple[str, str]:
    """Dataset and model folder by their places in the path; empty where the zip has no such level."""
    *above, last = folder.removesuffix("/").split("/")
    return (above[-1] if above else ""), last
