"""SimpleITKIO against nnU-Net's own class: the same arrays, spacing and properties, the same bytes in written files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from trtbuild.errors import InputError
from trtbuild.volume.image import ItkGeometry
from trtbuild.volume.io import reader_named

ours = reader_named("SimpleITKIO")
pytestmark = pytest.mark.parity


def oblique(degrees: tuple[float, float, float]) -> np.ndarray:
    """A rotation matrix."""
    a, b, c = np.radians(degrees)
    x = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    y = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    z = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    return x @ y @ z


DIRECTIONS = {
    "identity": np.eye(3),
    "negative": np.diag([-1.0, 1.0, -1.0]),
    "permuted": np.eye(3)[[2, 0, 1]],
    "oblique": oblique((10, -20, 33)),
    "oblique and negative": oblique((-40, 5, 80)) @ np.diag([1.0, -1.0, 1.0]),
}


def itk_image(values: np.ndarray, direction: np.ndarray | None = None, spacing: tuple[float, ...] | None = None) -> Any:
    """An ITK image of the array, anisotropic and away from the origin."""
    n = values.ndim
    image = sitk.GetImageFromArray(values, isVector=False)
    image.SetSpacing(spacing or (0.7, 0.9, 3.3, 2.5)[:n])
    image.SetOrigin((-12.5, 31.25, 7.125, 3.0)[:n])
    image.SetDirection((np.eye(n) if direction is None else direction).ravel().tolist())
    return image


def values_of(dtype: str, shape: tuple[int, ...] = (5, 6, 7), seed: int = 0) -> np.ndarray:
    """Random values over most of the type's range."""
    rng = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return (rng.standard_normal(shape) * 1e3).astype(kind)
    info = np.iinfo(kind)
    return rng.integers(info.min // 2, info.max // 2, shape).astype(kind)


def assert_reads_the_same(files: list[Path]) -> tuple[Any, dict[str, Any]]:
    """Reads by both and compares everything; returns both results."""
    data, properties = SimpleITKIO().read_images([str(file) for file in files])
    image = ours.read_image(files, tuple(f"c{i}" for i in range(len(data))))
    assert image.data.dtype == np.float32
    np.testing.assert_array_equal(image.data, data)
    assert image.spacing == tuple(properties["spacing"])
    got = ours.nnunet_properties(image)
    assert got.keys() == properties.keys()
    assert got["sitk_stuff"] == properties["sitk_stuff"]
    assert got["spacing"] == list(properties["spacing"])
    assert image.data.flags["C_CONTIGUOUS"]
    return image, properties


def assert_writes_the_same(image: Any, properties: dict[str, Any], folder: Path, ending: str, top: int) -> Path:
    """Writes a segmentation by both and compares the bytes."""
    labels = np.random.default_rng(top).integers(0, top + 1, image.data.shape[1:]).astype(np.int32)
    labels.flat[0] = top
    SimpleITKIO().write_seg(labels, str(folder / f"theirs{ending}"), properties)
    path = folder / f"ours{ending}"
    ours.write_segmentation(labels, image.geometry, path)
    assert path.read_bytes() == (folder / f"theirs{ending}").read_bytes()
    assert sitk.ReadImage(str(path)).GetPixelID() == (sitk.sitkUInt8 if top < 255 else sitk.sitkUInt16)
    assert {file.name for file in folder.iterdir() if ".partial" in file.name} == set()
    return path


FORMATS = [
    (ending, dtype)
    for ending in (".nii.gz", ".nii", ".nrrd", ".mha", ".gipl")
    for dtype in ("int16", "uint8", "float64", "float32", "int32", "uint16")
    if (ending, dtype) != (".gipl", "int32")  # ITK has no such GIPL
]


@pytest.mark.parametrize(("ending", "dtype"), FORMATS)
def test_every_format_and_type_is_read_and_written_as_by_nnunet(tmp_path: Path, ending: str, dtype: str) -> None:
    file = tmp_path / f"a_0000{ending}"
    sitk.WriteImage(itk_image(values_of(dtype)), str(file), True)
    image, properties = assert_reads_the_same([file])
    assert image.data.shape == (1, 5, 6, 7)
    assert_writes_the_same(image, properties, tmp_path, ending, 3)


@pytest.mark.parametrize(("name", "ending"), list(itertools.product(DIRECTIONS, [".nii.gz", ".nrrd", ".mha"])))
def test_the_direction_matrix_survives_the_way_there_and_back(tmp_path: Path, name: str, ending: str) -> None:
    file = tmp_path / f"a_0000{ending}"
    sitk.WriteImage(itk_image(values_of("int16"), DIRECTIONS[name]), str(file), True)
    image, properties = assert_reads_the_same([file])
    path = assert_writes_the_same(image, properties, tmp_path, ending, 7)
    before, after = sitk.ReadImage(str(file)), sitk.ReadImage(str(path))
    np.testing.assert_allclose(after.GetDirection(), before.GetDirection(), atol=1e-6)  # NIfTI keeps float32
    np.testing.assert_allclose(after.GetOrigin(), before.GetOrigin(), atol=1e-5)
    np.testing.assert_allclose(after.GetSpacing(), before.GetSpacing(), rtol=1e-6)


@pytest.mark.parametrize("top", [0, 1, 254, 255, 256, 65535])
@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".nrrd", ".mha", ".gipl"])
def test_labels_are_uint8_below_255_and_uint16_from_there_on(tmp_path: Path, top: int, ending: str) -> None:
    file = tmp_path / "a_0000.mha"
    sitk.WriteImage(itk_image(values_of("int16")), str(file), True)
    image, properties = assert_reads_the_same([file])
    assert_writes_the_same(image, properties, tmp_path, ending, top)


@pytest.mark.parametrize(("slope", "inter"), [(2.5, -1024.0), (1.0, -1024.0), (0.001, 0.0), (1.0, 0.0), (0.0, 5.0)])
@pytest.mark.parametrize("dtype", ["int16", "uint8"])
def test_scl_slope_and_inter_are_applied_as_itk_applies_them(
    tmp_path: Path, slope: float, inter: float, dtype: str
) -> None:
    nifti = nibabel.Nifti1Image(values_of(dtype), np.diag([0.7, 0.9, 3.3, 1.0]))
    nifti.header.set_slope_inter(slope, inter) if slope else nifti.header.set_slope_inter(None, None)
    file = tmp_path / "a_0000.nii.gz"
    nibabel.save(nifti, file)
    raw = nibabel.load(file).dataobj
    assert (raw.slope, raw.inter) == pytest.approx((slope, inter) if slope else (1.0, 0.0))
    assert_reads_the_same([file])


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_2d_image_gets_a_slice_axis_and_is_written_as_2d(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"a_0000{ending}"
    turned = np.array([[0.0, -1.0], [1.0, 0.0]])
    sitk.WriteImage(itk_image(values_of("int16", (6, 7)), turned, (0.4, 1.7)), str(file), True)
    image, properties = assert_reads_the_same([file])
    assert image.data.shape == (1, 1, 6, 7)
    assert image.spacing == pytest.approx((999 * 1.7, 1.7, 0.4))
    path = assert_writes_the_same(image, properties, tmp_path, ending, 2)
    assert sitk.ReadImage(str(path)).GetDimension() == 2


def test_a_single_slice_3d_image_stays_3d(tmp_path: Path) -> None:
    file = tmp_path / "a_0000.nii.gz"
    sitk.WriteImage(itk_image(values_of("int16", (1, 6, 7))), str(file), True)
    image, properties = assert_reads_the_same([file])
    assert image.spacing == pytest.approx((3.3, 0.9, 0.7))
    assert_writes_the_same(image, properties, tmp_path, ".nii.gz", 2)


def test_channels_are_stacked_in_the_order_of_the_files(tmp_path: Path) -> None:
    files = [tmp_path / f"a_{i:04d}.nii.gz" for i in range(3)]
    for i, file in enumerate(files):
        sitk.WriteImage(itk_image(values_of(("int16", "uint8", "float64")[i], seed=i)), str(file), True)
    image, _ = assert_reads_the_same(files)
    assert image.warnings == ()
    turned, _ = assert_reads_the_same(files[::-1])
    np.testing.assert_array_equal(turned.data[::-1], image.data)


def test_another_origin_or_direction_is_a_warning_and_the_first_file_counts(tmp_path: Path) -> None:
    first, moved, turned = (tmp_path / f"a_{i:04d}.nrrd" for i in range(3))
    sitk.WriteImage(itk_image(values_of("int16")), str(first), True)
    other = itk_image(values_of("int16"))
    other.SetOrigin((1.0, 2.0, 3.0))
    sitk.WriteImage(other, str(moved), True)
    sitk.WriteImage(itk_image(values_of("int16"), DIRECTIONS["oblique"]), str(turned), True)
    image, properties = assert_reads_the_same([first, moved, turned])
    assert [("another origin" in w, "another direction" in w) for w in image.warnings] == [(True, False), (False, True)]
    assert moved.name in image.warnings[0]
    assert turned.name in image.warnings[1]
    assert isinstance(image.geometry, ItkGeometry)
    assert image.geometry.origin == properties["sitk_stuff"]["origin"]


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_4d_file_holds_channels_and_its_result_lies_where_each_of_them_lies(tmp_path: Path, ending: str) -> None:
    direction = np.eye(4)
    direction[:3, :3] = DIRECTIONS["oblique"]
    values = values_of("int16", (2, 5, 6, 7))
    file = tmp_path / f"a_0000{ending}"
    sitk.WriteImage(itk_image(values, direction), str(file), True)
    image, _ = assert_reads_the_same([file])
    assert image.data.shape == (2, 5, 6, 7)
    assert image.spacing == pytest.approx((3.3, 0.9, 0.7))
    # nnU-Net cannot write this one; its file for the same image in 3-D is the reference.
    single = tmp_path / f"b_0000{ending}"
    sitk.WriteImage(itk_image(values[0], DIRECTIONS["oblique"]), str(single), True)
    labels = np.random.default_rng(0).integers(0, 5, (5, 6, 7))
    SimpleITKIO().write_seg(labels, str(tmp_path / f"theirs{ending}"), SimpleITKIO().read_images([str(single)])[1])
    ours.write_segmentation(labels, image.geometry, tmp_path / f"ours{ending}")
    assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


def test_a_4d_image_whose_channel_axis_is_tilted_is_refused_when_read(tmp_path: Path) -> None:
    direction = np.eye(4)
    direction[2:, 2:] = [[0.8, -0.6], [0.6, 0.8]]
    file = tmp_path / "a_0000.mha"
    sitk.WriteImage(itk_image(values_of("int16", (2, 5, 6, 7)), direction), str(file), True)
    with pytest.raises(InputError, match="tilted"):
        ours.read_image([file], ("a", "b"))


def test_two_4d_files_are_stacked_one_after_the_other(tmp_path: Path) -> None:
    files = [tmp_path / f"a_{i:04d}.mha" for i in range(2)]
    for i, file in enumerate(files):
        sitk.WriteImage(itk_image(values_of("int16", (2, 5, 6, 7), seed=i)), str(file), True)
    image, _ = assert_reads_the_same(files)
    assert len(image.data) == 4


def test_nnunet_can_write_with_our_properties(tmp_path: Path) -> None:
    file = tmp_path / "a_0000.nii.gz"
    sitk.WriteImage(itk_image(values_of("int16"), DIRECTIONS["oblique"]), str(file), True)
    image, _ = assert_reads_the_same([file])
    labels = np.random.default_rng(0).integers(0, 5, (5, 6, 7))
    SimpleITKIO().write_seg(labels, str(tmp_path / "theirs.nii.gz"), ours.nnunet_properties(image))
    ours.write_segmentation(labels, image.geometry, tmp_path / "ours.nii.gz")
    assert (tmp_path / "ours.nii.gz").read_bytes() == (tmp_path / "theirs.nii.gz").read_bytes()


@pytest.mark.parametrize("pixel", [sitk.sitkVectorFloat32, sitk.sitkComplexFloat32])
@pytest.mark.parametrize("size", [(7, 6), (7, 6, 5)])
def test_vectors_and_complex_numbers_are_refused(tmp_path: Path, pixel: int, size: tuple[int, ...]) -> None:
    file = tmp_path / "a_0000.nrrd"
    sitk.WriteImage(sitk.Image(size, pixel, *([3] if pixel == sitk.sitkVectorFloat32 else [])), str(file))
    with pytest.raises(InputError, match="no plain intensities"):
        ours.read_image([file], ("a",))


def test_an_rgb_picture_is_no_volume_of_three_columns(tmp_path: Path) -> None:
    file = tmp_path / "a_0000.png"
    sitk.WriteImage(sitk.Image((7, 6), sitk.sitkVectorUInt8, 3), str(file))
    with pytest.raises(InputError, match="no plain intensities"):
        ours.read_image([file], ("a",))
