"""The command line from the outside: words, exit codes, files, messages."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from models import DEMO, subject
from reference import segmentation_from_file

from trtbuild.cli import run


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("arguments", "suggestion"),
    [
        (["predict", "B", "-i", "x", "-o", "y", "-prev_stage", "z"], "-prev_stage_predictions"),
        (["compile", "M", "-o", "y", "-chkk", "x"], "-chk"),
        (["predict", "B", "-i", "x", "-o", "y", "-step", "0.5"], "-step_size"),
        (["predict", "B", "-i", "x", "-o", "y", "--disable_ta"], "--disable_tta"),
        (["predikt", "B"], "predict"),
    ],
)
def test_a_mistyped_word_is_refused_with_a_suggestion(
    arguments: list[str], suggestion: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments) == 2
    error = capsys.readouterr().err
    assert suggestion in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("words", "folds"),
    [
        (["-f", "0", "1", "2"], ("0", "1", "2")),
        (["-f", "0,1,2"], ("0", "1", "2")),
        (["-f", "all"], ("all",)),
        (["-f", "0", "-f", "3"], ("0", "3")),
        ([], None),
    ],
)
def test_folds_are_read_as_nnunet_reads_them(
    words: list[str], folds: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr("trtbuild.cli.CompileConfig", lambda **options: seen.append(options["folds"]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(["compile", *words, "MODEL", "-o", "x.trtb"])
    with pytest.raises(ZeroDivisionError):
        run(["compile", "MODEL", *words, "-o", "x.trtb"])
    assert seen == [folds, folds]


@pytest.mark.parametrize(
    "words", [["-f", "0", "0"], ["-f", "all", "1"], ["-f", "x"], ["-f"], ["-f0"], ["-o", "x", "-ofoo"]]
)
def test_folds_and_clusters_that_mean_nothing_are_usage_errors(words: list[str]) -> None:
    assert run(["compile", "MODEL", "-o", "x.trtb", *words]) == 2


@pytest.mark.parametrize("command", [[], ["compile"], ["export"], ["clean"], ["predict"], ["inspect"], ["doctor"]])
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_there_for_every_verb(command: list[str], word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, word]) == 0
    assert "Usage: trtbuild" in capsys.readouterr().out


def test_predict_writes_nnunets_files(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    who = subject("iso3d")
    arguments = [
        "predict",
        str(who.bundle),
        "-i",
        *map(str, [who.model.images]),
        "-o",
        str(out),
        "--save_probabilities",
        "--json",
    ]
    assert run(arguments) == 0
    summary = json.loads(capsys.readouterr().out)
    cases = sorted(who.model.cases)
    assert sorted(o["case"] for o in summary["outcomes"]) == cases
    expected = {f"{case}{ending}" for case in cases for ending in (who.model.file_ending, ".npz", ".pkl")}
    expected |= {"dataset.json", "plans.json", "predict_from_raw_data_args.json"}
    assert {path.name for path in out.iterdir()} == expected
    for name in ("dataset.json", "plans.json"):
        assert (out / name).read_bytes() == (who.model.folder / name).read_bytes()
    assert summary["engine"]["backend"] in ("openvino", "onnxruntime")


def test_the_pickle_beside_the_probabilities_is_nnunets_in_plain_types(out: Path) -> None:
    who = subject("iso3d")
    expected = who.reference("main")
    run(["predict", str(who.bundle), "-i", *_each(who.model.cases["main"]), "-o", str(out), "--save_probabilities"])
    ours = pickle.loads((out / "main.pkl").read_bytes())
    theirs = pickle.loads(expected.with_name("main.pkl").read_bytes())
    assert ours.keys() == theirs.keys()
    for key in ("shape_before_cropping", "shape_after_cropping_and_before_resampling"):
        assert tuple(ours[key]) == tuple(theirs[key])
    assert [list(map(int, b)) for b in theirs["bbox_used_for_cropping"]] == ours["bbox_used_for_cropping"]
    np.testing.assert_allclose(ours["spacing"], theirs["spacing"])
    assert b"numpy" not in (out / "main.pkl").read_bytes()


def _each(files: tuple[Path, ...]) -> list[str]:
    return [word for number, file in enumerate(files) for word in (["-i"] if number else []) + [str(file)]]


def test_continue_keeps_finished_cases_and_refuses_other_settings(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    who = subject("iso3d")
    base = ["predict", str(who.bundle), "-i", str(who.model.images), "-o", str(out), "--continue_prediction"]
    assert run(base) == 0
    kept = out / ("main" + who.model.file_ending)
    before = kept.stat().st_mtime_ns
    (out / ("small" + who.model.file_ending)).unlink()
    assert run(base) == 0
    assert kept.stat().st_mtime_ns == before
    assert (out / ("small" + who.model.file_ending)).exists()
    capsys.readouterr()
    assert run([*base, "-step_size", "0.8"]) == 1
    assert "step_size" in capsys.readouterr().err


def test_fewer_folds_give_another_result(out: Path) -> None:
    who = subject("resenc5")
    main = _each(who.model.cases["main"])
    assert run(["predict", str(who.bundle), "-i", *main, "-o", str(out / "one"), "-f", "0"]) == 0
    assert run(["predict", str(who.bundle), "-i", *main, "-o", str(out / "all")]) == 0
    name = "main" + who.model.file_ending
    one, many = (segmentation_from_file(out / sub / name) for sub in ("one", "all"))
    assert (one != many).any()


def test_inspect_and_doctor_show_and_speak_json(capsys: pytest.CaptureFixture[str]) -> None:
    bundle = str(subject("iso3d").bundle)
    assert run(["inspect", bundle, "--verify"]) == 0
    text = capsys.readouterr().out
    assert "openvino" in text
    assert "right hash" in text
    assert run(["inspect", bundle, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["stages"][0]["spec"]["patch"]
    assert run(["doctor"]) == 0
    assert "openvino" in capsys.readouterr().out
    assert run(["doctor", "--json"]) == 0
    assert {b["name"] for b in json.loads(capsys.readouterr().out)["backends"]} >= {"openvino", "onnxruntime"}


def test_export_and_clean_write_what_they_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = DEMO / "model" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
    assert run(["export", str(model), "-o", str(tmp_path / "onnx"), "--json"]) == 0
    (network,) = json.loads(capsys.readouterr().out)["networks"]
    assert network["max_error"] <= 2e-4
    assert {"fold_0.onnx", "fold_0_input.npy", "fold_0_logits.npy", "spec.json"} <= {
        p.name for p in (tmp_path / "onnx").iterdir()
    }
    assert run(["export", str(model), "-o", str(tmp_path / "onnx")]) == 1
    source, target = tmp_path / "onnx" / "fold_0.onnx", tmp_path / "clean.onnx"
    before = source.read_bytes()
    capsys.readouterr()
    assert run(["clean", str(source), "-o", str(target), "--rewrite-conv-transpose"]) == 0
    assert "ConvTranspose" in capsys.readouterr().out
    assert source.read_bytes() == before
    assert run(["clean", str(source), "-o", str(target)]) == 1


def test_a_bundle_can_be_recompiled_for_another_backend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    who = subject("iso3d")
    other = tmp_path / "other.trtb"
    assert run(["compile", str(who.bundle), "-o", str(other), "--backend", "onnxruntime", "--no-tune"]) == 0
    capsys.readouterr()
    assert run(["inspect", str(other), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert {e["backend"] for e in facts["engines"]} == {"onnxruntime"}
    assert (
        run(
            [
                "predict",
                str(other),
                "-i",
                *_each(who.model.cases["small"]),
                "-o",
                str(tmp_path / "o"),
                "--backend",
                "openvino",
            ]
        )
        == 1
    )
    assert "trtbuild compile" in capsys.readouterr().err
