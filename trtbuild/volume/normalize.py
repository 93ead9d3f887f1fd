"""The five intensity normalisations of nnU-Net (`default_normalization_schemes`), in float32 as there."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError
from trtbuild.spec import CT, NoNormalization, Normalization, RescaleTo01, RGBTo01, ZScore

EPSILON = 1e-8  # nnU-Net's guard for a zero standard deviation or range in float32


def needs_mask(schemes: tuple[Normalization, ...]) -> bool:
    """Whether any scheme looks at the nonzero mask."""
    return any(isinstance(s, ZScore) and s.masked for s in schemes)


def normalize_channel(
    channel: NDArray[np.float32], scheme: Normalization, mask: NDArray[np.bool_] | None, where: str
) -> None:
    """Normalises one channel (Z, Y, X) in place.

    Args:
        channel: intensities as read, cropped.
        scheme: what to do, with its constants.
        mask: the filled nonzero mask (Z, Y, X); needed for a masked z-score.
        where: the channel's name, for messages.

    Raises:
        InputError: values that do not fit the scheme, or so large that their statistics or the result overflow.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        _normalize(channel, scheme, mask, where)
    _require_finite(channel, where)


def _require_finite(values: NDArray[np.float32] | np.float32, where: str) -> None:
    if not np.isfinite(values).all():
        raise InputError(
            "The intensities overflow float32.",
            expected="intensities whose mean, deviation and range fit float32",
            where=where,
            hint="look for a few extreme voxels, or a wrong scale factor in the header",
        )


def _normalize(channel: NDArray[np.float32], scheme: Normalization, mask: NDArray[np.bool_] | None, where: str) -> None:
    match scheme:
        case ZScore(masked=True):
            if mask is None:
                raise InputError("A masked z-score needs the nonzero mask.", where=where)
            if mask.any():
                inside = channel[mask]
                mean, std = inside.mean(), inside.std()
                _require_finite(mean + std, where)  # an infinite deviation would make every voxel 0
                channel[mask] = (inside - mean) / max(std, EPSILON)
        case ZScore():
            mean, std = channel.mean(), channel.std()
            _require_finite(mean + std, where)
            channel -= mean
            channel /= max(std, EPSILON)
        case CT():
            np.clip(channel, scheme.lower, scheme.upper, out=channel)
            channel -= scheme.mean
            channel /= max(scheme.std, EPSILON)
        case RescaleTo01():
            channel -= channel.min()
            channel /= max(channel.max(), EPSILON)
        case RGBTo01():
            low, high = float(channel.min()), float(channel.max())
            if low < 0 or high > 255:
                raise InputError(
                    "The image is not 8-bit RGB.",
                    expected="values in 0..255",
                    got=f"{low:g}..{high:g}",
                    where=where,
                    hint="check that the file is the kind of image the model was trained on",
                )
            channel /= 255.0
        case NoNormalization():
            pass
