"""The compiled way back: logits on the network's grid to labels on the image's grid, one slab of slices at a time.

nnU-Net resizes every class to the full image and takes the argmax of the stack. Here a slab is cut into boxes of 8 x 8
x 16 output voxels. The smallest and largest logit of every class among the voxels that a box depends on bound its
interpolated values, so a class whose largest lies below another one's smallest wins nowhere in the box and is left
out, exactly. Where one class is left (most of an image) the box takes its label without any interpolation; else the
classes that are left are interpolated, along x, y, z, and folded into (best value, best label). No full-resolution
logits exist and memory does not grow with the number of classes.

Measured on two cores, 100 x 133 x 133 logits to 150 x 256 x 256 voxels (benchmarks/results/way_back.md): 6 to 12 ms
with 3 classes, 80 to 150 ms with 60, where reading the logits once takes 14 ms; 120 to 500 times faster than nnU-Net
with the same labels. Compiled with Numba (imported with this module, so import this module late).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trtbuild.compiled import compiled
from trtbuild.half import float_from_half
from trtbuild.volume.back.taps import LANES
from trtbuild.volume.back.vectors import extremes16, fill16, keep16, lerp16, spread16

F32 = np.float32
HEIGHT = 8
"""Rows of a box. Measured with 60 classes, CPU time beside 8 rows: 4 rows take 1.8 times as long on ellipsoids and 0.93
times on random fields (more overlap, fewer classes left), 16 rows 0.83 and 1.06 times."""
U16, I16 = np.uint16, np.int16


class Source(NamedTuple):
    """Logits of any strides: voxel (c, z, y, x) is ``voxels[c * steps[0] + z * steps[1] + y * steps[2] + x]``.

    `voxels` are float32, or for `half` the bits of float16 as uint16; there are `width` along x.
    """

    voxels: NDArray[Any]
    half: bool
    steps: tuple[int, int, int]
    width: int


class Scratch(NamedTuple):
    """One class of one row of boxes: extremes (>= width,), rows (n, 16) and planes (z, HEIGHT, 16), flat."""

    lowest: NDArray[Any]
    highest: NDArray[Any]
    rows: NDArray[np.float32]
    planes: NDArray[np.float32]


@compiled
def _wide(value, half):  # type: ignore[no-untyped-def]  # compiled
    """The float32 of a logit, which for `half` is the bits of a half."""
    return float_from_half(U16(value)) if half else F32(value)


@compiled
def _wide_key(key, half):  # type: ignore[no-untyped-def]  # compiled
    """The float32 of an extreme, which for `half` is a key of `extremes16`."""
    return float_from_half(U16(I16(key) ^ (I16(I16(key) >> 15) & I16(0x7FFF)))) if half else F32(key)


@compiled
def _column_extremes(source, at, box, scratch):  # type: ignore[no-untyped-def]  # compiled
    """lowest, highest (width,) = extremes over slices [z0, z1) and rows [y0, y1) of the class that begins at `at`."""
    z0, z1, y0, y1 = box
    voxels, half, (_, z_step, y_step), width = source
    lowest, highest = scratch.lowest, scratch.highest
    for z in range(z0, z1):
        for y in range(y0, y1, 2):
            start = at + z * z_step + y * y_step
            other = start + y_step if y + 1 < y1 else start
            x = 0
            while x + LANES <= width:
                extremes16(lowest, highest, x, voxels, start + x, other + x)
                x += LANES
            if 0 < x < width:  # the rest, with some again
                x = width - LANES
                extremes16(lowest, highest, x, voxels, start + x, other + x)
            elif x < width:
                for x in range(width):
                    for value in (voxels[start + x], voxels[other + x]):
                        key = I16(value) ^ (I16(I16(value) >> 15) & I16(0x7FFF)) if half else value
                        lowest[x] = min(lowest[x], key)
                        highest[x] = max(highest[x], key)


@compiled
def _row_bounds(source, box, columns, limits, scratch, lows, highs):  # type: ignore[no-untyped-def]  # compiled
    """lows, highs (boxes, heads): extremes of what each box of one row of boxes depends on."""
    lowest, highest, starts, stops = scratch.lowest, scratch.highest, columns.starts, columns.stops
    for c in range(lows.shape[1]):
        lowest[:] = limits[0]
        highest[:] = limits[1]
        _column_extremes(source, c * source.steps[0], box, scratch)
        for b in range(len(starts)):
            low, high = lowest[starts[b]], highest[starts[b]]
            for x in range(starts[b] + 1, stops[b]):
                low = lowest[x] if lowest[x] < low else low
                high = highest[x] if highest[x] > high else high
            lows[b, c], highs[b, c] = _wide_key(low, source.half), _wide_key(high, source.half)


@compiled
def _classes_left(low, high, regions, values, left):  # type: ignore[no-untyped-def]  # compiled
    """Puts the heads to interpolate into `left`; gives their number and the label where none of them wins."""
    count, label = 0, values[0]
    if regions:  # a head above 0 everywhere hides the ones before it, one at most 0 everywhere writes nothing
        label = values[0] - values[0]
        for c in range(len(low)):
            if low[c] > F32(0):
                count, label = 0, values[c]
            elif high[c] > F32(0):
                left[count] = c
                count += 1
        return count, label
    left[0], floor = 0, low[0]  # left[0] stays where NaN compares with nothing
    for c in range(1, len(low)):
        floor = low[c] if low[c] > floor else floor
    for c in range(len(low)):
        if high[c] >= floor:
            left[count] = c
            count += 1
    label = values[left[0]]
    return (0 if count == 1 else count), label


@compiled
def _box_planes(source, at, box, y_taps, first, last, columns, b, scratch):  # type: ignore[no-untyped-def]  # compiled
    """planes = one class at slices [z0, z1), interpolated along x and y to output rows [first, last) of box `b`."""
    z0, z1, y0, y1 = box
    # fields are taken out of their tuples here: inside the loops each would count a reference
    voxels, half, (_, z_step, y_step), _ = source
    starts, stops, x_low, x_high, x_weight = columns
    y_low, y_high, y_weight = y_taps
    rows, planes = scratch.rows, scratch.planes
    begin, start_x, narrow = b * LANES, starts[b], stops[b] - starts[b] <= LANES
    for z in range(z0, z1):
        for y in range(y0, y1):
            start, into = at + z * z_step + y * y_step + start_x, (y - y0) * LANES
            if not narrow or start + LANES > len(voxels):
                for x in range(LANES):
                    a = _wide(voxels[start + x_low[begin + x]], half)
                    c = _wide(voxels[start + x_high[begin + x]], half)
                    rows[into + x] = a + x_weight[begin + x] * (c - a)
            else:
                spread16(rows, into, voxels, start, x_low, x_high, x_weight, begin)
        for y in range(first, last):
            into = ((z - z0) * HEIGHT + y - first) * LANES
            lerp16(planes, into, rows, (y_low[y] - y0) * LANES, (y_high[y] - y0) * LANES, y_weight[y])


@compiled
def _keep(planes, z0, z_taps, rows, best, out, place, label):  # type: ignore[no-untyped-def]  # compiled
    """Interpolates `planes` along z and writes `label` into `out` where that exceeds `best`.

    Row y of slice k of the box is at ``place[0] + k * place[1] + y * place[2]`` of out.
    """
    z_low, z_high, z_weight = z_taps
    for k in range(len(z_low)):
        low, high, weight = (z_low[k] - z0) * HEIGHT * LANES, (z_high[k] - z0) * HEIGHT * LANES, z_weight[k]
        for y in range(rows):
            at, to = (k * HEIGHT + y) * LANES, place[0] + k * place[1] + y * place[2]
            keep16(best, at, out, to, planes, low + y * LANES, high + y * LANES, weight, label)


@compiled
def _scratch(source, z_taps, y_taps, limits):  # type: ignore[no-untyped-def]  # compiled
    most, height = 0, len(y_taps.low)
    for first in range(0, height, HEIGHT):
        most = max(most, y_taps.high[min(first + HEIGHT, height) - 1] + 1 - y_taps.low[first])
    slices = z_taps.high[len(z_taps.high) - 1] + 1 - z_taps.low[0]
    width = max(source.width, LANES)
    return Scratch(
        np.empty(width, limits.dtype),
        np.empty(width, limits.dtype),
        np.empty(most * LANES, F32),
        np.empty(slices * HEIGHT * LANES, F32),
    )


@compiled
def label_slab(source, z_taps, y_taps, columns, values, regions, limits, out):  # type: ignore[no-untyped-def]  # compiled
    """Writes the labels of one slab into `out` (slices * rows * boxes along x * 16,).

    ``out[k, y, x] = values[argmax over c of interpolated logits[c]]``, the first of equals; with `regions` every head
    above 0 (sigmoid above 0.5) writes its value, later heads over earlier ones.

    Args:
        source: the logits (`Source`).
        z_taps: `Taps` of the slab's slices.
        y_taps: `Taps` of all rows.
        columns: `Columns` of x.
        values: label of each head, in out's type.
        regions: the decision rule.
        limits: what lies above and below all logits, float32, or int16 for halves.
        out: uint8 or uint16.
    """
    heads, depth, height, boxes = len(values), len(z_taps.low), len(y_taps.low), len(columns.starts)
    z0, z1 = z_taps.low[0], z_taps.high[depth - 1] + 1
    lows, highs = np.empty((boxes, heads), F32), np.empty((boxes, heads), F32)
    left, best = np.empty(heads, np.int64), np.empty(depth * HEIGHT * LANES, F32)
    scratch = _scratch(source, z_taps, y_taps, limits)
    for first in range(0, height, HEIGHT):
        last = min(first + HEIGHT, height)
        box = (z0, z1, y_taps.low[first], y_taps.high[last - 1] + 1)
        _row_bounds(source, box, columns, limits, scratch, lows, highs)
        for b in range(boxes):
            count, label = _classes_left(lows[b], highs[b], regions, values, left)
            place = ((first * boxes + b) * LANES, height * boxes * LANES, boxes * LANES)
            for k in range(depth):
                for y in range(last - first):
                    fill16(out, place[0] + k * place[1] + y * place[2], label)
            for i in range(count):
                if i == 0 or regions:
                    for row in range(depth * HEIGHT):
                        fill16(best, row * LANES, F32(0) if regions else F32(-np.inf))
                _box_planes(source, left[i] * source.steps[0], box, y_taps, first, last, columns, b, scratch)
                _keep(scratch.planes, z0, z_taps, last - first, best, out, place, values[left[i]])


@compiled
def value_slab(source, at, z_taps, y_taps, columns, limits, out):  # type: ignore[no-untyped-def]  # compiled
    """Writes interpolated values of the class that begins at `at` into `out` (slices * rows * boxes * 16,) float32.

    The other arguments are those of `label_slab`.
    """
    depth, height, boxes = len(z_taps.low), len(y_taps.low), len(columns.starts)
    z0, z1 = z_taps.low[0], z_taps.high[depth - 1] + 1
    scratch = _scratch(source, z_taps, y_taps, limits)
    for first in range(0, height, HEIGHT):
        last = min(first + HEIGHT, height)
        box = (z0, z1, y_taps.low[first], y_taps.high[last - 1] + 1)
        for b in range(boxes):
            _box_planes(source, at, box, y_taps, first, last, columns, b, scratch)
            for k in range(depth):
                low, high = (z_taps.low[k] - z0) * HEIGHT, (z_taps.high[k] - z0) * HEIGHT
                for y in range(last - first):
                    to = ((k * height + first + y) * boxes + b) * LANES
                    lerp16(out, to, scratch.planes, (low + y) * LANES, (high + y) * LANES, z_taps.weight[k])
