"""The plan of the way back: which slices of logits make which slices of the segmentation, and in how many bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import ModelError
from trtbuild.spec import Labels, ModelSpec, Resampling
from trtbuild.volume.back.taps import LANES, Taps, taps_of_axes
from trtbuild.volume.preparation.preprocess import CaseGrid
from trtbuild.volume.resampling.axis import slab_bytes
from trtbuild.volume.resampling.image import coarse_axis

SLAB = 8  # output slices per task: enough work to hide a thread's hand-over, few enough to share evenly
Segmentation = NDArray[np.uint8] | NDArray[np.uint16]
Logits = NDArray[np.float32] | NDArray[np.float16]


@dataclass(frozen=True, kw_only=True, eq=False)
class WayBack:
    """The plan of one case's way back; everything in the network's axis order.

    `taps` of the three axes, None where the resampling is not linear (`how` then says what it is); `labels` the
    decision rule.
    """

    grid: CaseGrid
    labels: Labels
    how: Resampling
    taps: tuple[Taps, Taps, Taps] | None

    @property
    def streams(self) -> bool:
        """Whether output slices can be written before all slices of the logits are there."""
        return self.taps is not None


def way_back(grid: CaseGrid, spec: ModelSpec) -> WayBack:
    """The plan for one case.

    Raises:
        ModelError: the model does not resample, but its grid is not the image's; a label above 65535.
    """
    if max(spec.labels.values) > np.iinfo(np.uint16).max:
        raise ModelError("A label does not fit into a file.", expected="at most 65535", got=max(spec.labels.values))
    how = spec.resample_probabilities
    return WayBack(
        grid=grid,
        labels=spec.labels,
        how=how,
        taps=taps_of_axes(grid.resampled, grid.cropped, grid.target, grid.spacing, how),
    )


def ready_slices(way: WayBack, finished: int) -> int:
    """How many leading output slices (of the crop) depend on no network slice from `finished` on."""
    if way.taps is None:
        return way.grid.cropped[0] if finished >= way.grid.resampled[0] else 0
    return int(np.searchsorted(way.taps[0].high, finished, side="left"))


def first_needed(way: WayBack, next_output: int) -> int:
    """The first network slice that output slices from `next_output` on need; the number of slices if none is."""
    if next_output >= way.grid.cropped[0]:
        return way.grid.resampled[0]
    return 0 if way.taps is None else int(way.taps[0].low[next_output])


def label_type(labels: Labels) -> type[np.uint8] | type[np.uint16]:
    """uint8 where every value of the model fits, else uint16."""
    return np.uint8 if max(labels.values) < 256 else np.uint16


def empty_segmentation(grid: CaseGrid, spec: ModelSpec) -> Segmentation:
    """Background (Z, Y, X) of the uncropped image, in the network's axis order.

    It lies in memory in the image's own order, so that ``np.ascontiguousarray(it.transpose(transpose_backward))``
    copies nothing. Of `label_type`.
    """
    image = np.zeros(tuple(grid.shape[axis] for axis in spec.transpose_backward), dtype=label_type(spec.labels))
    return cast(Segmentation, image.transpose(np.argsort(spec.transpose_backward)))


def way_back_bytes(grid: CaseGrid, spec: ModelSpec, threads: int) -> int:
    """Bytes that the way back of one case needs besides the logits: the segmentation and the loops' scratch.

    Where the resampling is not linear along every axis: a few times one class at full resolution.
    """
    way, size = way_back(grid, spec), np.dtype(label_type(spec.labels)).itemsize
    labels = math.prod(grid.shape) * size
    if way.taps is None:
        return labels + _class_bytes(grid, way.how)
    _, height, width = grid.cropped
    slab = SLAB * height * (width + LANES) * size
    bounds = 8 * spec.labels.heads * (width // LANES + 1)
    boxes = 4 * LANES * (SLAB * (grid.resampled[0] + SLAB) + grid.resampled[1]) + 8 * (grid.resampled[2] + LANES)
    return labels + max(1, threads) * (slab + bounds + boxes)


def _class_bytes(grid: CaseGrid, how: Resampling) -> int:
    """The best values, a class and where it wins; the class as float32 before and between its resamplings."""
    voxels, source = math.prod(grid.cropped), math.prod(grid.resampled)
    axis = coarse_axis(grid.target, grid.spacing, how)
    between = 0 if axis is None else voxels // grid.cropped[axis] * grid.resampled[axis]
    return 9 * voxels + 4 * (source + between) + slab_bytes(grid.resampled, grid.cropped)
