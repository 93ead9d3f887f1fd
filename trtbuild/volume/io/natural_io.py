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
import PIL.Image
import tifffile
from numpy.typing import NDArray

from trtbuild.errors import CaseNotWritable, InputError, OutputError
from trtbuild.volume.image import Geometry, Header, Image, LabelImage, Map, PixelGeometry, Segmentation
from trtbuild.volume.io.foreign import labels_as_written, reading, written
from trtbuild.volume.io.labels import labels_from_file
from trtbuild.volume.io.stack import Part, header_from_files, image_from_files

TIFF = (".tif", ".tiff")
LOSSLESS = (*TIFF, ".png", ".bmp")
SPACING = (999.0, 1.0, 1.0)
"""nnU-Net's spacing of every picture (z, y, x)."""
COLOURS = (3, 4)
"""Channels of a colour picture: RGB, or RGB with alpha."""


def read_image(files: Sequence[Path], channels: tuple[str, ...]) -> Image:
    """See `ReaderWriter`. The image is (C, 1, Y, X)."""
    return image_from_files(files, channels, _part)


def read_segmentation(file: Path, *, allow_negative: bool = False) -> LabelImage:
    """See `ReaderWriter`."""
    return labels_from_file(file, _part, allow_negative)


def image_header(files: Sequence[Path], channels: tuple[str, ...]) -> Header | None:
    """See `ReaderWriter`. None for a palette or an animation, which show what they hold only when decoded."""
    return header_from_files(files, channels, _header)


def write_segmentation(segmentation: Segmentation | Map, geometry: Geometry, path: Path) -> None:
    """See `ReaderWriter`. Only endings that keep labels exactly are written."""
    if not isinstance(geometry, PixelGeometry):
        raise TypeError(f"NaturalImage2DIO writes pictures, not {type(geometry).__name__}")
    if path.suffix.lower() not in LOSSLESS:
        raise OutputError("Labels would not survive in this format.", expected=" | ".join(LOSSLESS), got=path.suffix,
                          where=path, hint="Use a model whose file_ending is one of these.")  # fmt: skip
    labels = _as_written(segmentation, path)[0]
    if path.suffix.lower() == ".bmp" and labels.dtype != np.uint8:
        raise CaseNotWritable("The labels do not fit the file: BMP has 8 bits per pixel.", expected="0 to 254",
                              got=f"0 to {int(segmentation.max())}", where=path,
                              hint="Train with .png or .tif pictures, which hold 16 bits.")  # fmt: skip
    with written(path) as temporary:
        if path.suffix.lower() in TIFF:
            tifffile.imwrite(temporary, labels)
        else:
            # Pillow does not notice a full disk when it writes BMP; these bytes are written by Python.
            encoded = imageio.v3.imwrite("<bytes>", labels, extension=path.suffix.lower(), plugin="pillow")
            temporary.write_bytes(encoded)


def _as_written(voxels: Segmentation | Map, path: Path) -> Segmentation:
    """Labels, and maps in TIFF, by `labels_as_written`; a map of 0 to 1 else as 0 to 65535 (PNG) or 0 to 254 (BMP).

    The scale of a map does not depend on its values: a PNG of one has 16 bits also where it is 0 everywhere.
    """
    if voxels.dtype.kind != "f" or path.suffix.lower() in TIFF:
        return labels_as_written(voxels, path)
    bmp = path.suffix.lower() == ".bmp"
    whole: Segmentation = np.rint(voxels * np.float32(254 if bmp else 65535)).astype(np.uint8 if bmp else np.uint16)
    return whole


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


def _header(file: Path) -> Header | None:
    with reading(file, "a png, bmp or tif picture"):
        shape, voxel_bytes = _tiff_shape(file) if file.suffix.lower() in TIFF else _pillow_shape(file)
    if len(shape) == 3 and shape[-1] not in COLOURS and shape[0] in COLOURS:
        shape = (*shape[1:], shape[0])  # planes first, as in `pixels_from_file`
    if len(shape) != 2 and not (len(shape) == 3 and shape[-1] in COLOURS):
        return None
    channels = 1 if len(shape) == 2 else shape[2]
    return Header(shape=(1, *shape[:2]), spacing=SPACING, channels=channels, voxel_bytes=voxel_bytes)


def _tiff_shape(file: Path) -> tuple[tuple[int, ...], int]:
    """Shape of the array to come, and bytes per number."""
    with tifffile.TiffFile(file) as tiff:
        return tuple(tiff.series[0].shape), tiff.series[0].dtype.itemsize


def _pillow_shape(file: Path) -> tuple[tuple[int, ...], int]:
    """The same of what Pillow reads; () where only decoding shows it."""
    with PIL.Image.open(file) as picture:
        bands = picture.getbands()
        if bands[0] == "P" or getattr(picture, "n_frames", 1) > 1:
            return (), 0
        colours = () if len(bands) == 1 else (len(bands),)
        voxel_bytes = 4 if picture.mode in ("I", "F") else 2 if picture.mode.startswith("I;16") else 1
        return (picture.height, picture.width, *colours), voxel_bytes


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
