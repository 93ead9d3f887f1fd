"""Which files belong to which case: a folder as nnU-Net wants it, image files, or a case list.

A case list is

- a .json file: a list of lists of files, ``[["a_0000.nii.gz", "a_0001.nii.gz"], …]``, or a list of objects
  ``{"id": "a", "files": ["t1.nii.gz", "t2.nii.gz"]}``, whose files need no particular names;
- a .txt file: the files of one case per line, separated by blanks; names with blanks in quotes.

Relative paths in a list start at the folder of the list. Its cases keep their order; those of a folder are sorted.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from trtbuild.errors import InputError

LISTS = (".json", ".txt")
LONGEST_NAME = 255  # bytes of a file name, on all common file systems


@dataclass(frozen=True, kw_only=True)
class Case:
    """One case: its name, and its files in the order of the channels.

    A case of a folder may lack a channel: then the last of `files` is the missing one, and reading the case says so,
    as it does for a file of a case list that does not exist. So one bad case does not keep the others from being
    predicted.
    """

    id: str
    files: tuple[Path, ...]

    def output_name(self, file_ending: str) -> str:
        """The file name of the segmentation, nnU-Net's."""
        return self.id + file_ending


def cases_from_input(inputs: Sequence[Path], file_ending: str) -> tuple[Case, ...]:
    """The cases of one folder, of one case list, or of some image files.

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
        cases = _cases_from_files(inputs, file_ending)
    elif os.path.isdir(special[0]):
        cases = _cases_from_folder(special[0], file_ending)
    else:
        cases = _cases_from_list(special[0], file_ending)
    return _distinct(cases)


def _is_list(path: Path, file_ending: str) -> bool:
    return path.suffix.lower() in LISTS and not path.name.endswith(file_ending)


def _named(path: Path, file_ending: str) -> tuple[str, int | None]:
    """Case and channel number that a file name holds; the number is None where there is none.

    Raises:
        InputError: the name has another ending than the model's files.
    """
    stem = path.name.removesuffix(file_ending)
    if stem in ("", path.name):
        raise InputError("The file is not of the kind that the model reads.", got=path.name, where=path,
                         expected=f"a name ending in {file_ending}", hint=f"Convert it to {file_ending}.")  # fmt: skip
    match = re.fullmatch(r"(.+)_([0-9]{4})", stem, re.DOTALL)
    return (match[1], int(match[2])) if match else (stem, None)


def _cases_from_folder(folder: Path, file_ending: str) -> list[Case]:
    """nnU-Net's `create_lists_from_splitted_dataset_folder`: sorted by name; hidden files are no images.

    What is neither a folder nor a file, such as a link to nowhere, stays: reading it fails its case by name.
    """
    try:
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        names = [name for name in names if not os.path.isdir(folder / name)]
    except OSError as error:
        raise InputError("The folder cannot be read.", got=error.strerror, where=folder) from error
    images = [name for name in names if name.endswith(file_ending)]
    expected = f"CASE_0000{file_ending}, CASE_0001{file_ending} … (one file per channel)"
    if not images:
        raise InputError("The folder holds no image of the model's file ending.", expected=expected,
                         got=_some(names), where=folder, hint=_ending_hint(names, file_ending))  # fmt: skip
    found = [(folder / name, *_named(folder / name, file_ending)) for name in images]
    unnumbered = [path.name for path, _, channel in found if channel is None]
    if unnumbered:
        name = unnumbered[0]
        raise InputError("Files in the folder have no channel number.", expected=expected, got=_some(unnumbered),
                         where=folder, hint=f"Move them away, or rename {name} to "
                         f"{name.removesuffix(file_ending)}_0000{file_ending} and so on.")  # fmt: skip
    grouped = groupby(sorted((case, channel or 0, path) for path, case, channel in found), key=lambda entry: entry[0])
    return [_numbered_case(case, {c: p for _, c, p in entries}, file_ending) for case, entries in grouped]


def _numbered_case(case: str, by_channel: dict[int, Path], file_ending: str) -> Case:
    """The case up to its last channel, or up to the first that is missing."""
    first = next(iter(by_channel.values()))
    gap = next(channel for channel in range(len(by_channel) + 1) if channel not in by_channel)
    files = [by_channel[channel] for channel in range(gap)]
    if gap < len(by_channel):
        files.append(first.with_name(f"{case}_{gap:04d}{file_ending}"))
    return Case(id=case, files=tuple(files))


def _cases_from_files(files: Sequence[Path], file_ending: str) -> list[Case]:
    named = [(path, *_named(path, file_ending)) for path in files]
    numbered = [path for path, _, channel in named if channel is not None]
    if numbered and len(numbered) < len(files):
        other = next(path for path, _, channel in named if channel is None)
        raise InputError("Some files have a channel number and some have none.",
                         got=f"{numbered[0].name}, {other.name}",
                         expected=f"CASE_0000{file_ending}, CASE_0001{file_ending} … or no numbers at all",
                         hint="Rename them, or say in a case list what belongs together.")  # fmt: skip
    if not numbered:
        return [Case(id=case, files=(path,)) for path, case, _ in named]
    ordered = sorted((case, str(path.parent), channel or 0, path) for path, case, channel in named)
    cases = []
    for (case, _), entries in groupby(ordered, key=lambda entry: entry[:2]):
        channels = [(channel, path) for _, _, channel, path in entries]
        _require_order(case, [channel for channel, _ in channels], channels[0][1])
        cases.append(Case(id=case, files=tuple(path for _, path in channels)))
    return cases


def _require_order(case: str, channels: list[int], where: Path) -> None:
    wanted = list(range(len(channels)))
    if channels != wanted:
        expected, got = (", ".join(f"{channel:04d}" for channel in some) for some in (wanted, channels))
        hint = 'Add what is missing; entries {"id": …, "files": […]} of a .json case list take files in any order.'
        raise InputError(
            f"The channels of case {case} are not complete or not in order.",
            expected=expected, got=got, where=where, hint=hint,
        )  # fmt: skip


def _cases_from_list(path: Path, file_ending: str) -> list[Case]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        entries = json.loads(text) if path.suffix.lower() == ".json" else _lines(text, path)
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            "The case list cannot be read.", expected=f"valid {path.suffix} in UTF-8", got=str(error), where=path
        ) from error
    if not isinstance(entries, list) or not entries:
        raise InputError("The case list holds no cases.", expected="a list with at least one case", where=path,
                         got=type(entries).__name__ if entries else "nothing")  # fmt: skip
    return [_listed_case(entry, f"{path}, case {i}", path.parent, file_ending) for i, entry in enumerate(entries, 1)]


def _lines(text: str, path: Path) -> list[list[str]]:
    cases = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            cases.append(shlex.split(line))
        except ValueError as error:
            raise InputError("A line of the case list cannot be read.", expected="files, separated by blanks",
                             got=str(error), where=f"{path}, line {number}") from error  # fmt: skip
    return [case for case in cases if case]


def _listed_case(entry: Any, where: str, folder: Path, file_ending: str) -> Case:
    """A case of a list: with its own id, or with the one that its files' names hold."""
    named = isinstance(entry, dict) and set(entry) == {"id", "files"}
    names = entry["files"] if named else entry
    if not isinstance(names, list) or not names or not all(map(_could_be_file, names)):
        raise InputError("An entry of the case list is no case.", got=json.dumps(entry)[:200], where=where,
                         expected='["a_0000…", "a_0001…"] or {"id": "a", "files": […]}, names that a file can have'
                         )  # fmt: skip
    files = tuple(folder / name for name in names)
    if named:
        return Case(id=_safe_id(entry["id"], where, file_ending), files=files)
    parsed = [_named(path, file_ending) for path in files]
    if len(files) == 1 and parsed[0][1] is None:
        return Case(id=parsed[0][0], files=files)
    channels = [channel for case, channel in parsed if case == parsed[0][0] and channel is not None]
    if len(channels) != len(files):
        raise InputError("The names of the files do not say which case they are.", where=where, got=", ".join(names),
                         expected=f"CASE_0000{file_ending}, CASE_0001{file_ending} …",
                         hint='Write the entry as {"id": "a", "files": […]} in a .json case list.')  # fmt: skip
    _require_order(parsed[0][0], channels, files[0])
    return Case(id=parsed[0][0], files=files)


def _could_be_file(name: Any) -> bool:
    """Whether the system could have a file of this name; whether there is one shows when it is read."""
    if not isinstance(name, str) or not name:
        return False
    try:
        return max(len(os.fsencode(part)) for part in name.split("/")) <= LONGEST_NAME and "\0" not in name
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can spell
        return False


def _safe_id(name: Any, where: str, file_ending: str) -> str:
    """The id, which becomes a file name in the output folder and must not lead out of it."""
    ending = max(file_ending, ".npz", ".pkl", key=len)
    bad = not isinstance(name, str) or name in ("", ".", "..") or re.search(r"[/\\\0]", name)
    if bad or not _could_be_file(name + ending):
        raise InputError("The id of a case cannot be a file name.", got=repr(name), where=where,
                         expected=f"a name without / and \\, with its ending at most {LONGEST_NAME} bytes"
                         )  # fmt: skip
    return str(name)


def _distinct(cases: list[Case]) -> tuple[Case, ...]:
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
