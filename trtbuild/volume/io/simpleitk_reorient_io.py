"""nnU-Net's SimpleITKIOWithReorient: whatever ITK reads, turned to the nearest RAS axes for the network, and back.

Where nnU-Net's class fails or loses labels, this one does not:

- it casts every segmentation to uint8, so that label 256 becomes 0; here the rule is that of the other readers;
- it cannot read a 2-D image; here that is the only slice of a 3-D one (with `SimpleITKIO`'s spacing), and the file
  that is written is 2-D again;
- it cannot read a 4-D image; here its channels are turned one by one, as if each had a file of its own;
- it gives the segmentation the axes of the last channel's file; here it has those of the first, as everywhere else.

The way back does not turn twice: origin, spacing and direction of the file written are those of the file read, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from trtbuild.volume.image import (
    Geometry,
    Header,
    Image,
    ItkGeometry,
    LabelImage,
    Map,
    ReorientedGeometry,
    Segmentation,
)
from trtbuild.volume.io.foreign import reading
from trtbuild.volume.io.labels import labels_from_file
from trtbuild.volume.io.place import spatial
from trtbuild.volume.io.simpleitk_io import (
    array_spacing,
    floats_from,
    header_from_itk,
    itk_from_file,
    itk_header_from_file,
    place_of,
    write_itk,
)
from trtbuild.volume.io.stack import Part, header_from_files, image_from_files
from trtbuild.volume.io.turn import turned_back, turned_header

ORIENTATION = "RAS"
AXES = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
"""Which axis of space a letter of ITK's orientations is about."""


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
    """See `ReaderWriter`. The file has the input's axes and dimension; of a 4-D input the first three."""
    place = reoriented_geometry(geometry)
    turned, original = (np.reshape(one.direction, (3, 3)) for one in (place.turned, _in_3d(place.original)))
    write_itk(turned_back(segmentation, turned, original), place.original, path)


def nnunet_properties(image: Image) -> dict[str, Any]:
    """See `ReaderWriter`."""
    place = reoriented_geometry(image.geometry)
    stuff = {"spacing": place.turned.spacing, "origin": place.turned.origin, "direction": place.turned.direction,
             "original_orientation": place.orientation}  # fmt: skip
    return {"sitk_stuff": stuff, "spacing": list(image.spacing)}


def reoriented_geometry(geometry: Geometry) -> ReorientedGeometry:
    """The geometry itself; a TypeError where another reader made it."""
    if not isinstance(geometry, ReorientedGeometry):
        raise TypeError(f"SimpleITKIOWithReorient uses what it has read, not {type(geometry).__name__}")
    return geometry


def part_from_array(data: NDArray[np.float32], place: ItkGeometry) -> Part:
    """What this reader gives for an image (Z, Y, X) that lies at `place`, in 3-D."""
    blank = sitk.Image(data.shape[::-1], sitk.sitkUInt8)  # turned in the place of the four times larger voxels
    blank.SetSpacing(place.spacing)
    blank.SetOrigin(place.origin)
    blank.SetDirection(place.direction)
    turned = place_of(sitk.DICOMOrient(blank, ORIENTATION))
    view = turned_back(data, np.reshape(place.direction, (3, 3)), np.reshape(turned.direction, (3, 3)))
    return _part_of(np.ascontiguousarray(view)[None], array_spacing(turned), place, turned)


def header_of_array(shape: tuple[int, int, int], place: ItkGeometry) -> Header:
    """The header of `part_from_array`, which copies once."""
    header = Header(shape=shape, spacing=array_spacing(place), channels=1, voxel_bytes=4)
    return _turned_header(header, place)


def _part(file: Path) -> Part:
    itk = itk_from_file(file)
    with reading(file, "an image with a direction that ITK can turn"):
        return _part_from_volumes(_volumes(itk), place_of(itk))


def _part_from_volumes(volumes: list[Any], original: ItkGeometry) -> Part:
    data, turned = [], original
    while volumes:  # each is let go once it is turned
        itk = sitk.DICOMOrient(volumes.pop(0), ORIENTATION)
        data.append(floats_from(itk))
        turned = place_of(itk)
    spacing = array_spacing(turned)
    if original.dimension == 2:
        # the slice axis stays the third: two dimensions cannot turn into it
        spacing = array_spacing(replace(turned, spacing=turned.spacing[:2]))
    return _part_of(data[0][None] if len(data) == 1 else np.stack(data), spacing, original, turned)


def _part_of(
    data: NDArray[np.float32], spacing: tuple[float, float, float], original: ItkGeometry, turned: ItkGeometry
) -> Part:
    geometry = ReorientedGeometry(original=original, turned=turned, orientation=_orientation(original))
    return Part(data=data, spacing=spacing, geometry=geometry,
                placement={"origin": turned.origin, "direction": turned.direction})  # fmt: skip


def _volumes(itk: Any) -> list[Any]:
    """The 3-D images that an image with 2 to 4 dimensions consists of."""
    if itk.GetDimension() == 2:
        return [sitk.JoinSeries([itk])]  # origin 0, spacing 1 and its own direction along the new axis
    if itk.GetDimension() == 3:
        return [itk]
    *size, count = itk.GetSize()
    collapse = sitk.ExtractImageFilter.DIRECTIONCOLLAPSETOSUBMATRIX
    return [sitk.Extract(itk, [*size, 0], [0, 0, 0, index], collapse) for index in range(count)]


def _header(file: Path) -> Header:
    reader = itk_header_from_file(file)
    place = place_of(reader)
    header = header_from_itk(reader, place)
    # ITK holds the image twice when it turns it
    return _turned_header(replace(header, voxel_bytes=2 * header.voxel_bytes), place)


def _turned_header(header: Header, place: ItkGeometry) -> Header:
    return turned_header(header, [AXES[letter] for letter in _orientation(place)])


def _orientation(place: ItkGeometry) -> str:
    name: str = sitk.DICOMOrientImageFilter_GetOrientationFromDirectionCosines(_in_3d(place).direction)
    return name


def _in_3d(place: ItkGeometry) -> ItkGeometry:
    """The place of the 3-D images that `_volumes` makes."""
    if place.dimension != 2:
        return spatial(place)
    a, b, c, d = place.direction
    return ItkGeometry(spacing=(*place.spacing, 1.0), origin=(*place.origin, 0.0),
                       direction=(a, b, 0.0, c, d, 0.0, 0.0, 0.0, 1.0))  # fmt: skip
