"""A file of labels becomes integers, as exact as nnU-Net's read_seg and without its silence about what is no label."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError
from trtbuild.volume.image import LabelImage, Segmentation
from trtbuild.volume.io.stack import Part, checked, require_files

LARGEST = 2**24 - 1
"""nnU-Net reads labels as float32, which holds every integer up to here."""


def labels_from_file(file: Path, read: Callable[[Path], Part], allow_negative: bool) -> LabelImage:
    """See `ReaderWriter.read_segmentation`; `read` is how the reader takes an image file."""
    require_files([file], ("labels",))
    part = checked(read(file), file)
    if len(part.data) != 1:
        raise InputError("The file holds several channels, and labels have one.", expected="(1, z, y, x)",
                         got=part.data.shape, where=file,
                         hint="Write the labels as one plain 2-D or 3-D image.")  # fmt: skip
    labels = _integers(part.data[0], file, allow_negative)
    return LabelImage(labels=labels, spacing=part.spacing, geometry=part.geometry)


def _integers(values: NDArray[np.float32], file: Path, allow_negative: bool) -> Segmentation:
    """The values (Z, Y, X) in the smallest of uint8, uint16 and int32 that holds them all; no float64 copy is made."""
    low, high = float(values.min()), float(values.max())
    least = -LARGEST if allow_negative else 0
    if low < least or high > LARGEST:
        raise InputError("The file holds values that are no labels.", expected=f"whole numbers from {least} on",
                         got=f"{low:g} to {high:g}", where=file,
                         hint="Is it an image instead of a segmentation? Labels start at 0.")  # fmt: skip
    dtype: type[np.integer[Any]] = np.uint8 if high <= 255 else np.uint16 if high <= 65535 else np.int32
    labels: Segmentation = np.empty(values.shape, np.int32 if low < 0 else dtype)
    for z, plane in enumerate(values):
        labels[z] = plane
        wrong = labels[z] != plane
        if wrong.any():
            y, x = np.unravel_index(int(wrong.argmax()), wrong.shape)
            raise InputError("The file holds fractions, and labels are whole numbers.", where=file,
                             got=f"{plane[y, x]} at (z, y, x) = ({z}, {y}, {x})",
                             hint="Was the segmentation resampled like an image? Use the original.")  # fmt: skip
    return labels
