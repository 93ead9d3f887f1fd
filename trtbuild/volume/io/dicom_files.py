"""A folder becomes its DICOM files: which count, which are none, and which are damaged; and their headers."""

from __future__ import annotations

import codecs
import os
from pathlib import Path
from typing import Any

from trtbuild.errors import InputError, MissingExtra
from trtbuild.volume.io.foreign import reading

ENDINGS = ("", ".dcm", ".dicom", ".dic", ".ima")
"""Names that DICOM files go by; a number at the end is the last part of a UID."""
MAGIC = b"DICM"
SNIFF = 4096
"""Bytes from which a text is known."""


def could_be_dicom(name: str) -> bool:
    """Whether DICOM files go by such names. Hidden files do not."""
    ending = os.path.splitext(name)[1].lower()
    return not name.startswith(".") and (ending in ENDINGS or ending[1:].isdigit())


def is_dicom_file(path: str) -> bool:
    """Whether the file has DICOM's mark behind its preamble; False where it cannot be read."""
    try:
        with open(path, "rb") as stream:
            return stream.read(132)[128:] == MAGIC
    except OSError:
        return False


def files_in_folder(folder: Path) -> tuple[list[Path], list[str]]:
    """The DICOM files in `folder`, sorted by name, and the names of files that DICOM might have but are none.

    What has another ending is not looked at. What lacks DICOM's mark is damaged, if it could be a slice.
    """
    if not os.path.isdir(folder):
        raise InputError("There is no such folder of DICOM files.", where=folder,
                         got="a file" if os.path.exists(folder) else "nothing", hint="Correct the path.")  # fmt: skip
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if could_be_dicom(entry.name) and not entry.is_dir())
    except OSError as error:
        raise InputError("The folder cannot be read.", got=error.strerror, where=folder) from error
    good = [name for name in names if is_dicom_file(os.path.join(folder, name))]
    if not good:
        raise InputError("The folder holds no DICOM files.", expected="the slices of one series",
                         got=", ".join(names[:3]) or "no such names", where=folder)  # fmt: skip
    strangers = [name for name in names if name not in set(good) and _is_no_slice(folder / name)]
    bad = sorted(set(names) - set(good) - set(strangers))
    if bad:
        raise InputError("A file among the slices is no DICOM file, or damaged.", where=folder / bad[0],
                         expected="DICM at byte 128", got=f"{len(bad)} such files",
                         hint="Move it away, or export the series again.")  # fmt: skip
    return [folder / name for name in good], strangers


def _is_no_slice(file: Path) -> bool:
    """Whether a file without DICOM's mark was never a slice, such as README, LICENSE or VERSION.

    That is text, or something under a word without a number (slices are numbered) that holds no DICOM without the
    mark. An ending of DICOM's own is a promise, whatever stands in the file.
    """
    ending = file.suffix.lower()
    if ending in ENDINGS[1:]:
        return False
    with reading(file, "a file that can be read"), file.open("rb") as stream:
        head = stream.read(SNIFF)
    if head and _is_text(head):
        return True
    return not ending and not any(map(str.isdigit, file.name)) and not _holds_dicom(file)


def _is_text(head: bytes) -> bool:
    """Whether a file begins as UTF-8 without control characters; an element of DICOM has a zero in its first bytes."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be cut off
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter in "\t\n\r\f\ufeff" for letter in text)


def _holds_dicom(file: Path) -> bool:
    """Whether pydicom finds an object in a file that lacks the mark; it raises errors of all kinds over other bytes."""
    try:
        with reading(file, "a DICOM object"):
            return "SOPClassUID" in imported_pydicom().dcmread(file, stop_before_pixels=True, force=True)
    except InputError:
        return False


def header_from_file(file: Path, tags: list[str] | None) -> Any:
    """The pydicom.Dataset of a file without its voxels: the elements `tags`, or all."""
    pydicom = imported_pydicom()
    with reading(file, "a DICOM file"):
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        for _ in header if tags else ():
            pass  # pydicom looks at an element when it is asked for; a damaged one shows itself here
    return header


def imported_pydicom() -> Any:
    """The package, or MissingExtra."""
    try:
        import pydicom
    except ImportError as error:
        raise MissingExtra("pydicom", "dicom", "read DICOM files") from error
    return pydicom
