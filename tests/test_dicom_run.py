"""DICOM through a whole run: a series in, a DICOM-SEG and a NIfTI out, both on the series' grid."""

from __future__ import annotations

from pathlib import Path

import highdicom
import numpy as np
import pytest
import SimpleITK as sitk
from dicom_samples import saved, slices
from models import Subject, subject

import trtbuild
from trtbuild.cli import run


@pytest.fixture(scope="module")
def who() -> Subject:
    return subject("ct_aniso")


@pytest.fixture(scope="module")
def series(who: Subject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A folder of series with the intensities of the model's own image, and the NIfTI that ITK makes of one."""
    root = tmp_path_factory.mktemp("dicom")
    intensities = sitk.GetArrayFromImage(sitk.ReadImage(str(who.model.cases["main"][0]))).astype(np.int64)
    stored = np.clip(intensities + 1024, 0, 4095).astype(np.uint16)
    folder = saved(root / "series" / "thorax", slices(stored))
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    nifti = root / "nifti" / "thorax_0000.nii.gz"
    nifti.parent.mkdir()
    sitk.WriteImage(sitk.Cast(reader.Execute(), sitk.sitkFloat32), str(nifti))
    return root / "series", nifti


def test_a_series_gives_the_labels_of_its_nifti_and_a_dicom_seg(
    who: Subject, series: tuple[Path, Path], tmp_path: Path
) -> None:
    folder, nifti = series
    common = ["--backend", "onnxruntime", "--disable_tta"]
    command = ["predict", str(who.bundle), "-i", str(folder), "-o", str(tmp_path / "a"), "-ot", "dicom_seg", *common]
    assert run(command) == 0
    assert run(["predict", str(who.bundle), "-i", str(nifti), "-o", str(tmp_path / "b"), *common]) == 0
    ours, theirs = (sitk.ReadImage(str(tmp_path / name / "thorax.nii.gz")) for name in "ab")
    labels = sitk.GetArrayFromImage(ours)
    assert len(np.unique(labels)) == len(who.model.labels)
    np.testing.assert_array_equal(labels, sitk.GetArrayFromImage(theirs))
    np.testing.assert_allclose(ours.GetOrigin(), theirs.GetOrigin(), atol=1e-4)
    np.testing.assert_allclose(ours.GetSpacing(), theirs.GetSpacing(), atol=1e-6)
    seg = highdicom.seg.segread(tmp_path / "a" / "thorax.dcm")
    assert seg.number_of_segments == len(who.model.labels) - 1
    volume = seg.get_volume(combine_segments=True, relabel=False)
    assert np.count_nonzero(volume.array) == np.count_nonzero(labels)
    assert {int(v) for v in np.unique(volume.array)} == set(range(len(who.model.labels)))


def test_python_takes_the_folder_of_a_series(who: Subject, series: tuple[Path, Path]) -> None:
    folder, nifti = series
    with trtbuild.open(who.bundle, backend="onnxruntime") as predictor:
        one = predictor.predict(folder / "thorax", mirroring=False).segmentation
        other = predictor.predict(nifti, mirroring=False).segmentation
    np.testing.assert_array_equal(one, other)


def test_a_dicom_seg_of_a_nifti_is_refused_by_name(
    who: Subject, series: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["predict", str(who.bundle), "-i", str(series[1]), "-o", str(tmp_path), "-ot", "dicom_seg"]
    assert run(command) == 1
    assert "refers to a DICOM series" in capsys.readouterr().err
    assert not list(tmp_path.glob("thorax*"))
