"""The sampling points of torch's `interpolate`, as nnU-Net's `resample_torch_fornnunet` calls it, without torch.

torch computes the coordinate `scale * (i + 0.5) - 0.5` in float32 with one fused multiply-add (ATen's UpSampleKernel on
a processor with AVX2 or later). Rounding once instead of twice changes the nearest voxel of some sizes and the weights
by up to 1e-5, so the product is formed here in float64, where it is exact, and rounded after the subtraction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def _coordinate(old: int, new: int) -> NDArray[np.float32]:
    scale = np.float32(old) / np.float32(new)
    return np.asarray(np.float64(scale) * (np.arange(new) + 0.5) - 0.5, dtype=np.float32)


def torch_nearest_index(old: int, new: int) -> NDArray[np.int64]:
    """The old index (new,) of every new voxel in mode "nearest-exact"."""
    index: NDArray[np.int64] = np.floor(_coordinate(old, new) + np.float32(0.5)).astype(np.int64)
    return np.minimum(np.maximum(index, 0), old - 1)


def torch_linear_taps(old: int, new: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Linear interpolation with align_corners=False: low and high index and the weight of `high`, each (new,)."""
    coordinate = np.maximum(_coordinate(old, new), np.float32(0))
    low = np.minimum(coordinate.astype(np.int64), old - 1)
    high = np.minimum(low + 1, old - 1)
    return low, high, np.clip(coordinate - low.astype(np.float32), np.float32(0), np.float32(1))


def torch_linear_matrix(old: int, new: int) -> NDArray[np.float64]:
    """The operator (new, old) of `torch_linear_taps`; the entries are float32 numbers."""
    low, high, weight = torch_linear_taps(old, new)
    matrix = np.zeros((new, old))
    rows = np.arange(new)
    np.add.at(matrix, (rows, low), np.float32(1) - weight)
    np.add.at(matrix, (rows, high), weight)
    return matrix
