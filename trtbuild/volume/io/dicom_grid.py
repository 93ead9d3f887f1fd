"""Do slices make a grid? Their positions and orientations become one place in space, or an error names the slice.

Only numbers that every slice states for itself are used: its position (the centre of its first voxel), the directions
of its rows and columns, and its pixel spacing. Instance numbers, slice locations and file names order nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError
from trtbuild.volume.image import ItkGeometry

ROUNDING = 0.18
"""Millimetres: some scanners write positions with one decimal. Two of them are then each 0.05 off in x, y and z, and
one slice seems to lie up to 0.1 * sqrt(3) beside its place behind the other."""
SHARE = 0.25
"""But never more than this share of the smallest spacing; a missing slice moves one by half a spacing or more."""
ANGLE = 1e-4
"""Difference of direction cosines between slices: 0.05 mm at the edge of a field of 500 mm."""
RIGHT_ANGLE = 1e-3
"""How far rows and columns may be from unit length and a right angle, because of cosines with three decimals."""


@dataclass(frozen=True, kw_only=True)
class Slice:
    """One frame of one file, as it describes itself.

    `position` and `orientation` (row direction, column direction) are in millimetres and cosines of the patient's
    x, y, z; `spacing` is the distance of rows and of columns, `thickness` what the file says about the third axis
    (None where it says nothing). A voxel's value is ``stored * slope + intercept``.
    """

    file: Path
    frame: int
    shape: tuple[int, int]
    position: tuple[float, float, float]
    orientation: tuple[float, float, float, float, float, float]
    spacing: tuple[float, float]
    thickness: float | None
    slope: float
    intercept: float
    space: str | None

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.file.name if self.frame == 0 else f"{self.file.name}, frame {self.frame + 1}"


def grid_from_slices(slices: Sequence[Slice]) -> tuple[tuple[Slice, ...], ItkGeometry]:
    """The slices ordered along their normal, and where the image (Z, Y, X) that they make lies.

    The order is that of ITK's series reader: the third axis runs along rows x columns, so that the three axes are
    right-handed.

    Raises:
        InputError: the slices differ in shape, orientation, spacing or frame of reference; two are in one place, one
            is missing, they are not equally spaced, or they are sheared (gantry tilt).
    """
    first = slices[0]
    axes = _axes(first)
    for other in slices[1:]:
        _require_alike(first, other)
    positions = np.array([one.position for one in slices])
    order = np.argsort(positions @ axes[2], kind="stable")
    ordered = tuple(slices[index] for index in order)
    distance = _spacing(ordered, positions[order], axes)
    columns, rows = first.spacing[1], first.spacing[0]
    place = ItkGeometry(spacing=(columns, rows, distance), origin=ordered[0].position,
                        direction=tuple(float(value) for value in axes.T.ravel()))  # fmt: skip
    return ordered, place


def _axes(one: Slice) -> NDArray[np.float64]:
    """The unit vectors of x, y, z of the array as rows; the third is the normal of the slice."""
    row, column = np.array(one.orientation[:3]), np.array(one.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    wrong = max(abs(float(value)) for value in (lengths[0] - 1, lengths[1] - 1, row @ column))
    if not wrong <= RIGHT_ANGLE:  # NaN is wrong too
        raise InputError("The rows and columns of a slice are not at right angles.", got=one.orientation,
                         expected="two perpendicular unit vectors in ImageOrientationPatient", where=one.file,
                         hint="Export the series again.")  # fmt: skip
    row = row / lengths[0]
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    return np.stack([row, np.cross(normal, row), normal])


def _require_alike(first: Slice, other: Slice) -> None:
    for what, expected, got, alike in (
        ("shape (rows, columns)", first.shape, other.shape, first.shape == other.shape),
        ("orientation", first.orientation, other.orientation,
         np.allclose(first.orientation, other.orientation, rtol=0, atol=ANGLE)),
        ("pixel spacing", first.spacing, other.spacing, np.allclose(first.spacing, other.spacing, rtol=1e-4)),
        ("frame of reference", first.space, other.space, first.space == other.space),
    ):  # fmt: skip
        if not alike:
            raise InputError(f"The slices of the series differ in {what}.", expected=f"{expected} as {first.name}",
                             got=f"{got} in {other.name}", where=other.file,
                             hint="Move localizers and other views into folders of their own.")  # fmt: skip


def _spacing(ordered: tuple[Slice, ...], positions: NDArray[np.float64], axes: NDArray[np.float64]) -> float:
    """The distance of neighbouring slices in mm, once it is sure that there is one."""
    if len(ordered) == 1:
        return _thickness(ordered[0])
    along = (positions - positions[0]) @ axes[2]
    gaps = np.diff(along)
    distance = float(along[-1]) / (len(ordered) - 1)
    limit = min(ROUNDING, SHARE * min(distance, *ordered[0].spacing))
    if gaps.min() <= limit / 10:
        index = int(gaps.argmin())
        raise InputError("Two slices of the series are in the same place.", where=ordered[index].file,
                         expected="one slice per position",
                         got=f"{ordered[index].name} and {ordered[index + 1].name}",
                         hint="Keep one acquisition, echo or time point per folder.")  # fmt: skip
    if np.abs(along - distance * np.arange(len(ordered))).max() > limit:
        index = int(gaps.argmax())
        raise InputError(
            "The slices of the series are not equally spaced, or one is missing.",
            expected=f"{float(np.median(gaps)):g} mm from slice to slice, within {limit:g} mm of a regular grid",
            got=f"{gaps[index]:g} mm from {ordered[index].name} to {ordered[index + 1].name}",
            where=ordered[index].file, hint="Export the series again, or resample it to a regular grid.",
        )  # fmt: skip
    sideways = np.linalg.norm((positions - positions[0]) @ axes[:2].T, axis=1)
    if sideways.max() > limit:
        raise InputError(
            "The slices of the series are sheared: they do not lie behind each other (gantry tilt).",
            expected=f"positions along the normal of the slices, within {limit:g} mm",
            got=f"{sideways.max():g} mm beside it in {ordered[int(sideways.argmax())].name}", where=ordered[0].file,
            hint="Convert the series with a tool that corrects the tilt, such as dcm2niix, and predict the result.",
        )  # fmt: skip
    return distance


def _thickness(one: Slice) -> float:
    if one.thickness is None:
        raise InputError("A single slice does not say how thick it is.", where=one.file,
                         expected="SpacingBetweenSlices or SliceThickness",
                         hint="Is the rest of the series in another folder?")  # fmt: skip
    if not 0 < one.thickness < np.inf:
        raise InputError("A single slice has no usable thickness.", where=one.file, got=f"{one.thickness:g} mm",
                         expected="a positive SpacingBetweenSlices or SliceThickness",
                         hint="Export the series again.")  # fmt: skip
    return one.thickness
