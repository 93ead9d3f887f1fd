"""Do two files lie at the same place? What nnU-Net passes over: equal shapes at different places in space."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError
from trtbuild.volume.image import Geometry, Image, ItkGeometry, LabelImage, NibabelGeometry, ReorientedGeometry

ANGLE = 1e-4
"""Difference of a direction cosine, or of a spacing as a share of it: half a tenth of a voxel after 500 voxels.
NIfTI's float32 and its quaternions lose less than a hundredth of that."""
NEAR = 0.05
"""How far, in voxels, an origin may lie from another; NIfTI's float32 moves it by a thousandth."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What differs (spacing, origin, direction or affine) between a file that is given and one that it belongs to."""

    name: str
    expected: str
    got: str


def differences(reference: Image | LabelImage, other: Image | LabelImage) -> tuple[Difference, ...]:
    """Where `other` lies elsewhere than `reference`, beyond what headers round; both come from the same reader."""
    theirs = dict(_place(other))
    return tuple(
        Difference(name=name, expected=_numbers(value), got=_numbers(theirs.get(name, ())))
        for name, value in _place(reference)
        if not _alike(name, value, theirs.get(name, ()), reference.spacing)
    )


def require_same_grid(image: Image, labels: LabelImage, where: object) -> None:
    """Refuses labels of a previous stage that are not on the grid of the image: they would name the wrong voxels.

    Raises:
        InputError: shape, spacing, origin or direction differ beyond rounding.
    """
    hint = "Predict this very image with the previous stage; do not resample, crop or flip what it writes."
    shape = image.data.shape[1:]
    if labels.labels.shape != shape:
        raise InputError("The previous stage's segmentation does not fit the image.", got=labels.labels.shape,
                         expected=f"{shape} voxels (z, y, x)", where=where, hint=hint)  # fmt: skip
    found = differences(image, labels)
    if found:
        names = " and ".join(one.name for one in found)
        raise InputError(f"The previous stage's segmentation has another {names} than the image.", where=where,
                         expected="; ".join(f"{one.name} {one.expected}" for one in found),
                         got="; ".join(f"{one.name} {one.got}" for one in found), hint=hint)  # fmt: skip


def spatial(place: ItkGeometry) -> ItkGeometry:
    """The place without the channel axis of a 4-D image, which is that of its segmentation."""
    if place.dimension != 4:
        return place
    direction = np.reshape(place.direction, (4, 4))[:3, :3].ravel().tolist()
    return ItkGeometry(spacing=place.spacing[:3], origin=place.origin[:3], direction=tuple(direction))


def _place(image: Image | LabelImage) -> Iterator[tuple[str, tuple[float, ...]]]:
    """Where the array lies, after the reader has turned it."""
    yield "spacing", image.spacing
    geometry: Geometry = image.geometry
    if isinstance(geometry, ReorientedGeometry):
        geometry = geometry.turned
    if isinstance(geometry, ItkGeometry):
        place = spatial(geometry)
        yield "origin", place.origin
        yield "direction", place.direction
    if isinstance(geometry, NibabelGeometry):
        yield "affine", sum(geometry.affine, ())


def _alike(name: str, a: Sequence[float], b: Sequence[float], spacing: Sequence[float]) -> bool:
    if len(a) != len(b):
        return False
    if name == "spacing":
        return all(math.isclose(x, y, rel_tol=ANGLE) for x, y in zip(a, b, strict=True))
    away: NDArray[np.float64] = np.abs(np.subtract(a, b))
    if name == "direction":
        return bool((away <= ANGLE).all())
    near = NEAR * min(spacing)
    if name == "origin":
        return bool((away <= near).all())
    steps = np.linalg.norm(np.reshape(a, (4, 4))[:3, :3], axis=0)
    return bool((away.reshape(4, 4) <= [*(ANGLE * steps), near]).all())


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"
