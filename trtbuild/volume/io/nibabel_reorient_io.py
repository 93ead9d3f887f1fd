"""nnU-Net's NibabelIOWithReorient: 3-D NIfTI turned to the nearest RAS axes for the network, and back for the file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray

from trtbuild.volume.image import Geometry, Header, Image, ItkGeometry, LabelImage, Map, NibabelGeometry, Segmentation
from trtbuild.volume.io.foreign import labels_as_written, reading, written
from trtbuild.volume.io.labels import labels_from_file
from trtbuild.volume.io.nibabel_io import (
    affine_from_itk,
    header_from,
    header_opened,
    lists_from,
    nibabel_geometry,
    opened,
    rows_from,
    spacing_from,
    voxels_from,
)
from trtbuild.volume.io.stack import Part, header_from_files, image_from_files


def read_image(files: Sequence[Path], channels: tuple[str, ...]) -> Image:
    """See `ReaderWriter`."""
    return image_from_files(files, channels, _part)


def read_segmentation(file: Path, *, allow_negative: bool = False) -> LabelImage:
    """See `ReaderWriter`."""
    return labels_from_file(file, _part, allow_negative)


def image_header(files: Sequence[Path], channels: tuple[str, ...]) -> Header | None:
    """See `ReaderWriter`."""
    return header_from_files(files, channels, _header)


def write_segmentation(segmentation: Segmentation | Map, geometry: Geometry, path: Path) -> None:
    """See `ReaderWriter`. The file has the axes of the input file."""
    place = nibabel_geometry(geometry)
    labels = labels_as_written(segmentation, path).transpose(2, 1, 0)
    with written(path) as temporary:
        to_file = ornt_transform(axcodes2ornt("RAS"), io_orientation(np.array(place.original_affine)))
        image = nibabel.Nifti1Image(labels, np.array(place.affine)).as_reoriented(to_file)
        nibabel.save(image, temporary)


def nnunet_properties(image: Image) -> dict[str, Any]:
    """See `ReaderWriter`. nnU-Net's affines are arrays, these are lists of rows."""
    place = nibabel_geometry(image.geometry)
    affines = {"original_affine": lists_from(place.original_affine), "reoriented_affine": lists_from(place.affine)}
    return {"nibabel_stuff": affines, "spacing": list(image.spacing)}


def part_from_array(data: NDArray[np.float32], place: ItkGeometry) -> Part:
    """What this reader gives for the NIfTI file that ITK writes of an image (Z, Y, X) at `place`, in 3-D."""
    image = nibabel.Nifti1Image(data.transpose(2, 1, 0), affine_from_itk(place))
    return _part_from_image(image, image.affine)


def header_of_array(shape: tuple[int, int, int], place: ItkGeometry) -> Header:
    """The header of `part_from_array`, which copies once."""
    blank = nibabel.Nifti1Image(np.broadcast_to(np.uint8(0), shape[::-1]), affine_from_itk(place))
    return replace(header_from(blank.as_reoriented(io_orientation(blank.affine))), voxel_bytes=4)


def _part(file: Path) -> Part:
    with reading(file, "a 3-D image that nibabel understands"):
        image = opened(file)
        return _part_from_image(image, image.affine)


def _part_from_image(image: Any, original_affine: NDArray[np.float64]) -> Part:
    reoriented = image.as_reoriented(io_orientation(original_affine))
    data = voxels_from(reoriented)
    original, affine = rows_from(original_affine), rows_from(reoriented.affine)
    spacing = spacing_from(reoriented)
    geometry = NibabelGeometry(original_affine=original, affine=affine)
    return Part(data=data, spacing=spacing, geometry=geometry, placement={"affine": sum(affine, ())})


def _header(file: Path) -> Header:
    with reading(file, "a 3-D image that nibabel understands"):
        image = header_opened(file)
        # one zero seen as a whole image: nibabel turns views, and computes the spacing anew from the affine
        blank = nibabel.Nifti1Image(np.broadcast_to(np.uint8(0), image.shape), image.affine, image.header)
        turned = header_from(blank.as_reoriented(io_orientation(image.affine)))
        return replace(turned, voxel_bytes=header_from(image).voxel_bytes)
