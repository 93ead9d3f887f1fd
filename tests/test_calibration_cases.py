"""Preprocessed cases: which files are a case, what is read of them, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from calibration_samples import DEMO, DEMO_CASES, image, labels, write_blosc, write_case

from trtbuild_calibration import ArraySource, CalibrationError, Case, cases_from_folder, digest, open_case

KINDS = ("b2nd", "npz", "npy")
BOX = ((1, 3), (0, 4), (2, 7))
INDEX = tuple(slice(*bounds) for bounds in BOX)


@pytest.mark.parametrize("kind", KINDS)
def test_a_case_is_read_box_by_box_as_it_was_written(tmp_path: Path, kind: str) -> None:
    data, seg = image(2, 5, 6, 7), labels(1, 5, 6, 7)
    write_case(tmp_path, "b", kind, data, seg)
    write_case(tmp_path, "a", kind, data + 1, None)
    cases = cases_from_folder(tmp_path)
    assert [case.name for case in cases] == ["a", "b"]
    without, source = (open_case(case, channels=2) for case in cases)
    assert source.shape == (2, 5, 6, 7)
    np.testing.assert_array_equal(source.read(BOX), data[(slice(None), *INDEX)])
    assert source.read(BOX).dtype == np.float32
    np.testing.assert_array_equal(source.read_labels(BOX), seg[0][INDEX])
    np.testing.assert_array_equal(without.read(BOX), (data + 1)[(slice(None), *INDEX)])
    assert without.read_labels(BOX) is None


@pytest.mark.parametrize("kind", ["b2nd", "npz"])
def test_nnunets_own_writer_and_reader_agree(tmp_path: Path, kind: str) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2, nnUNetDatasetNumpy

    dataset = nnUNetDatasetBlosc2 if kind == "b2nd" else nnUNetDatasetNumpy
    data, seg = image(1, 20, 30, 25), labels(1, 20, 30, 25)
    extra = {"chunks": (1, 16, 16, 16), "blocks": (1, 8, 8, 8)} if kind == "b2nd" else {}
    dataset.save_case(data, seg, {}, str(tmp_path / "one"), **extra)
    theirs = dataset(str(tmp_path)).load_case("one")
    (case,) = cases_from_folder(tmp_path)
    source = open_case(case, channels=1)
    whole = tuple((0, length) for length in data.shape[1:])
    np.testing.assert_array_equal(source.read(whole), theirs[0][:])
    np.testing.assert_array_equal(source.read_labels(whole), theirs[1][:][0])


def test_unpacked_arrays_go_before_the_archive(tmp_path: Path) -> None:
    write_case(tmp_path, "a", "npz", image(1, 2, 2, 2), labels(1, 2, 2, 2))
    write_case(tmp_path, "a", "npy", image(1, 2, 2, 2, seed=5), labels(1, 2, 2, 2))
    (case,) = cases_from_folder(tmp_path)
    assert (case.data.name, case.segmentation.name) == ("a.npy", "a_seg.npy")
    (tmp_path / "a_seg.npy").unlink()
    assert cases_from_folder(tmp_path)[0].segmentation.name == "a.npz"


def test_the_demo_cases_are_read() -> None:
    cases = cases_from_folder(DEMO_CASES)
    assert [case.name for case in cases] == ["copy0", "copy1", "copy2"]
    source = open_case(cases[0], channels=1)
    assert source.shape == (1, 96, 115, 101)
    box = ((40, 50), (50, 60), (40, 60))
    assert source.read(box).shape == (1, 10, 10, 20)
    assert set(np.unique(source.read_labels(box))) <= {-1, 0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_the_stage_before_becomes_channels_as_in_nnunet(tmp_path: Path, kind: str) -> None:
    import torch
    from batchgeneratorsv2.transforms.nnunet.seg_to_onehot import MoveSegAsOneHotToDataTransform

    data, before = image(2, 4, 5, 6), labels(4, 5, 6, seed=3, values=(0, 1, 2, 7)).astype(np.uint8)
    write_case(tmp_path / "cases", "a", kind, data, labels(1, 4, 5, 6))
    (tmp_path / "next").mkdir()
    if kind == "b2nd":
        write_blosc(tmp_path / "next/a.b2nd", before)
    elif kind == "npz":
        np.savez_compressed(tmp_path / "next/a.npz", seg=before)
    else:
        np.save(tmp_path / "next/a.npy", before)
    (case,) = cases_from_folder(tmp_path / "cases", previous=tmp_path / "next")
    source = open_case(case, channels=2, one_hot=(7, 1, 2))
    assert source.shape == (5, 4, 5, 6)
    whole = ((0, 4), (0, 5), (0, 6))
    transform = MoveSegAsOneHotToDataTransform(0, (7, 1, 2), True)
    theirs = transform(image=torch.from_numpy(data), segmentation=torch.from_numpy(before.astype(np.int16))[None])
    np.testing.assert_array_equal(source.read(whole), theirs["image"].numpy())


def test_the_stage_before_must_fit(tmp_path: Path) -> None:
    write_case(tmp_path / "cases", "a", "b2nd", image(1, 4, 5, 6), None)
    (tmp_path / "next").mkdir()
    with pytest.raises(CalibrationError, match=r"has not predicted a case[^$]*a\.b2nd"):
        cases_from_folder(tmp_path / "cases", previous=tmp_path / "next")
    write_blosc(tmp_path / "next/a.b2nd", labels(4, 5, 5).astype(np.uint8))
    (case,) = cases_from_folder(tmp_path / "cases", previous=tmp_path / "next")
    with pytest.raises(CalibrationError, match="another shape than their image"):
        open_case(case, channels=1, one_hot=(1,))
    with pytest.raises(CalibrationError, match="come together"):
        open_case(case, channels=1)


def test_the_digest_tells_cases_apart(tmp_path: Path) -> None:
    write_case(tmp_path, "a", "npy", image(1, 2, 2, 2), labels(1, 2, 2, 2))
    before = digest(cases_from_folder(tmp_path)[0])
    assert before == digest(cases_from_folder(tmp_path)[0])
    np.save(tmp_path / "a_seg.npy", labels(1, 2, 2, 2, seed=9))
    assert digest(cases_from_folder(tmp_path)[0]) != before


def test_folders_that_hold_no_cases(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="no such folder"):
        cases_from_folder(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CalibrationError, match="a folder, not a file"):
        cases_from_folder(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="an empty folder"):
        cases_from_folder(tmp_path / "empty")
    with pytest.raises(CalibrationError, match=r"its subfolders do[^$]*nnUNetPlans_3d_fullres"):
        cases_from_folder(DEMO)
    (tmp_path / "raw/imagesTr").mkdir(parents=True)
    with pytest.raises(CalibrationError, match="raw images"):
        cases_from_folder(tmp_path / "raw")
    (tmp_path / "raw/imagesTr/a_0000.nii.gz").write_bytes(b"")
    with pytest.raises(CalibrationError, match="raw images"):
        cases_from_folder(tmp_path / "raw/imagesTr")
    write_case(tmp_path / "two", "a", "b2nd", image(1, 2, 2, 2), None)
    write_case(tmp_path / "two", "b", "npz", image(1, 2, 2, 2), None)
    with pytest.raises(CalibrationError, match="two formats"):
        cases_from_folder(tmp_path / "two")
    write_case(tmp_path / "seg", "a_seg", "npy", labels(1, 2, 2, 2), None)
    with pytest.raises(CalibrationError, match="segmentations but no image"):
        cases_from_folder(tmp_path / "seg")
    (tmp_path / "keyless").mkdir()
    np.savez(tmp_path / "keyless/a.npz", seg=labels(1, 2, 2, 2))
    with pytest.raises(CalibrationError, match="has no image"):
        cases_from_folder(tmp_path / "keyless")


@pytest.mark.parametrize(
    ("data", "seg", "message"),
    [
        (image(3, 2, 2, 2), labels(1, 2, 2, 2), "another number of channels"),
        (image(2, 2, 2), None, "wrong number of axes"),
        (image(1, 0, 2, 2), None, "no values"),
        (np.full((1, 2, 2, 2), 1j), None, "something else than numbers"),
        (image(1, 2, 2, 2), labels(1, 2, 2, 3), "another shape than their image"),
        (image(1, 2, 2, 2), labels(2, 2, 2, 2), "another shape than their image"),
    ],
)
def test_arrays_of_another_form_are_refused(tmp_path: Path, data: np.ndarray, seg: np.ndarray, message: str) -> None:
    write_case(tmp_path, "case7", "npy", data, seg)
    with pytest.raises(CalibrationError, match=message) as caught:
        open_case(cases_from_folder(tmp_path)[0], channels=1)
    assert "case7" in str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("keep", [0.0, 0.02, 0.5, 0.97])
def test_a_file_that_is_cut_is_named(tmp_path: Path, kind: str, keep: float) -> None:
    write_case(tmp_path, "case7", kind, image(1, 30, 30, 30), None)
    path = tmp_path / f"case7.{kind}"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(CalibrationError, match=f"damaged[^$]*case7.{kind}"):
        open_case(cases_from_folder(tmp_path)[0], channels=1)


def test_a_damaged_member_of_an_archive_is_named(tmp_path: Path) -> None:
    """The header is whole, so it shows when the values are read."""
    write_case(tmp_path, "case7", "npz", image(1, 30, 30, 30), None)
    path = tmp_path / "case7.npz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    path.write_bytes(content)
    source = open_case(cases_from_folder(tmp_path)[0], channels=1)
    with pytest.raises(CalibrationError, match=r"damaged[^$]*case7\.npz"):
        source.read(((0, 1), (0, 1), (0, 1)))


def test_a_pickle_is_never_opened(tmp_path: Path) -> None:
    """Neither the one beside a case, which is none here, nor one inside an array."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    np.save(tmp_path / "a.npy", np.array([[[[Trap()]]]], dtype=object), allow_pickle=True)
    with pytest.raises(CalibrationError):
        open_case(cases_from_folder(tmp_path)[0], channels=1)
    (tmp_path / "a.npy").unlink()
    np.savez(tmp_path / "a.npz", data=np.array([[[[Trap()]]]], dtype=object), allow_pickle=True)
    with pytest.raises(CalibrationError):
        open_case(cases_from_folder(tmp_path)[0], channels=1)
    assert not (tmp_path / "sprung").exists()


def test_a_program_in_place_of_an_array_is_refused(tmp_path: Path) -> None:
    """Blosc2 files may hold expressions that are computed when they are read."""
    import blosc2

    array = blosc2.asarray(image(1, 4, 4, 4), urlpath=str(tmp_path / "other.b2nd"), mode="w")
    (array + 1).save(urlpath=str(tmp_path / "a.b2nd"), mode="w")
    case = next(case for case in cases_from_folder(tmp_path) if case.name == "a")
    with pytest.raises(CalibrationError, match=r"damaged[^$]*a\.b2nd"):
        open_case(case, channels=1)


def test_without_blosc2_the_message_holds_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_case(tmp_path, "a", "b2nd", image(1, 4, 4, 4), None)
    (case,) = cases_from_folder(tmp_path)
    monkeypatch.setitem(sys.modules, "blosc2", None)
    with pytest.raises(CalibrationError, match=r"pip install 'trtbuild\[calibrate\]'"):
        open_case(case, channels=1)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.nii").write_bytes(b"x")
    with pytest.raises(CalibrationError, match="other files"):
        cases_from_folder(tmp_path)
    with pytest.raises(CalibrationError, match="an ending that is not read"):
        open_case(Case(name="a", data=tmp_path / "a.nii", segmentation=None), channels=1)
    np.savez(tmp_path / "b.npz", data=image(1, 4, 4, 4))
    (tmp_path / "b.npz").write_bytes(b"no archive")
    with pytest.raises(CalibrationError, match=r"damaged[^$]*b\.npz"):
        cases_from_folder(tmp_path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        digest(Case(name="a", data=tmp_path / "none", segmentation=None))


def test_a_file_that_vanished_is_named(tmp_path: Path) -> None:
    write_case(tmp_path, "a", "npy", image(1, 2, 2, 2), None)
    (case,) = cases_from_folder(tmp_path)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(CalibrationError, match=r"missing[^$]*a\.npy"):
        open_case(case, channels=1)


def test_labels_must_be_labels(tmp_path: Path) -> None:
    write_case(tmp_path, "a", "npy", image(1, 2, 2, 2), np.full((1, 2, 2, 2), 0.5, np.float32))
    source = open_case(cases_from_folder(tmp_path)[0], channels=1)
    with pytest.raises(CalibrationError, match=r"something else than labels[^$]*0\.5"):
        source.read_labels(((0, 1), (0, 1), (0, 1)))


def test_arrays_in_memory_are_a_source() -> None:
    data, seg = image(2, 5, 6, 7), labels(5, 6, 7)
    source = ArraySource(name="m", data=data, labels=seg)
    np.testing.assert_array_equal(source.read(BOX), data[(slice(None), *INDEX)])
    np.testing.assert_array_equal(source.read_labels(BOX), seg[INDEX])
    with pytest.raises(CalibrationError, match="another shape"):
        ArraySource(name="m", data=data, labels=seg[1:])
    with pytest.raises(CalibrationError, match="number of axes"):
        ArraySource(name="m", data=data[0], labels=None)


def test_the_package_knows_neither_trtbuild_nor_a_framework() -> None:
    code = (
        "import sys, trtbuild_calibration; "
        "print(sorted({name.split('.')[0] for name in sys.modules} & "
        "{'trtbuild', 'torch', 'onnx', 'onnxruntime', 'openvino', 'numba', 'blosc2'}))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"
