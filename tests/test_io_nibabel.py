"""NibabelIO and NibabelIOWithReorient against nnU-Net's own classes: arrays, spacing, properties, bytes of files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient

from trtbuild.errors import InputError
from trtbuild.spec import Reader
from trtbuild.volume.image import NibabelGeometry
from trtbuild.volume.io import reader_named

pytestmark = pytest.mark.parity

THEIRS: dict[Reader, Any] = {"NibabelIO": NibabelIO(), "NibabelIOWithReorient": NibabelIOWithReorient()}
both = pytest.mark.parametrize("name", list(THEIRS))
SHAPE = (7, 6, 5)


def affine_of(codes: str, tilt: float = 0.0) -> np.ndarray:
    """An affine with these axis codes, spacing 0.7, 0.9, 3.3 along the array's axes, tilted by some degrees."""
    axes = nibabel.orientations.axcodes2ornt(codes)
    rotation = np.zeros((3, 3))
    for column, (row, sign) in enumerate(axes):
        rotation[int(row), column] = sign
    a = np.radians(tilt)
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn = turn @ np.array([[1, 0, 0], [0, np.cos(a / 2), -np.sin(a / 2)], [0, np.sin(a / 2), np.cos(a / 2)]])
    affine = np.eye(4)
    affine[:3, :3] = turn @ rotation @ np.diag([0.7, 0.9, 3.3])
    affine[:3, 3] = -12.5, 31.25, 7.125
    return affine


def saved(
    file: Path, affine: np.ndarray, dtype: str = "int16", seed: int = 0, scaling: tuple[float, float] | None = None
) -> Path:
    """A NIfTI file of random values over most of the type's range."""
    rng, kind = np.random.default_rng(seed), np.dtype(dtype)
    if kind.kind == "f":
        values = (rng.standard_normal(SHAPE) * 1e3).astype(kind)
    else:
        values = rng.integers(np.iinfo(kind).min // 2, np.iinfo(kind).max // 2, SHAPE).astype(kind)
    image = nibabel.Nifti1Image(values, affine, dtype=kind)
    nibabel.save(image, file)
    if scaling:
        content = bytearray(file.read_bytes())
        content[112:120] = np.array(scaling, np.float32).tobytes()  # scl_slope, scl_inter
        file.write_bytes(content)
    return file


def assert_reads_the_same(name: Reader, files: list[Path]) -> tuple[Any, dict[str, Any]]:
    """Reads by both and compares everything; returns both results."""
    data, properties = THEIRS[name].read_images([str(file) for file in files])
    image = reader_named(name).read_image(files, tuple(f"c{i}" for i in range(len(data))))
    assert image.data.dtype == np.float32
    assert image.data.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(image.data, data)
    assert image.spacing == tuple(properties["spacing"])
    got = reader_named(name).nnunet_properties(image)
    assert got.keys() == properties.keys()
    assert got["spacing"] == properties["spacing"]
    assert got["nibabel_stuff"].keys() == properties["nibabel_stuff"].keys()
    for key, affine in properties["nibabel_stuff"].items():
        np.testing.assert_array_equal(got["nibabel_stuff"][key], affine)
        assert type(got["nibabel_stuff"][key][0][0]) is float
    return image, properties


def assert_writes_the_same(name: Reader, image: Any, properties: dict[str, Any], folder: Path, ending: str) -> Path:
    """Writes a segmentation by nnU-Net, by nnU-Net from our properties, and by us; compares the bytes."""
    labels = np.random.default_rng(1).integers(0, 5, image.data.shape[1:])
    ours = reader_named(name)
    for path, given in (("theirs", properties), ("theirs from ours", ours.nnunet_properties(image))):
        THEIRS[name].write_seg(labels, str(folder / f"{path}{ending}"), given)
    path = folder / f"ours{ending}"
    ours.write_segmentation(labels, image.geometry, path)
    assert path.read_bytes() == (folder / f"theirs{ending}").read_bytes()
    assert path.read_bytes() == (folder / f"theirs from ours{ending}").read_bytes()
    return path


CODES = ["RAS", "LPS", "LAS", "ASR", "PIR", "SLA", "IPL", "RSA"]


@both
@pytest.mark.parametrize(("codes", "tilt"), list(itertools.product(CODES, [0.0, 17.0, -35.0])))
def test_every_orientation_is_read_and_written_as_by_nnunet(
    tmp_path: Path, name: Reader, codes: str, tilt: float
) -> None:
    file = saved(tmp_path / "a_0000.nii.gz", affine_of(codes, tilt))
    image, properties = assert_reads_the_same(name, [file])
    path = assert_writes_the_same(name, image, properties, tmp_path, ".nii.gz")
    result, source = nibabel.load(path), nibabel.load(file)
    np.testing.assert_allclose(result.affine, source.affine, rtol=1e-5, atol=1e-5)
    assert result.shape == source.shape


def test_a_reoriented_image_lies_along_ras_and_its_segmentation_goes_back_voxel_by_voxel(tmp_path: Path) -> None:
    file = saved(tmp_path / "a_0000.nii.gz", affine_of("PIR", 5.0))
    ours = reader_named("NibabelIOWithReorient")
    image = ours.read_image([file], ("c",))
    assert isinstance(image.geometry, NibabelGeometry)
    assert nibabel.aff2axcodes(np.array(image.geometry.affine)) == ("R", "A", "S")
    labels = (image.data[0] > 0).astype(np.uint8)
    ours.write_segmentation(labels, image.geometry, tmp_path / "a.nii.gz")
    np.testing.assert_array_equal(
        np.asarray(nibabel.load(tmp_path / "a.nii.gz").dataobj), nibabel.load(file).get_fdata() > 0
    )


@both
@pytest.mark.parametrize("codes", ["RAS", "ASL"])
@pytest.mark.parametrize(
    "dtype", ["int16", "uint8", "int8", "uint16", "int32", "uint32", "int64", "float32", "float64"]
)
def test_every_type_is_read_as_by_nnunet(tmp_path: Path, name: Reader, codes: str, dtype: str) -> None:
    assert_reads_the_same(name, [saved(tmp_path / "a_0000.nii", affine_of(codes), dtype)])


@both
@pytest.mark.parametrize("codes", ["RAS", "ASL"])
def test_long_integers_are_rounded_through_float64(tmp_path: Path, name: Reader, codes: str) -> None:
    # just above the middle of two float32 values; float64 takes it for the middle, and halves go to even
    value = 2**60 + 2**36 + 1
    nibabel.save(nibabel.Nifti1Image(np.full(SHAPE, value), affine_of(codes), dtype=np.int64), tmp_path / "a_0000.nii")
    image, _ = assert_reads_the_same(name, [tmp_path / "a_0000.nii"])
    assert image.data[0, 0, 0, 0] == 2**60 != np.float32(np.int64(value))


@both
@pytest.mark.parametrize("codes", ["RAS", "ASL"])
@pytest.mark.parametrize("dtype", ["int16", "uint8", "int32", "float32"])
@pytest.mark.parametrize("scaling", [(2.5, -1024.0), (1.0, -1024.0), (0.001, 0.0), (1.0, 0.0)])
def test_scl_slope_and_inter_are_applied_as_nibabel_applies_them(
    tmp_path: Path, name: Reader, codes: str, dtype: str, scaling: tuple[float, float]
) -> None:
    file = saved(tmp_path / "a_0000.nii", affine_of(codes), dtype, scaling=scaling)
    proxy = nibabel.load(file).dataobj
    assert (proxy.slope, proxy.inter) == pytest.approx(scaling)
    assert_reads_the_same(name, [file])


@both
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_both_endings_are_written_as_by_nnunet(tmp_path: Path, name: Reader, ending: str) -> None:
    file = saved(tmp_path / f"a_0000{ending}", affine_of("LPS"))
    image, properties = assert_reads_the_same(name, [file])
    assert_writes_the_same(name, image, properties, tmp_path, ending)


@both
def test_nifti_2_and_mgh_are_read_too(tmp_path: Path, name: Reader) -> None:
    values = np.arange(210, dtype=np.float32).reshape(SHAPE)
    nibabel.save(nibabel.Nifti2Image(values, affine_of("LPS")), tmp_path / "a_0000.nii.gz")
    nibabel.save(nibabel.MGHImage(values, affine_of("LPS")), tmp_path / "b_0000.mgz")
    assert_reads_the_same(name, [tmp_path / "a_0000.nii.gz"])
    assert_reads_the_same(name, [tmp_path / "b_0000.mgz"])


@both
def test_channels_are_stacked_and_another_affine_is_a_warning(tmp_path: Path, name: Reader) -> None:
    files = [saved(tmp_path / f"a_{i:04d}.nii.gz", affine_of("LPS"), "int16", seed=i) for i in range(2)]
    image, _ = assert_reads_the_same(name, files)
    assert image.warnings == ()
    moved = affine_of("LPS")
    moved[0, 3] += 1
    files.append(saved(tmp_path / "a_0002.nii.gz", moved, "uint8"))
    image, _ = assert_reads_the_same(name, files)
    assert len(image.warnings) == 1
    assert "a_0002.nii.gz has another affine" in image.warnings[0]


@both
def test_images_that_are_not_3d_are_refused_with_their_shape(tmp_path: Path, name: Reader) -> None:
    for shape in ((7, 6), (7, 6, 5, 1), (7, 6, 5, 2)):
        file = tmp_path / "a_0000.nii.gz"
        nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), file)
        with pytest.raises(InputError, match="number of dimensions") as error:
            reader_named(name).read_image([file], ("c",))
        assert str(shape) in str(error.value.got)


@both
def test_complex_and_rgb_voxels_are_refused(tmp_path: Path, name: Reader) -> None:
    file = tmp_path / "a_0000.nii.gz"
    rgb = np.zeros(SHAPE, np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    for values in (np.zeros(SHAPE, np.complex64), rgb):
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), file)
        with pytest.raises(InputError, match="no plain intensities"):
            reader_named(name).read_image([file], ("c",))


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_affine_without_meaning_is_refused(tmp_path: Path, name: Reader, bad: float) -> None:
    file = saved(tmp_path / "a_0000.nii", affine_of("RAS"))
    content = bytearray(file.read_bytes())
    content[280:284] = np.float32(bad).tobytes()  # srow_x[0]
    file.write_bytes(content)
    with pytest.raises(InputError, match="affine"):
        reader_named(name).read_image([file], ("c",))


def header_of(file: Path, name: Reader) -> None:
    reader_named(name).image_header([file], ("c",))


@both
@pytest.mark.parametrize("spacing", [np.nan, np.inf, 0.0])
def test_a_header_without_a_usable_spacing_is_refused_before_anything_is_planned(
    tmp_path: Path, name: Reader, spacing: float
) -> None:
    file = saved(tmp_path / "a_0000.nii", affine_of("RAS"))
    content = bytearray(file.read_bytes())
    content[80:84] = np.float32(spacing).tobytes()  # pixdim[1]
    file.write_bytes(content)
    with pytest.raises(InputError, match="no usable spacing") as error:
        header_of(file, name)
    assert error.value.where == file
    with pytest.raises(InputError, match="no usable spacing"):
        reader_named(name).read_image([file], ("c",))


@both
@pytest.mark.parametrize("columns", [[1], [0, 1, 2]])
def test_an_affine_that_drops_an_axis_is_refused(tmp_path: Path, name: Reader, columns: list[int]) -> None:
    affine = affine_of("RAS")
    affine[:, columns] = 0
    file = tmp_path / "a_0000.nii"
    image = nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4))
    image.header.set_sform(affine, 1)
    with file.open("wb") as stream:
        image.header["magic"], image.header["vox_offset"] = b"n+1", 352
        image.header.write_to(stream)
        stream.write(bytes(4 + 2 * 210))
    for read in (header_of, lambda file, name: reader_named(name).read_image([file], ("c",))):
        with pytest.raises(InputError, match="no usable affine") as error:
            read(file, name)
        assert error.value.where == file


@both
def test_an_affine_of_two_equal_axes_is_refused_and_a_sheared_one_is_not(tmp_path: Path, name: Reader) -> None:
    affine = affine_of("RAS")
    file = tmp_path / "a_0000.nii"
    for shear, refused in ((0.5, False), (np.inf, True)):
        affine[:3, 1] = affine[:3, 0] if refused else affine[:3, 1] + shear * affine[:3, 0]
        image = nibabel.Nifti1Image(np.zeros(SHAPE, np.int16), np.eye(4))
        image.set_sform(affine, 1)
        nibabel.save(image, file)
        if refused:
            with pytest.raises(InputError, match="no usable affine"):
                header_of(file, name)
        else:
            header_of(file, name)
