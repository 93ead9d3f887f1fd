"""What a caller hands over, checked and converted: the image, its spacing, the previous stage's segmentation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trtbuild.errors import InputError
from trtbuild.spec import ModelSpec

REAL = "biuf"
"""The kinds of NumPy's dtypes that hold real numbers."""
HIGHEST_LABEL = 65535  # nnU-Net's writers hold a segmentation in uint16 at most
LISTED = 8  # labels that a message names


def checked_image(data: ArrayLike, spec: ModelSpec) -> NDArray[np.float32]:
    """The image (C, Z, Y, X) as float32, itself if it is already.

    Raises:
        InputError: see `checked_array`; NaN, values beyond float32.
    """
    given = checked_array(data, spec)
    with np.errstate(over="ignore"):  # what becomes infinite is refused by name
        image = given.astype(np.float32, copy=False)
    for channel, original, name in zip(image, given, spec.channels, strict=True):
        if not np.isfinite(channel).all():
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(channel))[0])
            raise not_finite(original[first], first, name)
    return image


def checked_array(data: ArrayLike, spec: ModelSpec) -> NDArray[Any]:
    """The image (C, Z, Y, X) in its own type; whether its values are finite is not looked at.

    Raises:
        InputError: no real numbers, a masked array, wrong number of channels or axes, an empty axis.
    """
    given = _real_array(data)
    check_shape(given.shape, spec)
    return given


def check_shape(shape: tuple[int, ...], spec: ModelSpec) -> None:
    """Raises InputError where an image of this shape is none of the model's: it should be (C, Z, Y, X)."""
    if len(shape) != 4:
        raise InputError("An image must have four axes.", expected="(channels, z, y, x)", got=f"shape {shape}")
    if shape[0] != len(spec.channels):
        raise InputError(
            "The image has another number of channels than the model.",
            got=shape[0],
            expected=f"{len(spec.channels)}: {', '.join(spec.channels)}",
        )
    if 0 in shape:
        raise InputError("The image is empty.", expected="at least one voxel on every axis", got=f"shape {shape}")


def not_finite(value: Any, voxel: tuple[int, ...], channel: str) -> InputError:
    """The error of an image with a value that is NaN, infinite, or infinite in float32; `voxel` (z, y, x) as read."""
    finite = bool(np.isfinite(value))
    return InputError(
        "The intensities overflow float32." if finite else "The image holds NaN or infinity.",
        expected=f"values up to {np.finfo(np.float32).max:.2g}" if finite else None,
        got=value,
        where=f"channel {channel}, first at voxel {voxel} (z, y, x)",
        hint="repair the file; a network would spread the value over a whole patch",
    )


def _real_array(data: ArrayLike) -> NDArray[Any]:
    """The array of anything that holds real numbers; other things are not converted but refused."""
    if isinstance(data, np.ma.MaskedArray):
        raise InputError(
            "The image is a masked array.",
            expected="a plain array",
            got="numpy.ma.MaskedArray",
            hint="say what masked voxels are: array.filled(0)",
        )
    try:
        given = np.asarray(data)
    except (TypeError, ValueError) as error:  # rows of different lengths, or an array of a device
        raise InputError("The image is no array.", expected="(channels, z, y, x)", got=error) from error
    if given.dtype.kind not in REAL:
        raise InputError("The image holds no real numbers.", expected="integers or floats", got=f"dtype {given.dtype}")
    return given


def checked_spacing(spacing: Sequence[float]) -> tuple[float, ...]:
    """Three positive numbers (mm), or InputError."""
    try:
        given = np.asarray(spacing)
    except (TypeError, ValueError):
        given = np.empty(0)
    usable = given.dtype.kind in REAL and given.shape == (3,)
    if not usable or not all(np.isfinite(s) and s > 0 for s in given):
        raise InputError("The spacing is not usable.", expected="three positive numbers (mm)", got=spacing)
    return tuple(float(s) for s in given)


def checked_previous(
    previous: NDArray[Any] | None, shape: tuple[int, ...], spec: ModelSpec
) -> NDArray[np.integer[Any]] | None:
    """The previous stage's segmentation (Z, Y, X) as it is.

    Raises:
        InputError: it is given for a model without a previous stage, or missing for one with it; not an integer array
            of the image's `shape`; values that are no labels of the model.
    """
    if (previous is None) != (spec.previous_stage is None):
        raise InputError(
            "The model needs the segmentation of its previous stage."
            if previous is None
            else "The model has no previous stage, but the segmentation of one was given.",
            expected=f"the labels that {spec.previous_stage} predicted for this image" if previous is None else "none",
            got="none" if previous is None else "a segmentation",
            where=f"configuration {spec.configuration}",
        )
    if previous is None:
        return None
    if not isinstance(previous, np.ndarray) or previous.dtype.kind not in "iu" or previous.shape != shape:
        got = f"{previous.dtype} {previous.shape}" if isinstance(previous, np.ndarray) else type(previous).__name__
        raise InputError(
            "The previous stage's segmentation does not fit the image.",
            expected=f"an integer array of shape {shape}",
            got=got,
            hint="it must be a segmentation of this very image, on its own grid",
        )
    _require_labels(previous, spec)
    return previous


def _require_labels(previous: NDArray[np.integer[Any]], spec: ModelSpec) -> None:
    labels = spec.labels
    known = {0, *labels.foreground, *labels.values}
    strange = sorted(_present(previous) - known)
    if strange:
        more = f" and {len(strange) - LISTED} more" if len(strange) > LISTED else ""
        raise InputError(
            "The previous stage's segmentation holds values that are no labels of the model.",
            expected=f"labels in {min(known)}..{max(known)}",
            got=", ".join(map(str, strange[:LISTED])) + more,
            where=f"configuration {spec.configuration}",
            hint="it must come from a model with the same labels",
        )


def _present(labels: NDArray[np.integer[Any]]) -> set[int]:
    """The values in `labels` (Z, Y, X); where some are outside 0..65535, only the least and the greatest."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high > HIGHEST_LABEL:
        return {low, high}
    table = np.zeros(high + 1, dtype=bool)
    for plane in labels:  # slice by slice: indexing makes an int64 of every voxel
        table[plane] = True
    return {int(value) for value in np.flatnonzero(table)}
