"""How much a voxel of a window counts: a Gaussian that is a product of one-dimensional Gaussians.

nnU-Net filters a unit impulse at `patch // 2` with sigma = patch / 8 and scales it to a maximum of 10
(`compute_gaussian`); the scale cancels in the mean. Filtering is separable, so the weight of a window is
g(z) g(y) g(x), and because windows form a grid the total weight of a voxel is again a product of three
one-dimensional sums. No volume of weights is needed.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def axis_gaussian(patch: int, sigma_scale: float) -> NDArray[np.float64]:
    """Weights (patch,) along one axis, 1 at `patch // 2`, all positive.

    Equal to `scipy.ndimage.gaussian_filter1d` of a unit impulse divided by its maximum: the kernel is
    exp(-d² / 2 sigma²), its normalisation cancels in the division, and its cut at 4 sigma lies outside the patch
    for nnU-Net's sigma (patch / 8).
    """
    distance = np.arange(patch) - patch // 2
    return np.asarray(np.exp(-0.5 * (distance / (patch * sigma_scale)) ** 2))


def normalised_weights(
    length: int, patch: int, steps: tuple[int, ...], sigma_scale: float
) -> tuple[NDArray[np.float32], ...]:
    """For each of the window starts `steps` along one axis the weights (patch,) that add up to 1 in every voxel.

    Gaussian / sum of the Gaussians of all windows there, formed in float64. A sum weighted by them is the mean itself:
    no division follows, and a voxel is finished when its last window is.
    """
    gaussian, total = axis_gaussian(patch, sigma_scale), np.zeros(length)
    for start in steps:
        total[start : start + patch] += gaussian
    return tuple((gaussian / total[start : start + patch]).astype(np.float32) for start in steps)
