"""Probabilities on the image's grid, block by block, so that no full-resolution stack need exist."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from trtbuild.spec import ModelSpec
from trtbuild.volume.back.slabs import in_slabs, limits_of_logits, source_from_logits, taps_between
from trtbuild.volume.back.taps import Taps, columns_from_taps
from trtbuild.volume.back.way import SLAB, Logits, WayBack, way_back
from trtbuild.volume.preparation.preprocess import CaseGrid
from trtbuild.volume.resampling.block import resampled_block

SLAB_BYTES = 2**26  # of one slab of probabilities; a slice of 60 classes at 512 x 512 voxels is as much
Block = tuple[slice, slice, slice]


def probability_block(logits: Logits, way: WayBack, block: Block, threads: int = 1) -> NDArray[np.float32]:
    """Softmax (for regions sigmoid) of the resampled logits in `block` of the crop, network's axis order.

    Args:
        logits: all of them, (heads, *grid.resampled), finite, Y and X contiguous.
        way: the plan.
        block: what to compute; slices with steps of 1.
        threads: slabs worked on at once.

    Returns:
        (heads, *block) float32.
    """
    z, y, x = (range(n)[part] for part, n in zip(block, way.grid.cropped, strict=True))
    if not (z and y and x):
        return np.empty((len(logits), len(z), len(y), len(x)), dtype=np.float32)
    if way.taps is None:
        values = _resampled_block(logits, way, (z, y, x))
    else:
        values = _interpolated_block(logits, way.taps, (z, y, x), threads)
    _decide(values, way.labels.decision == "argmax")
    return values


def probabilities_from_logits(logits: Logits, grid: CaseGrid, spec: ModelSpec, *, threads: int) -> NDArray[np.float32]:
    """Softmax (or sigmoid, for regions) after resampling, (heads, Z, Y, X) in the image's own axis order.

    Outside the crop the background's probability is 1 (for regions all are 0). This is the full-resolution stack, 4
    bytes per class and voxel, which `segmentation_from_logits` avoids.
    """
    way = way_back(grid, spec)
    full = np.zeros((len(logits), *(grid.shape[axis] for axis in spec.transpose_backward)), dtype=np.float32)
    if spec.labels.decision == "argmax":
        full[0] = 1.0
    inside = full.transpose(0, *(1 + axis for axis in spec.transpose_forward))[(slice(None), *grid.box)]

    def slab(first: int, last: int) -> None:
        inside[:, first:last] = probability_block(logits, way, (slice(first, last), slice(None), slice(None)))

    in_slabs(slab, 0, grid.cropped[0], threads, _depth(way))
    return full


def probabilities_bytes(grid: CaseGrid, spec: ModelSpec, threads: int) -> int:
    """Bytes that `probabilities_from_logits` needs besides the logits: the stack, and per thread a slab of it with a
    few classes more."""
    way, heads = way_back(grid, spec), spec.labels.heads
    slab = 4 * math.prod(grid.cropped[1:]) * min(_depth(way), grid.cropped[0])
    return 4 * heads * math.prod(grid.shape) + max(1, threads) * (heads + 4) * slab


def _depth(way: WayBack) -> int:
    """Slices per slab. For splines the more the better, because every slab reads some 30 slices besides its own."""
    plane = 4 * way.labels.heads * math.prod(way.grid.cropped[1:])
    return max(1, min(SLAB if way.streams else 8 * SLAB, SLAB_BYTES // plane))


def _interpolated_block(
    logits: Logits, taps: tuple[Taps, Taps, Taps], block: tuple[range, range, range], threads: int
) -> NDArray[np.float32]:
    from trtbuild.volume.back.interpolate import value_slab

    z, y, x = (taps_between(t, part.start, part.stop, 0) for t, part in zip(taps, block, strict=True))
    source, limits, columns = source_from_logits(logits), limits_of_logits(logits), columns_from_taps(x)
    values = np.empty((len(logits), *map(len, block)), dtype=np.float32)

    def slab(first: int, last: int) -> None:
        part = np.empty((last - first, len(block[1]), len(columns.low)), dtype=np.float32)
        for c, into in enumerate(values):
            at = c * source.steps[0]
            value_slab(source, at, taps_between(z, first, last, 0), y, columns, limits, part.reshape(-1))
            into[first:last] = part[:, :, : len(block[2])]

    in_slabs(slab, 0, len(block[0]), threads)
    return values


def _resampled_block(logits: Logits, way: WayBack, block: tuple[range, range, range]) -> NDArray[np.float32]:
    grid = way.grid
    values = np.empty((len(logits), *map(len, block)), dtype=np.float32)
    for channel, into in zip(logits, values, strict=True):
        into[...] = resampled_block(channel, grid.cropped, grid.target, grid.spacing, way.how, block)
    return values


def _decide(values: NDArray[np.float32], softmax: bool) -> None:
    """Logits to probabilities in place."""
    if softmax:
        values -= values.max(axis=0, keepdims=True)
        np.exp(values, out=values)
        values /= values.sum(axis=0, keepdims=True)
    else:
        with np.errstate(over="ignore"):  # exp(-x) may overflow to infinity, whose reciprocal is the right 0
            np.negative(values, out=values)
            np.exp(values, out=values)
            values += 1
            np.reciprocal(values, out=values)
