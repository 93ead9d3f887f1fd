"""nnU-Net's NibabelIO: 3-D NIfTI through nibabel, axes in the file's order, reversed to (z, y, x)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nibabel.arrayproxy import ArrayProxy
from numpy.typing import NDArray

from trtbuild.errors import InputError
from trtbuild.volume.image import Geometry, Header, Image, ItkGeometry, LabelImage, Map, NibabelGeometry, Segmentation
from trtbuild.volume.io.foreign import labels_as_written, reading, written
from trtbuild.volume.io.labels import labels_from_file
from trtbuild.volume.io.sound import require_sound
from trtbuild.volume.io.stack import Part, header_from_files, image_from_files

FLAT = 1e-6
"""Smallest determinant of the axes' unit vectors; a sheared image has some tenths."""
Rows = tuple[tuple[float, ...], ...]


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
    """See `ReaderWriter`."""
    affine = np.array(nibabel_geometry(geometry).original_affine)
    labels = labels_as_written(segmentation, path).transpose(2, 1, 0)
    with written(path) as temporary:
        nibabel.save(nibabel.Nifti1Image(labels, affine), temporary)


def nnunet_properties(image: Image) -> dict[str, Any]:
    """See `ReaderWriter`. nnU-Net's affine is an array, this one a list of rows."""
    place = nibabel_geometry(image.geometry)
    return {"nibabel_stuff": {"original_affine": lists_from(place.original_affine)}, "spacing": list(image.spacing)}


def _part(file: Path) -> Part:
    with reading(file, "a 3-D image that nibabel understands"):
        image = opened(file)
        data = voxels_from(image)
        affine = rows_from(image.affine)
        spacing = spacing_from(image)
    geometry = NibabelGeometry(original_affine=affine, affine=affine)
    return Part(data=data, spacing=spacing, geometry=geometry, placement={"affine": sum(affine, ())})


def part_from_array(data: NDArray[np.float32], place: ItkGeometry) -> Part:
    """What this reader gives for the NIfTI file that ITK writes of an image (Z, Y, X) at `place`, in 3-D."""
    affine = rows_from(affine_from_itk(place))
    x, y, z = place.spacing
    geometry = NibabelGeometry(original_affine=affine, affine=affine)
    return Part(data=data[None], spacing=(z, y, x), geometry=geometry, placement={"affine": sum(affine, ())})


def header_of_array(shape: tuple[int, int, int], place: ItkGeometry) -> Header:
    """The header of `part_from_array`, which copies nothing."""
    x, y, z = place.spacing
    return Header(shape=shape, spacing=(z, y, x), channels=1, voxel_bytes=0)


def affine_from_itk(place: ItkGeometry) -> NDArray[np.float64]:
    """The affine (x, y, z in RAS) of a 3-D image whose place ITK gives in LPS."""
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(place.direction, (3, 3)) * place.spacing
    affine[:3, 3] = place.origin
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def _header(file: Path) -> Header:
    with reading(file, "a 3-D image that nibabel understands"):
        return header_from(header_opened(file))


def header_from(image: Any) -> Header:
    """The header of a nibabel image in the order of its axes."""
    x, y, z = image.shape
    dtype, proxy = image.get_data_dtype(), image.dataobj
    scaled = isinstance(proxy, ArrayProxy) and (proxy.slope, proxy.inter) != (1, 0)
    # see `voxels_from`: what is scaled or wider than four bytes goes through float64
    voxel_bytes = dtype.itemsize if dtype.itemsize <= 4 and not scaled else 8
    return Header(shape=(z, y, x), spacing=spacing_from(image), channels=1, voxel_bytes=voxel_bytes)


def opened(file: Path) -> Any:
    """The nibabel image of a file that is whole, 3-D and of real numbers; its voxels are not read yet.

    Raises:
        InputError: it is not.
    """
    require_sound(file)
    return header_opened(file)


def header_opened(file: Path) -> Any:
    """`opened` without a look at whether the file is whole."""
    image: Any = nibabel.load(file)
    dtype = image.get_data_dtype()
    if image.ndim != 3:
        raise InputError("The image has the wrong number of dimensions.", expected="3", got=f"{image.shape} voxels",
                         where=file, hint="Write each channel as a 3-D image.")  # fmt: skip
    if dtype.kind not in "iuf":
        raise InputError("The image has no plain intensities.", expected="one real number per voxel", got=dtype,
                         where=file, hint="Write each component as a channel of its own: one file each.")  # fmt: skip
    _require_spacing(image, file)
    if not np.isfinite(image.affine).all():
        raise InputError("The image has no usable affine.", expected="finite numbers", got=image.affine.tolist(),
                         where=file, hint="Write the affine again, or export the image again.")  # fmt: skip
    if _is_singular(image.affine):
        raise InputError("The image has no usable affine: an axis of it has no direction of its own.", where=file,
                         expected="three independent columns", got=image.affine.tolist(),
                         hint="Write the affine again, or export the image again.")  # fmt: skip
    return image


def _require_spacing(image: Any, file: Path) -> None:
    """An InputError where a NIfTI's own spacing is 0, which nibabel takes for 1 mm in a log line, or not finite."""
    header = image.header
    if not isinstance(header, nibabel.Nifti1Header):  # Nifti2Header is one, too
        return
    with (image.file_map.get("header") or image.file_map["image"]).get_prepare_fileobj("rb") as stream:
        stored = type(header).from_fileobj(stream, check=False)["pixdim"][1:4]
    if not (np.isfinite(stored) & (stored != 0)).all():
        raise InputError("The image has no usable spacing.", expected="three positive numbers", got=stored.tolist(),
                         where=file, hint="Write the voxel size into the header.")  # fmt: skip


def _is_singular(affine: NDArray[np.float64]) -> bool:
    """Whether the volume that the three unit vectors of the axes span is none; for axes at right angles it is 1."""
    steps = affine[:3, :3]
    lengths = np.linalg.norm(steps, axis=0)
    return not (lengths > 0).all() or abs(float(np.linalg.det(steps / lengths))) < FLAT


def voxels_from(image: Any) -> NDArray[np.float32]:
    """The voxels (1, Z, Y, X) of a nibabel image, equal to ``get_fdata()`` rounded to float32.

    Types that a float64 holds exactly go to float32 in one step and need no float64 copy of the image.
    """
    proxy = image.dataobj
    if isinstance(proxy, ArrayProxy):
        unscaled = (proxy.slope, proxy.inter) == (1, 0)
        values = proxy.get_unscaled() if unscaled else image.get_fdata(caching="unchanged")
    else:
        values = np.asanyarray(proxy)
    if values.dtype.itemsize > 4:
        values = values.astype(np.float64, copy=False)
    with np.errstate(over="ignore"):  # A value beyond float32 becomes infinite, which is refused by name.
        return np.ascontiguousarray(values.transpose(2, 1, 0)[None], dtype=np.float32)


def spacing_from(image: Any) -> tuple[float, float, float]:
    """The spacing (z, y, x) in mm of a nibabel image, from its header's zooms (x, y, z)."""
    x, y, z = (float(zoom) for zoom in image.header.get_zooms())
    return z, y, x


def nibabel_geometry(geometry: Geometry) -> NibabelGeometry:
    """The geometry itself; a TypeError where another reader made it."""
    if not isinstance(geometry, NibabelGeometry):
        raise TypeError(f"nibabel's readers use what they have read, not {type(geometry).__name__}")
    return geometry


def rows_from(affine: NDArray[np.float64]) -> Rows:
    """An affine as a value."""
    return tuple(tuple(float(value) for value in row) for row in affine)


def lists_from(rows: Rows) -> list[list[float]]:
    """An affine as JSON and pickles of plain types have it."""
    return [list(row) for row in rows]
