"""The two loops that Numba compiles: counting into a histogram, and the divergences of all entropy candidates.

Imported late: Numba takes a moment to load. Both compute in float64 and without reordered sums, so a result does not
depend on the machine's vector length. The tests hold them to NumPy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

BLOCK = 4096
"""Values whose bins are computed before they are counted; they stay in the first-level cache."""
LANES = 4  # a power of two
NO_CACHE = "cannot cache function"  # how Numba's RuntimeError begins where it finds no folder that it may write to


def _compiled(function: Callable[..., Any]) -> Any:
    """Without the GIL; kept on disk where Numba finds a folder for it, else compiled anew by each process."""
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        if not str(error).startswith(NO_CACHE):
            raise
        warnings.warn(
            "Numba has no folder for its cache, so every run compiles its loops again. "
            "Set NUMBA_CACHE_DIR to a folder that you may write to.",
            RuntimeWarning,
            stacklevel=1,
        )
        return njit(nogil=True)(function)


@_compiled
def count(values, top, counts):  # type: ignore[no-untyped-def]  # compiled, see histogram.add
    """Adds |values| (1-D, contiguous) to `counts` (LANES, bins); returns the largest, NaN where one is not finite.

    A block at a time, so that the loops that compute are vectorised and only the one that counts is not. Neighbours
    go into different lanes: equal ones would otherwise wait for each other's store.
    """
    bins = counts.shape[1]
    last = np.float64(bins - 1)
    places = np.empty(BLOCK, np.int32)
    largest = np.zeros(1, np.int32)  # the bits of a float32
    bits = values.view(np.int32)
    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK]
        peak = largest[0]
        for word in bits[start : start + BLOCK]:  # without its sign, a float32 orders like its bits
            peak = max(peak, np.int32(word & np.int32(0x7FFFFFFF)))
        if peak >= np.int32(0x7F800000):  # infinity, and NaN above it
            return np.float32(np.nan)
        largest[0] = peak
        for i in range(block.size):
            places[i] = np.int32(min(np.float64(abs(block[i])) * bins / top, last))
        for i in range(block.size):
            counts[i & (LANES - 1), places[i]] += 1
    return largest.view(np.float32)[0]


@_compiled
def divergences(counts, first, levels):  # type: ignore[no-untyped-def]  # compiled, see thresholds.entropy
    """KL(P || Q) in nats of the candidates i = first .. len(counts); infinity for those that are skipped."""
    bins = counts.size
    total = counts.sum()
    found = np.full(bins + 1 - first, np.inf)
    q = np.zeros(bins)
    inside = np.float64(counts[:first].sum())
    for i in range(first, bins + 1):
        if i > first:
            inside += counts[i - 1]
        if inside == 0 or (counts[i - 1] == 0 and inside < total):
            continue  # P > 0 in the last bin, where the outliers are, and Q = 0
        for level in range(levels):
            start, end = (level * i + levels - 1) // levels, ((level + 1) * i + levels - 1) // levels
            mass, filled = 0.0, 0
            for k in range(start, end):
                mass += counts[k]
                filled += counts[k] > 0
            for k in range(start, end):
                q[k] = mass / filled if counts[k] > 0 else 0.0
        divergence = 0.0
        for k in range(i):
            p = counts[k]
            if k == i - 1:
                p += total - inside
            if p > 0:
                divergence += p / total * np.log((p / total) / (q[k] / inside))
        found[i - first] = divergence
    return found
