"""The files of one case become one image: their channels stacked, once it is sure that they belong together."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError
from trtbuild.volume.image import Geometry, Header, Image
from trtbuild.volume.io.sound import non_finite

Numbers = tuple[float, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """One file of a case.

    `data` is (C, Z, Y, X) float32, `spacing` (z, y, x) in mm. `placement` names what should agree between the files
    of a case but need not (origin, direction, affine).
    """

    data: NDArray[np.float32]
    spacing: tuple[float, float, float]
    geometry: Geometry
    placement: Mapping[str, Numbers]


def image_from_files(files: Sequence[Path], channels: tuple[str, ...], read: Callable[[Path], Part]) -> Image:
    """The image (C, Z, Y, X) of one case, its channels in the order of `files`, then of each file.

    As in nnU-Net all files must agree in shape and spacing (`np.allclose`), while a difference in placement is a
    warning. Files are read one after the other into the array, so that one of them at most is held twice.

    Raises:
        InputError: a file is missing, the number of channels is not the model's, the files do not fit each other, a
            voxel is not finite, an axis is empty, or `read` says so.
    """
    require_files(files, channels)
    return image_from_sources(files, channels, read)


def image_from_sources(files: Sequence[Path], channels: tuple[str, ...], read: Callable[[Path], Part]) -> Image:
    """`image_from_files` where `read` itself finds out whether there is something to read, such as a DICOM folder."""
    first = checked(read(files[0]), files[0])
    per_file = len(first.data)
    if per_file * len(files) != len(channels):
        raise _wrong_number(files, channels, per_file)
    if len(files) == 1:
        return Image(data=first.data, spacing=first.spacing, geometry=first.geometry)
    data = np.empty((len(channels), *first.data.shape[1:]), np.float32)
    data[:per_file] = first.data
    warnings: list[str] = []
    for index, file in enumerate(files[1:], start=1):
        part = checked(read(file), file)
        warnings += _require_fit(first, part, files[0], file)
        data[index * per_file : (index + 1) * per_file] = part.data
    return Image(data=data, spacing=first.spacing, geometry=first.geometry, warnings=tuple(warnings))


def header_from_files(
    files: Sequence[Path], channels: tuple[str, ...], read: Callable[[Path], Header | None]
) -> Header | None:
    """The header of the image that `image_from_files` would give; None where `read` cannot say it of the first file.

    Only the first file is opened: the others must agree with it, or reading the image fails.

    Raises:
        InputError: a file is missing, the header is damaged or another one than the reader takes.
    """
    require_files(files, channels)
    first = read(files[0])
    if first is not None:
        require_extent(first.shape, first.spacing, files[0])
    return None if first is None else replace(first, channels=first.channels * len(files))


def _expected_files(files: Sequence[Path], channels: tuple[str, ...]) -> str:
    """The file names that nnU-Net expects for these channels, such as ``case_0000.nii.gz (T1)``."""
    name = files[0].name if files else "case"
    match = re.fullmatch(r"(.+?)(?:_[0-9]{4})?((?:\.[A-Za-z]+)*)", name)
    case, ending = match.groups() if match else (name, "")
    return ", ".join(f"{case}_{index:04d}{ending} ({channel})" for index, channel in enumerate(channels))


def require_files(files: Sequence[Path], channels: tuple[str, ...]) -> None:
    """An InputError where one of the files is not there."""
    if not files:
        raise InputError("The case has no files.", expected=_expected_files(files, channels))
    for file in files:
        if not os.path.isfile(file):  # unlike Path.is_file it does not raise in a folder that may not be entered
            raise InputError("There is no such image file.", expected=_expected_files(files, channels),
                             got="a folder" if os.path.isdir(file) else "nothing", where=file,
                             hint="Correct the path, or add the missing channel.")  # fmt: skip


def _wrong_number(files: Sequence[Path], channels: tuple[str, ...], per_file: int) -> InputError:
    return InputError(
        "The case has the wrong number of channels.",
        expected=f"{len(channels)}: {', '.join(channels)}",
        got=f"{per_file * len(files)}, {per_file} in each of {', '.join(file.name for file in files)}",
        where=files[0],
        hint=f"Give one file per channel: {_expected_files(files, channels)}.",
    )


def checked(part: Part, file: Path) -> Part:
    """The part itself, if it is an image that can be predicted."""
    require_extent(part.data.shape[1:], part.spacing, file)
    with np.errstate(invalid="ignore"):
        # Float32 values cannot overflow a float64 sum, so it is finite exactly where all of them are; unlike
        # np.isfinite(data) it needs no memory.
        finite = np.isfinite(part.data.sum(dtype=np.float64))
    if not finite:
        bad = ~np.isfinite(part.data)
        index = np.unravel_index(int(bad.argmax()), bad.shape)[1:]
        raise non_finite(file, int(bad.sum()), tuple(map(int, index)))
    return part


def require_extent(shape: Sequence[int], spacing: Numbers, file: Path) -> None:
    """An InputError where an axis (z, y, x) has no voxel, or no positive finite spacing."""
    if min(shape) < 1:
        raise InputError("The image is empty.", expected="at least one voxel on every axis", where=file,
                         got=f"{tuple(shape)} voxels (z, y, x)", hint="Export the image again.")  # fmt: skip
    if not all(0 < value < np.inf for value in spacing):  # NaN is not either
        raise InputError("The image has no usable spacing.", expected="three positive numbers", got=_mm(spacing),
                         where=file, hint="Write the voxel size into the header.")  # fmt: skip


def _mm(spacing: Numbers) -> str:
    return " x ".join(f"{value:g}" for value in spacing) + " mm"


def _require_fit(first: Part, part: Part, first_file: Path, file: Path) -> list[str]:
    """Warnings about differing placement; an error where shape or spacing differ."""
    for what, expected, got, fits in (
        ("shape (c, z, y, x)", first.data.shape, part.data.shape, first.data.shape == part.data.shape),
        ("spacing (z, y, x)", _mm(first.spacing), _mm(part.spacing), np.allclose(first.spacing, part.spacing)),
    ):
        if not fits:
            raise InputError(f"The channels of the case differ in {what}.", expected=f"{expected} as {first_file.name}",
                             got=f"{got} in {file.name}", where=file,
                             hint="Bring all channels to one grid: register and resample them.")  # fmt: skip
    return [
        f"{file.name} has another {name} than {first_file.name}: {part.placement[name]} instead of {value}."
        for name, value in first.placement.items()
        if len(value) != len(part.placement[name]) or not np.allclose(value, part.placement[name])
    ]
