"""Slabs of output slices, worked on by several threads; each is what one call of a compiled loop takes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from trtbuild.errors import ModelError
from trtbuild.volume.back.taps import Taps
from trtbuild.volume.back.way import SLAB, Logits

if TYPE_CHECKING:
    from trtbuild.volume.back.interpolate import Source


def source_from_logits(logits: Logits) -> Source:
    """The logits (heads, n, Y, X) as the compiled loops take them; the voxels of a row must be neighbours in memory.

    Raises:
        ModelError: they are not, or an axis runs backwards, or the type is neither float32 nor float16.
    """
    from trtbuild.volume.back.interpolate import Source

    kinds = {np.dtype(np.float32): np.float32, np.dtype(np.float16): np.uint16}
    if logits.dtype not in kinds:
        raise ModelError("Logits of this type cannot be resampled.", expected="float32 or float16", got=logits.dtype)
    size = logits.itemsize
    backwards = any(n > 1 and (s < 0 or s % size) for n, s in zip(logits.shape, logits.strides, strict=True))
    if backwards or (logits.shape[3] > 1 and logits.strides[3] != size):
        raise ModelError("The logits do not lie in rows.", expected="contiguous x", got=f"strides {logits.strides}")
    count = 1 + sum((n - 1) * s // size for n, s in zip(logits.shape, logits.strides, strict=True))
    voxels = as_strided(logits.view(kinds[logits.dtype]), (count,), (size,), writeable=False)
    c, z, y = (s // size for s in logits.strides[:3])
    return Source(voxels=voxels, half=logits.dtype == np.float16, steps=(c, z, y), width=logits.shape[3])


def limits_of_logits(logits: Logits) -> NDArray[Any]:
    """What lies above and below all of them, as `label_slab` takes it."""
    if logits.dtype == np.float16:
        return np.array([np.iinfo(np.int16).max, np.iinfo(np.int16).min], dtype=np.int16)
    return np.array([np.inf, -np.inf], dtype=np.float32)


def taps_between(taps: Taps, first: int, last: int, offset: int) -> Taps:
    """The taps of new voxels [first, last), counting old ones from `offset`."""
    part = slice(first, last)
    return Taps(low=taps.low[part] - offset, high=taps.high[part] - offset, weight=taps.weight[part])


def in_slabs(task: Callable[[int, int], None], first: int, last: int, threads: int, slab: int = SLAB) -> None:
    """Runs task(a, b) over all slices in [first, last), `threads` slabs at a time; the first error is raised."""
    bounds = [(a, min(a + slab, last)) for a in range(first, last, slab)]
    if threads <= 1 or len(bounds) == 1:
        for a, b in bounds:
            task(a, b)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(task, *b) for b in bounds]:
            done.result()
