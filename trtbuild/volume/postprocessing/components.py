"""Connected components of a segmentation, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

SLAB = 1 << 20  # voxels that are looked at together: temporaries of a few MB


def keep_largest_component(segmentation: NDArray[Any], labels: Sequence[int], background: int) -> None:
    """Makes `background` of every component of the labels' union that is smaller than the largest one, in place.

    Voxels that share a corner are neighbours; components of the largest size all stay. As nnU-Net's
    `remove_all_but_largest_component_from_segmentation`, except that only the bounding box is worked on.
    """
    from scipy import ndimage

    mask = np.empty(segmentation.shape, bool)
    for slab in _slabs(segmentation.shape):
        mask[slab] = _members(segmentation[slab], labels)
    box = _bounding_box(mask)
    if box is None:
        return
    numbers, count = ndimage.label(mask[box], np.ones((3,) * mask.ndim, bool))
    del mask
    if count == 1:
        return
    sizes = np.zeros(count + 1, np.int64)
    for slab in _slabs(numbers.shape):
        sizes += np.bincount(numbers[slab].ravel(), minlength=count + 1)
    small = sizes < sizes[1:].max()
    small[0] = False  # number 0 is what does not belong to the labels
    inside = segmentation[box]
    for slab in _slabs(numbers.shape):
        inside[slab][small[numbers[slab]]] = background


def components_bytes(shape: Sequence[int]) -> int:
    """Upper bound of the memory that `keep_largest_component` takes beside the segmentation, in bytes.

    Per voxel: one byte of mask and four (eight beyond 2**31 voxels) of component numbers; and a slab's temporaries.
    Of these only what lies in the bounding box of the labels is really taken, apart from the mask. Noise of isolated
    voxels, up to one component per eight voxels, takes two bytes per voxel more.
    """
    voxels = math.prod(shape)
    numbers = 4 if voxels < 2**31 - 1 else 8  # scipy.ndimage.label's own rule
    slab = max(SLAB, math.prod(shape[1:]))
    return voxels * (1 + numbers) + slab * 16 + (4 << 20)


def _slabs(shape: tuple[int, ...]) -> list[slice]:
    """Slices of the first axis, of about `SLAB` voxels."""
    height = max(1, SLAB // max(1, math.prod(shape[1:])))
    return [slice(start, start + height) for start in range(0, shape[0], height)]


def _members(segmentation: NDArray[Any], labels: Sequence[int]) -> NDArray[np.bool_]:
    """Where the segmentation holds one of the labels."""
    if segmentation.dtype.itemsize > 2 or segmentation.dtype.kind != "u":
        return np.isin(segmentation, labels)
    table = np.zeros(np.iinfo(segmentation.dtype).max + 1, bool)
    table[[label for label in labels if label < table.size]] = True
    members: NDArray[np.bool_] = table[segmentation]
    return members


def _bounding_box(mask: NDArray[np.bool_]) -> tuple[slice, ...] | None:
    """The smallest box with everything that is True, None where nothing is."""
    box = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if hit.size == 0:
            return None
        box.append(slice(int(hit[0]), int(hit[-1]) + 1))
    return tuple(box)
