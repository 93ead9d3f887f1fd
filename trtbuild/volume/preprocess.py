"""From an image as read to what the network sees, in nnU-Net's order (`DefaultPreprocessor.run_case_npy`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError
from trtbuild.spec import ModelSpec
from trtbuild.volume.crop import Box, filled_nonzero_mask, nonzero_box
from trtbuild.volume.normalize import needs_mask, normalize_channel
from trtbuild.volume.resample import new_shape, resample

Shape = tuple[int, ...]


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


def prepared_from_array(data: NDArray[np.float32], spacing: tuple[float, ...], spec: ModelSpec) -> Prepared:
    """Transposes, crops, normalises and resamples one case.

    Args:
        data: (C, Z, Y, X) intensities as read; left unchanged.
        spacing: mm in array axis order (z, y, x).
        spec: the model.

    Raises:
        InputError: wrong number of channels or axes, NaN, a spacing that is not positive.
    """
    _check(data, spacing, spec)
    forward = spec.transpose_forward
    turned = data.transpose(0, *(axis + 1 for axis in forward))
    turned_spacing = tuple(float(spacing[axis]) for axis in forward)
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


def _check(data: NDArray[np.float32], spacing: tuple[float, ...], spec: ModelSpec) -> None:
    if data.ndim != 4:
        raise InputError("An image must have four axes.", expected="(channels, z, y, x)", got=f"shape {data.shape}")
    if len(data) != len(spec.channels):
        raise InputError(
            "The image has another number of channels than the model.",
            got=len(data),
            expected=f"{len(spec.channels)}: {', '.join(spec.channels)}",
        )
    if len(spacing) != 3 or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise InputError("The spacing is not usable.", expected="three positive numbers (mm)", got=tuple(spacing))
    for channel, name in zip(data, spec.channels, strict=True):
        if not np.isfinite(channel).all():
            first = tuple(int(i) for i in np.argwhere(~np.isfinite(channel))[0])
            raise InputError(
                "The image holds NaN or infinity.",
                where=f"channel {name}, first at voxel {first} (z, y, x)",
                hint="repair the file; a network would spread the value over a whole patch",
            )
