"""Crop, mask and normalisation of a case on a GPU, as `volume/preparation` defines them.

Mean and deviation are sums in float64, in an order that depends on the image only; the CPU path sums in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import EngineError
from trtbuild.runtime.device import Buffer
from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.spec import CT, NoNormalization, Normalization, RescaleTo01, RGBTo01, ZScore
from trtbuild.stitch import preparation_launches as kernels
from trtbuild.stitch.launches import Launch
from trtbuild.stitch.preparation_launches import UNSET, Image
from trtbuild.volume.preparation.crop import Box
from trtbuild.volume.preparation.normalize import EPSILON, require_finite, require_rgb

ZERO, ONE = np.float32(0), np.float32(1)
Memory = Mapping[str, Buffer]
"""By the names of `image_sizes` and `case_sizes`."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """(clip(value, low, high) - shift) / scale: what every scheme is, with its own numbers."""

    low: float = -math.inf
    high: float = math.inf
    shift: np.float32 = ZERO
    scale: np.float32 = ONE


def reset_words(gpu: Gpu, memory: Memory, count: int) -> int:
    """The address of `count` words that hold what kernels look for in them: nothing found."""
    gpu.upload(memory["words"], np.full(count, UNSET, dtype=np.int32))
    return memory["words"].address


def words(gpu: Gpu, memory: Memory, count: int) -> NDArray[np.int32]:
    """The first `count` words, when the kernels are done."""
    found = np.empty(count, dtype=np.int32)
    gpu.download(found, memory["words"])
    return found


def first_not_finite(channel: Image, gpu: Gpu, memory: Memory) -> int | None:
    """The smallest z with a value that is NaN or infinite, or None."""
    gpu.launch(kernels.not_finite(channel, reset_words(gpu, memory, 1)))
    found = int(words(gpu, memory, 1)[0])
    return None if found == UNSET else found


def box_on_device(image: Image, gpu: Gpu, memory: Memory) -> tuple[Box, bool]:
    """`nonzero_box` of volume/preparation/crop.py, and whether every voxel is 0."""
    gpu.launch(kernels.nonzero_box(image, reset_words(gpu, memory, 6)))
    bounds = words(gpu, memory, 6)
    return kernels.box_from_bounds(bounds, image.shape), bool(bounds[0] == UNSET)


def fill_mask(cropped: Image, gpu: Gpu, memory: Memory) -> None:
    """`filled_nonzero_mask` of volume/preparation/crop.py, into the memory "mask".

    Raises:
        EngineError: the flood does not end: every round but the last one reaches a voxel, so that a kernel is wrong.
    """
    state, unchanged = memory["mask"].address, memory["words"].address
    gpu.launch(kernels.background(cropped, state))
    for _ in range(math.prod(cropped.shape) + 1):
        gpu.upload(memory["words"], np.ones(1, dtype=np.int32))
        for launch in kernels.floods(state, unchanged, cropped.shape):
            gpu.launch(launch)
        if words(gpu, memory, 1)[0]:
            return
    raise EngineError("The mask of the nonzero region is never finished.", got=f"{cropped.shape} voxels")


def normalize_channel(channel: Image, scheme: Normalization, out: int, gpu: Gpu, memory: Memory, where: str) -> None:
    """One channel of the cropped image, normalised, into `out` (Z, Y, X) float32.

    Raises:
        InputError: as `normalized_channel` of volume/preparation/normalize.py, with the same words.
    """
    mask = memory["mask"].address if isinstance(scheme, ZScore) and scheme.masked else 0
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused by name
        known = _constants(channel, scheme, mask, gpu, memory, where)
        gpu.launch(_normalize(channel, mask, out, known))
    if first_not_finite(kernels.contiguous(out, channel.shape), gpu, memory) is not None:
        require_finite(np.float32(np.nan), where)


def _normalize(channel: Image, mask: int, out: int, known: Constants) -> Launch:
    return kernels.normalize(channel, mask, out, low=known.low, high=known.high, shift=known.shift, scale=known.scale)


def _constants(channel: Image, scheme: Normalization, mask: int, gpu: Gpu, memory: Memory, where: str) -> Constants:
    least = np.float32(EPSILON)
    match scheme:
        case ZScore():
            return _z_score(channel, mask, gpu, memory, where)
        case CT():
            low = min(scheme.lower, scheme.upper)  # NumPy clips to the upper end where the ends are swapped
            scale = np.float32(max(scheme.std, EPSILON))
            return Constants(low=low, high=scheme.upper, shift=np.float32(scheme.mean), scale=scale)
        case RescaleTo01():
            bottom, top = _range(channel, gpu, memory)
            return Constants(shift=bottom, scale=max(top - bottom, least))
        case RGBTo01():
            bottom, top = _range(channel, gpu, memory)
            require_rgb(float(bottom), float(top), where)
            return Constants(scale=np.float32(255))
        case NoNormalization():
            return Constants()


def _z_score(channel: Image, mask: int, gpu: Gpu, memory: Memory, where: str) -> Constants:
    count = _total(channel, mask, gpu, memory, power=0) if mask else float(math.prod(channel.shape))
    if count == 0:
        return Constants()
    total = _total(channel, mask, gpu, memory, power=1)
    squares = _total(channel, mask, gpu, memory, power=2, centre=total / count)
    # refused where the CPU path's float32 sums are, though these would not overflow
    require_finite(np.float32(total) + np.float32(squares), where)
    deviation = np.float32(math.sqrt(squares / count))
    return Constants(shift=np.float32(total / count), scale=max(deviation, np.float32(EPSILON)))


def _total(channel: Image, mask: int, gpu: Gpu, memory: Memory, *, power: int, centre: float = 0.0) -> float:
    """The sum of (value - centre)**power inside the mask; 0 is no mask."""
    sums, folded = memory["sums"], memory["folded"]
    gpu.launch(kernels.column_sums(channel, mask, sums.address, centre=centre, power=power))
    for launch in kernels.folds(sums.address, folded.address, math.prod(channel.shape[1:])):
        gpu.launch(launch)
    result = np.empty(1, dtype=np.float64)
    gpu.download(result, sums)
    return float(result[0])


def _range(channel: Image, gpu: Gpu, memory: Memory) -> tuple[np.float32, np.float32]:
    """The smallest and the largest value."""
    gpu.launch(kernels.extremes(channel, reset_words(gpu, memory, 2), axis=None))
    keys: NDArray[Any] = words(gpu, memory, 2).reshape(1, 2)
    low, high = kernels.range_from_keys(keys)
    return low[0], high[0]
