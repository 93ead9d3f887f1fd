"""Which files belong to which case: a folder as nnU-Net wants it, DICOM series, image files, or a case list.

A folder that holds no image of the model's kind may be a DICOM series itself, or hold folders each of which is one.
Of those, ``NAME_0000, NAME_0001 …`` are the channels of the case NAME; any other name is a case of one channel.

A case list is

- a .json file: a list of lists of files, ``[["a_0000.nii.gz", "a_0001.nii.gz"], …]``, or a list of objects
  ``{"id": "a", "files": ["t1.nii.gz", "t2.nii.gz"]}``, whose files need no particular names;
- a .txt file: the files of one case per line, separated by blanks; names with blanks in quotes.

In both a DICOM series is named by its folder. Relative paths in a list start at the folder of the list. Its cases
keep their order; those of a folder are sorted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from trtbuild.errors import InputError
from trtbuild.volume.cases.case import Case, distinct, named, require_order
from trtbuild.volume.cases.folder import cases_from_folder
from trtbuild.volume.cases.lists import cases_from_list

LISTS = (".json", ".txt")


def cases_from_input(inputs: Sequence[Path], file_ending: str) -> Sequence[Case]:
    """The cases of one folder, of one case list, or of some image files.

    For a folder of images only the names are held: each `Case` is made when it is asked for.

    Args:
        inputs: what stands behind ``-i``.
        file_ending: the model's, such as ``.nii.gz``.

    Image files ``NAME_0000<ending>, NAME_0001<ending> …`` are the channels of the case NAME; a file without such a
    number is a case of one channel.

    Raises:
        InputError: there is nothing to predict, or it is not clear what belongs together.
    """
    if not inputs:
        raise InputError("There is no input.", expected="a folder, image files, or a case list (.json, .txt)")
    for path in inputs:
        if not os.path.exists(path):
            raise InputError("The input does not exist.", where=path, hint="Check the path.")
    special = [path for path in inputs if os.path.isdir(path) or _is_list(path, file_ending)]
    if special and len(inputs) > 1:
        raise InputError("The inputs are of different kinds.", expected="one folder, one case list, or image files",
                         got=f"{special[0].name} and {len(inputs) - 1} more",
                         hint="Run them one after the other.")  # fmt: skip
    if not special:
        return distinct(_cases_from_files(inputs, file_ending))
    if os.path.isdir(special[0]):
        return cases_from_folder(special[0], file_ending)
    return distinct(cases_from_list(special[0], file_ending))


def part_of(cases: Sequence[Case], num_parts: int, part_id: int) -> Sequence[Case]:
    """The cases that one of `num_parts` machines predicts: nnU-Net's every num_parts-th, from number `part_id` on.

    Raises:
        InputError: there is no such part.
    """
    if not 0 <= part_id < num_parts:
        raise InputError("There is no such part.", expected="-num_parts 1 or more, and -part_id 0 to num_parts - 1",
                         got=f"-num_parts {num_parts} -part_id {part_id}")  # fmt: skip
    return cases[part_id::num_parts]


def _is_list(path: Path, file_ending: str) -> bool:
    return path.suffix.lower() in LISTS and not path.name.endswith(file_ending)


def _cases_from_files(files: Sequence[Path], file_ending: str) -> list[Case]:
    parsed = [(path, *named(path, file_ending)) for path in files]
    with_number = [path for path, _, channel in parsed if channel is not None]
    if with_number and len(with_number) < len(files):
        other = next(path for path, _, channel in parsed if channel is None)
        raise InputError("Some files have a channel number and some have none.",
                         got=f"{with_number[0].name}, {other.name}",
                         expected=f"CASE_0000{file_ending}, CASE_0001{file_ending} … or no numbers at all",
                         hint="Rename them, or say in a case list what belongs together.")  # fmt: skip
    if not with_number:
        return [Case(id=case, files=(path,)) for path, case, _ in parsed]
    ordered = sorted((case, str(path.parent), channel or 0, path) for path, case, channel in parsed)
    cases = []
    for (case, _), entries in groupby(ordered, key=lambda entry: entry[:2]):
        channels = [(channel, path) for _, _, channel, path in entries]
        require_order(case, [channel for channel, _ in channels], channels[0][1])
        cases.append(Case(id=case, files=tuple(path for _, path in channels)))
    return cases


__all__ = ["Case", "cases_from_input", "part_of"]
