"""nnU-Net's SimpleITKIO: whatever ITK reads, in 2-D, in 3-D, or in 4-D with the channels along the fourth axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from trtbuild.errors import CaseNotWritable, InputError
from trtbuild.volume.image import Geometry, Header, Image, ItkGeometry, LabelImage, Map, Segmentation
from trtbuild.volume.io.foreign import labels_as_written, reading, written
from trtbuild.volume.io.labels import labels_from_file
from trtbuild.volume.io.place import spatial
from trtbuild.volume.io.sound import require_sound
from trtbuild.volume.io.stack import Part, header_from_files, image_from_files

SLICE_SPACING = 999
"""The spacing that nnU-Net gives to the slice axis of a 2-D image, in units of its largest spacing."""
VOXEL_BYTES = {
    sitk.sitkInt8: 1, sitk.sitkUInt8: 1, sitk.sitkInt16: 2, sitk.sitkUInt16: 2, sitk.sitkInt32: 4, sitk.sitkUInt32: 4,
    sitk.sitkInt64: 8, sitk.sitkUInt64: 8, sitk.sitkFloat32: 4, sitk.sitkFloat64: 8,
}  # fmt: skip
"""The pixel types that hold one real number; ITK has others for vectors, complex numbers and labels."""


def read_image(files: Sequence[Path], channels: tuple[str, ...]) -> Image:
    """See `ReaderWriter`. A 2-D image gets a slice axis; a 4-D file holds its channels along the last ITK axis."""
    return image_from_files(files, channels, _part)


def read_segmentation(file: Path, *, allow_negative: bool = False) -> LabelImage:
    """See `ReaderWriter`."""
    return labels_from_file(file, _part, allow_negative)


def image_header(files: Sequence[Path], channels: tuple[str, ...]) -> Header | None:
    """See `ReaderWriter`."""
    return header_from_files(files, channels, _header)


def write_segmentation(segmentation: Segmentation | Map, geometry: Geometry, path: Path) -> None:
    """See `ReaderWriter`. The file has the input's dimension; of a 4-D input, where nnU-Net fails, its first three."""
    if not isinstance(geometry, ItkGeometry):
        raise TypeError(f"SimpleITKIO writes what it has read, not {type(geometry).__name__}")
    write_itk(segmentation, geometry, path)


def write_itk(segmentation: Segmentation | Map, geometry: ItkGeometry, path: Path) -> None:
    """Writes labels (Z, Y, X) to where the image lies, in 2-D if that is, else in 3-D; raises OutputError."""
    _require_utf8(path, CaseNotWritable)
    place = spatial(geometry)
    labels = labels_as_written(segmentation, path)
    with written(path) as temporary:
        itk = sitk.GetImageFromArray(labels[0] if place.dimension == 2 else labels)
        itk.SetSpacing(place.spacing)
        itk.SetOrigin(place.origin)
        itk.SetDirection(place.direction)
        sitk.WriteImage(itk, str(temporary), True)
        _checked_header(temporary)  # ITK does not notice a full disk when it writes NIfTI or GIPL.


def nnunet_properties(image: Image) -> dict[str, Any]:
    """See `ReaderWriter`."""
    place = image.geometry
    if not isinstance(place, ItkGeometry):
        raise TypeError(f"SimpleITKIO describes what it has read, not {type(place).__name__}")
    return {
        "sitk_stuff": {"spacing": place.spacing, "origin": place.origin, "direction": place.direction},
        "spacing": list(image.spacing),
    }


def part_from_array(data: NDArray[np.float32], place: ItkGeometry) -> Part:
    """What this reader gives for an image (Z, Y, X) that lies at `place`, in 3-D."""
    return Part(data=data[None], spacing=array_spacing(place), geometry=place,
                placement={"origin": place.origin, "direction": place.direction})  # fmt: skip


def header_of_array(shape: tuple[int, int, int], place: ItkGeometry) -> Header:
    """The header of `part_from_array`, which copies nothing."""
    return Header(shape=shape, spacing=array_spacing(place), channels=1, voxel_bytes=0)


def _part(file: Path) -> Part:
    itk = itk_from_file(file)
    place = place_of(itk)
    data = floats_from(itk)
    if place.dimension == 2:
        data = data[None, None]
    elif place.dimension == 3:
        data = data[None]
    return Part(data=data, spacing=array_spacing(place), geometry=place,
                placement={"origin": place.origin, "direction": place.direction})  # fmt: skip


def _header(file: Path) -> Header:
    reader = itk_header_from_file(file)
    return header_from_itk(reader, place_of(reader))


def header_from_itk(reader: Any, place: ItkGeometry) -> Header:
    """The header of what a sitk.ImageFileReader has looked at."""
    x, y, z, t = (*reader.GetSize(), 1, 1)[:4]
    return Header(shape=(z, y, x), spacing=array_spacing(place), channels=t,
                  voxel_bytes=VOXEL_BYTES[reader.GetPixelID()])  # fmt: skip


def itk_header_from_file(file: Path) -> Any:
    """A sitk.ImageFileReader that has read the header of an image with 2 to 4 dimensions and one number per voxel.

    Raises:
        InputError: it is something else.
    """
    _require_utf8(file, InputError)
    with reading(file, "an image that ITK understands"):
        return _header_read(file)


def itk_from_file(file: Path) -> Any:
    """The sitk.Image of a file that is whole, with 2 to 4 dimensions and one number per voxel.

    Raises:
        InputError: it is not.
    """
    _require_utf8(file, InputError)
    with reading(file, "an image that ITK understands"):
        itk = _checked_header(file).Execute()
    if itk.GetDimension() == 4:
        _require_separate_channels(place_of(itk), file)
    return itk


def floats_from(itk: Any) -> NDArray[np.float32]:
    """A copy of the voxels as float32, axes (t, z, y, x) as far as the image has them."""
    # The view is a window on ITK's memory and must not outlive `itk`, so this always copies.
    with np.errstate(over="ignore"):  # A value beyond float32 becomes infinite, which is refused by name.
        return np.array(sitk.GetArrayViewFromImage(itk), np.float32)


def place_of(itk: Any) -> ItkGeometry:
    """Where an image lies, or the one whose header a reader has read."""
    return ItkGeometry(spacing=itk.GetSpacing(), origin=itk.GetOrigin(), direction=itk.GetDirection())


def array_spacing(place: ItkGeometry) -> tuple[float, float, float]:
    """nnU-Net's spacing (z, y, x) of an image with 2 to 4 dimensions."""
    x, y = place.spacing[:2]
    return (max(x, y) * SLICE_SPACING if place.dimension == 2 else place.spacing[2]), y, x


def _require_utf8(path: Path, error: type[InputError] | type[CaseNotWritable]) -> None:
    """An `error` where ITK would end the process: it throws through SimpleITK over a name that is not UTF-8."""
    try:
        str(path).encode()
    except UnicodeEncodeError as problem:
        name = str(path).encode(errors="backslashreplace").decode()
        raise error("The file name is not UTF-8.", where=name, hint="Rename the file and its folders.") from problem


def _checked_header(file: Path) -> Any:
    """A sitk.ImageFileReader that has read the header, once the file has proved to be as long as that promises."""
    reader = _header_read(file)
    require_sound(file, math.prod(reader.GetSize()) * VOXEL_BYTES[reader.GetPixelID()])
    return reader


def _header_read(file: Path) -> Any:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    pixel, dimension = reader.GetPixelID(), reader.GetDimension()
    if pixel not in VOXEL_BYTES:
        kind = f"{reader.GetNumberOfComponents()} times {sitk.GetPixelIDValueAsString(pixel)}"
        raise InputError("The image has no plain intensities.", expected="one real number per voxel", got=kind,
                         where=file,
                         hint="Write each component as a channel of its own: one file each.")  # fmt: skip
    if dimension not in (2, 3, 4):
        raise InputError("The image has the wrong number of dimensions.", expected="2, 3, or 4 with the channels last",
                         got=dimension, where=file, hint="Write each channel as a 3-D image.")  # fmt: skip
    return reader


def _require_separate_channels(place: ItkGeometry, file: Path) -> None:
    """An InputError where the channel axis of a 4-D image is tilted against space: no 3-D image lies like that."""
    direction = np.reshape(place.direction, (4, 4))
    if np.any(direction[3, :3]) or np.any(direction[:3, 3]):
        raise InputError("The fourth axis of the image is tilted against space.", got=direction.tolist(), where=file,
                         expected="a direction in which x, y, z are apart from the channels",
                         hint="Write each channel as a 3-D image.")  # fmt: skip
