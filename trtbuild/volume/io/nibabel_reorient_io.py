"""nnU-Net's NibabelIOWithReorient: 3-D NIfTI turned to the nearest RAS axes for the network, and back for the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from trtbuild.volume.image import Geometry, Image, NibabelGeometry, Segmentation
from trtbuild.volume.io.foreign import labels_as_written, reading, written
from trtbuild.volume.io.nibabel_io import lists_from, nibabel_geometry, opened, rows_from, spacing_from, voxels_from
from trtbuild.volume.io.stack import Part, image_from_files


def read_image(files: Sequence[Path], channels: tuple[str, ...]) -> Image:
    """See `ReaderWriter`."""
    return image_from_files(files, channels, _part)


def write_segmentation(segmentation: Segmentation, geometry: Geometry, path: Path) -> None:
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


def _part(file: Path) -> Part:
    with reading(file, "a 3-D image that nibabel understands"):
        image = opened(file)
        reoriented = image.as_reoriented(io_orientation(image.affine))
        data = voxels_from(reoriented)
        original, affine = rows_from(image.affine), rows_from(reoriented.affine)
        spacing = spacing_from(reoriented)
    geometry = NibabelGeometry(original_affine=original, affine=affine)
    return Part(data=data, spacing=spacing, geometry=geometry, placement={"affine": sum(affine, ())})
