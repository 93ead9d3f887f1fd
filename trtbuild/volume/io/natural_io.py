"""nnU-Net's NaturalImage2DIO: png, bmp and tif pictures, grey or with colours as channels.

nnU-Net reads through skimage.io, which hands tif to tifffile and the rest to imageio's pillow plugin. The same two are
called here, in the same way, because other libraries return other arrays for grey BMP, 1-bit and LA PNG, and planar
TIFF.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import imageio.v3
import numpy as np
import tifffile
from numpy.typing import NDArray

from trtbuild.errors import InputError, OutputError
from trtbuild.volume.image import Geometry, Image, PixelGeometry, Segmentation
from trtbuild.volume.io.foreign import labels_as_written, reading, written
from trtbuild.volume.io.stack import Part, image_from_files

TIFF = (".tif", ".tiff")
LOSSLESS = (*TIFF, ".png", ".bmp")
SPACING = (999.0, 1.0, 1.0)
"""nnU-Net's spacing of every picture (z, y, x)."""
COLOURS = (3, 4)
"""Channels of a colour picture: RGB, or RGB with alpha."""


def read_image(files: Sequence[Path], channels: tuple[str, ...]) -> Image:
    """See `ReaderWriter`. The image is (C, 1, Y, X)."""
    return image_from_files(files, channels, _part)


def write_segmentation(segmentation: Segmentation, geometry: Geometry, path: Path) -> None:
    """See `ReaderWriter`. Only endings that keep labels exactly are written."""
    if not isinstance(geometry, PixelGeometry):
        raise TypeError(f"NaturalImage2DIO writes pictures, not {type(geometry).__name__}")
    if path.suffix.lower() not in LOSSLESS:
        raise OutputError("Labels would not survive in this format.", expected=" | ".join(LOSSLESS), got=path.suffix,
                          where=path, hint="Use a model whose file_ending is one of these.")  # fmt: skip
    labels = labels_as_written(segmentation, path)[0]
    with written(path) as temporary:
        if path.suffix.lower() in TIFF:
            tifffile.imwrite(temporary, labels)
        else:
            # Pillow does not notice a full disk when it writes BMP; these bytes are written by Python.
            encoded = imageio.v3.imwrite("<bytes>", labels, extension=path.suffix.lower(), plugin="pillow")
            temporary.write_bytes(encoded)


def nnunet_properties(image: Image) -> dict[str, Any]:
    """See `ReaderWriter`."""
    return {"spacing": image.spacing}


def pixels_from_file(file: Path) -> NDArray[Any]:
    """The array that ``skimage.io.imread`` returns for the file: (Y, X) or (Y, X, C), of the file's own type."""
    if file.suffix.lower() in TIFF:
        with tifffile.TiffFile(file) as tiff:
            pixels: NDArray[Any] = tiff.asarray()
    else:
        pixels = imageio.v3.imread(file, plugin="pillow")
    if pixels.ndim > 2 and pixels.shape[-1] not in COLOURS and pixels.shape[-3] in COLOURS:
        pixels = pixels.swapaxes(-1, -3).swapaxes(-2, -3)
    return pixels


def _part(file: Path) -> Part:
    with reading(file, "a png, bmp or tif picture"):
        pixels = pixels_from_file(file)
    if pixels.dtype.kind not in "buif":
        raise InputError("The picture has no plain intensities.", expected="real numbers", got=pixels.dtype, where=file)
    if pixels.ndim != 2 and not (pixels.ndim == 3 and pixels.shape[-1] in COLOURS):
        raise InputError("The file is no picture of the kind that this model takes.", where=file, got=pixels.shape,
                         expected="(y, x), or (y, x, 3) and (y, x, 4) for RGB and RGBA",
                         hint="Save it as plain grey or RGB; a stack of slices is no 2-D picture.")  # fmt: skip
    planes = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    with np.errstate(over="ignore"):  # A value beyond float32 becomes infinite, which is refused by name.
        data = np.ascontiguousarray(planes[:, None], dtype=np.float32)
    return Part(data=data, spacing=SPACING, geometry=PixelGeometry(), placement={})
