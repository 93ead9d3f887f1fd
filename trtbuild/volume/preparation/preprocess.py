"""From an image as read to what the network sees, in nnU-Net's order (`DefaultPreprocessor.run_case_npy`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trtbuild.errors import InputError
from trtbuild.spec import ModelSpec
from trtbuild.volume.preparation.checks import checked_image, checked_previous, checked_spacing
from trtbuild.volume.preparation.crop import Box, filled_nonzero_mask, nonzero_box
from trtbuild.volume.preparation.normalize import needs_mask, normalized_channel
from trtbuild.volume.resampling.image import new_shape, resample_into
from trtbuild.volume.resampling.labels import resample_segmentation

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


def grid_of_case(shape: Shape, box: Box, spacing: tuple[float, ...], spec: ModelSpec) -> CaseGrid:
    """The way back of an image of `shape` with `spacing` (mm), both in transposed axis order, and its crop.

    Raises:
        InputError: the resampled grid is empty or too large (`new_shape`).
    """
    # a 2-D configuration keeps the spacing between slices
    target = spec.spacing if spec.dimensions == 3 else (spacing[0], *spec.spacing)
    resampled = tuple(s.stop - s.start for s in box)
    if spec.resample_data.method != "none":
        resampled = new_shape(resampled, spacing, target)
    return CaseGrid(shape=shape, box=box, spacing=spacing, target=target, resampled=resampled)


def uncropped_grid(shape: Sequence[int], spacing: Sequence[float], spec: ModelSpec) -> CaseGrid:
    """The way back of an image (Z, Y, X) without a rim of zeros, from its shape and spacing in its own axis order.

    Raises:
        InputError: see `grid_of_case`.
    """
    z, y, x = (shape[axis] for axis in spec.transpose_forward)
    turned = tuple(float(spacing[axis]) for axis in spec.transpose_forward)
    return grid_of_case((z, y, x), (slice(0, z), slice(0, y), slice(0, x)), turned, spec)


def prepared_from_array(
    data: ArrayLike, spacing: Sequence[float], spec: ModelSpec, previous: NDArray[Any] | None = None
) -> Prepared:
    """Transposes, crops, normalises and resamples one case.

    Args:
        data: (C, Z, Y, X) intensities as read, any real numbers; left unchanged.
        spacing: mm in array axis order (z, y, x).
        spec: the model.
        previous: for the second stage of a cascade the first stage's segmentation, integers (Z, Y, X) on the image's
            own grid. It goes through crop and resampling with the image, and becomes one channel of zeros and ones per
            foreground label, below the image's channels.

    Raises:
        InputError: no real numbers, a masked array, wrong number of channels or axes, an empty axis, NaN, values
            beyond float32, a spacing that is not three positive numbers; `previous` missing, not asked for, of another
            shape, or with values that are no labels of the model.
        ModelError: the plans resample the images, but give no way to resample `previous`.
    """
    image, millimetres = checked_image(data, spec), checked_spacing(spacing)
    labels = checked_previous(previous, image.shape[1:], spec)
    forward = spec.transpose_forward
    turned = image.transpose(0, *(axis + 1 for axis in forward))
    turned_spacing = tuple(millimetres[axis] for axis in forward)
    box = nonzero_box(turned)
    cropped = turned[(slice(None), *box)]

    grid = grid_of_case(turned.shape[1:], box, turned_spacing, spec)

    mask = filled_nonzero_mask(cropped) if labels is not None or needs_mask(spec.normalization) else None
    result = np.empty((spec.network_channels, *grid.resampled), dtype=np.float32)
    if labels is not None and mask is not None:
        marked = _marked(labels.transpose(forward)[box], mask)
        mask = marked >= 0 if needs_mask(spec.normalization) else None
        _write_one_hot(result[len(spec.channels) :], marked, grid, spec)
        del marked
    for index, (scheme, name) in enumerate(zip(spec.normalization, spec.channels, strict=True)):
        channel = normalized_channel(cropped[index], scheme, mask, f"channel {name}")
        resample_into(result[index : index + 1], channel[None], grid.spacing, grid.target, spec.resample_data)
        del channel  # before the next one is made
    return Prepared(data=result, grid=grid)


def labels_on_grid(
    labels: NDArray[np.integer[Any]], image: NDArray[Any], grid: CaseGrid, spec: ModelSpec
) -> NDArray[np.signedinteger[Any]]:
    """Labels as nnU-Net prepares those of training cases: cropped and resampled as the image, -1 where that is 0.

    Args:
        labels: (Z, Y, X) on the image's own grid.
        image: (C, Z, Y, X) as read.
        grid: how the image was prepared.
        spec: of the model.

    Raises:
        InputError: the labels have another shape than the image.
        ModelError: the plans give no way to resample segmentations.
    """
    forward = spec.transpose_forward
    turned = labels.transpose(forward)
    if turned.shape != grid.shape:
        raise InputError("The labels do not fit their image.", expected=grid.shape, got=turned.shape)
    cropped = image.transpose(0, *(axis + 1 for axis in forward))[(slice(None), *grid.box)]
    marked = _marked(turned[grid.box], filled_nonzero_mask(cropped))
    return resample_segmentation(marked, grid.resampled, grid.spacing, grid.target, spec.resample_segmentation)


def _marked(labels: NDArray[np.integer[Any]], mask: NDArray[np.bool_]) -> NDArray[np.signedinteger[Any]]:
    """A copy of the cropped labels, -1 where they are background outside the nonzero mask (`crop_to_nonzero`).

    nnU-Net casts what comes of it to int8 or int16, which turns labels above 32767 negative; these stay what they are.
    """
    small = labels.max() <= np.iinfo(np.int16).max
    marked: NDArray[np.signedinteger[Any]] = labels.astype(np.int16 if small else np.int32, order="C")
    for plane, inside in zip(marked, mask, strict=True):
        plane[(plane == 0) & ~inside] = -1
    return marked


def _write_one_hot(
    out: NDArray[np.float32], marked: NDArray[np.signedinteger[Any]], grid: CaseGrid, spec: ModelSpec
) -> None:
    """The resampled labels as zeros and ones, one channel per foreground label (`convert_labelmap_to_one_hot`)."""
    resampled = resample_segmentation(marked, grid.resampled, grid.spacing, grid.target, spec.resample_segmentation)
    for channel, label in zip(out, spec.labels.foreground, strict=True):
        np.equal(resampled, label, out=channel)
