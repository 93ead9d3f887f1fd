"""From an image as read to what the network sees, in nnU-Net's order (`DefaultPreprocessor.run_case_npy`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trtbuild.errors import InputError
from trtbuild.spec import ModelSpec
from trtbuild.volume.crop import Box, filled_nonzero_mask, nonzero_box
from trtbuild.volume.normalize import needs_mask, normalize_channel
from trtbuild.volume.resample import new_shape, resample

Shape = tuple[int, ...]
REAL = "biuf"
"""The kinds of NumPy's dtypes that hold real numbers."""


@dataclass(frozen=True, kw_only=True)
class CaseGrid:
    """The way back: every grid between the file and the network, in transposed axis order.

    `shape` is the image after `transpose_forward`, `box` the crop in it, `spacing` its spacing in mm, `target` the
    spacing after resampling, `resampled` the grid that the network sees.
    """

    shape: Shape
    box: Box
    spacing: tuple[float, ...]
    target: tuple[float, ...]
    resampled: Shape

    @property
    def cropped(self) -> Shape:
        """Shape of the crop."""
        return tuple(s.stop - s.start for s in self.box)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """`data` (C, Z, Y, X) float32 on the network's grid, and the way back."""

    data: NDArray[np.float32]
    grid: CaseGrid


def prepared_from_array(data: ArrayLike, spacing: Sequence[float], spec: ModelSpec) -> Prepared:
    """Transposes, crops, normalises and resamples one case.

    Args:
        data: (C, Z, Y, X) intensities as read, any real numbers; left unchanged.
        spacing: mm in array axis order (z, y, x).
        spec: the model.

    Raises:
        InputError: no real numbers, a masked array, wrong number of channels or axes, an empty axis, NaN, values
            beyond float32, a spacing that is not three positive numbers.
    """
    image, millimetres = _checked_image(data, spec), _checked_spacing(spacing)
    forward = spec.transpose_forward
    turned = image.transpose(0, *(axis + 1 for axis in forward))
    turned_spacing = tuple(millimetres[axis] for axis in forward)
    box = nonzero_box(turned)
    cropped = np.array(turned[(slice(None), *box)], dtype=np.float32, order="C", copy=True)

    mask = filled_nonzero_mask(cropped) if needs_mask(spec.normalization) else None
    for channel, scheme, name in zip(cropped, spec.normalization, spec.channels, strict=True):
        normalize_channel(channel, scheme, mask, f"channel {name}")

    # a 2-D configuration keeps the spacing between slices
    target = spec.spacing if spec.dimensions == 3 else (turned_spacing[0], *spec.spacing)
    shape = new_shape(cropped.shape[1:], turned_spacing, target)
    grid = CaseGrid(shape=turned.shape[1:], box=box, spacing=turned_spacing, target=target, resampled=shape)
    return Prepared(data=resample(cropped, shape, turned_spacing, target, spec.resample_data), grid=grid)


def _checked_image(data: ArrayLike, spec: ModelSpec) -> NDArray[np.float32]:
    given = _real_array(data)
    if given.ndim != 4:
        raise InputError("An image must have four axes.", expected="(channels, z, y, x)", got=f"shape {given.shape}")
    if len(given) != len(spec.channels):
        raise InputError(
            "The image has another number of channels than the model.",
            got=len(given),
            expected=f"{len(spec.channels)}: {', '.join(spec.channels)}",
        )
    if given.size == 0:
        raise InputError("The image is empty.", expected="at least one voxel on every axis", got=f"shape {given.shape}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused by name
        image = given.astype(np.float32, copy=False)
    for channel, original, name in zip(image, given, spec.channels, strict=True):
        if not np.isfinite(channel).all():
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(channel))[0])
            value = original[first]
            finite = bool(np.isfinite(value))
            raise InputError(
                "The intensities overflow float32." if finite else "The image holds NaN or infinity.",
                expected=f"values up to {np.finfo(np.float32).max:.2g}" if finite else None,
                got=value,
                where=f"channel {name}, first at voxel {first} (z, y, x)",
                hint="repair the file; a network would spread the value over a whole patch",
            )
    return image


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


def _checked_spacing(spacing: Sequence[float]) -> tuple[float, ...]:
    try:
        given = np.asarray(spacing)
    except (TypeError, ValueError):
        given = np.empty(0)
    usable = given.dtype.kind in REAL and given.shape == (3,)
    if not usable or not all(np.isfinite(s) and s > 0 for s in given):
        raise InputError("The spacing is not usable.", expected="three positive numbers (mm)", got=spacing)
    return tuple(float(s) for s in given)
