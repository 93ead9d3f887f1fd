"""Images for the zoo: structured, seeded, with borders to crop, holes, sharp edges and plateaus; and their files.

Arrays are (C, Z, Y, X) in the order in which nnU-Net's reader of the model returns them, spacings likewise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as imageio
import nibabel
import numpy as np
import SimpleITK as sitk
import tifffile
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Intensity:
    """What a model's images look like: values `offset + scale * v`, v in 0..1, stored as `dtype` (0 outside the body).

    `slope` and `inter` are the NIfTI scaling of the stored integers.
    """

    scale: float
    offset: float
    dtype: str
    slope: float = 1.0
    inter: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One image: `shape` and `spacing` in reader order; the body fills the box that is `below` voxels from the lower
    and `above` voxels from the upper faces. `empty` is an image of zeros. `codes` is the stored orientation."""

    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    below: tuple[int, int, int] = (0, 0, 0)
    above: tuple[int, int, int] = (0, 0, 0)
    empty: bool = False
    codes: str = "RAS"


def array_from_scene(scene: Scene, channels: int, intensity: Intensity, seed: int) -> FloatArray:
    """(channels, *scene.shape) float32: an ellipsoid that touches every face of its box, holed, in front of zeros.

    With several channels the first lacks the body's lower end and the second its upper end along the last axis, so
    that only the union of all channels has the right bounding box.
    """
    image = np.zeros((channels, *scene.shape), np.float32)
    if scene.empty:
        return image
    body = _body(scene)
    rng = np.random.default_rng(seed)
    position = np.indices(scene.shape, sparse=True)[2]
    lower, upper = scene.below[2] + 4, scene.shape[2] - scene.above[2] - 4
    for channel in range(channels):
        values = intensity.offset + intensity.scale * _texture(scene, rng)
        mask = (
            body & ((channel != 0) | (position >= lower)) & ((channel != 1) | (position < upper))
            if channels > 1
            else body
        )
        # a voxel of the body is never 0 by chance: the mask of nonzero voxels is the one made here
        values[np.abs(values) < 1] = 1
        image[channel] = np.where(mask, values, 0)
    return image if intensity.dtype.startswith("float") else np.round(image)


def _body(scene: Scene) -> NDArray[np.bool_]:
    """The ellipsoid, with a closed cavity (nnU-Net fills it, but not in a single slice) and a notch (stays outside)."""
    distance = np.zeros(scene.shape)
    grids = np.indices(scene.shape, sparse=True)
    for grid, size, below, above in zip(grids, scene.shape, scene.below, scene.above, strict=True):
        diameter = size - below - above
        distance = distance + ((grid - below - (diameter - 1) / 2) / (diameter / 2)) ** 2
    body = np.asarray(distance <= 1)
    z, y, x = [
        (size - above + below) // 2 for size, below, above in zip(scene.shape, scene.below, scene.above, strict=True)
    ]
    if min(scene.shape[1:]) > 1:
        body[max(z - 1, 0) : z + 2, y - 2 : y + 3, x - 2 : x + 3] = False  # the cavity
        body[:, : max(y - 4, 0), x + 3 : x + 5] = False  # the notch
    return body


def _texture(scene: Scene, rng: np.random.Generator) -> FloatArray:
    """Values 0..1: smooth compartments with sharp borders, some noise, and a ceiling that differs from slice to slice.

    The ceiling gives every slice a plateau at its own maximum, so that clipping after interpolation shows, and so does
    clipping to the range of the whole volume instead.
    """
    finest = min(scene.spacing)
    sigmas = [
        4.0 * finest / spacing if size > 1 else 0 for size, spacing in zip(scene.shape, scene.spacing, strict=True)
    ]
    fields = []
    for _ in range(2):
        field = gaussian_filter(rng.standard_normal(scene.shape), sigmas)
        fields.append((field - field.mean()) / field.std())
    compartments = np.digitize(fields[0], (-0.8, 0.0, 0.8)) / 3
    value = 0.5 + 0.45 * (compartments - 0.5) + 0.07 * fields[1] + 0.02 * rng.standard_normal(scene.shape)
    z, y, x = np.indices(scene.shape, sparse=True)
    value = value + 0.12 * np.sin(0.9 * z + 0.3) + 0.02 * np.sin(0.9 * y + 1.1)
    value = np.minimum(value, np.minimum(0.66 + 0.1 * np.sin(1.3 * z), 0.66 + 0.1 * np.sin(1.7 * x)))
    return np.asarray(np.clip(value, 0.02, 0.98), np.float32)


def write_image(
    files: Sequence[Path],
    array: FloatArray,
    scene: Scene,
    intensity: Intensity,
    reader: str,
    *,
    one_file: bool = False,
    flat: bool = False,
) -> None:
    """One file per channel, or one RGB file, such that nnU-Net's `reader` returns `array` and `scene.spacing`.

    `one_file` makes one 4-D file of all channels; with `flat` the one slice of the array is stored as a 2-D image,
    of which the reader returns the first spacing as 999 times the largest.
    """
    if reader == "NaturalImage2DIO":
        imageio.imwrite(files[0], array[:, 0].transpose(1, 2, 0).astype(intensity.dtype))
        return
    if one_file:
        _write_itk_4d(files[0], array, scene, intensity)
        return
    for file, channel in zip(files, array, strict=True):
        if flat:
            _write_itk_2d(file, channel[0], scene, intensity)
        elif reader == "SimpleITKIO":
            _write_itk(file, channel, scene, intensity)
        elif reader == "SimpleITKIOWithReorient":
            _write_itk_oriented(file, channel, scene, intensity)
        elif reader == "Tiff3DIO":
            _write_tiff(file, channel, scene, intensity)
        else:
            _write_nifti(file, channel, scene, intensity, reorient=reader.endswith("WithReorient"))


def _rotation() -> NDArray[np.float64]:
    """A small turn about two axes (0.12 and -0.07 rad), so that the image is oblique."""
    a, b = 0.12, -0.07
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return np.asarray(about_z @ about_x)


def _write_itk(file: Path, channel: FloatArray, scene: Scene, intensity: Intensity) -> None:
    image = sitk.GetImageFromArray(channel.astype(intensity.dtype))
    image.SetSpacing(scene.spacing[::-1])
    image.SetOrigin((-31.5, 12.25, 7.0))
    # an oblique frame with two axes flipped: still a proper rotation
    image.SetDirection((_rotation() @ np.diag([-1.0, -1.0, 1.0])).ravel().tolist())
    sitk.WriteImage(image, str(file), True)


def _write_itk_oriented(file: Path, channel: FloatArray, scene: Scene, intensity: Intensity) -> None:
    """Stored in the orientation `scene.codes` (in SimpleITK's letters), oblique; brought to RAS it is the array."""
    image = sitk.GetImageFromArray(channel.astype(intensity.dtype))
    image.SetSpacing(scene.spacing[::-1])
    image.SetOrigin((14.5, -22.75, 101.0))
    codes = sitk.DICOMOrientImageFilter()
    axes = np.array(codes.GetDirectionCosinesFromOrientation("RAS")).reshape(3, 3)
    image.SetDirection((_rotation() @ axes).ravel().tolist())
    sitk.WriteImage(sitk.DICOMOrient(image, scene.codes), str(file), True)


def _write_itk_4d(file: Path, array: FloatArray, scene: Scene, intensity: Intensity) -> None:
    image = sitk.GetImageFromArray(array.astype(intensity.dtype), isVector=False)
    image.SetSpacing((*scene.spacing[::-1], 1.0))
    image.SetOrigin((-31.5, 12.25, 7.0, 0.0))
    direction = np.eye(4)
    direction[:3, :3] = _rotation() @ np.diag([-1.0, -1.0, 1.0])
    image.SetDirection(direction.ravel().tolist())
    sitk.WriteImage(image, str(file), True)


def _write_itk_2d(file: Path, pixels: FloatArray, scene: Scene, intensity: Intensity) -> None:
    image = sitk.GetImageFromArray(pixels.astype(intensity.dtype))
    image.SetSpacing(scene.spacing[:0:-1])
    image.SetOrigin((-8.5, 3.25))
    image.SetDirection(_rotation()[:2, :2].ravel().tolist())
    sitk.WriteImage(image, str(file), True)


def _write_tiff(file: Path, channel: FloatArray, scene: Scene, intensity: Intensity) -> None:
    """A stack of pages, and the spacing in CASE.json beside it."""
    tifffile.imwrite(file, channel.astype(intensity.dtype))
    case = file.name[: -len("_0000.tif")]
    file.with_name(f"{case}.json").write_text(json.dumps({"spacing": list(scene.spacing)}))


def _write_nifti(file: Path, channel: FloatArray, scene: Scene, intensity: Intensity, *, reorient: bool) -> None:
    """`reorient`: the stored axes follow `scene.codes`, and come back as the array when brought to RAS."""
    affine = np.eye(4)
    affine[:3, :3] = _rotation() @ np.diag(scene.spacing[::-1])
    affine[:3, 3] = (-40.0, 25.5, -310.25)
    if not reorient:
        affine[:3, :2] *= -1
    # with slope and intercept set, nibabel stores what it is given
    stored = np.round((channel - intensity.inter) / intensity.slope).astype(intensity.dtype)
    image = nibabel.Nifti1Image(stored.transpose(2, 1, 0), affine)
    if reorient:
        image = image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(tuple(scene.codes))))
    image.header.set_slope_inter(intensity.slope, intensity.inter)
    nibabel.save(image, file)
