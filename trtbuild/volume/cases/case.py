"""One case, and what the names of files and folders say about it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import InputError

LONGEST_NAME = 255  # bytes of a file name, on all common file systems


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case: its name, and its files in the order of the channels; or the folders of its DICOM series.

    A case of a folder may lack a channel: then the last of `files` is the missing one, and reading the case says so,
    as it does for a file of a case list that does not exist. So one bad case does not keep the others from being
    predicted.
    """

    id: str
    files: tuple[Path, ...]

    @property
    def is_dicom(self) -> bool:
        """Whether `files` are folders of DICOM files, one series in each. Asks the file system."""
        return os.path.isdir(self.files[0])

    def output_name(self, file_ending: str) -> str:
        """The file name of the segmentation, nnU-Net's."""
        return self.id + file_ending


def named(path: Path, file_ending: str) -> tuple[str, int | None]:
    """Case and channel number that a file name holds; the number is None where there is none.

    Raises:
        InputError: the name has another ending than the model's files.
    """
    stem = path.name.removesuffix(file_ending)
    if stem in ("", path.name):
        raise InputError("The file is not of the kind that the model reads.", got=path.name, where=path,
                         expected=f"a name ending in {file_ending}", hint=f"Convert it to {file_ending}.")  # fmt: skip
    return numbered(stem)


def numbered(stem: str) -> tuple[str, int | None]:
    match = re.fullmatch(r"(.+)_([0-9]{4})", stem, re.DOTALL)
    return (match[1], int(match[2])) if match else (stem, None)


def numbered_case(case: str, by_channel: Mapping[int, Path], file_ending: str) -> Case:
    """The case up to its last channel, or up to the first that is missing."""
    first = next(iter(by_channel.values()))
    gap = next(channel for channel in range(len(by_channel) + 1) if channel not in by_channel)
    files = [by_channel[channel] for channel in range(gap)]
    if gap < len(by_channel):
        files.append(first.with_name(f"{case}_{gap:04d}{file_ending}"))
    return Case(id=case, files=tuple(files))


def require_order(case: str, channels: list[int], where: Path) -> None:
    wanted = list(range(len(channels)))
    if channels != wanted:
        expected, got = (", ".join(f"{channel:04d}" for channel in some) for some in (wanted, channels))
        hint = 'Add what is missing; entries {"id": …, "files": […]} of a .json case list take files in any order.'
        raise InputError(
            f"The channels of case {case} are not complete or not in order.",
            expected=expected, got=got, where=where, hint=hint,
        )  # fmt: skip


def could_be_file(name: Any) -> bool:
    """Whether the system could have a file of this name; whether there is one shows when it is read."""
    if not isinstance(name, str) or not name:
        return False
    try:
        return max(len(os.fsencode(part)) for part in name.split("/")) <= LONGEST_NAME and "\0" not in name
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False


def safe_id(name: Any, where: str, file_ending: str) -> str:
    """The id, which becomes a file name in the output folder and must not lead out of it."""
    ending = max(file_ending, ".npz", ".pkl", key=len)
    bad = not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name)
    if bad or not could_be_file(name + ending):
        raise InputError("The id of a case cannot be a file name.", got=repr(name), where=where,
                         expected=f"a name without / and \\, with its ending at most {LONGEST_NAME} bytes"
                         )  # fmt: skip
    return str(name)


def distinct(cases: list[Case]) -> tuple[Case, ...]:
    """The cases themselves, if no two would write the same file and none has a file twice."""
    for case in cases:
        doubled = [path for path, count in Counter(case.files).items() if count > 1]
        if doubled:
            raise InputError(f"Case {case.id} has a file twice.", where=doubled[0])
    doubled_ids = [name for name, count in Counter(case.id for case in cases).items() if count > 1]
    if doubled_ids:
        first, second = [case.files[0] for case in cases if case.id == doubled_ids[0]][:2]
        raise InputError(f"Two cases are called {doubled_ids[0]}, so that both would write the same file.",
                         got=f"{first} and {second}",
                         hint='Give them ids in a .json case list: {"id": …, "files": […]}.')  # fmt: skip
    return tuple(cases)
