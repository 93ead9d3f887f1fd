"""Histograms of |x|: 2048 bins over [0, top], filled array by array."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from trtbuild_calibration.errors import CalibrationError

BINS = 2048
EXCESS = 1e-3
"""How far above the top a value may lie, as a part of it; it then counts into the last bin.

The top comes from another pass through the graph. A backend fuses a graph that is cut elsewhere in another way, which
moves sums by some float32 roundings (1e-5 of the largest value and less); an engine that computes in bfloat16 by
mistake would be off by 4e-3.
"""
PART = 1 << 20
"""Values below which a second thread does not pay, and which are copied at a time where an array is not contiguous."""

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """|x| of one tensor.

    Attributes:
        top: upper edge of the last bin, the largest |x| of all patches; 0 for a tensor of zeros.
        counts: int64 (2048,); bin k holds top * k / 2048 <= |x| < top * (k + 1) / 2048, the last one also top itself.
    """

    top: float
    counts: Counts = field(repr=False)

    def __post_init__(self) -> None:
        if self.counts.shape != (BINS,) or self.counts.dtype != np.int64 or (self.counts < 0).any():
            raise CalibrationError(
                "A histogram is malformed.",
                expected=f"int64 ({BINS},), none below 0",
                got=f"{self.counts.dtype} {self.counts.shape}",
            )
        if not (math.isfinite(self.top) and self.top >= 0):
            raise CalibrationError(
                "A histogram has a wrong top.", expected="a finite value of at least 0", got=self.top
            )


def add(values: NDArray[np.float32], top: float, counts: Counts, *, threads: int = 1) -> float:
    """Adds |values| to `counts` in place and returns the largest |x|.

    The bin of x is min(floor(|x| * 2048 / top), 2047), computed in float64; for a top that is a float32 value this is
    exactly the bin of np.histogram(|x|, 2048, (0, top)), since a quotient of two float32 values that is not a whole
    number lies farther from one than float64 rounds. With top 0, all values must be 0 and count into the first bin.

    Args:
        values: float32, any shape and strides; empty adds nothing.
        top: at least 0.
        counts: int64 (2048,). Not to be used after an exception.
        threads: the counts do not depend on it.

    Raises:
        CalibrationError: a wrong dtype, a value that is NaN, infinite, or above top * (1 + EXCESS).
    """
    if values.dtype != np.float32:
        raise CalibrationError("An activation has another type.", expected="float32", got=values.dtype)
    from trtbuild_calibration.kernels import LANES

    lanes = [np.zeros((LANES, BINS), np.int64) for _ in range(threads)]
    largest = max((_count(run, top if top > 0 else 1.0, lanes) for run in _runs(values)), default=0.0)
    if math.isnan(largest):
        raise CalibrationError("An activation is NaN or infinite.", expected="finite values")
    if largest > top * (1 + EXCESS):
        raise CalibrationError(
            "An activation is larger than in the first pass.",
            expected=f"at most {top:.6g}, as the first pass found",
            got=f"{largest:.6g}",
            hint="the network must compute the same each time, in float32",
        )
    for lane in lanes:
        counts += lane.sum(axis=0)
    return largest


def _count(run: NDArray[np.float32], top: float, lanes: Sequence[Counts]) -> float:
    """Counts a 1-D array in as many threads as there are lanes; NaN where a value is not finite."""
    from trtbuild_calibration.kernels import count

    if len(lanes) == 1 or run.size < PART:
        return float(count(run, top, lanes[0]))
    with ThreadPoolExecutor(len(lanes)) as pool:
        found = list(pool.map(count, np.array_split(run, len(lanes)), [top] * len(lanes), lanes))
    return float(np.max(found))  # NaN where one is


def _runs(values: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """1-D contiguous arrays with the same values; of an array that is not contiguous, parts are copied."""
    if values.flags.c_contiguous:
        yield values.reshape(-1)
    elif values.flags.f_contiguous:
        yield values.T.reshape(-1)
    elif values.size <= PART:
        yield np.ascontiguousarray(values).reshape(-1)
    elif values.ndim == 1:
        for start in range(0, values.size, PART):
            yield np.ascontiguousarray(values[start : start + PART])
    else:
        for part in np.moveaxis(values, int(np.argmax(np.abs(values.strides))), 0):
            yield from _runs(part)
