"""Axes swapped and mirrored: from the array that a network sees back to the axes of its file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trtbuild.volume.image import Header

Array = TypeVar("Array", bound=NDArray[Any])


def turned_back(array: Array, turned: NDArray[np.floating[Any]], original: NDArray[np.floating[Any]]) -> Array:
    """A view of `array` (Z, Y, X) with its axes as the file has them.

    Args:
        array: what lies in space as `turned` says.
        turned: 3x3, the columns being the steps or directions of the axes x, y, z of `array`.
        original: the same for the file. It differs only in the order and signs of its columns.

    This does not ask a library for the way back: for a direction at 45 degrees, where two orders are equally near,
    the library may take the other one.
    """
    # steps[j, k] is 1 or -1 where axis j of the file is axis k of the array, else 0
    steps = np.rint(np.linalg.solve(original, turned)).astype(int)
    if not (np.abs(steps).sum(axis=0) == 1).all() or not (np.abs(steps).sum(axis=1) == 1).all():
        raise ValueError(f"{turned.tolist()} is no other order of {original.tolist()}")
    axis_in_array = [int(k) for k in np.abs(steps).argmax(axis=1)]
    order = [2 - axis_in_array[2 - axis] for axis in range(3)]
    mirrored = tuple(axis for axis in range(3) if steps[2 - axis].sum() < 0)
    view: Array = np.flip(array.transpose(order), mirrored)
    return view


def turned_header(header: Header, order: Sequence[int]) -> Header:
    """The header of the array whose axes run along x, y, z of space; axis j of the file runs along ``order[j]``."""
    z, y, x = (2 - order.index(axis) for axis in (2, 1, 0))
    shape, spacing = header.shape, header.spacing
    return replace(header, shape=(shape[z], shape[y], shape[x]), spacing=(spacing[z], spacing[y], spacing[x]))
