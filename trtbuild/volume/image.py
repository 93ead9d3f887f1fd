"""One case as read from its files, and what a writer needs to put a segmentation back into the same place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Segmentation = NDArray[np.integer[Any]]
"""(Z, Y, X), label values."""
Map = NDArray[np.float32]
"""(Z, Y, X), 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ItkGeometry:
    """Where ITK says the image lies: millimetres in x, y, z(, t) order; `direction` row by row; 2 to 4 dimensions."""

    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]

    @property
    def dimension(self) -> int:
        """2 for an image that was given a slice axis, 3, or 4 where one file holds all channels."""
        return len(self.spacing)


@dataclass(frozen=True, kw_only=True)
class ReorientedGeometry:
    """`original` is where ITK says the file lies, `turned` where the array does (always in 3-D).

    `orientation` names the axes of the file as ITK's DICOMOrient does, such as LPS for the identity.
    """

    original: ItkGeometry
    turned: ItkGeometry
    orientation: str


@dataclass(frozen=True, kw_only=True)
class NibabelGeometry:
    """Row by row, the 4x4 affine of the file, and that of the array as read (another one only after reorienting)."""

    original_affine: tuple[tuple[float, ...], ...]
    affine: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class PixelGeometry:
    """A picture without any place in space."""


@dataclass(frozen=True, kw_only=True)
class TiffGeometry:
    """A stack of slices that knows its spacing (z, y, x) in mm, as the numbers of its .json file, and nothing else."""

    spacing: tuple[float, float, float]


Geometry = ItkGeometry | ReorientedGeometry | NibabelGeometry | PixelGeometry | TiffGeometry


@dataclass(frozen=True, kw_only=True, eq=False)
class Image:
    """One case as read.

    `data` is (C, Z, Y, X) float32 and finite, a 2-D image has Z = 1; `spacing` is (z, y, x) in mm, in array axis
    order; `geometry` is what the writer of the same reader needs; `warnings` are sentences for the user.
    """

    data: NDArray[np.float32]
    spacing: tuple[float, float, float]
    geometry: Geometry
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class LabelImage:
    """A segmentation as read: a previous stage's prediction, or a reference.

    `labels` is (Z, Y, X) in the axes of `Image.data`: uint8 or uint16 where its values fit, else int32. `spacing` is
    (z, y, x) in mm, `geometry` what the writer of the same reader needs, `warnings` are sentences for the user.
    """

    labels: Segmentation
    spacing: tuple[float, float, float]
    geometry: Geometry
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the files of a case promise before a voxel is read.

    `shape` (Z, Y, X), `spacing` (z, y, x) in mm and `channels` are those of the `Image` to come. `voxel_bytes` is the
    memory that a voxel of one channel takes in its library while a file is read, besides the float32 of the `Image`.
    """

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    channels: int
    voxel_bytes: int
