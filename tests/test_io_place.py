"""Labels of a previous stage on the grid of the image, or an error that names the file; evaluate shares the rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from dicom_samples import saved as saved_series
from dicom_samples import slices, stored_values
from null_bundles import END, SECOND, null_bundle, write_cases
from test_io_labels import THEIRS, saved
from test_io_simpleitk import DIRECTIONS, oblique

import trtbuild
from trtbuild.errors import InputError
from trtbuild.spec import Reader
from trtbuild.volume.image import Image, LabelImage
from trtbuild.volume.io import reader_named
from trtbuild.volume.io.dicom_io import read_series
from trtbuild.volume.io.place import differences
from trtbuild.volume.io.previous import labels_for_image

VOLUMES: list[Reader] = ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"]
VALUES = np.random.default_rng(0).integers(0, 3, (5, 6, 7)).astype(np.uint8)


def image_of(name: Reader, folder: Path, direction: str = "identity") -> Image:
    file = saved(name, folder, VALUES.astype(np.float32), direction, "a_0000")
    return reader_named(name).read_image([file], ("c",))


@pytest.mark.parametrize("name", list(THEIRS))
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_the_reader_itself_writes_is_on_the_grid(tmp_path: Path, name: Reader, direction: str) -> None:
    image = image_of(name, tmp_path, direction)
    labels = np.random.default_rng(1).integers(0, 3, image.data.shape[1:]).astype(np.uint8)
    file = tmp_path / ("before.tif" if name in ("NaturalImage2DIO", "Tiff3DIO") else "before.nii.gz")
    reader_named(name).write_segmentation(labels, image.geometry, file)
    read = labels_for_image(file, name, image)
    np.testing.assert_array_equal(read.labels, labels)
    assert read.warnings == ()


@pytest.mark.parametrize("name", VOLUMES)
def test_labels_written_for_a_dicom_series_are_on_its_grid(tmp_path: Path, name: Reader) -> None:
    folder = saved_series(tmp_path / "s", slices(stored_values(), oblique((10, -20, 33)), origin=(-500.5, 700.25, 1e3)))
    image = read_series([folder], ("CT",), name)
    labels = (image.data[0] > 1000).astype(np.uint8)
    reader_named(name).write_segmentation(labels, image.geometry, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(labels_for_image(tmp_path / "a.nii.gz", name, image).labels, labels)


@pytest.mark.parametrize("name", VOLUMES)
@pytest.mark.parametrize("change", ["spacing", "origin", "direction"])
def test_labels_elsewhere_are_refused_by_the_name_of_their_file(tmp_path: Path, name: Reader, change: str) -> None:
    image = image_of(name, tmp_path)
    moved = sitk.ReadImage(str(tmp_path / "a_0000.nii.gz"), sitk.sitkUInt8)
    if change == "spacing":
        moved.SetSpacing([1.01 * value for value in moved.GetSpacing()])
    elif change == "origin":
        moved.SetOrigin([value + 0.2 * step for value, step in zip(moved.GetOrigin(), moved.GetSpacing(), strict=True)])
    else:
        moved.SetDirection(oblique((1, 0, 0)).ravel().tolist())
    sitk.WriteImage(moved, str(tmp_path / "before.nii.gz"))
    with pytest.raises(InputError, match="previous stage's segmentation has another") as error:
        labels_for_image(tmp_path / "before.nii.gz", name, image)
    assert error.value.where == tmp_path / "before.nii.gz"
    assert error.value.expected
    assert error.value.got
    assert error.value.hint


def test_a_flipped_file_is_refused_except_where_the_reader_turns_it(
    tmp_path: Path,
) -> None:
    for name in VOLUMES:
        image = image_of(name, tmp_path)
        flipped = sitk.Flip(sitk.ReadImage(str(tmp_path / "a_0000.nii.gz"), sitk.sitkUInt8), [True, True, False])
        sitk.WriteImage(flipped, str(tmp_path / "before.nii.gz"))
        if name.endswith("Reorient"):
            read = labels_for_image(tmp_path / "before.nii.gz", name, image)
            np.testing.assert_array_equal(read.labels, image.data[0])
        else:
            with pytest.raises(InputError, match="another"):
                labels_for_image(tmp_path / "before.nii.gz", name, image)


@pytest.mark.parametrize("name", list(THEIRS))
def test_another_shape_is_refused_by_the_name_of_the_file(tmp_path: Path, name: Reader) -> None:
    image = image_of(name, tmp_path)
    file = saved(name, tmp_path, VALUES[:, 1:], stem="before")
    with pytest.raises(InputError, match="does not fit the image") as error:
        labels_for_image(file, name, image)
    assert error.value.where == file


def test_a_stack_without_its_spacing_warns_by_name_or_is_refused(tmp_path: Path) -> None:
    image = image_of("Tiff3DIO", tmp_path)
    file = saved("Tiff3DIO", tmp_path, VALUES, stem="before")
    (tmp_path / "before.json").unlink()
    with pytest.raises(InputError, match="another spacing"):
        labels_for_image(file, "Tiff3DIO", image)
    (tmp_path / "a.json").write_text('{"spacing": [1, 1, 1]}')
    image = reader_named("Tiff3DIO").read_image([tmp_path / "a_0000.tif"], ("c",))
    (warning,) = labels_for_image(file, "Tiff3DIO", image).warnings
    assert warning.startswith("before.tif: There is no before.json")


@pytest.mark.parametrize("name", VOLUMES[:2])
def test_the_labels_of_a_4d_image_are_those_of_its_first_three_axes(tmp_path: Path, name: Reader) -> None:
    channels = [sitk.GetImageFromArray(VALUES.astype(np.float32)) for _ in range(2)]
    for one in channels:
        one.SetSpacing((0.5, 0.7, 2.0))
        one.SetOrigin((1.0, 2.0, 3.0))
    sitk.WriteImage(sitk.JoinSeries(channels), str(tmp_path / "a.nii.gz"))
    image = reader_named(name).read_image([tmp_path / "a.nii.gz"], ("a", "b"))
    sitk.WriteImage(sitk.Cast(channels[0], sitk.sitkUInt8), str(tmp_path / "before.nii.gz"))
    np.testing.assert_array_equal(labels_for_image(tmp_path / "before.nii.gz", name, image).labels, image.data[0])


def test_rounding_is_no_difference_and_more_is(tmp_path: Path) -> None:
    image = image_of("NibabelIO", tmp_path, "oblique and negative")
    place = image.geometry
    for by, names in ((1e-6, ()), (0.03, ("affine",))):
        moved = tuple(tuple(v * (1 + by) for v in row) for row in place.affine)  # type: ignore[union-attr]
        other = LabelImage(labels=VALUES, spacing=tuple(s * (1 + by / 1e4) for s in image.spacing),  # type: ignore[arg-type]
                           geometry=type(place)(original_affine=moved, affine=moved))  # fmt: skip
        assert tuple(one.name for one in differences(image, other)) == names


def test_python_refuses_labels_of_a_previous_stage_that_lie_elsewhere(tmp_path: Path) -> None:
    null_bundle(tmp_path / "second.trtb", SECOND)
    images = write_cases(tmp_path / "images", "a")
    image = sitk.ReadImage(str(images / f"a_0000{END}"))
    before = sitk.Cast(image > 1, sitk.sitkUInt8)
    sitk.WriteImage(before, str(tmp_path / "here.nii.gz"))
    before.SetOrigin((500.0, 0.0, 0.0))
    sitk.WriteImage(before, str(tmp_path / "there.nii.gz"))
    with trtbuild.open(tmp_path / "second.trtb", previous_stage=True) as predictor:
        predictor.predict(images / f"a_0000{END}", previous=tmp_path / "here.nii.gz")
        with pytest.raises(InputError, match="another") as error:
            predictor.predict(images / f"a_0000{END}", previous=tmp_path / "there.nii.gz")
    assert error.value.where == tmp_path / "there.nii.gz"
