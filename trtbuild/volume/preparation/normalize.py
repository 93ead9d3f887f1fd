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


def normalized_channel(
    source: NDArray[np.float32], scheme: Normalization, mask: NDArray[np.bool_] | None, where: str
) -> NDArray[np.float32]:
    """One channel (Z, Y, X), normalised, as a new C-contiguous array.

    Args:
        source: intensities as read: the view of the image that is transposed and cropped, not a copy of it. NumPy sums
            float32 in the order of the memory, and over a copy the mean of a large image comes out up to 1e-5 apart
            from nnU-Net's, which sums such a view.
        scheme: what to do, with its constants.
        mask: (Z, Y, X), True where a masked z-score looks; needed for that only.
        where: the channel's name, for messages.

    Raises:
        InputError: values that do not fit the scheme, or so large that their statistics or the result overflow.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        channel = _normalized(source, scheme, mask, where)
    require_finite(channel, where)
    return channel


def require_finite(values: NDArray[np.float32] | np.float32, where: str) -> None:
    """Raises InputError where what was computed of a channel is not finite."""
    if not np.isfinite(values).all():
        raise InputError(
            "The intensities overflow float32.",
            expected="intensities whose mean, deviation and range fit float32",
            where=where,
            hint="look for a few extreme voxels, or a wrong scale factor in the header",
        )


def _normalized(
    source: NDArray[np.float32], scheme: Normalization, mask: NDArray[np.bool_] | None, where: str
) -> NDArray[np.float32]:
    match scheme:
        case ZScore(masked=True):
            if mask is None:
                raise InputError("A masked z-score needs the nonzero mask.", where=where)
            return _scored_inside(source, mask, where)
        case ZScore():
            mean, std = source.mean(), source.std()
            require_finite(mean + std, where)  # an infinite deviation would make every voxel 0
            channel = source.copy()
            channel -= mean
            channel /= max(std, EPSILON)
        case CT():
            channel = source.copy()
            np.clip(channel, scheme.lower, scheme.upper, out=channel)
            channel -= scheme.mean
            channel /= max(scheme.std, EPSILON)
        case RescaleTo01():
            channel = source.copy()
            channel -= channel.min()
            channel /= max(channel.max(), EPSILON)
        case RGBTo01():
            require_rgb(float(source.min()), float(source.max()), where)
            channel = source.copy()
            channel /= 255.0
        case NoNormalization():
            channel = source.copy()
    return channel


def _scored_inside(source: NDArray[np.float32], mask: NDArray[np.bool_], where: str) -> NDArray[np.float32]:
    inside = source[mask]
    if inside.size == 0:
        return source.copy()
    mean = inside.mean()
    # the steps of `inside.std()`, in place
    inside -= mean
    std = np.sqrt(np.square(inside, out=inside).mean())
    require_finite(mean + std, where)
    del inside
    channel = source.copy()
    np.subtract(channel, mean, out=channel, where=mask)
    np.divide(channel, max(std, EPSILON), out=channel, where=mask)
    return channel


def require_rgb(low: float, high: float, where: str) -> None:
    """Raises InputError where a channel with values from `low` to `high` is none of an 8-bit RGB image."""
    if low < 0 or high > 255:
        raise InputError(
            "The image is not 8-bit RGB.",
            expected="values in 0..255",
            got=f"{low:g}..{high:g}",
            where=where,
            hint="check that the file is the kind of image the model was trained on",
        )
