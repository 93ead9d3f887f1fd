"""Patches: where they lie and how they are read, padded as in nnU-Net's training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trtbuild_calibration.errors import CalibrationError
from trtbuild_calibration.sources import Box, Source

OUTSIDE = -1
"""The label of voxels outside the image; the image itself is 0 there."""

Corner = tuple[int, int, int]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a patch lies.

    Attributes:
        case: name of its source.
        corner: first voxel (z, y, x), which may lie outside the image.
        forced: the class that the patch was centred on, or None.
    """

    case: str
    corner: Corner
    forced: int | None


@dataclass(frozen=True, kw_only=True)
class Patch:
    """What lies at a place.

    Attributes:
        data: float32 (C, *patch), 0 outside the image.
        labels: int16 patch-shaped, -1 outside the image; None without a segmentation.
        inside: the part of the patch that lies in the image, a slice per axis of the patch. The rest is padding, of
            which nnU-Net predicts nothing.
    """

    data: NDArray[np.float32] = field(repr=False)
    labels: NDArray[np.int16] | None = field(repr=False)
    inside: tuple[slice, ...]


@dataclass(frozen=True, kw_only=True)
class PatchSequence:
    """The patches of a sample, read when they are asked for; one at a time lies in memory."""

    sources: Mapping[str, Source]
    places: tuple[Place, ...]
    patch: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> NDArray[np.float32]:
        return self.labelled(index).data

    def labelled(self, index: int) -> Patch:
        """Image and labels of one patch."""
        place = self.places[index]
        return read_patch(self.sources[place.case], place, self.patch)


def read_patch(source: Source, place: Place, patch: Sequence[int]) -> Patch:
    """What lies at `place`; without the axis Z for a 2-D patch.

    Raises:
        CalibrationError: the image is not finite there, or its file is damaged.
    """
    shape = spatial(patch)
    box, padding = _clip(source, place, shape)
    data = np.pad(source.read(box), ((0, 0), *padding))
    if not np.isfinite(data).all():
        raise CalibrationError(
            "A patch holds NaN or infinity.",
            expected="finite values",
            got=f"{int((~np.isfinite(data)).sum())} of {data.size} values",
            where=f"case {source.name}, patch at {place.corner}",
            hint="preprocess the case again, or leave it out",
        )
    labels = read_labels_at(source, place, shape)
    inside = tuple(slice(before, length - after) for (before, after), length in zip(padding, shape, strict=True))
    if len(patch) == 2:
        return Patch(data=data[:, 0], labels=None if labels is None else labels[0], inside=inside[1:])
    return Patch(data=data, labels=labels, inside=inside)


def read_labels_at(source: Source, place: Place, shape: Corner) -> NDArray[np.int16] | None:
    """The labels of a patch (Z, Y, X), -1 outside the image; None without a segmentation."""
    box, padding = _clip(source, place, shape)
    labels = source.read_labels(box)
    return None if labels is None else np.pad(labels, padding, constant_values=OUTSIDE)


def spatial(patch: Sequence[int]) -> Corner:
    """(Z, Y, X) of a patch; one slice of Z for a 2-D network, as nnU-Net's loader does it.

    Raises:
        CalibrationError: not two or three lengths of at least 1.
    """
    if len(patch) not in (2, 3) or any(length < 1 for length in patch):
        raise CalibrationError(
            "A patch size is wrong.", expected="two or three lengths of at least 1", got=tuple(patch)
        )
    z, y, x = (1, *patch) if len(patch) == 2 else patch
    return int(z), int(y), int(x)


def _clip(source: Source, place: Place, shape: Corner) -> tuple[Box, tuple[tuple[int, int], ...]]:
    """The part of a patch that lies inside the image, and what is missing before and after it on each axis."""
    box, padding = [], []
    for start, length, size in zip(place.corner, shape, source.shape[1:], strict=True):
        first, last = max(0, start), min(size, start + length)
        if first >= last:
            raise CalibrationError(
                "A patch lies outside its image.",
                expected=f"an overlap with {source.shape[1:]}",
                got=f"{shape} at {place.corner}",
                where=f"case {source.name}",
            )
        box.append((first, last))
        padding.append((first - start, start + length - last))
    return tuple(box), tuple(padding)
