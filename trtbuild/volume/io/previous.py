"""The labels that a cascade's first stage predicted, from a file, once it is sure that they belong to the image."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from trtbuild.spec import Reader
from trtbuild.volume.image import Image, LabelImage
from trtbuild.volume.io import reader_named
from trtbuild.volume.io.place import require_same_grid


def labels_for_image(file: Path, reader: Reader, image: Image) -> LabelImage:
    """The labels in `file` on the grid of `image`; its warnings name the file.

    Raises:
        InputError: the file cannot be read, holds no labels, or lies elsewhere than the image.
    """
    labels = reader_named(reader).read_segmentation(file)
    require_same_grid(image, labels, file)
    return replace(labels, warnings=tuple(f"{file.name}: {warning}" for warning in labels.warnings))
