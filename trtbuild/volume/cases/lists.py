"""The cases of a case list, a .json or .txt file (see `cases`)."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import Any

from trtbuild.errors import InputError
from trtbuild.volume.cases.case import Case, could_be_file, named, numbered, require_order, safe_id


def cases_from_list(path: Path, file_ending: str) -> list[Case]:
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
    has_id = isinstance(entry, dict) and set(entry) == {"id", "files"}
    names = entry["files"] if has_id else entry
    if not isinstance(names, list) or not names or not all(map(could_be_file, names)):
        raise InputError("An entry of the case list is no case.", got=json.dumps(entry)[:200], where=where,
                         expected='["a_0000…", "a_0001…"] or {"id": "a", "files": […]}, names that a file can have'
                         )  # fmt: skip
    files = tuple(folder / name for name in names)
    if has_id:
        return Case(id=safe_id(entry["id"], where, file_ending), files=files)
    if len(files) == 1 and _is_series(files[0], file_ending) and numbered(files[0].name)[1] != 0:
        return Case(id=safe_id(files[0].name, where, file_ending), files=files)
    parsed = [numbered(path.name) if _is_series(path, file_ending) else named(path, file_ending) for path in files]
    if len(files) == 1 and parsed[0][1] is None:
        return Case(id=parsed[0][0], files=files)
    channels = [channel for case, channel in parsed if case == parsed[0][0] and channel is not None]
    if len(channels) != len(files):
        raise InputError("The names of the files do not say which case they are.", where=where, got=", ".join(names),
                         expected=f"CASE_0000{file_ending}, CASE_0001{file_ending} …",
                         hint='Write the entry as {"id": "a", "files": […]} in a .json case list.')  # fmt: skip
    require_order(parsed[0][0], channels, files[0])
    return Case(id=parsed[0][0], files=files)


def _is_series(path: Path, file_ending: str) -> bool:
    """Whether an entry of a list is a folder; the system is asked only where the name is not that of an image."""
    return not path.name.endswith(file_ending) and os.path.isdir(path)
