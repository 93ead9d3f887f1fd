"""Cropping to the nonzero region, and the mask that masked normalisation uses."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Box = tuple[slice, slice, slice]


def nonzero_box(data: NDArray[np.float32]) -> Box:
    """The bounding box of the voxels where any channel of `data` (C, Z, Y, X) is nonzero; all of it if none is.

    nnU-Net fills the holes of that mask first (`crop_to_nonzero`), which cannot change its bounding box.
    """
    nonzero = data[0] != 0
    for channel in data[1:]:
        nonzero |= channel != 0
    if not nonzero.any():
        return (slice(0, nonzero.shape[0]), slice(0, nonzero.shape[1]), slice(0, nonzero.shape[2]))
    bounds = []
    for axis in range(3):
        hit = np.flatnonzero(nonzero.any(axis=tuple(a for a in range(3) if a != axis)))
        bounds.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return (bounds[0], bounds[1], bounds[2])


def filled_nonzero_mask(data: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The mask (Z, Y, X) where any channel of the cropped `data` (C, Z, Y, X) is nonzero, holes filled.

    A hole is a 6-connected part of the background that touches no face of the volume, which is what
    `scipy.ndimage.binary_fill_holes` fills; labelling the background finds it in one pass. Filling after the crop is
    the same as before it: background on a face of the box is connected to the outside of the box.
    """
    from scipy import ndimage

    empty: NDArray[np.bool_] = data[0] == 0
    for channel in data[1:]:
        empty &= channel == 0
    parts, count = ndimage.label(empty)
    filled = np.ones(count + 1, dtype=bool)
    for axis in range(3):
        for face in (0, -1):
            filled[np.unique(parts.take(face, axis=axis))] = False
    filled[0] = True  # label 0 is the mask itself
    mask = empty  # its memory is free again
    for plane, labels in zip(mask, parts, strict=True):  # slice by slice: indexing makes an int64 of every voxel
        plane[...] = filled[labels]
    return mask
