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
    """
    match scheme:
        case ZScore(masked=True):
            if mask is None:
                raise InputError("A masked z-score needs the nonzero mask.", where=where)
            if mask.any():
                inside = channel[mask]
                channel[mask] = (inside - inside.mean()) / max(inside.std(), EPSILON)
        case ZScore():
            mean, std = channel.mean(), channel.std()
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
