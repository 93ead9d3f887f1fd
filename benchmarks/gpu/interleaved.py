"""Two contenders in the order ABBA, so that what drifts (clocks, heat) hits both alike, and the ratio of their times."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of each run, in their order; `ratios` are theirs / ours, one per pair of neighbours."""

    ours: tuple[float, ...]
    theirs: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        return tuple(b / a for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the pairs' ratios: how many times faster ours is."""
        return statistics.median(self.ratios)

    @property
    def text(self) -> str:
        """For the note of a row."""
        return (
            f"ours {statistics.median(self.ours):.3f} s, theirs {statistics.median(self.theirs):.3f} s, ratios "
            f"{min(self.ratios):.2f} to {max(self.ratios):.2f} over {len(self.ratios)} pairs"
        )


def abba(ours: Callable[[], float], theirs: Callable[[], float], rounds: int) -> Times:
    """Runs each 2 x `rounds` times: ours, theirs, theirs, ours. Each call gives the seconds of one run."""
    a: list[float] = []
    b: list[float] = []
    for _ in range(rounds):
        a.append(ours())
        b.append(theirs())
        b.append(theirs())
        a.append(ours())
    return Times(ours=tuple(a), theirs=tuple(b))
