"""Label files and headers of every reader: nnU-Net's read_seg as integers, and what an image is before it is read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from test_io_natural import PICTURES
from test_io_simpleitk import DIRECTIONS, itk_image

from trtbuild.errors import InputError
from trtbuild.spec import Reader
from trtbuild.volume.io import reader_named

pytestmark = pytest.mark.parity
THEIRS: dict[Reader, Any] = {
    "SimpleITKIO": SimpleITKIO(),
    "SimpleITKIOWithReorient": SimpleITKIOWithReorient(),
    "NibabelIO": NibabelIO(),
    "NibabelIOWithReorient": NibabelIOWithReorient(),
    "NaturalImage2DIO": NaturalImage2DIO(),
    "Tiff3DIO": Tiff3DIO(),
}
every = pytest.mark.parametrize("name", list(THEIRS))
VOLUMES = [name for name in THEIRS if name.startswith(("SimpleITK", "Nibabel"))]


def saved(name: Reader, folder: Path, values: np.ndarray, direction: str = "identity", stem: str = "a") -> Path:
    """A file of the reader's kind that holds the values (Z, Y, X)."""
    if name == "NaturalImage2DIO":
        tifffile.imwrite(folder / f"{stem}.tif", values[0], photometric="minisblack")
        return folder / f"{stem}.tif"
    if name == "Tiff3DIO":
        tifffile.imwrite(folder / f"{stem}.tif", values, photometric="minisblack")
        (folder / f"{stem.removesuffix('_0000')}.json").write_text('{"spacing": [3, 0.5, 0.25]}')
        return folder / f"{stem}.tif"
    sitk.WriteImage(itk_image(values, DIRECTIONS[direction]), str(folder / f"{stem}.nii.gz"), True)
    return folder / f"{stem}.nii.gz"


def labels_of(top: int, dtype: type = np.int32) -> np.ndarray:
    values = np.random.default_rng(top).integers(0, min(top, 7) + 1, (5, 6, 7)).astype(dtype)
    values[0, 1, 2] = top
    return values


@every
@pytest.mark.parametrize("top", [0, 1, 254, 255, 256, 65535])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_labels_are_those_of_nnunets_read_seg(tmp_path: Path, name: Reader, top: int, dtype: type) -> None:
    file = saved(name, tmp_path, labels_of(top, dtype), "oblique and negative")
    seg, properties = THEIRS[name].read_seg(str(file))
    image = reader_named(name).read_segmentation(file)
    assert image.labels.dtype == (np.uint8 if top < 256 else np.uint16)
    assert image.labels.flags["C_CONTIGUOUS"]
    np.testing.assert_array_equal(image.labels, seg[0])
    assert list(image.spacing) == list(properties["spacing"])
    assert image.labels.max() == top


@every
def test_labels_can_be_written_back_to_where_they_lay(tmp_path: Path, name: Reader) -> None:
    file = saved(name, tmp_path, labels_of(300, np.uint16), "permuted")
    image = reader_named(name).read_segmentation(file)
    path = tmp_path / ("out" + "".join(file.suffixes))
    reader_named(name).write_segmentation(image.labels, image.geometry, path)
    again = reader_named(name).read_segmentation(path)
    np.testing.assert_array_equal(again.labels, image.labels)
    assert again.spacing == image.spacing


@every
def test_fractions_are_refused_with_their_place(tmp_path: Path, name: Reader) -> None:
    values = labels_of(3, np.float32)
    z = 0 if name == "NaturalImage2DIO" else 3
    values[z, 4, 5] = 1.5
    with pytest.raises(InputError, match="fractions") as error:
        reader_named(name).read_segmentation(saved(name, tmp_path, values))
    assert "1.5 at (z, y, x)" in str(error.value.got)
    if not name.endswith("Reorient"):
        assert f"= ({z}, 4, 5)" in str(error.value.got)


@every
def test_negative_values_are_refused_except_where_told(tmp_path: Path, name: Reader) -> None:
    values = labels_of(3, np.int16)
    values[0, 4, 5] = -1
    file = saved(name, tmp_path, values)
    with pytest.raises(InputError, match="no labels") as error:
        reader_named(name).read_segmentation(file)
    assert error.value.got == "-1 to 3"
    labels = reader_named(name).read_segmentation(file, allow_negative=True).labels
    np.testing.assert_array_equal(labels, THEIRS[name].read_seg(str(file))[0][0])
    assert labels.dtype == np.int32


@every
@pytest.mark.parametrize(("value", "taken"), [(65536, True), (2**24 - 1, True), (2**24, False), (2**24 + 1, False)])
def test_labels_are_taken_as_far_as_nnunet_can_tell_them_apart(
    tmp_path: Path, name: Reader, value: int, taken: bool
) -> None:
    values = labels_of(3)
    values[0, 0, 0] = value
    file = saved(name, tmp_path, values)
    if taken:
        labels = reader_named(name).read_segmentation(file).labels
        assert labels.dtype == np.int32
        assert labels.max() == value
        return
    with pytest.raises(InputError, match="no labels"):
        reader_named(name).read_segmentation(file)


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_is_no_label(tmp_path: Path, name: Reader, bad: float) -> None:
    values = labels_of(3, np.float32)
    values[0, 0, 0] = bad
    with pytest.raises(InputError, match="NaN or infinity"):
        reader_named(name).read_segmentation(saved(name, tmp_path, values))


@every
def test_a_missing_or_damaged_label_file_is_named(tmp_path: Path, name: Reader) -> None:
    with pytest.raises(InputError, match="no such image file"):
        reader_named(name).read_segmentation(tmp_path / "gone.nii.gz")
    file = saved(name, tmp_path, labels_of(3, np.uint8))
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(InputError) as error:
        reader_named(name).read_segmentation(file)
    assert error.value.where == file


def test_a_colour_picture_and_a_4d_image_are_no_labels(tmp_path: Path) -> None:
    PICTURES["rgb.png"](tmp_path / "a.png")
    sitk.WriteImage(itk_image(np.zeros((2, 5, 6, 7), np.uint8)), str(tmp_path / "a.mha"))
    for name, ending in (("NaturalImage2DIO", ".png"), ("SimpleITKIO", ".mha"), ("SimpleITKIOWithReorient", ".mha")):
        with pytest.raises(InputError, match="several channels"):
            reader_named(name).read_segmentation(tmp_path / f"a{ending}")  # type: ignore[arg-type]


# --- headers ---------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("direction", list(DIRECTIONS))
@pytest.mark.parametrize("dtype", [np.int16, np.float32, np.uint8])
def test_the_header_tells_what_reading_gives(tmp_path: Path, name: Reader, direction: str, dtype: type) -> None:
    file = saved(name, tmp_path, labels_of(7, dtype), direction, "a_0000")
    reader = reader_named(name)
    image, header = reader.read_image([file], ("c",)), reader.image_header([file], ("c",))
    assert header is not None
    assert (header.channels, *header.shape) == image.data.shape
    assert header.spacing == image.spacing
    copies = 2 if name == "SimpleITKIOWithReorient" else 1
    assert header.voxel_bytes == np.dtype(dtype).itemsize * copies


@pytest.mark.parametrize("name", PICTURES)
def test_the_header_of_a_picture_is_right_or_not_known(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    PICTURES[name](file)
    reader = reader_named("NaturalImage2DIO")
    data, _ = NaturalImage2DIO().read_images([str(file)])
    header = reader.image_header([file], ("c",))
    if "palette" in name and header is None:
        return
    assert header is not None
    assert (header.channels, *header.shape) == data.shape
    assert header.spacing == (999.0, 1.0, 1.0)
    assert header.voxel_bytes == np.dtype(tifffile.imread(file).dtype if "tif" in name.lower() else
                                          np.uint16 if "16-bit" in name else np.uint8).itemsize  # fmt: skip


@pytest.mark.parametrize("name", ["NibabelIO", "NibabelIOWithReorient"])
def test_scaled_voxels_take_eight_bytes_while_they_are_read(tmp_path: Path, name: Reader) -> None:
    image = nibabel.Nifti1Image(labels_of(9, np.int16), np.eye(4))
    image.header.set_slope_inter(2.0, 1.0)
    nibabel.save(image, tmp_path / "a.nii.gz")
    header = reader_named(name).image_header([tmp_path / "a.nii.gz"], ("c",))
    assert header is not None
    assert header.voxel_bytes == 8


def test_channels_of_all_files_are_counted(tmp_path: Path) -> None:
    flat = [saved("SimpleITKIO", tmp_path, labels_of(3, np.uint8), stem=f"a_000{i}") for i in range(2)]
    deep = tmp_path / "b_0000.mha"
    sitk.WriteImage(itk_image(np.zeros((3, 5, 6, 7), np.uint8)), str(deep))
    for name in ("SimpleITKIO", "SimpleITKIOWithReorient"):
        for files, channels in ((flat, 2), ([deep], 3)):
            header = reader_named(name).image_header(files, ("c",) * channels)  # type: ignore[arg-type]
            assert header is not None
            assert (header.channels, header.shape) == (channels, (5, 6, 7))


@every
def test_a_header_that_is_none_is_refused(tmp_path: Path, name: Reader) -> None:
    file = saved(name, tmp_path, labels_of(3, np.uint8))
    with pytest.raises(InputError, match="no such image file"):
        reader_named(name).image_header([tmp_path / "gone"], ("c",))
    for content in (b"", b"hello", bytes(1000)):
        file.write_bytes(content)
        with pytest.raises(InputError) as error:
            reader_named(name).image_header([file], ("c",))
        assert error.value.where == file


@pytest.mark.parametrize("name", VOLUMES)
def test_a_header_takes_no_memory_for_voxels(tmp_path: Path, name: Reader) -> None:
    nibabel.save(nibabel.Nifti1Image(np.zeros((400, 400, 300), np.int16), np.eye(4)), tmp_path / "a.nii")
    code = (
        "import sys; from pathlib import Path; from trtbuild.volume.io import reader_named\n"
        f"reader, status = reader_named({name!r}), Path('/proc/self/status')\n"
        "def peak(): return int(status.read_text().split('VmHWM:')[1].split()[0])\n"
        "before = peak(); header = reader.image_header([Path(sys.argv[1])], ('c',))\n"
        "print(header.shape, header.voxel_bytes, peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.nii")], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("(300, 400, 400) ")
    assert int(done.stdout.split()[-1]) < 20_000  # KiB; the voxels are 94 000
