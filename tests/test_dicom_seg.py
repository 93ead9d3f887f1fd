"""DICOM-SEG as output, read back by highdicom and by hand, frame by frame, and held against the segmentation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_samples import enhanced, saved, slices, stored_values
from test_dicom import READERS, TURNS, itk_series

import trtbuild
from trtbuild.errors import InputError, OutputError
from trtbuild.spec import Reader
from trtbuild.volume.image import Geometry, PixelGeometry
from trtbuild.volume.io import reader_named
from trtbuild.volume.io.dicom_io import read_series
from trtbuild.volume.io.dicom_seg import write_dicom_seg

LABELS = {"background": (0,), "liver": (1,), "Tumör": (2,), "spleen": (7,)}
BUNDLE = "ab" * 32


def labels_of(data: np.ndarray) -> np.ndarray:
    """A segmentation that depends on the voxels, so that its place can be told from them: 0, 1, 2, 7."""
    return np.select([data < 0, data < 1000, data < 2000], [0, 1, 2], 7).astype(np.uint8)


def frames_of(path: Path) -> dict[tuple[int, str], np.ndarray]:
    """The frames of a SEG by segment number and position, decoded by pydicom alone."""
    ds = pydicom.dcmread(path)
    pixels = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    return {
        (
            int(group.SegmentIdentificationSequence[0].ReferencedSegmentNumber),
            " ".join(f"{float(v):.6f}" for v in group.PlanePositionSequence[0].ImagePositionPatient),
        ): frame
        for group, frame in zip(ds.PerFrameFunctionalGroupsSequence, pixels, strict=True)
    }


def assert_holds(path: Path, expected: np.ndarray, masks: dict[int, Any], series: list[pydicom.Dataset]) -> None:
    """Every segment of every slice is in the SEG, at the slice's position and with a reference to it, or empty."""
    frames = frames_of(path)
    seen = set()
    for z, ds in enumerate(series):
        position = " ".join(f"{float(v):.6f}" for v in ds.ImagePositionPatient)
        for number, values in masks.items():
            frame = frames.get((number, position))
            wanted = np.isin(expected[z], values)
            np.testing.assert_array_equal(np.zeros_like(wanted) if frame is None else frame, wanted)
            seen.add((number, position))
    assert set(frames) <= seen


@pytest.mark.parametrize("turn", TURNS)
@pytest.mark.parametrize("reader", READERS)
def test_every_voxel_comes_back_at_its_place(tmp_path: Path, turn: str, reader: Reader) -> None:
    series = slices(stored_values(), TURNS[turn])
    folder = saved(tmp_path / "s", series)
    image = read_series([folder], ("CT",), reader)
    path = tmp_path / "case.dcm"
    write_dicom_seg(labels_of(image.data[0]), image.geometry, folder, LABELS, path, bundle=BUNDLE)
    expected = labels_of(stored_values().astype(np.float32) - 1024)
    assert_holds(path, expected, {1: [1], 2: [2], 3: [7]}, series)
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["case.dcm"]
    # highdicom's own idea of the volume, combined into one label map
    volume = highdicom.seg.segread(path).get_volume(combine_segments=True, relabel=False)
    theirs = itk_series(folder)
    indices = np.array(list(np.ndindex(volume.array.shape)))
    steps = np.reshape(theirs.GetDirection(), (3, 3)) * theirs.GetSpacing()
    x, y, z = (
        np.linalg.solve(steps, (volume.map_indices_to_reference(indices) - theirs.GetOrigin()).T).round().astype(int)
    )
    numbers = np.where(expected == 7, 3, expected)
    np.testing.assert_array_equal(volume.array[tuple(indices.T)], numbers[z, y, x])


def test_a_case_that_came_as_nifti_can_be_written_for_its_series(tmp_path: Path) -> None:
    series = slices(stored_values(), TURNS["oblique"])
    folder = saved(tmp_path / "s", series)
    sitk.WriteImage(itk_series(folder), str(tmp_path / "a_0000.nii.gz"))
    for reader in READERS:
        image = reader_named(reader).read_image([tmp_path / "a_0000.nii.gz"], ("CT",))
        path = tmp_path / f"{reader}.dcm"
        write_dicom_seg(labels_of(image.data[0]), image.geometry, folder, LABELS, path, bundle=BUNDLE)
        assert_holds(path, labels_of(stored_values().astype(np.float32) - 1024), {1: [1], 2: [2], 3: [7]}, series)


def written(tmp_path: Path, labels: dict[str, tuple[int, ...]], segmentation: np.ndarray) -> pydicom.Dataset:
    folder = saved(tmp_path / "s", slices(stored_values(segmentation.shape)))  # type: ignore[arg-type]
    geometry = read_series([folder], ("CT",), "SimpleITKIO").geometry
    write_dicom_seg(segmentation, geometry, folder, labels, tmp_path / "o.dcm", bundle=BUNDLE)
    return pydicom.dcmread(tmp_path / "o.dcm")


def test_the_object_says_what_made_it_from_what(tmp_path: Path) -> None:
    ds = written(tmp_path, LABELS, labels_of(stored_values().astype(np.float32) - 1024))
    assert (ds.Modality, ds.SegmentationType) == ("SEG", "BINARY")
    assert (ds.PatientName, ds.PatientID, ds.PatientSex) == ("Müller^Eva", "p1", "F")
    assert ds.StudyInstanceUID == "1.2.3.1"
    assert ds.FrameOfReferenceUID == "1.2.3.2"
    assert ds.SeriesInstanceUID != "1.2.3"
    assert [segment.SegmentLabel for segment in ds.SegmentSequence] == ["liver", "Tumör", "spleen"]
    assert [segment.SegmentNumber for segment in ds.SegmentSequence] == [1, 2, 3]
    for segment in ds.SegmentSequence:
        assert segment.SegmentAlgorithmType == "AUTOMATIC"
        algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("trtbuild", trtbuild.__version__)
        assert BUNDLE in algorithm.AlgorithmParameters
    sources = {pydicom.dcmread(file).SOPInstanceUID for file in (tmp_path / "s").iterdir()}
    referenced = ds.ReferencedSeriesSequence[0]
    assert referenced.SeriesInstanceUID == "1.2.3"
    assert {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence} == sources
    by_position = {
        " ".join(map(str, one.ImagePositionPatient)): one.SOPInstanceUID
        for one in (pydicom.dcmread(file) for file in (tmp_path / "s").iterdir())
    }
    for group in ds.PerFrameFunctionalGroupsSequence:
        source = group.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
        assert by_position[" ".join(map(str, group.PlanePositionSequence[0].ImagePositionPatient))] == source


def test_regions_overlap(tmp_path: Path) -> None:
    segmentation = labels_of(stored_values().astype(np.float32) - 1024)
    regions = {"background": (0,), "all": (1, 2, 7), "core": (2, 7), "enhancing": (7,)}
    written(tmp_path, regions, segmentation)
    assert_holds(tmp_path / "o.dcm", segmentation, {1: [1, 2, 7], 2: [2, 7], 3: [7]}, slices(stored_values()))


def test_more_than_255_labels_are_as_many_segments(tmp_path: Path) -> None:
    segmentation = np.arange(300, dtype=np.uint16).reshape(3, 10, 10)
    ds = written(tmp_path, {f"l{i}": (i,) for i in range(300)}, segmentation)
    assert len(ds.SegmentSequence) == 299
    assert_holds(tmp_path / "o.dcm", segmentation, {i: [i] for i in range(1, 300)}, slices(stored_values((3, 10, 10))))


def test_an_empty_segmentation_names_what_was_looked_for(tmp_path: Path) -> None:
    ds = written(tmp_path, LABELS, np.zeros((5, 6, 7), np.uint8))
    assert len(ds.SegmentSequence) == 3
    assert not ds.pixel_array.any()


def test_a_second_run_makes_the_same_object_and_another_model_another(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    image = read_series([folder], ("CT",), "SimpleITKIO")
    segmentation = labels_of(image.data[0])
    other = segmentation.copy()
    other[0, 0, 0] = 7 - other[0, 0, 0] if other[0, 0, 0] in (0, 7) else 7
    uids = []
    for voxels, bundle in ((segmentation, BUNDLE), (segmentation.astype(np.int64), BUNDLE), (segmentation, "c" * 64),
                           (other, BUNDLE)):  # fmt: skip
        write_dicom_seg(voxels, image.geometry, folder, LABELS, tmp_path / "o.dcm", bundle=bundle)
        ds = pydicom.dcmread(tmp_path / "o.dcm")
        assert ds.SOPInstanceUID.is_valid
        assert ds.SeriesInstanceUID.is_valid
        uids.append((ds.SOPInstanceUID, ds.SeriesInstanceUID))
    assert uids[0] == uids[1]
    assert len({uid for pair in uids for uid in pair}) == 6


@pytest.mark.parametrize("order", [(), (3, 0, 4, 1, 2)])
def test_an_enhanced_series_is_referred_to_frame_by_frame(tmp_path: Path, order: tuple[int, ...]) -> None:
    folder = saved(tmp_path / "s", [enhanced(stored_values(), TURNS["oblique"], order=order)])
    image = read_series([folder], ("CT",), "NibabelIOWithReorient")
    write_dicom_seg(labels_of(image.data[0]), image.geometry, folder, LABELS, tmp_path / "o.dcm", bundle=BUNDLE)
    expected = labels_of(stored_values().astype(np.float32) - 1024)
    assert_holds(tmp_path / "o.dcm", expected, {1: [1], 2: [2], 3: [7]}, slices(stored_values(), TURNS["oblique"]))


def refused(tmp_path: Path, segmentation: np.ndarray, geometry: Geometry, folder: Path, **more: Any) -> str:
    with pytest.raises((OutputError, InputError)) as error:
        write_dicom_seg(
            segmentation, geometry, folder, more.get("labels", LABELS), tmp_path / "o.dcm", bundle=BUNDLE
        )  # fmt: skip
    assert not (tmp_path / "o.dcm").exists()
    return error.value.what


def test_a_segmentation_of_another_series_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    geometry = read_series([folder], ("CT",), "SimpleITKIO").geometry
    segmentation = np.zeros((5, 6, 7), np.uint8)
    others = {
        "moved": slices(stored_values(), origin=(-10.5, 20.25, 30.5)),
        "turned": slices(stored_values(), TURNS["prone"]),
        "denser": slices(stored_values(), distance=2.4),
        "finer": slices(stored_values(), spacing=(0.7, 0.85)),
    }
    for name, series in others.items():
        assert "elsewhere" in refused(tmp_path, segmentation, geometry, saved(tmp_path / name, series))
    longer = saved(tmp_path / "longer", slices(stored_values((6, 6, 7))))
    assert "another shape" in refused(tmp_path, segmentation, geometry, longer)
    assert "another shape" in refused(tmp_path, segmentation[:, :, :6], geometry, folder)
    with pytest.raises(TypeError):
        write_dicom_seg(segmentation, PixelGeometry(), folder, LABELS, tmp_path / "o.dcm", bundle=BUNDLE)


def test_a_series_that_lost_a_slice_or_its_frame_of_reference_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    geometry, segmentation = read_series([folder], ("CT",), "SimpleITKIO").geometry, np.zeros((5, 6, 7), np.uint8)
    bare = slices(stored_values())
    for ds in bare:
        del ds.FrameOfReferenceUID
    assert "no frame of reference" in refused(tmp_path, segmentation, geometry, saved(tmp_path / "bare", bare))
    (folder / "I0002.dcm").unlink()
    assert refused(tmp_path, segmentation, geometry, folder)


@pytest.mark.parametrize(("labels", "what"), [
    ({"a" * 65: (1,)}, "a name that DICOM cannot hold"),
    ({"": (1,)}, "a name that DICOM cannot hold"),
    ({"a\\b": (1,)}, "a name that DICOM cannot hold"),
    ({"a\nb": (1,)}, "a name that DICOM cannot hold"),
    ({"background": (0,)}, "no label to write"),
    ({"liver": (1,)}, "values that no label names"),
])  # fmt: skip
def test_labels_that_cannot_be_written_are_refused(
    tmp_path: Path, labels: dict[str, tuple[int, ...]], what: str
) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    segmentation = np.zeros((5, 6, 7), np.uint8)
    segmentation[1, 2, 3] = 2 if labels == {"liver": (1,)} else 0
    geometry = read_series([folder], ("CT",), "SimpleITKIO").geometry
    assert what in refused(tmp_path, segmentation, geometry, folder, labels=labels)


def test_an_anonymised_series_gets_an_object_with_empty_names(tmp_path: Path) -> None:
    series = slices(stored_values())
    for ds in series:
        for name in ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "AccessionNumber",
                     "StudyID", "ReferringPhysicianName", "SeriesNumber", "SeriesDescription"):  # fmt: skip
            delattr(ds, name)
    folder = saved(tmp_path / "s", series)
    image = read_series([folder], ("CT",), "SimpleITKIO")
    write_dicom_seg(labels_of(image.data[0]), image.geometry, folder, LABELS, tmp_path / "o.dcm", bundle=BUNDLE)
    assert_holds(tmp_path / "o.dcm", labels_of(image.data[0]), {1: [1], 2: [2], 3: [7]}, series)


def test_a_place_that_cannot_be_written_and_a_missing_highdicom_say_so(tmp_path: Path) -> None:
    folder = saved(tmp_path / "s", slices(stored_values()))
    geometry, segmentation = read_series([folder], ("CT",), "SimpleITKIO").geometry, np.zeros((5, 6, 7), np.uint8)
    with pytest.raises(OutputError):
        write_dicom_seg(segmentation, geometry, folder, LABELS, tmp_path / "gone" / "o.dcm", bundle=BUNDLE)
    code = (
        "import sys; sys.modules['highdicom'] = None\n"
        "from pathlib import Path; import numpy as np\n"
        "from trtbuild.volume.io.dicom_io import read_series\n"
        "from trtbuild.volume.io.dicom_seg import write_dicom_seg\n"
        "folder = Path(sys.argv[1]); image = read_series([folder], ('CT',), 'SimpleITKIO')\n"
        "zeros, labels = np.zeros((5, 6, 7), np.uint8), {'a': (1,)}\n"
        "try: write_dicom_seg(zeros, image.geometry, folder, labels, folder / 'o', bundle='b')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("MissingExtra highdicom is needed to write DICOM-SEG")
    assert not (folder / "o").exists()
