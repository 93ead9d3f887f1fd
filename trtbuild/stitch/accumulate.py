"""The accumulator: windows, mirror flips and folds all add into one float32 buffer of logits.

Compiled with Numba (imported with this module, so import this module late). Each function says in NumPy what it does;
the tests hold it to that in float64.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtbuild.compiled import compiled

F32 = np.float32


@compiled
def _add_window(total, logits, gz, gy, gx, start, flip):  # type: ignore[no-untyped-def]  # compiled, see add_window
    heads, nz, ny, nx = logits.shape
    bad = np.int32(0)  # counted in integers: a float sum would keep the loop from being vectorised
    for c in range(heads):
        for z in range(nz):
            from_z = nz - 1 - z if flip[0] else z
            for y in range(ny):
                row = logits[c, from_z, ny - 1 - y if flip[1] else y]
                into = total[c, start[0] + z, start[1] + y, start[2] : start[2] + nx]
                weight = gz[z] * gy[y]
                if flip[2]:
                    for x in range(nx):
                        value = row[nx - 1 - x]
                        bad += np.int32(value - value != F32(0))  # NaN for NaN and infinity, 0 for all else
                        into[x] += value * (weight * gx[x])
                else:
                    for x in range(nx):
                        value = row[x]
                        bad += np.int32(value - value != F32(0))
                        into[x] += value * (weight * gx[x])
    return bad == 0


def add_window(
    total: NDArray[np.float32],
    logits: NDArray[np.float32],
    gaussians: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]],
    start: tuple[int, int, int],
    flip: tuple[bool, bool, bool],
) -> bool:
    """Adds one window's weighted logits in place; False if any of them is NaN or infinite.

    ``total[:, z0:z0+nz, y0:y0+ny, x0:x0+nx] += np.flip(logits, flip) * gz[:, None, None] * gy[:, None] * gx``

    Args:
        total: accumulator (C, Z, Y, X), C-contiguous.
        logits: the network's output (C, nz, ny, nx) for the window, mirrored along the axes where `flip` is True.
        gaussians: weights (nz,), (ny,), (nx,).
        start: the window's first voxel (z0, y0, x0).
        flip: which of (z, y, x) the window was mirrored along.
    """
    return bool(_add_window(total, logits, *gaussians, start, flip))


@compiled
def _divide_by_weights(total, wz, wy, wx, count):  # type: ignore[no-untyped-def]  # compiled, see divide_by_weights
    heads, nz, ny, nx = total.shape
    bad = np.int32(0)
    for c in range(heads):
        for z in range(nz):
            for y in range(ny):
                row = total[c, z, y]
                weight = wz[z] * wy[y] * count
                for x in range(nx):
                    row[x] = F32(row[x] / (weight * wx[x]))
                    bad += np.int32(row[x] - row[x] != F32(0))
    return bad == 0


def divide_by_weights(
    total: NDArray[np.float32],
    weights: tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]],
    count: int,
) -> bool:
    """Turns the sum into the mean in place; False if the result holds NaN or infinity.

    ``total /= wz[:, None, None] * wy[:, None] * wx * count``

    Args:
        total: accumulator (C, Z, Y, X), C-contiguous.
        weights: summed weights (Z,), (Y,), (X,) of `axis_weight_sum`.
        count: number of folds times number of mirror combinations.
    """
    return bool(_divide_by_weights(total, *weights, float(count)))
