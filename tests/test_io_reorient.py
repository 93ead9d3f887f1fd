"""SimpleITKIOWithReorient against nnU-Net's own class, and the right thing where that one fails."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from test_io_simpleitk import DIRECTIONS, itk_image, oblique, values_of

from trtbuild.errors import InputError
from trtbuild.volume.image import ReorientedGeometry
from trtbuild.volume.io import reader_named

ours = reader_named("SimpleITKIOWithReorient")
pytestmark = pytest.mark.parity
PERMUTED = {
    f"{order}{signs}": np.eye(3)[list(order)] * signs
    for order, signs in itertools.product(itertools.permutations(range(3)), [(1, 1, 1), (-1, 1, -1), (1, -1, 1)])
}


def saved(file: Path, values: np.ndarray, direction: np.ndarray | None = None) -> Path:
    sitk.WriteImage(itk_image(values, direction), str(file), True)
    return file


def assert_reads_the_same(files: list[Path]) -> tuple[Any, dict[str, Any]]:
    """Reads by both and compares everything; returns both results."""
    data, properties = SimpleITKIOWithReorient().read_images([str(file) for file in files])
    image = ours.read_image(files, tuple(f"c{i}" for i in range(len(data))))
    assert image.data.dtype == np.float32
    assert image.data.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(image.data, data)
    assert image.spacing == tuple(properties["spacing"])
    assert ours.nnunet_properties(image) == {**properties, "spacing": list(properties["spacing"])}
    header = ours.image_header(files, tuple(f"c{i}" for i in range(len(data))))
    assert header is not None
    assert (header.channels, *header.shape) == data.shape
    assert header.spacing == image.spacing
    return image, properties


def same_place(one: Path, other: Path) -> None:
    """The two files lie in the same place, exactly."""
    a, b = sitk.ReadImage(str(one)), sitk.ReadImage(str(other))
    assert a.GetSize() == b.GetSize()
    assert (a.GetOrigin(), a.GetSpacing(), a.GetDirection()) == (b.GetOrigin(), b.GetSpacing(), b.GetDirection())


@pytest.mark.parametrize("name", [*DIRECTIONS, *PERMUTED])
def test_every_orientation_is_read_and_written_as_by_nnunet(tmp_path: Path, name: str) -> None:
    file = saved(tmp_path / "a_0000.mha", values_of("int16"), (DIRECTIONS | PERMUTED)[name])
    image, properties = assert_reads_the_same([file])
    labels = np.random.default_rng(3).integers(0, 255, image.data.shape[1:])
    SimpleITKIOWithReorient().write_seg(labels, str(tmp_path / "theirs.mha"), properties)
    ours.write_segmentation(labels, image.geometry, tmp_path / "ours.mha")
    a, b = (sitk.ReadImage(str(tmp_path / f"{who}.mha")) for who in ("ours", "theirs"))
    assert a.GetPixelID() == b.GetPixelID()
    np.testing.assert_array_equal(sitk.GetArrayFromImage(a), sitk.GetArrayFromImage(b))
    # nnU-Net turns the origin there and back, which rounds it
    np.testing.assert_allclose(a.GetOrigin(), b.GetOrigin(), rtol=0, atol=1e-12)
    np.testing.assert_allclose(a.GetDirection(), b.GetDirection(), rtol=0, atol=1e-15)
    same_place(tmp_path / "ours.mha", file)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha", ".nii"])
def test_written_files_have_the_bytes_of_nnunet(tmp_path: Path, ending: str) -> None:
    file = saved(tmp_path / f"a_0000{ending}", values_of("int16"))
    image, properties = assert_reads_the_same([file])
    labels = np.random.default_rng(3).integers(0, 255, image.data.shape[1:])
    SimpleITKIOWithReorient().write_seg(labels, str(tmp_path / f"theirs{ending}"), properties)
    ours.write_segmentation(labels, image.geometry, tmp_path / f"ours{ending}")
    assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()


def test_a_segmentation_lies_over_the_voxels_it_was_made_from(tmp_path: Path) -> None:
    values = values_of("int16", (9, 10, 11))
    file = saved(tmp_path / "a_0000.nrrd", values, oblique((20, -30, 95)) @ np.diag([1.0, -1.0, 1.0]))
    image = ours.read_image([file], ("c",))
    ours.write_segmentation((image.data[0] > 1000).astype(np.uint8), image.geometry, tmp_path / "o.nrrd")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "o.nrrd"))), values > 1000)


@pytest.mark.parametrize("degrees", [(45.0, 0.0, 0.0), (0.0, 45.0, 45.0), (45.0, 45.0, 45.0)])
def test_a_direction_between_two_orientations_comes_back_to_its_own(
    tmp_path: Path, degrees: tuple[float, float, float]
) -> None:
    for index, signs in enumerate(itertools.product((1.0, -1.0), repeat=3)):
        file = saved(tmp_path / f"a{index}_0000.mha", values_of("int16"), oblique(degrees) @ np.diag(signs))
        image, _ = assert_reads_the_same([file])
        ours.write_segmentation(image.data[0] > 0, image.geometry, tmp_path / "o.mha")
        same_place(tmp_path / "o.mha", file)
        back = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "o.mha")))
        np.testing.assert_array_equal(back, values_of("int16") > 0)


@pytest.mark.parametrize("top", [254, 255, 256, 300, 65535])
def test_labels_from_256_on_are_kept_where_nnunet_wraps_them(tmp_path: Path, top: int) -> None:
    file = saved(tmp_path / "a_0000.nii.gz", values_of("int16"), DIRECTIONS["permuted"])
    image, properties = assert_reads_the_same([file])
    labels = np.zeros(image.data.shape[1:], np.int32)
    labels[1, 2, 3] = top
    SimpleITKIOWithReorient().write_seg(labels, str(tmp_path / "theirs.nii.gz"), properties)
    ours.write_segmentation(labels, image.geometry, tmp_path / "ours.nii.gz")
    got, theirs = (sitk.ReadImage(str(tmp_path / f"{who}.nii.gz")) for who in ("ours", "theirs"))
    assert sitk.GetArrayFromImage(got).max() == top
    assert sitk.GetArrayFromImage(theirs).max() == top % 256
    assert got.GetPixelID() == (sitk.sitkUInt8 if top < 255 else sitk.sitkUInt16)
    np.testing.assert_array_equal(np.argwhere(sitk.GetArrayFromImage(got)).shape, (1, 3))
    if top % 256:
        np.testing.assert_array_equal(sitk.GetArrayFromImage(got) > 0, sitk.GetArrayFromImage(theirs) > 0)


@pytest.mark.parametrize("direction", [np.eye(2), np.array([[0.0, -1.0], [1.0, 0.0]]), np.diag([-1.0, 1.0])])
def test_a_2d_image_is_read_as_the_slice_of_a_3d_one_and_written_in_2d(tmp_path: Path, direction: np.ndarray) -> None:
    file = saved(tmp_path / "a_0000.mha", values_of("int16", (6, 7)), direction)
    with pytest.raises(RuntimeError):
        SimpleITKIOWithReorient().read_images([str(file)])
    in_3d = np.eye(3)
    in_3d[:2, :2] = direction
    slab = saved(tmp_path / "b_0000.mha", values_of("int16", (6, 7))[None], in_3d)
    image = ours.read_image([file], ("c",))
    np.testing.assert_array_equal(image.data, SimpleITKIOWithReorient().read_images([str(slab)])[0])
    flat = SimpleITKIO().read_images([str(file)])[1]["spacing"]
    assert image.spacing[0] == flat[0] == pytest.approx(999 * 0.9)
    assert sorted(image.spacing[1:]) == sorted(flat[1:])
    header = ours.image_header([file], ("c",))
    assert header is not None
    assert (header.shape, header.spacing) == (image.data.shape[1:], image.spacing)
    ours.write_segmentation((image.data[0] > 0).astype(int) * 300, image.geometry, tmp_path / "o.mha")
    same_place(tmp_path / "o.mha", file)
    back = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "o.mha")))
    np.testing.assert_array_equal(back, (values_of("int16", (6, 7)) > 0) * 300)
    assert ours.nnunet_properties(image)["sitk_stuff"].keys() == {
        "spacing", "origin", "direction", "original_orientation"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["identity", "permuted", "oblique and negative"])
def test_a_4d_file_is_read_as_its_channels_in_files_of_their_own(tmp_path: Path, name: str) -> None:
    values = values_of("int16", (2, 5, 6, 7))
    direction = np.eye(4)
    direction[:3, :3] = DIRECTIONS[name]
    file = saved(tmp_path / "a_0000.mha", values, direction)
    with pytest.raises(RuntimeError):
        SimpleITKIOWithReorient().read_images([str(file)])
    channels = [saved(tmp_path / f"b_{i:04d}.mha", values[i], DIRECTIONS[name]) for i in range(2)]
    single, _ = assert_reads_the_same(channels)
    image = ours.read_image([file], ("a", "b"))
    np.testing.assert_array_equal(image.data, single.data)
    assert image.spacing == single.spacing
    assert isinstance(image.geometry, ReorientedGeometry)
    assert image.geometry.turned == single.geometry.turned
    header = ours.image_header([file], ("a", "b"))
    assert header is not None
    assert (header.channels, *header.shape) == image.data.shape
    for geometry, out in ((image.geometry, "ours.mha"), (single.geometry, "single.mha")):
        ours.write_segmentation((image.data[1] > 0).astype(np.uint8), geometry, tmp_path / out)
    assert (tmp_path / "ours.mha").read_bytes() == (tmp_path / "single.mha").read_bytes()


def test_a_4d_file_with_a_tilted_channel_axis_is_refused(tmp_path: Path) -> None:
    direction = np.eye(4)
    direction[2:, 2:] = [[0.8, -0.6], [0.6, 0.8]]
    file = saved(tmp_path / "a_0000.mha", values_of("int16", (2, 5, 6, 7)), direction)
    with pytest.raises(InputError, match="tilted"):
        ours.read_image([file], ("a", "b"))


def test_channels_with_different_axes_are_turned_one_by_one_and_the_first_file_counts(tmp_path: Path) -> None:
    first = saved(tmp_path / "a_0000.nrrd", values_of("int16", (6, 6, 6)))
    second = tmp_path / "a_0001.nrrd"
    image = itk_image(values_of("int16", (6, 6, 6), seed=1), None, (0.7, 0.9, 3.3))
    sitk.WriteImage(sitk.DICOMOrient(image, "PIR"), str(second))
    both = ours.read_image([first, second], ("a", "b"))
    assert both.warnings == ()
    data, properties = SimpleITKIOWithReorient().read_images([str(first), str(second)])
    np.testing.assert_array_equal(both.data, data)
    np.testing.assert_array_equal(both.data[1], sitk.GetArrayFromImage(sitk.DICOMOrient(image, "RAS")))
    assert properties["sitk_stuff"]["original_orientation"] == "PIR"  # nnU-Net takes the last
    ours.write_segmentation((both.data[0] > 0).astype(np.uint8), both.geometry, tmp_path / "o.nrrd")
    same_place(tmp_path / "o.nrrd", first)


def test_another_readers_geometry_is_a_programming_error(tmp_path: Path) -> None:
    file = saved(tmp_path / "a_0000.mha", values_of("int16"))
    image = reader_named("SimpleITKIO").read_image([file], ("c",))
    with pytest.raises(TypeError):
        ours.write_segmentation(image.data[0] > 0, image.geometry, tmp_path / "o.mha")
