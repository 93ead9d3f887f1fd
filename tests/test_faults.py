"""Bad input and bad luck: one clear message, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
from models import DEMO, Subject, subject

from trtbuild.cli import run


@pytest.fixture
def who() -> Subject:
    return subject("iso3d")


@pytest.fixture
def model(who: Subject, tmp_path: Path) -> Path:
    """A copy of a model folder that a test may spoil."""
    target = tmp_path / "model" / who.model.folder.name
    shutil.copytree(who.model.folder, target)
    return target


@pytest.fixture
def images(who: Subject, tmp_path: Path) -> Path:
    """A folder with one good case that a test may add bad ones to."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number, file in enumerate(who.model.cases["small"]):
        shutil.copy(file, folder / f"good_{number:04}{who.model.file_ending}")
    return folder


def message(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_configuration(model: Path, **changes: object) -> None:
    plans = json.loads((model / "plans.json").read_text())
    for configuration in plans["configurations"].values():
        configuration.update(changes)
    (model / "plans.json").write_text(json.dumps(plans))


def spoil(model: Path, how: str) -> None:
    plans = json.loads((model / "plans.json").read_text())
    configuration = next(iter(plans["configurations"].values()))
    match how:
        case "no plans":
            (model / "plans.json").unlink()
        case "plans are no JSON":
            (model / "plans.json").write_text("{")
        case "unknown normalisation":
            edit_configuration(
                model, normalization_schemes=["MyNormalization"] * len(configuration["normalization_schemes"])
            )
        case "unknown reader":
            edit(model / "plans.json", image_reader_writer="MyIO")
        case "unknown architecture":
            edit_configuration(model, architecture=configuration["architecture"] | {"network_class_name": "mynets.Net"})
        case "unknown resampling":
            edit_configuration(model, resampling_fn_data="my_resampling")
        case "checkpoint cut off":
            checkpoint = next(model.glob("fold_*/checkpoint_final.pth"))
            checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
        case "no fold":
            for fold in model.glob("fold_*"):
                shutil.rmtree(fold)


SPOILED = {
    "no plans": "plans.json",
    "plans are no JSON": "plans.json",
    "unknown normalisation": "MyNormalization",
    "unknown reader": "MyIO",
    "unknown architecture": "mynets",
    "unknown resampling": "my_resampling",
    "checkpoint cut off": "checkpoint_final.pth",
    "no fold": "fold",
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_spoiled_model_is_refused_by_name(
    how: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(model, how)
    assert run(["compile", str(model), "-o", str(tmp_path / "b.trtb"), "--no-tune"]) == 1
    assert SPOILED[how] in message(capsys)
    assert not list(tmp_path.glob("*.trtb*"))
    assert not list(tmp_path.glob(".*"))


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        assert run(["compile", str(path), "-o", str(tmp_path / "b.trtb")]) == 1
        assert "plans.json" in message(capsys)


def test_a_missing_fold_is_named_with_those_that_exist(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", str(model), "-o", str(tmp_path / "b.trtb"), "-f", "4"]) == 1
    error = message(capsys)
    assert "4" in error
    assert "0" in error
    assert run(["compile", str(model), "-o", str(tmp_path / "b.trtb"), "-chk", "checkpoint_best.pth"]) == 1
    assert "checkpoint_best.pth" in message(capsys)


def test_an_existing_bundle_is_kept(who: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "b.trtb"
    shutil.copytree(who.bundle, copy)
    before = (copy / "bundle.json").read_bytes()
    assert run(["compile", str(who.bundle), "-o", str(copy), "--no-tune"]) == 1
    assert "--overwrite" in message(capsys)
    assert (copy / "bundle.json").read_bytes() == before


def bad_case(images: Path, who: Subject, how: str) -> None:
    ending = who.model.file_ending
    paths = [images / f"bad_{n:04}{ending}" for n in range(2)]
    for source, path in zip(who.model.cases["small"], paths, strict=True):
        shutil.copy(source, path)
    volume = nibabel.load(paths[1])
    array, affine = volume.get_fdata(), volume.affine
    match how:
        case "one channel":
            paths[1].unlink()
        case "three channels":
            shutil.copy(paths[0], images / f"bad_0002{ending}")
        case "another shape":
            nibabel.save(nibabel.Nifti1Image(array[:-1], affine), paths[1])
        case "another spacing":
            nibabel.save(nibabel.Nifti1Image(array, affine @ np.diag([1.5, 1, 1, 1])), paths[1])
        case "cut off":
            paths[1].write_bytes(paths[1].read_bytes()[:-200])
        case "no image":
            paths[1].write_bytes(b"this is text")
        case "NaN":
            array[1, 2, 3] = np.nan
            nibabel.save(nibabel.Nifti1Image(array.astype(np.float32), affine), paths[1])


BAD = ["one channel", "three channels", "another shape", "another spacing", "cut off", "no image", "NaN"]


@pytest.mark.parametrize("how", BAD)
def test_one_bad_case_fails_alone_and_is_named(
    how: str, who: Subject, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad_case(images, who, how)
    out = tmp_path / "out"
    assert run(["predict", str(who.bundle), "-i", str(images), "-o", str(out)]) == 4
    error = message(capsys)
    assert "1 of 2 cases failed" in error
    assert "bad" in error
    assert (out / ("good" + who.model.file_ending)).is_file()
    assert {p.name for p in out.iterdir() if "bad" in p.name or "partial" in p.name} == set()


@pytest.mark.parametrize("how", BAD)
def test_a_bad_case_alone_is_exit_code_1(
    how: str, who: Subject, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in images.iterdir():
        file.unlink()
    bad_case(images, who, how)
    assert run(["predict", str(who.bundle), "-i", str(images), "-o", str(tmp_path / "out")]) == 1
    assert "\nError: " in message(capsys)


def test_an_empty_input_folder_says_how_files_are_named(
    who: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert run(["predict", str(who.bundle), "-i", str(tmp_path / "empty"), "-o", str(tmp_path / "out")]) == 1
    assert "_0000" in message(capsys)


def test_previous_stage_predictions_need_a_cascade(
    who: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "predict",
        str(who.bundle),
        "-i",
        str(tmp_path),
        "-o",
        str(tmp_path / "o"),
        "-prev_stage_predictions",
        "x",
    ]
    assert run(arguments) == 1
    assert "cascade" in message(capsys)


def test_an_output_that_is_a_file_is_refused(
    who: Subject, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").write_text("in the way")
    assert run(["predict", str(who.bundle), "-i", str(images), "-o", str(tmp_path / "out")]) == 1
    assert "out" in message(capsys)
    assert run(["predict", str(who.bundle), "-i", str(images), "-o", "/proc/trtbuild"]) == 1
    message(capsys)


def cli(*arguments: str, limit: int | None = None) -> subprocess.Popen[str]:
    """trtbuild in a process of its own; `limit` is the largest file it may write, in bytes."""

    def limited() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-m", "trtbuild", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limited,
    )


def test_a_disk_that_takes_no_more_ends_the_run_with_a_message(tmp_path: Path) -> None:
    """The system refuses every write beyond 12 kB, in Python and in ITK alike, as a full disk does."""
    out = tmp_path / "out"
    process = cli(
        "predict", str(subject("demo").bundle), "-i", str(DEMO / "input"), "-o", str(out), "--disable_tta", limit=12_000
    )
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1, error
    assert "Traceback" not in error
    assert "written" in error
    assert not [p for p in out.iterdir() if p.name.startswith(("mni152", ".mni152"))]
    assert not list(out.glob(".*partial*"))


def test_a_bundle_that_the_disk_cannot_hold_leaves_nothing(who: Subject, tmp_path: Path) -> None:
    process = cli("compile", str(who.model.folder), "-o", str(tmp_path / "b.trtb"), "--no-tune", limit=9_000)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 1, error
    assert "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_ends_with_130_and_leaves_no_partial_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = cli("predict", str(subject("demo").bundle), "-i", str(DEMO / "input"), "-o", str(out))
    assert process.stderr is not None
    line = process.stderr.readline()  # printed when the engines are open and the first case starts
    assert "1 case" in line
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in error
    names = {p.name for p in out.iterdir()}
    assert names == {"dataset.json", "plans.json", "predict_from_raw_data_args.json"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; /proc in another test refuses root as well")
def test_a_folder_without_permission_is_refused(
    who: Subject, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    assert run(["predict", str(who.bundle), "-i", str(images), "-o", str(tmp_path / "locked" / "out")]) == 1
    assert "write" in message(capsys)
