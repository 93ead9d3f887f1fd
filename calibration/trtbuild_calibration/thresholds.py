"""Histogram -> threshold T of |x|: entropy (TensorRT's published algorithm, made definite), percentile, min-max.

What is above T is clipped: the scale of symmetric INT8 is T / 127.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from trtbuild_calibration.errors import CalibrationError
from trtbuild_calibration.histogram import BINS, Histogram

Method = Literal["entropy", "percentile", "minmax"]
METHODS: tuple[Method, ...] = get_args(Method)
LEVELS = 128
"""Magnitudes that INT8 tells apart."""
PERCENTILE = 99.99
"""Of the values, kept unclipped by the method of that name."""
SMALLEST = float(np.finfo(np.float32).tiny)
"""A scale below the smallest normal float32 is taken for that of zeros: backends flush such numbers to zero."""


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """How much of a histogram is kept.

    Attributes:
        amax: T, at least 0; 0 for a tensor of zeros.
        bins: bins below T, 1 to 2048; for entropy this is the candidate. 0 for a tensor of zeros.
    """

    amax: float
    bins: int


def scale_of(amax: float) -> float:
    """amax / 127, the step of symmetric INT8; 1 for a tensor of zeros, whose step does not matter."""
    scale = amax / 127
    return scale if scale >= SMALLEST else 1.0


def threshold(histogram: Histogram, method: Method, *, percentile: float = PERCENTILE) -> Threshold:
    """T by one of the three methods.

    Raises:
        CalibrationError: an unknown method, or nothing was counted.
    """
    if method == "entropy":
        return entropy(histogram)
    if method == "percentile":
        return at_percentile(histogram, percentile)
    if method == "minmax":
        return minmax(histogram)
    raise CalibrationError("There is no such method.", expected=", ".join(METHODS), got=method)


def thresholds(histogram: Histogram, *, percentile: float = PERCENTILE) -> Mapping[Method, Threshold]:
    """T by each of the methods."""
    return {method: threshold(histogram, method, percentile=percentile) for method in METHODS}


def entropy(histogram: Histogram) -> Threshold:
    """The T whose clipped histogram loses least when it is reduced to 128 levels.

    TensorRT's algorithm as published (S. Migacz, "8-bit inference with TensorRT", GTC 2017), with every choice fixed:

    1. Candidates are i = 128 .. 2048 bins.
    2. P is bins[:i] with all that lies above added to its last bin.
    3. Q is bins[:i], without that, in 128 levels: level j holds the bins k with j * i / 128 <= k < (j + 1) * i / 128
       (`linspace(0, i, 129)`, rounded up). Its sum is spread evenly over those of its bins that are not empty. The
       outliers in P do not count for what is empty.
    4. A candidate where Q is 0 under P > 0 is skipped: its last bin is empty, and there are values above it.
    5. The first smallest KL(P || Q) wins, P and Q scaled to sum 1, computed in float64 in the order of the bins.
    6. T = min((i + 0.5) * top / 2048, top).

    Raises:
        CalibrationError: nothing was counted.
    """
    if _is_zero(histogram):
        return Threshold(amax=0.0, bins=0)
    from trtbuild_calibration.kernels import divergences

    bins = LEVELS + int(np.argmin(divergences(histogram.counts, LEVELS, LEVELS)))
    return Threshold(amax=min((bins + 0.5) * (histogram.top / BINS), histogram.top), bins=bins)


def at_percentile(histogram: Histogram, percentile: float = PERCENTILE) -> Threshold:
    """The upper edge of the first bin up to which at least `percentile` percent of the values lie.

    Raises:
        CalibrationError: nothing was counted, or the percentile is not above 0 and at most 100.
    """
    if not 0 < percentile <= 100:
        raise CalibrationError("A percentile is out of range.", expected="above 0, at most 100", got=percentile)
    if _is_zero(histogram):
        return Threshold(amax=0.0, bins=0)
    below = np.cumsum(histogram.counts)
    # a whole number of values, so that 100 is the last bin whatever percentile / 100 rounds to
    needed = min(int(np.ceil(percentile / 100 * int(below[-1]))), int(below[-1]))
    bins = int(np.searchsorted(below, needed)) + 1
    return Threshold(amax=histogram.top * bins / BINS, bins=bins)


def minmax(histogram: Histogram) -> Threshold:
    """The largest |x|: nothing is clipped."""
    if _is_zero(histogram):
        return Threshold(amax=0.0, bins=0)
    return Threshold(amax=histogram.top, bins=BINS)


def _is_zero(histogram: Histogram) -> bool:
    if not histogram.counts.any():
        raise CalibrationError("A histogram is empty.", expected="at least one counted value")
    return histogram.top == 0
