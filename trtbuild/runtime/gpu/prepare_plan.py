"""How a case is prepared on a GPU: which axes are resized, in which order, and what memory that takes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from trtbuild.errors import OutOfMemory
from trtbuild.runtime.gpu.plan import MEGABYTE, in_grains
from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.spec import ModelSpec, Resampling, ZScore
from trtbuild.stitch.launches import Three
from trtbuild.stitch.preparation_launches import FOLD
from trtbuild.volume import CaseGrid
from trtbuild.volume.preparation import uncropped_grid
from trtbuild.volume.preparation.normalize import needs_mask
from trtbuild.volume.resampling import coarse_axis, resample_into
from trtbuild.volume.resampling.axis import axes_by_gain

FLOAT, DOUBLE, WORD = 4, 8, 4
Kind = int | Literal["torch", "nearest", "torch nearest"]
"""What an axis is resized with: a spline of this order, torch's interpolation, or the nearest voxel of either."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One axis resized: a volume with `old` voxels along `axis` becomes one of `shape` (Z, Y, X)."""

    axis: int
    old: int
    shape: Three
    kind: Kind


@dataclass(frozen=True, kw_only=True)
class Resizing:
    """A channel's way to the network's grid, one axis after the other.

    The `across` axes come first. Behind them, with `clip`, every slice along the `coarse` axis (all of the volume where
    there is none) is kept within its range before them. `along` is the step of the coarse axis, where that changes.
    """

    across: tuple[Step, ...] = ()
    along: Step | None = None
    coarse: int | None = None
    clip: bool = False

    @property
    def steps(self) -> tuple[Step, ...]:
        """All of them, in order."""
        return self.across if self.along is None else (*self.across, self.along)


def resizing_of_case(grid: CaseGrid, how: Resampling) -> Resizing:
    """What `resample_into` of volume/resampling does to every channel of a case.

    Raises:
        ModelError: as there.
    """
    old, new = grid.cropped, grid.resampled
    into, source = (np.empty((0, *shape), dtype=np.float32) for shape in (new, old))
    resample_into(into, source, grid.spacing, grid.target, how)  # of no channel at all: only its refusals are wanted
    if old == new:
        return Resizing()
    coarse = coarse_axis(grid.spacing, grid.target, how)
    shape, across = list(old), []
    for axis in (a for a in axes_by_gain(old, new) if a != coarse):
        shape[axis] = new[axis]
        kind: Kind = "torch" if how.method == "torch" else how.order
        across.append(Step(axis=axis, old=old[axis], shape=_three(shape), kind=kind))
    along = None
    if coarse is not None and old[coarse] != new[coarse]:
        along = Step(axis=coarse, old=old[coarse], shape=_three(new), kind=_kind_along(how))
    clip = bool(across) and how.method == "spline" and how.order > 0
    return Resizing(across=tuple(across), along=along, coarse=coarse, clip=clip)


def _kind_along(how: Resampling) -> Kind:
    if how.method == "torch":
        return "torch nearest"
    return how.order_z if how.order_z > 0 else "nearest"


def bytes_on_device(shape: Sequence[int], spacing: Sequence[float], spec: ModelSpec) -> int:
    """The most device memory that `prepared_on_device` takes, its result included; a crop takes less.

    Args:
        shape: the image (Z, Y, X) in its own order of axes.
        spacing: mm in the same order.
        spec: the model.

    Raises:
        InputError: the resampled grid is empty or too large.
        ModelError: the plans give no way to resample the images.
    """
    grid = uncropped_grid(shape, spacing, spec)
    sizes = (image_sizes(shape, spec), case_sizes(grid, resizing_of_case(grid, spec.resample_data), spec))
    return in_grains(size for part in sizes for size in part.values())


def image_sizes(shape: Sequence[int], spec: ModelSpec) -> Mapping[str, int]:
    """Bytes of what is taken before the crop is known: the image (Z, Y, X) as read, and words for small results."""
    return {"image": FLOAT * len(spec.channels) * math.prod(shape), "words": words_bytes(shape)}


def words_bytes(shape: Sequence[int]) -> int:
    """Of a bounding box, or the ranges of all slices along any axis."""
    return WORD * 2 * max(3, *shape)


def case_sizes(grid: CaseGrid, resizing: Resizing, spec: ModelSpec) -> Mapping[str, int]:
    """Bytes of what is taken when the crop is known, by what it is for. "prepared" is the result.

    Volumes alternate between "channel", where a normalised channel begins, and "between"; the last step ends in
    "prepared".
    """
    steps, voxels = resizing.steps, math.prod(grid.cropped)
    sizes = {"prepared": FLOAT * len(spec.channels) * math.prod(grid.resampled)}
    if needs_mask(spec.normalization):
        sizes["mask"] = voxels
    if any(isinstance(scheme, ZScore) for scheme in spec.normalization):
        plane = math.prod(grid.cropped[1:])
        sizes |= {"sums": DOUBLE * plane, "folded": DOUBLE * -(-plane // FOLD)}
    if steps:
        back = [math.prod(step.shape) for step in steps[1:-1]]
        sizes |= {"channel": FLOAT * max(voxels, *back, 0), "operators": sum(map(_operator_bytes, steps))}
    if len(steps) > 1:
        sizes["between"] = FLOAT * math.prod(steps[0].shape)
    return sizes


def _operator_bytes(step: Step) -> int:
    """At most: as if no entry of an operator were 0. It need not be made to be counted."""
    return WORD * step.shape[step.axis] * (1 + step.old)


def check_room(
    sizes: Iterable[int],
    gpu: Gpu,
    limit: int | None,
    held: int,
    shape: Sequence[int],
    what: str = "The image cannot be prepared in the GPU's memory.",
) -> None:
    """Raises OutOfMemory where there is no room, before any of it is taken.

    Args:
        sizes: bytes of the allocations.
        gpu: the device.
        limit: bytes that the case may take, where the user named them.
        held: bytes of it that the case has taken.
        shape: of the image, for the message.
        what: is the matter then.
    """
    needed, free = in_grains(sizes), gpu.device.free_memory()
    room = free if limit is None else min(free, limit - held)
    if needed > room:
        raise OutOfMemory(
            what,
            expected=f"{needed / MEGABYTE:.0f} MB free",
            got=f"{max(0, room) / MEGABYTE:.0f} MB",
            where=f"an image of {tuple(shape)} voxels",
            hint="raise the limit where you set one, close other programs that use the GPU, or hand over the image on "
            "the host (predict_array)",
        )


def _three(numbers: Sequence[int]) -> Three:
    z, y, x = numbers
    return z, y, x
