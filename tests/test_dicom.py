"""DICOM series as input: voxels and place are those of ITK's own series reader and of the NIfTI that it writes."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gdcm
import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_samples import AXIAL, decimal, enhanced, image_header, saved, slice_header, slices, stored_values
from pydicom.dataset import Dataset
from pydicom.uid import BasicTextSRStorage, JPEGLSLossless, MRImageStorage, RLELossless
from test_io_simpleitk import oblique

from trtbuild.errors import InputError, OutOfMemory
from trtbuild.spec import Reader
from trtbuild.volume.image import ItkGeometry
from trtbuild.volume.io import reader_named
from trtbuild.volume.io.dicom_io import read_series, series_header

READERS: list[Reader] = ["SimpleITKIO", "SimpleITKIOWithReorient", "NibabelIO", "NibabelIOWithReorient"]
TURNS = {
    "axial": AXIAL,
    "feet first": np.diag([-1.0, 1.0, -1.0]),
    "prone": np.diag([-1.0, -1.0, 1.0]),
    "coronal": np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]]),
    "sagittal": np.array([[0.0, 0, -1], [1, 0, 0], [0, -1, 0]]),
    "tilted about x, each slice behind the last": oblique((17, 0, 0)),
    "oblique": oblique((10, -20, 33)),
    "far from any axis": oblique((140, 35, -80)),
}


def itk_series(folder: Path) -> Any:
    """What ITK's series reader makes of the folder."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def voxels(folder: Path) -> np.ndarray:
    return read_series([folder], ("CT",), "SimpleITKIO").data[0]


def refusal(folder: Path, reader: Reader = "SimpleITKIO") -> InputError:
    with pytest.raises(InputError) as error:
        read_series([folder], ("CT",), reader)
    return error.value


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("distance", [2.5, -2.5])
def test_voxels_and_place_are_those_of_itks_series_reader(tmp_path: Path, turn: str, distance: float) -> None:
    folder = saved(tmp_path / "s", slices(stored_values(), TURNS[turn], distance=distance))
    theirs = itk_series(folder)
    image = read_series([folder], ("CT",), "SimpleITKIO")
    assert image.data.dtype == np.float32
    np.testing.assert_array_equal(image.data[0], sitk.GetArrayFromImage(theirs))
    place = image.geometry
    assert isinstance(place, ItkGeometry)
    # the files hold nine digits of cosines and positions, and ITK takes its spacing from the first
    np.testing.assert_allclose(place.spacing, theirs.GetSpacing(), rtol=1e-7)
    np.testing.assert_allclose(place.origin, theirs.GetOrigin(), atol=1e-9)
    np.testing.assert_allclose(place.direction, theirs.GetDirection(), atol=1e-8)
    assert image.warnings == ()


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_sees_what_it_sees_in_the_converted_nifti(tmp_path: Path, turn: str, reader: Reader) -> None:
    folder = saved(tmp_path / "s", slices(stored_values(), TURNS[turn]))
    sitk.WriteImage(itk_series(folder), str(tmp_path / "a_0000.nii.gz"))
    from_file = reader_named(reader).read_image([tmp_path / "a_0000.nii.gz"], ("CT",))
    image = read_series([folder], ("CT",), reader)
    np.testing.assert_array_equal(image.data, from_file.data)
    assert image.data.flags["C_CONTIGUOUS"]
    assert type(image.geometry) is type(from_file.geometry)
    if reader == "NibabelIOWithReorient":
        # nibabel takes it from the affine, which NIfTI keeps with seven digits
        np.testing.assert_allclose(image.spacing, from_file.spacing, rtol=2e-7)
    else:
        assert image.spacing == from_file.spacing
    header = series_header([folder, folder], reader)
    assert (header.channels, header.shape, header.spacing) == (2, image.data.shape[1:], image.spacing)
    # and the segmentation lies in the same place, whichever way the case came
    labels = (image.data[0] > 1000).astype(np.uint8)
    for geometry, name in ((image.geometry, "dicom.nii.gz"), (from_file.geometry, "file.nii.gz")):
        reader_named(reader).write_segmentation(labels, geometry, tmp_path / name)
    ours, theirs = (sitk.ReadImage(str(tmp_path / name)) for name in ("dicom.nii.gz", "file.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs))
    np.testing.assert_allclose(ours.GetOrigin(), theirs.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(ours.GetDirection(), theirs.GetDirection(), atol=1e-6)
    np.testing.assert_allclose(ours.GetSpacing(), theirs.GetSpacing(), rtol=1e-6)


def test_neither_instance_numbers_nor_names_nor_slice_locations_order_the_slices(tmp_path: Path) -> None:
    series = slices(stored_values())
    for number, ds in enumerate(series):
        ds.InstanceNumber, ds.SliceLocation = [4, 4, 1, 99, 2][number], "0"
    for seed in range(4):
        folder = saved(tmp_path / f"s{seed}", series, seed)
        np.testing.assert_array_equal(voxels(folder), stored_values().astype(np.float32) - 1024)


@pytest.mark.parametrize(("slope", "intercept"), [(1, -1024), (0.37, -3.5), (2, 5), (1e-3, 0), (-1, 100)])
def test_rescaled_values_are_those_of_itk(tmp_path: Path, slope: float, intercept: float) -> None:
    series = slices(stored_values(), RescaleSlope=decimal(slope), RescaleIntercept=decimal(intercept))
    folder = saved(tmp_path / "s", series)
    np.testing.assert_array_equal(voxels(folder), sitk.GetArrayFromImage(itk_series(folder)).astype(np.float32))


def test_every_slice_is_rescaled_by_its_own_numbers_where_itk_takes_the_first_ones_type(tmp_path: Path) -> None:
    series, slopes = slices(stored_values(), Modality="PT"), [1.0, 0.5, 0.25, 1.75, 2.2]
    for ds, slope in zip(series, slopes, strict=True):
        ds.RescaleSlope, ds.RescaleIntercept = decimal(slope), "0"
    folder = saved(tmp_path / "s", series)
    expected = (stored_values() * np.array(slopes)[:, None, None]).astype(np.float32)
    np.testing.assert_array_equal(voxels(folder), expected)
    assert (sitk.GetArrayFromImage(itk_series(folder)) != expected).any()


def test_magnetic_resonance_without_rescaling_keeps_its_values(tmp_path: Path) -> None:
    series = slices(stored_values(), SOPClassUID=MRImageStorage, Modality="MR")
    for ds in series:
        del ds.RescaleSlope, ds.RescaleIntercept
    np.testing.assert_array_equal(voxels(saved(tmp_path / "s", series)), stored_values())


@pytest.mark.parametrize("signed", [0, 1])
def test_what_lies_in_the_bits_above_the_stored_ones_does_not_count(tmp_path: Path, signed: int) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (5, 6, 7)).astype(np.uint16)
    folder = saved(tmp_path / "s", slices(values, PixelRepresentation=signed))
    np.testing.assert_array_equal(voxels(folder), sitk.GetArrayFromImage(itk_series(folder)))
    low = values.astype(int) % 4096
    np.testing.assert_array_equal(voxels(folder) + 1024, np.where(signed * (low > 2047), low - 4096, low))


def gdcm_compressed(syntax: Any) -> Callable[[Path], None]:
    def compress(file: Path) -> None:
        reader = gdcm.ImageReader()
        reader.SetFileName(str(file))
        assert reader.Read()
        change = gdcm.ImageChangeTransferSyntax()
        change.SetTransferSyntax(gdcm.TransferSyntax(syntax))
        change.SetInput(reader.GetImage())
        assert change.Change()
        writer = gdcm.ImageWriter()
        writer.SetFile(reader.GetFile())
        writer.SetFileName(str(file))
        writer.SetImage(change.GetOutput())
        assert writer.Write()

    return compress


def pydicom_compressed(syntax: str) -> Callable[[Path], None]:
    def compress(file: Path) -> None:
        ds = pydicom.dcmread(file)
        ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(file)

    return compress


COMPRESSIONS = {
    "JPEG lossless": gdcm_compressed(gdcm.TransferSyntax.JPEGLosslessProcess14_1),
    "JPEG 2000": gdcm_compressed(gdcm.TransferSyntax.JPEG2000Lossless),
    "JPEG-LS": pydicom_compressed(JPEGLSLossless),
    "RLE": pydicom_compressed(RLELossless),
}


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_compressed_series_give_the_voxels_of_the_plain_one(tmp_path: Path, name: str) -> None:
    values = stored_values((4, 40, 50))
    folder = saved(tmp_path / "s", slices(values))
    for file in folder.iterdir():
        COMPRESSIONS[name](file)
        assert pydicom.dcmread(file).file_meta.TransferSyntaxUID.is_compressed
    np.testing.assert_array_equal(voxels(folder), values.astype(np.float32) - 1024)


@pytest.mark.parametrize("name", ["plain", *COMPRESSIONS])
def test_a_truncated_slice_is_refused_by_name(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path / "s", slices(stored_values((4, 40, 50))))
    file = folder / "I0002.dcm"
    if name != "plain":
        COMPRESSIONS[name](file)
    content = file.read_bytes()
    for share in (0.0, 0.02, 0.2, 0.4, 0.6, 0.8, 0.95, 0.99):
        file.write_bytes(content[: int(len(content) * share)])
        with pytest.raises((InputError, OutOfMemory)) as error:
            read_series([folder], ("CT",), "SimpleITKIO")
        assert error.value.where == file, share


def test_a_decoder_that_is_not_installed_names_the_command(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values((4, 40, 50))))
    for file in folder.iterdir():
        COMPRESSIONS["JPEG lossless"](file)
    code = (
        "import sys; sys.modules[sys.argv[2]] = None\n"
        "from pathlib import Path; from trtbuild.volume.io.dicom_io import read_series\n"
        "try: read_series([Path(sys.argv[1])], ('CT',), 'SimpleITKIO')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    for missing, purpose in (("gdcm", "decompress JPEG Lossless"), ("pydicom", "read DICOM files")):
        done = subprocess.run([sys.executable, "-c", code, str(folder), missing], capture_output=True, text=True,
                              check=True)  # fmt: skip
        assert done.stdout.startswith("MissingExtra")
        assert purpose in done.stdout
        assert "pip install 'trtbuild[dicom]'" in done.stdout


@pytest.mark.parametrize("turn", ["axial", "oblique", "sagittal"])
@pytest.mark.parametrize("order", [(), (3, 0, 4, 1, 2), (4, 3, 2, 1, 0)])
def test_an_enhanced_multi_frame_file_is_the_series_of_its_frames(
    tmp_path: Path, turn: str, order: tuple[int, ...]
) -> None:
    slopes = (1.0, 0.5, 0.25, 1.75, 2.2)
    single, multi = tmp_path / "single", tmp_path / "multi"
    series = slices(stored_values(), TURNS[turn])
    for ds, slope in zip(series, slopes, strict=True):
        ds.RescaleSlope = decimal(slope)
    saved(single, series)
    saved(multi, [enhanced(stored_values(), TURNS[turn], slopes=slopes, order=order)])
    one, other = (read_series([folder], ("CT",), "SimpleITKIO") for folder in (single, multi))
    np.testing.assert_array_equal(one.data, other.data)
    assert one.geometry == other.geometry
    assert one.spacing == other.spacing


def test_an_enhanced_multi_frame_file_gives_the_volume_of_highdicom(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", [enhanced(stored_values(), TURNS["oblique"], order=(3, 0, 4, 1, 2))])
    volume = highdicom.imread(folder / "I0000.dcm").get_volume()
    image = read_series([folder], ("CT",), "SimpleITKIO")
    place = image.geometry
    assert isinstance(place, ItkGeometry)
    direction = np.reshape(place.direction, (3, 3))
    first = volume.map_indices_to_reference(np.array([[0, 0, 0]]))[0]
    index = np.linalg.solve(direction, first - place.origin) / place.spacing  # x, y, z of highdicom's first voxel
    order = slice(None) if abs(index[2]) < 0.5 else slice(None, None, -1)
    np.testing.assert_array_equal(volume.array[order], image.data[0])


def test_channels_are_series_in_folders_of_their_own(tmp_path: Path) -> None:
    folders = [saved(tmp_path / f"c_000{i}", slices(stored_values(seed=i), series=f"1.2.{i}")) for i in range(2)]
    image = read_series(folders, ("T1", "T2"), "SimpleITKIO")
    for channel in range(2):
        np.testing.assert_array_equal(image.data[channel], stored_values(seed=channel).astype(np.float32) - 1024)
    with pytest.raises(InputError, match="wrong number of channels"):
        read_series(folders, ("T1",), "SimpleITKIO")
    with pytest.raises(InputError, match="no series"):
        read_series([], ("T1",), "SimpleITKIO")
    shifted = saved(tmp_path / "d", slices(stored_values(), origin=(0.0, 0.0, 0.0)))
    assert "another origin" in read_series([folders[0], shifted], ("T1", "T2"), "SimpleITKIO").warnings[0]
    larger = saved(tmp_path / "e", slices(stored_values((6, 6, 7))))
    with pytest.raises(InputError, match="differ in shape"):
        read_series([folders[0], larger], ("T1", "T2"), "SimpleITKIO")


# --- series that are refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [1, 2, 3, 15, 27, 28])
def test_a_missing_slice_is_found_wherever_it_was(tmp_path: Path, missing: int) -> None:
    series = slices(stored_values((30, 6, 7)))
    del series[missing]
    error = refusal(saved(tmp_path / "s", series))
    assert "not equally spaced, or one is missing" in error.what
    assert "5 mm from I" in str(error.got)


@pytest.mark.parametrize("ends", [(0,), (29,)])
def test_a_series_without_its_end_is_a_shorter_series(tmp_path: Path, ends: tuple[int, ...]) -> None:
    series = [ds for z, ds in enumerate(slices(stored_values((30, 6, 7)))) if z not in ends]
    assert len(voxels(saved(tmp_path / "s", series))) == 29  # nothing in DICOM says how many there were


def test_positions_with_one_decimal_are_equal_steps(tmp_path: Path) -> None:
    series = slices(stored_values((30, 6, 7)), TURNS["tilted about x, each slice behind the last"], distance=1.25)
    for ds in series:
        ds.ImagePositionPatient = [f"{float(v):.1f}" for v in ds.ImagePositionPatient]
    image = read_series([saved(tmp_path / "s", series)], ("CT",), "SimpleITKIO")
    assert image.spacing[0] == pytest.approx(1.25, abs=0.1 / 29)


def test_slices_that_grow_apart_are_no_grid(tmp_path: Path) -> None:
    series = slices(stored_values((30, 6, 7)))
    for ds in series[15:]:
        ds.ImagePositionPatient[2] = float(ds.ImagePositionPatient[2]) + 0.25 * (ds.InstanceNumber - 15)
    assert "not equally spaced" in refusal(saved(tmp_path / "s", series)).what


def test_gantry_tilt_is_refused_and_told_from_an_oblique_series(tmp_path: Path) -> None:
    axes = TURNS["tilted about x, each slice behind the last"]
    series = slices(stored_values(), axes)
    for ds in series:  # the table moves along z, not along the normal
        ds.ImagePositionPatient = [0, 0, 2.5 * ds.InstanceNumber]
    error = refusal(saved(tmp_path / "s", series))
    assert "gantry tilt" in error.what
    assert "dcm2niix" in str(error.hint)


def test_two_slices_in_one_place_are_refused(tmp_path: Path) -> None:
    series = [*slices(stored_values()), *slices(stored_values(seed=1))]
    assert "same place" in refusal(saved(tmp_path / "s", series)).what
    alone = [slice_header(stored_values()[0]), slice_header(stored_values()[1])]
    assert "same place" in refusal(saved(tmp_path / "t", alone)).what


@pytest.mark.parametrize(("what", "change"), [
    ("shape", {"Rows": 7, "Columns": 6}),
    ("orientation", {"ImageOrientationPatient": [1, 0, 0, 0, 0, 1]}),
    ("pixel spacing", {"PixelSpacing": [0.7, 0.8]}),
    ("frame of reference", {"FrameOfReferenceUID": "1.9"}),
])  # fmt: skip
def test_a_slice_of_another_kind_is_named(tmp_path: Path, what: str, change: dict[str, Any]) -> None:
    series = slices(stored_values())
    for name, value in change.items():
        setattr(series[2], name, value)
    error = refusal(saved(tmp_path / "s", series))
    assert f"differ in {what}" in error.what


@pytest.mark.parametrize(("name", "value", "what"), [
    ("ImagePositionPatient", None, "does not say its ImagePositionPatient"),
    ("ImagePositionPatient", [1, 2], "does not say its ImagePositionPatient"),
    ("ImageOrientationPatient", None, "does not say its ImageOrientationPatient"),
    ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0], "not at right angles"),
    ("ImageOrientationPatient", [1, 0, 0, 0, 0.5, 0], "not at right angles"),
    ("ImageOrientationPatient", [0, 0, 0, 0, 0, 0], "not at right angles"),
    ("PixelSpacing", None, "does not say its PixelSpacing"),
    ("PixelSpacing", [0, 1], "no usable spacing"),
    ("PixelSpacing", [0, 0], "no usable spacing"),
    ("PixelSpacing", [-1, 1], "no usable spacing"),
    ("RescaleSlope", "0", "RescaleSlope of the image is 0"),
    ("Rows", 0, "no voxels"),
    ("SOPClassUID", None, "damaged"),
    ("PhotometricInterpretation", "RGB", "no plain intensities"),
    ("SamplesPerPixel", 3, "no plain intensities"),
    ("ModalityLUTSequence", [Dataset()], "stand in a table"),
    ("NumberOfFrames", 2, "do not say where they lie"),
])  # fmt: skip
def test_headers_that_cannot_be_used_say_why(tmp_path: Path, name: str, value: Any, what: str) -> None:
    series = slices(stored_values())
    for ds in series:
        if value is None:
            delattr(ds, name)
        else:
            setattr(ds, name, value)
    folder = saved(tmp_path / "s", series)
    for reader in READERS:
        error = refusal(folder, reader)
        assert what in error.what
        assert str(error.where).startswith(str(folder))
    with pytest.raises(InputError, match=re.escape(what)):
        series_header([folder], "NibabelIO")


@pytest.mark.parametrize(("rescale", "what"), [("RescaleSlope", "NaN or infinity"), ("RescaleIntercept", "NaN or inf")])
def test_values_that_overflow_are_refused(tmp_path: Path, rescale: str, what: str) -> None:
    assert what in refusal(saved(tmp_path / "s", slices(stored_values(), **{rescale: "1e300"}))).what


def test_several_series_are_listed_so_that_one_can_be_chosen(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    for ds in slices(stored_values((3, 6, 7)), series="1.2.9", SeriesDescription="Lung", Modality="MR"):
        ds.save_as(folder / f"x{ds.InstanceNumber}.dcm", enforce_file_format=True)
    error = refusal(folder)
    assert "2 series" in error.what
    assert "CT 'Thorax 2.5', 5 files, 1.2.3; MR 'Lung', 3 files, 1.2.9" in str(error.got)


def test_what_is_no_slice_is_left_out_aloud_or_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    (folder / "notes.txt").write_text("hello")
    (folder / ".DS_Store").write_bytes(b"\0")
    (folder / "more").mkdir()
    assert read_series([folder], ("CT",), "SimpleITKIO").warnings == ()
    report = slices(stored_values(), SOPClassUID=BasicTextSRStorage)[0]
    for name in ("Rows", "Columns", "PixelData"):
        delattr(report, name)
    report.save_as(folder / "report.dcm", enforce_file_format=True)
    assert "1 DICOM objects without an image" in read_series([folder], ("CT",), "SimpleITKIO").warnings[0]
    (folder / "1.2.840.17").write_bytes(b"\0" * 500)
    error = refusal(folder)
    assert "damaged" in error.what
    assert error.where == folder / "1.2.840.17"


def test_a_single_slice_is_as_thick_as_it_says(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values((1, 6, 7))))
    assert read_series([folder], ("CT",), "SimpleITKIO").spacing[0] == 2.5
    alone = slices(stored_values((1, 6, 7)))
    del alone[0].SliceThickness
    assert "how thick" in refusal(saved(tmp_path / "t", alone)).what


@pytest.mark.parametrize(("name", "value"), [("SliceThickness", "0"), ("SpacingBetweenSlices", "-3"),
                                             ("SpacingBetweenSlices", "0"), ("SliceThickness", "-1")])  # fmt: skip
def test_a_single_slice_without_a_positive_thickness_is_refused(tmp_path: Path, name: str, value: str) -> None:
    folder = saved(tmp_path / "s", slices(stored_values((1, 6, 7)), **{name: value}))
    for reader in READERS:
        error = refusal(folder, reader)
        assert "no usable thickness" in error.what
        assert error.where == folder / "I0000.dcm"


def test_a_negative_distance_in_the_header_of_many_slices_does_not_count(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values(), SpacingBetweenSlices="-2.5"))
    assert read_series([folder], ("CT",), "SimpleITKIO").spacing[0] == 2.5


def test_a_slice_cut_anywhere_is_never_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values((4, 6, 7))))
    last = max(folder.iterdir())
    content = last.read_bytes()
    for length in range(0, len(content) - 1):
        last.write_bytes(content[:length])
        assert refusal(folder).where == last, length


@pytest.mark.parametrize("kind", [BasicTextSRStorage, "1.3.46.670589.11.0.0.12.1"])
def test_an_object_that_is_no_image_is_left_out_and_one_that_may_be_a_slice_is_not(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    other = image_header(stored_values(), kind, "1.2.9")
    for name in ("Rows", "Columns", "PixelData"):
        delattr(other, name)
    other.save_as(folder / "other", enforce_file_format=True)
    image = read_series([folder], ("CT",), "SimpleITKIO")
    assert image.warnings == ("1 DICOM objects without an image were left out, the first is other.",)
    assert image.data.shape == (1, 5, 6, 7)
    before, after = (folder / "other").read_bytes().rsplit(kind.encode(), 1)
    # known to nobody, and not what the file announced
    (folder / "other").write_bytes(before + kind[:-1].encode() + b"9" + after)
    assert refusal(folder).where == folder / "other"


def test_a_dicomdir_beside_the_slices_is_an_index_and_no_slice(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    index = Dataset()
    index.file_meta = pydicom.dataset.FileMetaDataset()
    index.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    index.file_meta.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    index.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    index.FileSetID = "A"
    index.save_as(folder / "DICOMDIR", enforce_file_format=True)
    image = read_series([folder], ("CT",), "SimpleITKIO")
    assert image.data.shape == (1, 5, 6, 7)
    assert image.warnings == ()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("README", b"hello"),
        ("VERSION", b""),
        ("LICENSE", "© 2024\n".encode()),
        ("readme.2024", b"hello\n"),
        ("Thumbs", b"\xd0\xcf\x11\xe0\0\0"),
    ],
)
def test_a_file_that_was_never_a_slice_is_left_out_aloud(tmp_path: Path, name: str, content: bytes) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    (folder / name).write_bytes(content)
    image = read_series([folder], ("CT",), "SimpleITKIO")
    assert image.data.shape == (1, 5, 6, 7)
    assert image.warnings == (f"1 files that are no DICOM were left out, the first is {name}.",)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.dcm", b"hello"),
        ("a.dcm", b""),
        ("IM", b"\0" * 128 + b"DICM"),
        ("IM0009", b""),
        ("IM0009", b"\0" * 300),
        ("1.2.9", b""),
    ],
)
def test_a_file_that_may_have_been_a_slice_is_not(tmp_path: Path, name: str, content: bytes) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    (folder / name).write_bytes(content)
    assert refusal(folder).where == folder / name


def test_a_slice_without_the_preamble_is_not_left_out(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    whole = max(folder.iterdir()).rename(folder / "last")
    whole.write_bytes(whole.read_bytes()[132:])
    assert refusal(folder).where == folder / "last"


def test_a_folder_that_is_none_or_empty_says_so(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone").got == "nothing"
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file").got == "a file"
    (tmp_path / "empty").mkdir()
    assert "no DICOM files" in refusal(tmp_path / "empty").what


@pytest.mark.parametrize("reader", ["NaturalImage2DIO", "Tiff3DIO"])
def test_readers_that_know_no_space_do_not_take_series(tmp_path: Path, reader: Reader) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    assert "cannot stand in" in refusal(folder, reader).what


def test_damaged_headers_are_images_or_input_errors(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values((2, 6, 7))))
    file = folder / "I0001.dcm"
    content = file.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for position in rng.integers(132, len(content), rng.integers(1, 4)):
            damaged[position] = rng.integers(0, 256)
        file.write_bytes(damaged)
        try:
            image = read_series([folder], ("CT",), "SimpleITKIO")
        except (InputError, OutOfMemory):
            continue
        assert np.isfinite(image.data).all()
