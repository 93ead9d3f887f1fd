"""What the cases of a run are read from, and marks that tell whether that has changed since.

A mark is one line about a file, without opening it: resolved path, size and time of the last change. So another image
under the same name, or one that was written anew, is told from the old one at the price of one look per file.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.spec import Reader

if TYPE_CHECKING:
    from trtbuild.volume.cases import Case

FOLDERS = 256
"""Resolved folders that are remembered; the cases of a list may lie in as many as there are cases."""


def files_beside_case(case: Case, *, reader: Reader, ending: str, previous: Path | None) -> tuple[Path, ...]:
    """What is read for the case besides its own files, whether it is there or not.

    Args:
        case: its images.
        reader: the model's; Tiff3DIO reads spacings from files beside images and labels.
        ending: of segmentations.
        previous: the folder with the labels of the previous stage.
    """
    from trtbuild.volume.io import files_beside

    files: list[Path] = []
    if reader == "Tiff3DIO":
        from trtbuild.volume.io.tiff3d_io import json_of_image

        files.append(json_of_image(case.files[0]))
    if previous is not None:
        labels = previous / case.output_name(ending)
        files += [labels, *files_beside(reader, labels)]
    return tuple(files)


def marks_from_cases(cases: Iterable[Case], beside: Callable[[Case], Iterable[Path]]) -> dict[str, list[str]]:
    """The marks of everything that each case is read from, by its id.

    Args:
        cases: of the run.
        beside: what is read for a case besides its files (`files_beside_case`).
    """
    resolved = lru_cache(FOLDERS)(os.path.realpath)
    return {case.id: [_mark(file, resolved) for file in (*case.files, *beside(case))] for case in cases}


def _mark(path: Path, resolved: Callable[[str], str]) -> str:
    folder, name = os.path.split(path)
    real = os.path.join(resolved(folder), name) if name not in ("", ".", "..") else os.path.realpath(path)
    try:
        found = os.lstat(real)
        if stat.S_ISLNK(found.st_mode):
            real = os.path.realpath(real)
            found = os.stat(real)
        if stat.S_ISDIR(found.st_mode):
            return f"{real}, {_series(real)}"
    except OSError:
        return f"{real}, not there"
    return f"{real}, {found.st_size} bytes, {found.st_mtime_ns} ns"


def _series(folder: str) -> str:
    """The files of a DICOM series taken together; hidden ones are none of it."""
    files, size, newest = 0, 0, 0
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and entry.is_file():
                found = entry.stat()
                files, size, newest = files + 1, size + found.st_size, max(newest, found.st_mtime_ns)
    return f"{files} files, {size} bytes, newest {newest} ns"
