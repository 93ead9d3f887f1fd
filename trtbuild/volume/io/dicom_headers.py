"""A folder of DICOM files becomes slices: which files count, that they are one series, and what each one says."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from trtbuild.errors import InputError, MissingExtra
from trtbuild.volume.io.dicom_grid import Slice
from trtbuild.volume.io.foreign import reading

ENDINGS = ("", ".dcm", ".dicom", ".dic", ".ima")
"""Names that DICOM files go by; a number at the end is the last part of a UID."""
MAGIC = b"DICM"
DIRECTORY = "1.2.840.10008.1.3.10"
"""The SOP class of DICOMDIR, an index of files."""
TAGS = [
    "SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "FrameOfReferenceUID", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness", "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip


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


def slices_from_folder(folder: Path) -> tuple[list[Slice], tuple[str, ...]]:
    """The slices of the one series in `folder`, in no order, and sentences about files that were left out.

    Raises:
        InputError: there is no series or more than one, or a file is damaged or holds something else than plain
            intensities with a place in space.
        MissingExtra: pydicom is not installed.
    """
    headers, without = [], []
    for file in _files(folder):
        header = header_from_file(file, TAGS)
        if header.get("SOPClassUID") == DIRECTORY:
            continue
        if "Rows" not in header:
            without.append(file.name)
            continue
        headers.append((file, header))
    _require_one_series(folder, [header for _, header in headers])
    slices: list[Slice] = []
    for file, header in headers:
        with reading(file, "a DICOM image with a place in space"):
            slices += _slices(file, header)
    if not without:
        return slices, ()
    return slices, (f"{len(without)} DICOM objects without an image were left out, the first is {without[0]}.",)


def header_from_file(file: Path, tags: list[str] | None) -> Any:
    """The pydicom.Dataset of a file without its voxels: the elements `tags`, or all."""
    try:
        import pydicom
    except ImportError as error:
        raise MissingExtra("pydicom", "dicom", "read DICOM files") from error
    with reading(file, "a DICOM file"):
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags)
        for _ in header if tags else ():
            pass  # pydicom looks at an element when it is asked for; a damaged one shows itself here
    return header


def _files(folder: Path) -> list[Path]:
    """The DICOM files in `folder`, sorted by name. What has another ending is none; what lacks the mark is damaged."""
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
    if len(good) < len(names):
        bad = sorted(set(names) - set(good))
        raise InputError("A file among the slices is no DICOM file, or damaged.", where=folder / bad[0],
                         expected="DICM at byte 128", got=f"{len(bad)} such files",
                         hint="Move it away, or export the series again.")  # fmt: skip
    return [folder / name for name in good]


def _require_one_series(folder: Path, headers: list[Any]) -> None:
    counts = Counter(str(header.get("SeriesInstanceUID")) for header in headers)
    if not counts:
        raise InputError("The folder holds DICOM files, but no images.", where=folder)
    if len(counts) > 1:
        about = {str(header.get("SeriesInstanceUID")): header for header in headers}
        listed = [f"{about[uid].get('Modality', '?')} '{about[uid].get('SeriesDescription', '')}', {count} files, {uid}"
                  for uid, count in counts.most_common()]  # fmt: skip
        raise InputError(f"The folder holds {len(counts)} series.", expected="the files of one", got="; ".join(listed),
                         where=folder, hint="Move each series into a folder of its own and name the one you mean."
                         )  # fmt: skip


def _slices(file: Path, header: Any) -> list[Slice]:
    """The frames of one file."""
    _require_plain(file, header)
    groups = header.get("PerFrameFunctionalGroupsSequence")
    frames = int(header.get("NumberOfFrames") or 1)
    if groups is None and frames > 1:
        raise InputError("The file has several frames that do not say where they lie.", where=file,
                         expected="an enhanced image, or one slice per file", got=f"{frames} frames")  # fmt: skip
    if groups is not None and len(groups) != frames:
        raise InputError("The file does not describe each of its frames.", where=file, expected=frames, got=len(groups))
    return [_slice(file, header, index) for index in range(frames)]


def _require_plain(file: Path, header: Any) -> None:
    if header.get("SamplesPerPixel") != 1 or header.get("PhotometricInterpretation") not in (
        "MONOCHROME1",
        "MONOCHROME2",
    ):
        raise InputError("The image has no plain intensities.", expected="MONOCHROME1 or MONOCHROME2", where=file,
                         got=header.get("PhotometricInterpretation"))  # fmt: skip
    if "ModalityLUTSequence" in header:
        raise InputError("The image's values stand in a table, which is not supported.", where=file,
                         expected="RescaleSlope and RescaleIntercept", got="ModalityLUTSequence",
                         hint="Convert the series with a tool that applies it.")  # fmt: skip


def _slice(file: Path, header: Any, index: int) -> Slice:
    place = _group(header, index, "PlanePositionSequence")
    turned = _group(header, index, "PlaneOrientationSequence")
    measures = _group(header, index, "PixelMeasuresSequence")
    values = _group(header, index, "PixelValueTransformationSequence")
    x, y, z = _numbers(file, place, "ImagePositionPatient", 3)
    a, b, c, d, e, f = _numbers(file, turned, "ImageOrientationPatient", 6)
    rows, columns = _numbers(file, measures, "PixelSpacing", 2)
    slope, intercept = _number(values, "RescaleSlope"), _number(values, "RescaleIntercept")
    space = header.get("FrameOfReferenceUID")
    return Slice(file=file, frame=index, shape=(int(header.Rows), int(header.Columns)), position=(x, y, z),
                 orientation=(a, b, c, d, e, f), spacing=(rows, columns),
                 thickness=_number(measures, "SpacingBetweenSlices") or _number(measures, "SliceThickness"),
                 slope=1.0 if slope is None else slope, intercept=intercept or 0.0,
                 space=None if space is None else str(space))  # fmt: skip


def _group(header: Any, index: int, name: str) -> Any:
    """Where an attribute stands: in the frame's functional groups, in the shared ones, or in the file itself."""
    for sequence, at in (("PerFrameFunctionalGroupsSequence", index), ("SharedFunctionalGroupsSequence", 0)):
        groups = header.get(sequence)
        if groups is not None and len(groups) > at and groups[at].get(name):
            return groups[at][name][0]
    return header


def _number(header: Any, name: str) -> float | None:
    value = header.get(name)
    return None if value is None or value == "" else float(value)


def _numbers(file: Path, header: Any, name: str, count: int) -> list[float]:
    found = header.get(name)
    numbers = [float(value) for value in found] if found is not None else []
    if len(numbers) != count or not np.isfinite(numbers).all():
        raise InputError(f"The image does not say its {name}.", expected=f"{count} numbers", got=numbers or "nothing",
                         where=file, hint="Images without a place in space, such as X-rays, are not supported."
                         )  # fmt: skip
    return numbers
