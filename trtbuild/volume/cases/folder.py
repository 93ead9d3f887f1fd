"""The cases of a folder: images as nnU-Net names them, or DICOM series.

A folder of a hundred thousand images is a list of names: nothing is asked about a file, and no `Case` is made, before
somebody wants it.
"""

from __future__ import annotations

import os
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

from trtbuild.errors import InputError
from trtbuild.volume.cases.case import Case, distinct, numbered, numbered_case, safe_id
from trtbuild.volume.io.dicom_files import could_be_dicom, is_dicom_file


@dataclass(frozen=True, kw_only=True, eq=False)
class _FolderCases(Sequence[Case]):
    """The cases of a folder of images: `names` sorted by case and channel, `starts[i]` the first of case i."""

    folder: Path
    ending: str
    names: Sequence[str]
    starts: Sequence[int]
    chosen: range

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, index: int) -> Case: ...

    @overload
    def __getitem__(self, index: slice) -> _FolderCases: ...

    def __getitem__(self, index: int | slice) -> Case | _FolderCases:
        if isinstance(index, slice):
            return replace(self, chosen=self.chosen[index])
        number = self.chosen[index]
        names = self.names[self.starts[number] : self.starts[number + 1]]
        by_channel = {int(name[-len(self.ending) - 4 : -len(self.ending)]): self.folder / name for name in names}
        return numbered_case(names[0][: -len(self.ending) - 5], by_channel, self.ending)


def cases_from_folder(folder: Path, file_ending: str) -> Sequence[Case]:
    """nnU-Net's `create_lists_from_splitted_dataset_folder`: sorted by name; hidden files are no images.

    What is neither a folder nor a file, such as a link to nowhere, stays: reading it fails its case by name.
    """
    names, folders = _listing(folder)
    images = [name for name in names if name.endswith(file_ending)]
    expected = f"CASE_0000{file_ending}, CASE_0001{file_ending} … (one file per channel)"
    if not images:
        cases = _cases_from_dicom(folder, names, folders, file_ending)
        if cases:
            return distinct(cases)
        names.sort()
        raise InputError("The folder holds no image of the model's file ending.", got=_some(names), where=folder,
                         expected=f"{expected}, or DICOM series",
                         hint=_ending_hint(names, file_ending))  # fmt: skip
    del names
    unnumbered = sorted(name for name in images if numbered(name[: -len(file_ending)])[1] is None)
    if unnumbered:
        name = unnumbered[0]
        raise InputError("Files in the folder have no channel number.", expected=expected, got=_some(unnumbered),
                         where=folder, hint=f"Move them away, or rename {name} to "
                         f"{name.removesuffix(file_ending)}_0000{file_ending} and so on.")  # fmt: skip
    channel = -len(file_ending) - 5
    images.sort(key=lambda name: (name[:channel], name[channel:]))
    last = len(images)
    starts = [0, *(i for i in range(1, last) if images[i][:channel] != images[i - 1][:channel]), last]
    return _FolderCases(folder=folder, ending=file_ending, names=images, starts=array("q", starts),
                        chosen=range(len(starts) - 1))  # fmt: skip


def _listing(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders in `folder`, hidden ones apart, in no order; links are followed."""
    names: list[str] = []
    folders: list[str] = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    # the system tells folders from files while listing them; a link that leads nowhere is asked gently
                    is_folder = os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()
                    (folders if is_folder else names).append(entry.name)
    except OSError as error:
        raise InputError("The folder cannot be read.", got=error.strerror, where=folder) from error
    return names, folders


def _cases_from_dicom(folder: Path, names: list[str], folders: list[str], file_ending: str) -> list[Case]:
    """The one case of a series, or those of the folders in `folder` as soon as one of them is a series; else none.

    Then every other folder is a case, too, and reading one that is no series fails it by name: none is left out.
    """
    if _holds_dicom(folder, names):
        name = os.path.basename(os.path.abspath(folder))
        return [Case(id=safe_id(name, str(folder), file_ending), files=(folder,))]
    if not any(_is_series(folder / name) for name in folders):
        return []
    parsed = {name: numbered(name) for name in folders}
    # patients may be called P_0001, P_0002 …: only where there is a number 0 the numbers are those of channels
    several = {case for case, channel in parsed.values() if channel == 0}
    channels: dict[str, dict[int, Path]] = {}
    cases = []
    for name, (case, channel) in parsed.items():
        if channel is None or case not in several:
            cases.append(Case(id=safe_id(name, str(folder), file_ending), files=(folder / name,)))
        else:
            channels.setdefault(case, {})[channel] = folder / name
    cases += [numbered_case(safe_id(case, str(folder), file_ending), found, "") for case, found in channels.items()]
    return sorted(cases, key=lambda case: case.id)


def _holds_dicom(folder: Path, names: list[str]) -> bool:
    return any(could_be_dicom(name) and is_dicom_file(os.path.join(folder, name)) for name in names)


def _is_series(folder: Path) -> bool:
    """Whether the folder holds DICOM files. One that may not be entered may be one; reading its case says why not."""
    try:
        names, _ = _listing(folder)
    except InputError:
        return False
    return _holds_dicom(folder, names)


def _some(names: list[str]) -> str:
    """Up to three names."""
    if not names:
        return "no files"
    return ", ".join(names[:3]) + (f" … ({len(names)} files)" if len(names) > 3 else "")


def _ending_hint(names: list[str], file_ending: str) -> str:
    """What to do about a folder whose files have another ending."""
    endings = Counter("".join(Path(name).suffixes[-2 if name.lower().endswith(".gz") else -1 :]) for name in names)
    if not endings:
        return f"Put the images there; the model's file_ending is {file_ending}."
    meant = endings.most_common(1)[0][0] or "without an ending"
    return f"Did you mean the files {meant}? The model's file_ending is {file_ending}; convert or rename them."
