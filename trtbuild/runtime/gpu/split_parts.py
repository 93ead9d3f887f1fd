"""How one case is divided among GPUs, and how what each has found becomes one.

A part is a contiguous range of rows of windows. Its mean logits are those of its own windows. Where the slices of parts
overlap, the mean over all windows is the mean of the parts' means, each weighted by its share of the windows' weights
there. It is formed in the order of the parts, so that it does not depend on which was first. All other slices are bit
for bit those of the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trtbuild.runtime.tiles import TilePlan, patch3
from trtbuild.spec import ModelSpec
from trtbuild.stitch.gaussian import axis_gaussian
from trtbuild.volume.back import Logits


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """Rows of windows that lie on one GPU: they cover slices [first, last) of the image, in which `tiles` counts.

    `weights` (last - first,) float32 is their share of the weights of all windows, 1 where no other part has any.
    """

    first: int
    last: int
    tiles: TilePlan
    weights: NDArray[np.float32]


def parts_of_case(plan: TilePlan, spec: ModelSpec, count: int) -> tuple[Part, ...]:
    """The rows in contiguous ranges of as many tiles as can be, at most one row apart; no more parts than rows.

    Args:
        plan: all tiles.
        spec: the model.
        count: of GPUs.
    """
    rows, depth = plan.rows, patch3(spec)[0]
    count = min(count, len(rows))
    bounds = [len(rows) * number // count for number in range(count + 1)]  # every row has as many tiles
    starts = [start for start, _ in rows]
    gaussian = axis_gaussian(depth, spec.sigma_scale)
    whole = _total(starts, gaussian, plan.grid.shape[0])
    parts = []
    for low, high in pairwise(bounds):
        own = starts[low:high]
        first, last = own[0], own[-1] + depth
        share = _total(own, gaussian, plan.grid.shape[0])[first:last] / whole[first:last]
        tiles = _rows_of(plan, own, first, last)
        parts.append(Part(first=first, last=last, tiles=tiles, weights=share.astype(np.float32)))
    return tuple(parts)


def merged_logits(parts: Sequence[Part], logits: Sequence[Logits], slices: int) -> Logits:
    """(heads, slices, Y, X): the parts' means by their weights, in the order of the parts, summed in float32."""
    heads, _, *plane = logits[0].shape
    whole = np.empty((heads, slices, *plane), dtype=logits[0].dtype)
    for z in range(slices):
        there = [(part, one) for part, one in zip(parts, logits, strict=True) if part.first <= z < part.last]
        if len(there) == 1:
            part, one = there[0]
            whole[:, z] = one[:, z - part.first]
            continue
        total = np.zeros((heads, *plane), dtype=np.float32)
        for part, one in there:
            total += part.weights[z - part.first] * one[:, z - part.first].astype(np.float32)
        whole[:, z] = total
    return whole


def _rows_of(plan: TilePlan, starts: Sequence[int], first: int, last: int) -> TilePlan:
    """The tiles of some rows, in the slices [first, last) alone. There is no padding along z, or there is one row."""
    grid = plan.grid
    inside = grid.inside[0]
    low, high = max(first, inside.start) - first, min(last, inside.stop) - first
    steps = grid.steps
    if len(grid.patch) == len(grid.shape):
        steps = (tuple(start - first for start in starts), *steps[1:])
    part = replace(
        grid, shape=(last - first, *grid.shape[1:]), inside=(slice(low, high), *grid.inside[1:]), steps=steps
    )
    return replace(plan, grid=part)


def _total(starts: Sequence[int], gaussian: NDArray[np.float64], length: int) -> NDArray[np.float64]:
    """As `normalised_weights` adds them up: of the same windows the same bits."""
    total = np.zeros(length)
    for start in starts:
        total[start : start + len(gaussian)] += gaussian
    return total
