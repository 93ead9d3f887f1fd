"""The way back: logits on the network's grid to labels and probabilities on the image's grid.

Follows `export_prediction.py`: resample, decide, paste into the uncropped shape, transpose back. Where the resampling
is linear along z, an output slice depends on two slices of logits, so labels are written as soon as those are there
and the logits can be forgotten.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from trtbuild.errors import ModelError
from trtbuild.spec import ModelSpec
from trtbuild.volume.back.slabs import in_slabs, limits_of_logits, source_from_logits, taps_between
from trtbuild.volume.back.taps import Taps, columns_from_taps
from trtbuild.volume.back.way import (
    Logits,
    Segmentation,
    WayBack,
    empty_segmentation,
    first_needed,
    ready_slices,
    way_back,
)
from trtbuild.volume.preparation.preprocess import CaseGrid
from trtbuild.volume.resampling.image import resample_into


def label_slices(
    logits: Logits, offset: int, way: WayBack, out: Segmentation, first: int, last: int, threads: int
) -> None:
    """Writes the labels of output slices [first, last) into `out`.

    Args:
        logits: network slices [offset, offset + n) as (heads, n, Y, X), finite, Y and X contiguous; all that the
            output slices need (`first_needed`, `ready_slices`).
        offset: number of the first network slice in `logits`.
        way: the plan.
        out: the crop (Z', Y', X'), any strides.
        first: the first output slice to write.
        last: one past the last.
        threads: slabs worked on at once. The result does not depend on it.

    Raises:
        ModelError: the logits do not fit the labels or the grid, or lack a slice that is needed.
    """
    _check(logits, offset, way, first, last)
    if first >= last:
        return
    if way.taps is None:
        _label_by_class(logits, way, out)
    else:
        _label_linear(logits, offset, way, way.taps, out, (first, last), threads)


def _check(logits: Logits, offset: int, way: WayBack, first: int, last: int) -> None:
    _, height, width = way.grid.resampled
    expected, got = (way.labels.heads, height, width), (len(logits), *logits.shape[2:])
    if expected != got:
        raise ModelError("The logits do not fit the labels and the grid.", expected=expected, got=got)
    end = offset + logits.shape[1]
    if first < last and (offset > first_needed(way, first) or ready_slices(way, end) < last):
        raise ModelError(
            "The logits lack slices that the labels need.",
            expected=f"slices from {first_needed(way, first)} until output slice {last - 1} is ready",
            got=f"slices {offset} to {end - 1}",
        )


def segmentation_from_logits(logits: Logits, grid: CaseGrid, spec: ModelSpec, *, threads: int) -> Segmentation:
    """Labels (Z, Y, X) in the image's own axis order; background outside the crop.

    Args:
        logits: (heads, *grid.resampled), finite.
        grid: the way back of the case.
        spec: the model; `spec.labels` holds the decision rule.
        threads: slabs worked on at once. The result does not depend on it.

    Returns:
        uint8 where every value of the model fits, else uint16.
    """
    whole = empty_segmentation(grid, spec)
    label_slices(logits, 0, way_back(grid, spec), whole[grid.box], 0, grid.cropped[0], threads)
    return cast(Segmentation, np.ascontiguousarray(whole.transpose(spec.transpose_backward)))


def _label_linear(
    logits: Logits,
    offset: int,
    way: WayBack,
    taps: tuple[Taps, Taps, Taps],
    out: Segmentation,
    bounds: tuple[int, int],
    threads: int,
) -> None:
    from trtbuild.volume.back.interpolate import label_slab

    z, y, x = taps
    source, limits, columns = source_from_logits(logits), limits_of_logits(logits), columns_from_taps(x)
    values, regions = np.array(way.labels.values, dtype=out.dtype), way.labels.decision == "regions"
    height, width = out.shape[1:]

    def slab(first: int, last: int) -> None:
        labels = np.empty((last - first, height, len(columns.low)), dtype=out.dtype)
        label_slab(
            source, taps_between(z, first, last, offset), y, columns, values, regions, limits, labels.reshape(-1)
        )
        out[first:last] = labels[:, :, :width]

    in_slabs(slab, *bounds, threads)


def _label_by_class(logits: Logits, way: WayBack, out: Segmentation) -> None:
    """Any other order of resampling: class after class at full resolution, keeping the best value and label."""
    grid, regions = way.grid, way.labels.decision == "regions"
    best = np.full(grid.cropped, 0.0 if regions else -np.inf, dtype=np.float32)
    here = np.empty_like(best)
    for value, channel in zip(way.labels.values, logits, strict=True):
        wide = channel[None].astype(np.float32, copy=False)
        resample_into(here[None], wide, grid.target, grid.spacing, way.how)
        np.copyto(out, np.asarray(value, dtype=out.dtype), where=here > best)
        if not regions:
            np.maximum(best, here, out=best)
