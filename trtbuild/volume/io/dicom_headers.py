"""A folder of DICOM files becomes slices: which files count, that they are one series, and what each one says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from trtbuild.errors import InputError
from trtbuild.volume.io.dicom_files import files_in_folder, header_from_file, imported_pydicom
from trtbuild.volume.io.dicom_grid import Slice
from trtbuild.volume.io.foreign import reading

DIRECTORY = "1.2.840.10008.1.3.10"
"""The SOP class of DICOMDIR, an index of files."""
IMAGES = ("Image Storage", "Volume Storage")
"""What the names of SOP classes with voxels have in common (DICOM PS3.6, table A-1)."""
TAGS = [
    "SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "FrameOfReferenceUID", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "SpacingBetweenSlices", "SliceThickness", "RescaleSlope",
    "RescaleIntercept", "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip


def slices_from_folder(folder: Path) -> tuple[list[Slice], tuple[str, ...]]:
    """The slices of the one series in `folder`, in no order, and sentences about files that were left out.

    Raises:
        InputError: there is no series or more than one, or a file is damaged or holds something else than plain
            intensities with a place in space.
        MissingExtra: pydicom is not installed.
    """
    files, strangers = files_in_folder(folder)
    headers, without = [], []
    for file in files:
        header = header_from_file(file, TAGS)
        if str(_announced_class(header)) == DIRECTORY:
            continue
        _require_class(file, header)
        if "Rows" not in header:
            without.append(file.name)
            continue
        headers.append((file, header))
    _require_one_series(folder, [header for _, header in headers])
    slices: list[Slice] = []
    for file, header in headers:
        with reading(file, "a DICOM image with a place in space"):
            slices += _slices(file, header)
    return slices, tuple(
        f"{len(names)} {kind} were left out, the first is {names[0]}."
        for kind, names in (("DICOM objects without an image", without), ("files that are no DICOM", strangers))
        if names
    )


def _announced_class(header: Any) -> Any:
    """The SOP class in the file meta information, before the object itself; None where there is none."""
    return getattr(header, "file_meta", {}).get("MediaStorageSOPClassUID")


def _require_class(file: Path, header: Any) -> None:
    """An InputError where the file ends, or is damaged, before it is clear that it is an image or none.

    pydicom reads a file that was cut between two elements without a word. One that may be an image is a slice lost.
    """
    kind = header.get("SOPClassUID")
    if kind and "Rows" in header:
        return
    with reading(file, "a DICOM file with a SOPClassUID"):
        name = str(imported_pydicom().uid.UID(str(kind or "")).name)
    known = name != kind or kind == _announced_class(header)  # a private class is; not one that was cut off
    if not kind or not known or any(word in name for word in IMAGES):
        raise InputError("A DICOM file is damaged or ends too early.", where=file,
                         expected="an image with its SOPClassUID and Rows, or an object that is none",
                         got=f"SOPClassUID {kind or 'missing'}, Rows {'there' if 'Rows' in header else 'missing'}",
                         hint="Copy or export the series again.")  # fmt: skip


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
    if not (min(rows, columns) > 0 and header.Rows and header.Columns):
        raise InputError("The image has no usable spacing, or no voxels.", where=file, hint="Export the series again.",
                         expected="positive PixelSpacing, Rows and Columns",
                         got=f"{rows:g} x {columns:g} mm, {header.Rows} x {header.Columns} voxels")  # fmt: skip
    slope, intercept = _number(values, "RescaleSlope"), _number(values, "RescaleIntercept")
    if slope == 0:
        raise InputError("The RescaleSlope of the image is 0, which makes all of its voxels one value.", where=file,
                         expected="another number", got=f"{slope:g}", hint="Export the series again.")  # fmt: skip
    thickness = _number(measures, "SpacingBetweenSlices")
    space = header.get("FrameOfReferenceUID")
    return Slice(file=file, frame=index, shape=(int(header.Rows), int(header.Columns)), position=(x, y, z),
                 orientation=(a, b, c, d, e, f), spacing=(rows, columns),
                 thickness=_number(measures, "SliceThickness") if thickness is None else thickness,
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
