"""Agreement of two segmentations."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError

Labels = NDArray[np.integer[np.typing.NBitBase]]


def _same_shape(a: Labels, b: Labels) -> None:
    if a.shape != b.shape:
        raise InputError("Two segmentations differ in shape.", expected=a.shape, got=b.shape)


def differing_voxels(a: Labels, b: Labels) -> int:
    """Number of voxels with different labels."""
    _same_shape(a, b)
    return int(np.count_nonzero(a != b))


def dice(a: Labels, b: Labels, label: int) -> float:
    """2 |A and B| / (|A| + |B|) of one label; NaN where neither holds it (as in nnU-Net's summary.json)."""
    _same_shape(a, b)
    in_a, in_b = a == label, b == label
    total = int(np.count_nonzero(in_a)) + int(np.count_nonzero(in_b))
    return 2 * int(np.count_nonzero(in_a & in_b)) / total if total else float("nan")
