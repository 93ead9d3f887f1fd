"""Test-time mirroring: every combination of the allowed axes."""

from __future__ import annotations

import itertools

from trtbuild.errors import ModelError


def flip_combinations(mirror_axes: tuple[int, ...], dimensions: int) -> tuple[tuple[int, ...], ...]:
    """All subsets of `mirror_axes`, the empty one first, in nnU-Net's order; 2**n of them.

    Axes count the patch's own axes (0 is z of a 3-D patch, y of a 2-D one).
    """
    if any(not 0 <= axis < dimensions for axis in mirror_axes) or len(set(mirror_axes)) != len(mirror_axes):
        raise ModelError(
            "The mirror axes do not fit the network.", expected=f"distinct axes below {dimensions}", got=mirror_axes
        )
    return tuple(c for n in range(len(mirror_axes) + 1) for c in itertools.combinations(mirror_axes, n))
