"""The compiled vote of labels: every new voxel takes the label that weighs most among the eight old ones around it.

That is the argmax over the linearly interpolated indicators of all labels, without making a single one of them: a label
that is not among the eight scores 0. The scores are summed in the order and precision of scipy's `zoom` and of torch's
`interpolate`, since ties are decided by their equality. Compiled with Numba (imported with this module, so import this
module late).
"""

from __future__ import annotations

import math

import numpy as np

from trtbuild.compiled import compiled

F32 = np.float32
F64 = np.float64
SCALE = F32(1000)  # resample_torch_simple interpolates indicators of 0 and 1000
HALF_DIGITS, HALF_LEAST = 11, 2.0**-24  # significant binary digits of float16, and its smallest number


@compiled
def _around(seg, low, high, k, j, i, labels):  # type: ignore[no-untyped-def]  # compiled
    """Fills `labels` (8,) with the old voxels around new voxel (k, j, i); whether all are the same."""
    same = True
    for corner in range(8):
        z = high[0][k] if corner & 4 else low[0][k]
        y = high[1][j] if corner & 2 else low[1][j]
        x = high[2][i] if corner & 1 else low[2][i]
        labels[corner] = seg[z, y, x]
        same = same and labels[corner] == labels[0]
    return same


@compiled
def _new_here(labels, corner):  # type: ignore[no-untyped-def]  # compiled
    """Whether the label at `corner` stands at none before it."""
    for earlier in range(corner):  # noqa: SIM110  # Numba compiles no generators into `all`
        if labels[earlier] == labels[corner]:
            return False
    return True


@compiled
def _share(weight, high):  # type: ignore[no-untyped-def]  # compiled
    """The weight of the high or low voxel; scipy takes the last one as what the others leave of 1."""
    keep = 1.0 - weight
    return 1.0 - keep if high else keep


@compiled
def vote_spline(seg, low, high, weight, nearest, out):  # type: ignore[no-untyped-def]  # compiled
    """batchgenerators' `resize_segmentation` of order 1 (0.25.5), for every voxel of `out` (Z', Y', X').

    The largest score wins; among equals the label of the nearest old voxel if it is one of them, else the smallest.
    `low`, `high`, `weight` (of `high`, float64) and `nearest` hold one array per axis, (new,).
    """
    labels, scores = np.empty(8, np.int64), np.empty(8, F64)
    for k in range(out.shape[0]):
        for j in range(out.shape[1]):
            for i in range(out.shape[2]):
                if _around(seg, low, high, k, j, i, labels):
                    out[k, j, i] = labels[0]
                    continue
                for corner in range(8):
                    z = _share(weight[0][k], corner & 4)
                    y = _share(weight[1][j], corner & 2)
                    scores[corner] = z * y * _share(weight[2][i], corner & 1)
                close = seg[nearest[0][k], nearest[1][j], nearest[2][i]]
                best, winner, of_close = -1.0, labels[0], -1.0
                for corner in range(8):
                    if not _new_here(labels, corner):
                        continue
                    score = 0.0
                    for other in range(corner, 8):
                        if labels[other] == labels[corner]:
                            score += scores[other]
                    score = min(score, 1.0)  # skimage clips to the indicator's range
                    if labels[corner] == close:
                        of_close = score
                    if score > best or (score == best and labels[corner] < winner):
                        best, winner = score, labels[corner]
                out[k, j, i] = close if of_close == best else winner


@compiled
def _half(value):  # type: ignore[no-untyped-def]  # compiled
    """A positive float32 rounded to float16, to the nearest, halves to even."""
    _, exponent = math.frexp(value)
    unit = max(math.ldexp(1.0, exponent - HALF_DIGITS), HALF_LEAST)
    return np.rint(value / unit) * unit


@compiled
def _between(a, b, weight):  # type: ignore[no-untyped-def]  # compiled
    """a (1 - weight) + b weight in float32, the first product fused with the sum as torch's kernel does it."""
    return F32(F64(a) * F64(F32(1) - weight) + F64(F32(b * weight)))


@compiled
def vote_torch(seg, low, high, weight, out):  # type: ignore[no-untyped-def]  # compiled
    """nnU-Net's `resample_torch_simple` with is_seg, for every voxel of `out` (Z', Y', X').

    The largest score, kept in float16 as there, wins; the smallest label among equals. `weight` is float32.
    """
    labels, at = np.empty(8, np.int64), np.empty(8, F32)
    for k in range(out.shape[0]):
        for j in range(out.shape[1]):
            for i in range(out.shape[2]):
                if _around(seg, low, high, k, j, i, labels):
                    out[k, j, i] = labels[0]
                    continue
                best, winner = -1.0, labels[0]
                for corner in range(8):
                    if not _new_here(labels, corner):
                        continue
                    for other in range(8):
                        at[other] = SCALE if labels[other] == labels[corner] else F32(0)
                    for pair in range(4):
                        at[pair] = _between(at[2 * pair], at[2 * pair + 1], weight[2][i])
                    for pair in range(2):
                        at[pair] = _between(at[2 * pair], at[2 * pair + 1], weight[1][j])
                    score = _half(F64(_between(at[0], at[1], weight[0][k])))
                    if score > best or (score == best and labels[corner] < winner):
                        best, winner = score, labels[corner]
                out[k, j, i] = winner
