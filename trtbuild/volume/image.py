"""One case as read from its files, and what a writer needs to put a segmentation back into the same place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Segmentation = NDArray[np.integer[Any]]
"""(Z, Y, X), label values."""


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
class NibabelGeometry:
    """Row by row, the 4x4 affine of the file, and that of the array as read (another one only after reorienting)."""

    original_affine: tuple[tuple[float, ...], ...]
    affine: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class PixelGeometry:
    """A picture without any place in space."""


Geometry = ItkGeometry | NibabelGeometry | PixelGeometry


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
