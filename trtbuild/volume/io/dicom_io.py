"""DICOM series as input: a folder of slices becomes the image that the model's reader gives for its NIfTI conversion.

A converter can order the axes of its file in several ways. The one meant here is ITK's (SimpleITK's series reader and
its NIfTI writer): x along the rows, y down the columns, z along rows x columns. dcm2niix mirrors y, so a model trained
on its files by a reader that does not reorient has seen the images upside down from here; the readers "WithReorient"
give the same for both.

pydicom reads the files and not ITK, whose series reader gives all slices the number type of the first one: in PET,
where every slice has a slope of its own, it rounds the values to integers where the first slope is one. Compressed
voxels are decoded by the decoders that pydicom finds; the extra brings GDCM, which knows all that is in use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError, MissingExtra
from trtbuild.spec import Reader
from trtbuild.volume.image import Header, Image, ItkGeometry
from trtbuild.volume.io.dicom_grid import Slice, grid_from_slices
from trtbuild.volume.io.dicom_headers import slices_from_folder
from trtbuild.volume.io.foreign import reading
from trtbuild.volume.io.stack import Part, image_from_sources, require_extent


def read_series(folders: Sequence[Path], channels: tuple[str, ...], reader: Reader) -> Image:
    """The image whose channels are the series in `folders`, one series in each.

    Args:
        folders: one per channel, in this order; each holds the files of one series directly.
        channels: the names that the model expects.
        reader: the model's; it decides on the order of the axes and on the geometry, so that its writer can write the
            segmentation, too. As in a NIfTI file the spacing has the precision of float32.

    Raises:
        InputError: a folder holds no series or several, its slices make no grid (see `grid_from_slices`), a file is
            damaged, the channels do not fit each other, or the reader knows no space.
        MissingExtra: pydicom, or a decoder for the compression, is not installed.
    """
    warnings: list[str] = []

    def read(folder: Path) -> Part:
        slices, about = slices_from_folder(folder)
        warnings.extend(about)
        ordered, place = grid_from_slices(slices)
        axes = _axes_of(reader, folder)
        with reading(folder, "a DICOM series with a place in space"):
            part = axes.part_from_array(_voxels(ordered), place)
        return replace(part, spacing=_as_in_nifti(part.spacing))

    if not folders:
        raise InputError("The case has no series.", expected=", ".join(channels))
    image = image_from_sources(folders, channels, read)
    return replace(image, warnings=(*warnings, *image.warnings))


def series_header(folders: Sequence[Path], reader: Reader) -> Header:
    """The header of the image that `read_series` would give, from all files of the first folder without their voxels.

    Raises:
        InputError, MissingExtra: as `read_series`, as far as headers show it.
    """
    ordered, place = grid_from_slices(slices_from_folder(folders[0])[0])
    axes = _axes_of(reader, folders[0])
    with reading(folders[0], "a DICOM series with a place in space"):
        header = axes.header_of_array((len(ordered), *ordered[0].shape), place)
    header = replace(header, spacing=_as_in_nifti(header.spacing), channels=len(folders))
    require_extent(header.shape, header.spacing, folders[0])
    return header


def _as_in_nifti(spacing: tuple[float, float, float]) -> tuple[float, float, float]:
    z, y, x = (float(np.float32(value)) for value in spacing)
    return z, y, x


class _Axes(Protocol):
    """How a reader orders the axes of an image."""

    def part_from_array(self, data: NDArray[np.float32], place: ItkGeometry) -> Part:
        """What the reader gives for the NIfTI file that ITK writes of an image (Z, Y, X) at `place`, in 3-D."""

    def header_of_array(self, shape: tuple[int, int, int], place: ItkGeometry) -> Header:
        """The header of that part."""


def _axes_of(reader: Reader, folder: Path) -> _Axes:
    """The model's reader."""
    if reader == "SimpleITKIO":
        from trtbuild.volume.io import simpleitk_io

        return simpleitk_io
    if reader == "SimpleITKIOWithReorient":
        from trtbuild.volume.io import simpleitk_reorient_io

        return simpleitk_reorient_io
    if reader == "NibabelIO":
        from trtbuild.volume.io import nibabel_io

        return nibabel_io
    if reader == "NibabelIOWithReorient":
        from trtbuild.volume.io import nibabel_reorient_io

        return nibabel_reorient_io
    raise InputError("A DICOM series cannot stand in for the images that this model reads.", got=reader, where=folder,
                     expected="a model trained with a reader of SimpleITK or nibabel",
                     hint="Convert the series to the model's file ending.")  # fmt: skip


def _voxels(ordered: Sequence[Slice]) -> NDArray[np.float32]:
    """The values (Z, Y, X): ``stored * slope + intercept`` of every slice in float64, rounded to float32."""
    data = np.empty((len(ordered), *ordered[0].shape), np.float32)
    opened: Path | None = None
    for index, one in enumerate(ordered):
        if one.file != opened:
            stored, opened = _stored(one.file), one.file
            stored = stored[None] if stored.ndim == 2 else stored
        if stored.shape[1:] != one.shape or not one.frame < len(stored):
            raise InputError("The voxels of a slice do not have the shape that it says.", expected=one.shape,
                             got=stored.shape, where=one.file)  # fmt: skip
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused by name
            data[index] = stored[one.frame].astype(np.float64) * one.slope + one.intercept
    return data


def _stored(file: Path) -> NDArray[Any]:
    """The stored values (Y, X) or (frames, Y, X) of a file, decompressed."""
    try:
        import pydicom
        from pydicom.pixels import get_decoder
    except ImportError as error:
        raise MissingExtra("pydicom", "dicom", "read DICOM files") from error
    with reading(file, "a DICOM image"):
        dataset = pydicom.dcmread(file)
        syntax = dataset.file_meta.TransferSyntaxUID
        if syntax.is_compressed and syntax.is_encapsulated and not get_decoder(syntax).is_available:
            raise MissingExtra("python-gdcm", "dicom", f"decompress {syntax.name}")
        values: NDArray[Any] = dataset.pixel_array
    return values
