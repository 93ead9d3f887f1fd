"""How far a candidate's logits are from FP32's, from sums that add up over patches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class LogitSums:
    """Over all logits: of FP32's the number, sum, sum of squares and largest magnitude; of the difference the sum of
    squares and the largest magnitude, infinite where the candidate is not finite."""

    values: int
    total: float
    squares: float
    largest: float
    difference_squares: float
    largest_difference: float

    def __add__(self, other: LogitSums) -> LogitSums:
        return LogitSums(
            values=self.values + other.values,
            total=self.total + other.total,
            squares=self.squares + other.squares,
            largest=max(self.largest, other.largest),
            difference_squares=self.difference_squares + other.difference_squares,
            largest_difference=max(self.largest_difference, other.largest_difference),
        )

    @property
    def error_rms(self) -> float:
        """rms of the difference over the standard deviation of FP32's logits."""
        variance = max(self.squares / self.values - (self.total / self.values) ** 2, 0.0)
        return _ratio(math.sqrt(self.difference_squares / self.values), math.sqrt(variance))

    @property
    def error_max(self) -> float:
        """The largest |difference| over the largest |logit| of FP32."""
        return _ratio(self.largest_difference, self.largest)


def sums_from_logits(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> LogitSums:
    """The sums of one patch, (heads, *patch) each, in float64.

    One head after the other: a patch of a model with 100 classes must not stand in memory a second time. The reference
    is finite.
    """
    total = squares = largest = difference_squares = largest_difference = 0.0
    for ours, theirs in zip(reference, candidate, strict=True):
        exact = ours.astype(np.float64)
        total += float(exact.sum())
        squares += float(np.square(exact).sum())
        largest = max(largest, float(np.abs(exact).max()))
        if not np.isfinite(theirs).all():
            difference_squares = largest_difference = math.inf
            continue
        exact -= theirs
        difference_squares += float(np.square(exact).sum())
        largest_difference = max(largest_difference, float(np.abs(exact).max()))
    return LogitSums(
        values=reference.size,
        total=total,
        squares=squares,
        largest=largest,
        difference_squares=difference_squares,
        largest_difference=largest_difference,
    )


def _ratio(difference: float, size: float) -> float:
    """difference / size; 0 where nothing differs, infinity where a difference meets a size of 0."""
    if difference == 0:
        return 0.0
    return difference / size if size > 0 else math.inf
