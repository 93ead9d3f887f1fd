"""Where windows lie: the padding of small images and the positions of the windows along each axis."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from trtbuild.errors import InputError

FEWEST_VOXELS = 0.5
"""Windows closer than this only repeat, by the billion for a tiny step size. A patch axis of 1 has 0.5 by default."""


def axis_steps(size: int, patch: int, step_size: float) -> tuple[int, ...]:
    """Start positions of the windows along one axis, in voxels.

    Args:
        size: length of the (padded) image along the axis, at least `patch`.
        patch: length of the window.
        step_size: largest distance between windows as a share of the patch, in (0, 1], at least half a voxel.

    The order of the floating-point operations is nnU-Net's (`compute_steps_for_sliding_window`): another order gives
    other positions for 0.3 % of the sizes, and so does rounding down. Python's `round` and NumPy's both round halves
    to even.
    """
    if size < patch:
        raise InputError("An image axis is shorter than the patch.", expected=f">= {patch}", got=size)
    if not 0 < step_size <= 1:
        raise InputError("The step size is out of range.", expected="0 < step size <= 1", got=step_size)
    if size > patch and patch * step_size < FEWEST_VOXELS:
        raise InputError(
            "The step size is below half a voxel: windows would only repeat.",
            expected=f"step size * patch >= {FEWEST_VOXELS} voxel on a patch axis of {patch}",
            got=f"{step_size:g} * {patch} = {patch * step_size:g}",
            hint=f"use a step size of at least {math.ceil(1e4 * FEWEST_VOXELS / patch) / 1e4:g}",
        )
    count = math.ceil((size - patch) / (patch * step_size)) + 1
    if count == 1:
        return (0,)
    distance = (size - patch) / (count - 1)
    return tuple(round(distance * i) for i in range(count))


def padded_shape(shape: tuple[int, ...], patch: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[slice, ...]]:
    """The shape after zero padding to at least the patch, and the slices that lead back.

    Missing voxels are split evenly, the odd one goes above (`acvl_utils.pad_nd_image`). A 2-D patch pads the last two
    axes of a 3-D shape.
    """
    wanted = (*shape[: len(shape) - len(patch)], *patch)
    padded = tuple(max(n, w) for n, w in zip(shape, wanted, strict=True))
    below = tuple((p - n) // 2 for p, n in zip(padded, shape, strict=True))
    return padded, tuple(slice(b, b + n) for b, n in zip(below, shape, strict=True))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The windows of one image.

    `shape` is the padded image (Z, Y, X); `inside` leads from it back to the image; `steps` are the start positions
    per patch axis. A 2-D patch is moved over every slice of the first axis.
    """

    shape: tuple[int, ...]
    inside: tuple[slice, ...]
    patch: tuple[int, ...]
    steps: tuple[tuple[int, ...], ...]

    @property
    def slices(self) -> int:
        """Number of slices that a 2-D patch visits; 1 for a 3-D patch."""
        return self.shape[0] if len(self.patch) < len(self.shape) else 1

    def __len__(self) -> int:
        return self.slices * math.prod(len(s) for s in self.steps)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Window starts (z, y, x) in nnU-Net's order; for a 2-D patch z is the slice."""
        if len(self.patch) < len(self.shape):
            yield from itertools.product(range(self.slices), *self.steps)
        else:
            yield from itertools.product(*self.steps)


def grid_from_shape(shape: tuple[int, ...], patch: tuple[int, ...], step_size: float) -> Grid:
    """The grid of windows for an image of `shape` (Z, Y, X)."""
    padded, inside = padded_shape(shape, patch)
    steps = tuple(axis_steps(n, p, step_size) for n, p in zip(padded[-len(patch) :], patch, strict=True))
    return Grid(shape=padded, inside=inside, patch=patch, steps=steps)
