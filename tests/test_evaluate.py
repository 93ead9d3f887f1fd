"""`trtbuild evaluate` beside nnU-Net's own evaluation of the same folders."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing.dummy
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.evaluation import evaluate_predictions as theirs
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from trtbuild.accuracy.surface import surface_agreement
from trtbuild.cli import run
from trtbuild.errors import InputError, ModelError
from trtbuild.source.fields import Field
from trtbuild.steps.evaluation import cases as evaluate_cases
from trtbuild.steps.evaluation.cases import CaseOutcome, Job, measured_cases, processes_for
from trtbuild.steps.evaluation.inputs import EvaluateConfig, Evaluation, Pair
from trtbuild.steps.evaluation.labels import labels_from_dataset_json

pytestmark = [
    pytest.mark.filterwarnings("ignore:Mean of empty slice"),  # nnU-Net's, over labels that no case has
    pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning"),  # SciPy's, over surface-distance's imports
    pytest.mark.filterwarnings("ignore:The legacy `DICOM` plugin:DeprecationWarning"),
]
LABELS = {"background": 0, "liver": 1, "tumour": 2, "vessel": 3, "nowhere": 4}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "single": [3], "alone": 2, "ignore": 4}
PLANS = {
    "dataset_name": "Dataset999_Test", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
    "label_manager": "LabelManager", "configurations": {"2d": {}},
}  # fmt: skip


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads in place of processes on both sides: what is computed is the same, and nothing has to be started."""
    monkeypatch.setattr(evaluate_cases, "_pool", lambda processes: ThreadPoolExecutor(processes))
    in_threads = SimpleNamespace(get_context=lambda kind: multiprocessing.dummy)
    monkeypatch.setattr(theirs, "multiprocessing", in_threads)


def write(path: Path, labels: Any, spacing: Any = (1.0, 1.0, 1.0), origin: Any = (0.0, 0.0, 0.0)) -> None:
    image = sitk.GetImageFromArray(labels)
    image.SetSpacing([float(s) for s in reversed(spacing)])
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))


class Folders:
    """A reference folder, a prediction folder, dataset.json and plans.json."""

    def __init__(self, root: Path, labels: dict[str, Any], ending: str = ".nii.gz", reader: str = "SimpleITKIO"):
        self.reference, self.prediction = root / "ref", root / "pred"
        self.dataset, self.plans, self.ending = root / "dataset.json", root / "plans.json", ending
        self.reference.mkdir()
        self.prediction.mkdir()
        order = [1] * len([name for name in labels if name not in ("background", "ignore")])
        self.dataset.write_text(json.dumps({"labels": labels, "file_ending": ending, "channel_names": {"0": "CT"},
                                            "regions_class_order": order}))  # fmt: skip
        self.plans.write_text(json.dumps({**PLANS, "image_reader_writer": reader}))

    def fill(self, cases: int = 3, highest: int = 4, shape: Any = (5, 8, 9), write: Any = write) -> Folders:
        rng = np.random.default_rng(cases)
        for case in range(cases):
            reference, prediction = rng.integers(0, highest + 1 - case % 2, (2, *shape)).astype(np.uint8)
            reference[:, :2], prediction[:, :2] = 1, 1
            write(self.reference / f"case_{case}{self.ending}", reference, (3.0, 0.8, 0.7))
            write(self.prediction / f"case_{case}{self.ending}", prediction, (3.0, 0.8, 0.7))
        return self

    def files(self) -> list[str]:
        return ["-djfile", str(self.dataset), "-pfile", str(self.plans)]

    def evaluate(self, *options: str) -> int:
        return run(["evaluate", str(self.reference), str(self.prediction), *options])

    def summary(self, name: str = "summary.json") -> Any:
        return json.loads((self.prediction / name).read_text())

    def nnunet(self, output: Path, chill: bool = False) -> Any:
        theirs.compute_metrics_on_folder2(
            str(self.reference), str(self.prediction), str(self.dataset), str(self.plans), str(output), 2, chill
        )
        return output.read_text()


def without_ours(path: Path) -> str:
    """The file as nnU-Net would have written it: every byte but those of the key "trtbuild"."""
    summary = json.loads(path.read_text())
    assert summary.pop("trtbuild")["version"]
    return json.dumps(summary, indent=4, sort_keys=True)


def close(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(close(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(close(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) or isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or abs(a - b) <= 1e-12 * max(1.0, abs(b))
    return bool(a == b) and type(a) is type(b)


def assert_same(ours: Path, nnunet: str) -> None:
    summary = json.loads(ours.read_text())
    del summary["trtbuild"]
    assert close(summary, json.loads(nnunet))
    assert without_ours(ours) == nnunet  # even to the byte


@pytest.mark.parity
@pytest.mark.parametrize(
    "labels",
    [
        LABELS,
        REGIONS,
        {"background": 0, "all": [1, 2], "ignore": 3},
        {"background": 0, "a": [1], "b": 2, "ignore": 3},
        {"background": 0, "far": 7, "two names": [2], "of it": 2},
    ],
)
@pytest.mark.usefixtures("threads")
def test_the_summary_is_nnunets_to_the_byte(tmp_path: Path, labels: Any) -> None:
    folders = Folders(tmp_path, labels).fill()
    assert folders.evaluate(*folders.files()) == 0
    assert_same(folders.prediction / "summary.json", folders.nnunet(tmp_path / "theirs.json"))


@pytest.mark.parity
@pytest.mark.usefixtures("threads")
def test_labels_on_the_command_line_give_the_summary_of_evaluate_simple(tmp_path: Path) -> None:
    folders = Folders(tmp_path, LABELS).fill()
    assert folders.evaluate("-l", "0", "1", "3", "9", "3", "-il", "2") == 0
    theirs.compute_metrics_on_folder_simple(
        str(folders.reference), str(folders.prediction), [0, 1, 3, 9, 3], str(tmp_path / "theirs.json"), 1, 2
    )
    assert_same(folders.prediction / "summary.json", (tmp_path / "theirs.json").read_text())


@pytest.mark.parity
@pytest.mark.usefixtures("threads")
def test_only_background_gives_a_foreground_mean_of_nan_as_in_nnunet(tmp_path: Path) -> None:
    folders = Folders(tmp_path, LABELS).fill(cases=1)
    assert folders.evaluate("-l", "0") == 0
    theirs.compute_metrics_on_folder_simple(
        str(folders.reference), str(folders.prediction), [0], str(tmp_path / "theirs.json"), 1
    )
    assert_same(folders.prediction / "summary.json", (tmp_path / "theirs.json").read_text())


def write_nibabel(path: Path, labels: Any, spacing: Any) -> None:
    affine = np.diag([-spacing[2], spacing[1], spacing[0], 1.0])
    affine[0, 1] = 0.2  # not orthonormal: ITK refuses it
    nibabel.save(nibabel.Nifti1Image(labels.transpose(2, 1, 0), affine), path)


def write_png(path: Path, labels: Any, spacing: Any) -> None:
    import imageio.v3

    imageio.v3.imwrite(path, labels[0])


def write_tif(path: Path, labels: Any, spacing: Any) -> None:
    import tifffile

    tifffile.imwrite(path, labels)
    path.with_suffix(".json").write_text(json.dumps({"spacing": spacing}))


FORMATS = {
    "mha": (".mha", "SimpleITKIO", write, (5, 8, 9)),
    "2-D in nrrd": (".nrrd", "SimpleITKIO", lambda path, labels, _: write(path, labels[0], (1, 1)), (1, 8, 9)),
    "nibabel": (".nii.gz", "NibabelIO", write_nibabel, (5, 8, 9)),
    "reoriented": (".nii.gz", "NibabelIOWithReorient", write_nibabel, (5, 8, 9)),
    "png": (".png", "NaturalImage2DIO", write_png, (1, 8, 9)),
    "tif": (".tif", "Tiff3DIO", write_tif, (5, 8, 9)),
}


@pytest.mark.parity
@pytest.mark.parametrize("plans", [True, False])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.usefixtures("threads")
def test_every_reader_gives_nnunets_summary_with_and_without_plans(tmp_path: Path, name: str, plans: bool) -> None:
    ending, reader, writer, shape = FORMATS[name]
    folders = Folders(tmp_path, LABELS, ending, reader).fill(shape=shape, write=writer)
    options = folders.files()
    assert folders.evaluate(*(options if plans else options[:2])) == 0
    used = folders.summary()["trtbuild"]["reader"]
    assert used == (reader if plans or name != "reoriented" else "NibabelIO")
    assert_same(folders.prediction / "summary.json", folders.nnunet(tmp_path / "theirs.json"))


@pytest.mark.usefixtures("threads")
def test_nnunet_reads_the_summary_that_also_has_surfaces(tmp_path: Path) -> None:
    folders = Folders(tmp_path, REGIONS).fill()
    assert folders.evaluate(*folders.files(), "--surface", "--nsd-tolerance", "1.5") == 0
    assert_same(folders.prediction / "summary.json", folders.nnunet(tmp_path / "theirs.json"))
    loaded = theirs.load_summary_json(str(folders.prediction / "summary.json"))
    assert set(loaded["mean"]) == {(1, 2, 3), (2, 3), (3,), 2}
    assert loaded["foreground_mean"]["Dice"] == folders.summary()["foreground_mean"]["Dice"]


@pytest.mark.usefixtures("threads")
def test_the_surface_block_holds_every_case_and_means_that_name_missed_structures(tmp_path: Path) -> None:
    folders = Folders(tmp_path, LABELS)
    reference, prediction = np.zeros((2, 6, 12, 12), np.uint8)
    reference[1:4, 2:6, 2:6], prediction[1:4, 2:6, 3:8] = 1, 1
    reference[4:, 8:, 8:] = 2
    write(folders.reference / "a.nii.gz", reference, (3.0, 1.0, 0.5))
    write(folders.prediction / "a.nii.gz", prediction, (3.0, 1.0, 0.5))
    write(folders.reference / "b.nii.gz", prediction, (2.0, 1.0, 1.0))
    write(folders.prediction / "b.nii.gz", reference, (2.0, 1.0, 1.0))
    assert folders.evaluate(*folders.files(), "--surface") == 0
    surface = folders.summary()["trtbuild"]["surface"]
    expected = [
        surface_agreement(reference, prediction, (1,), (3.0, 1.0, 0.5), 2.0),
        surface_agreement(prediction, reference, (1,), (2.0, 1.0, 1.0), 2.0),
    ]
    cases = surface["metric_per_case"]
    assert [case["prediction_file"] for case in cases] == [str(folders.prediction / f"{c}.nii.gz") for c in "ab"]
    assert [case["metrics"]["1"] for case in cases] == [{"HD95": e.hd95, "NSD": e.nsd} for e in expected]
    assert [case["metrics"]["2"] for case in cases] == [{"HD95": math.inf, "NSD": 0.0}] * 2
    mean = surface["mean"]
    assert mean["1"] == {"HD95": (expected[0].hd95 + expected[1].hd95) / 2, "one_empty": 0,
                         "NSD": (expected[0].nsd + expected[1].nsd) / 2}  # fmt: skip
    assert math.isnan(mean["2"]["HD95"])
    assert (mean["2"]["NSD"], mean["2"]["one_empty"]) == (0.0, 2)
    assert math.isnan(mean["3"]["NSD"])
    assert surface["nsd_tolerance_mm"] == 2.0
    assert surface["foreground_mean"] == {"HD95": mean["1"]["HD95"], "NSD": mean["1"]["NSD"] / 2}


@pytest.mark.usefixtures("threads")
def test_surfaces_without_their_library_are_an_error_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "surface_distance", None)
    folders = Folders(tmp_path, LABELS).fill(cases=1)
    assert folders.evaluate(*folders.files(), "--surface") == 1
    assert "pip install 'trtbuild[evaluate]'" in capsys.readouterr().err
    assert folders.evaluate(*folders.files()) == 0


@pytest.mark.usefixtures("threads")
def test_dataset_and_plans_are_taken_from_the_prediction_folder_where_predict_put_them(tmp_path: Path) -> None:
    folders = Folders(tmp_path, LABELS, reader="NibabelIO").fill(cases=1)
    folders.dataset.rename(folders.prediction / "dataset.json")
    folders.plans.rename(folders.prediction / "plans.json")
    assert folders.evaluate() == 0
    assert set(folders.summary()["mean"]) == {"1", "2", "3", "4"}
    assert folders.summary()["trtbuild"]["reader"] == "NibabelIO"
    assert folders.summary()["trtbuild"]["label_names"] == {"1": "liver", "2": "tumour", "3": "vessel", "4": "nowhere"}


@pytest.mark.parity
@pytest.mark.usefixtures("threads")
def test_a_missing_prediction_is_an_error_and_with_chill_it_does_not_count_and_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = Folders(tmp_path, LABELS).fill()
    (folders.prediction / "case_1.nii.gz").unlink()
    assert folders.evaluate(*folders.files()) == 1
    assert "case_1.nii.gz" in capsys.readouterr().err
    assert not (folders.prediction / "summary.json").exists()
    with pytest.raises(AssertionError):
        folders.nnunet(tmp_path / "theirs.json")
    assert folders.evaluate(*folders.files(), "--chill") == 0
    assert "1 references have no prediction" in capsys.readouterr().err
    assert folders.summary()["trtbuild"]["not_predicted"] == ["case_1"]
    assert_same(folders.prediction / "summary.json", folders.nnunet(tmp_path / "theirs.json", chill=True))


@pytest.mark.usefixtures("threads")
def test_a_prediction_without_a_reference_is_an_error_that_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = Folders(tmp_path, LABELS).fill()
    (folders.reference / "case_2.nii.gz").unlink()
    assert folders.evaluate(*folders.files(), "--chill") == 1
    assert "case_2.nii.gz" in capsys.readouterr().err


def spoil(folders: Folders, kind: str) -> None:
    bad = folders.prediction / "case_1.nii.gz"
    if kind == "shape":
        write(bad, np.zeros((5, 8, 10), np.uint8))
    elif kind == "fractions":
        write(bad, np.full((5, 8, 9), 0.5, np.float32))
    elif kind == "truncated":
        bad.write_bytes(bad.read_bytes()[:-40])
    else:
        bad.write_bytes(b"no image")


@pytest.mark.parametrize("kind", ["shape", "fractions", "truncated", "no image"])
@pytest.mark.usefixtures("threads")
def test_a_bad_case_is_named_the_others_are_kept_and_no_summary_looks_complete(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = Folders(tmp_path, LABELS).fill()
    assert folders.evaluate(*folders.files()) == 0
    whole = folders.summary()
    spoil(folders, kind)
    assert folders.evaluate(*folders.files(), "--json") == 4
    message = capsys.readouterr().err
    assert "case_1" in message
    assert "1 of 3 cases failed" in message
    assert not (folders.prediction / "summary.json").exists()
    part = folders.summary("summary.incomplete.json")
    assert set(part) == {"metric_per_case", "trtbuild"}
    assert list(part["trtbuild"]["failed"]) == ["case_1"]
    assert part["metric_per_case"] == [whole["metric_per_case"][0], whole["metric_per_case"][2]]
    write(folders.prediction / "case_1.nii.gz", np.ones((5, 8, 9), np.uint8))
    assert folders.evaluate(*folders.files()) == 0
    assert not (folders.prediction / "summary.incomplete.json").exists()


@pytest.mark.usefixtures("threads")
def test_the_exit_code_is_1_where_no_case_could_be_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = Folders(tmp_path, LABELS).fill(cases=2)
    for path in folders.prediction.iterdir():
        path.write_bytes(b"no image")
    assert folders.evaluate(*folders.files()) == 1
    message = capsys.readouterr().err
    assert "case_0" in message
    assert "case_1" in message
    assert "No case could be compared" in message


@pytest.mark.usefixtures("threads")
def test_another_place_in_space_is_a_warning_and_changes_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = Folders(tmp_path, LABELS)
    labels = np.ones((4, 5, 6), np.uint8)
    write(folders.reference / "a.nii.gz", labels, (2.0, 1.0, 1.0))
    write(folders.prediction / "a.nii.gz", labels, (2.5, 1.0, 1.0), (0.0, 0.0, 7.0))
    assert folders.evaluate(*folders.files()) == 0
    warnings = folders.summary()["trtbuild"]["warnings"]["a"]
    assert [warning.split()[1] for warning in warnings] == ["spacing", "origin"]
    assert "warning: the spacing of the prediction is (2.5, 1, 1), that of the reference (2, 1, 1)" in (
        capsys.readouterr().err
    )
    assert folders.summary()["mean"]["1"]["Dice"] == 1.0


@pytest.mark.usefixtures("threads")
def test_the_table_has_a_row_per_label_and_json_has_the_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = Folders(tmp_path, LABELS).fill()
    assert folders.evaluate(*folders.files(), "--surface") == 0
    out = capsys.readouterr()
    for word in ("liver", "tumour", "Dice", "HD95 in mm", "NSD at 2 mm", "only in one", "mean"):
        assert word in out.out
    assert f"{folders.summary()['mean']['1']['Dice']:.4f}" in out.out
    assert "case_0: compared" in out.err
    assert folders.evaluate(*folders.files(), "--json") == 0
    out = capsys.readouterr()
    facts = json.loads(out.out)
    assert out.err == ""
    assert facts.pop("output") == str(folders.prediction / "summary.json")
    assert close(facts, folders.summary())


REFUSED = {
    "no labels": ([], "which labels"),
    "labels twice": (["-l", "1", "-djfile", "x.json"], "given twice"),
    "ignore alone": (["-il", "3"], "together with labels"),
    "no json": (["-l", "1", "-o", "summary.txt"], "no JSON file"),
    "missing dataset": (["-djfile", "nowhere.json"], "cannot be read"),
    "tolerance": (["-l", "1", "--nsd-tolerance", "inf"], "tolerance"),
    "plans over": (["-l", "1", "-o", "PRED/plans.json"], "overwrite an input"),
    "dataset over": (["-djfile", "DATASET", "-o", "DATASET"], "overwrite an input"),
    "folder": (["-l", "1", "-o", "nowhere/summary.json"], "does not exist"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("threads")
def test_what_cannot_be_meant_is_refused(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    folders = Folders(tmp_path, LABELS).fill(cases=1)
    options, reason = REFUSED[name]
    before = folders.dataset.read_text()
    words = [word.replace("PRED", str(folders.prediction)).replace("DATASET", str(folders.dataset)) for word in options]
    assert folders.evaluate(*words) == 1
    assert reason in capsys.readouterr().err
    assert folders.dataset.read_text() == before
    assert sorted(path.name for path in folders.prediction.iterdir()) == ["case_0.nii.gz"]


@pytest.mark.usefixtures("threads")
def test_folders_that_are_missing_empty_or_mixed_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = Folders(tmp_path, LABELS)
    assert run(["evaluate", str(tmp_path / "nowhere"), str(folders.prediction), "-l", "1"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert folders.evaluate(*folders.files()) == 1
    assert "no prediction" in capsys.readouterr().err
    write(folders.reference / "a.nii.gz", np.zeros((1, 2, 3), np.uint8))
    write(folders.reference / "b.mha", np.zeros((1, 2, 3), np.uint8))
    assert folders.evaluate("-l", "1") == 1
    assert "no common file ending" in capsys.readouterr().err


def test_an_unknown_option_is_a_usage_error(tmp_path: Path) -> None:
    assert run(["evaluate", str(tmp_path), str(tmp_path), "-labels", "1"]) == 2
    assert run(["evaluate", str(tmp_path), str(tmp_path), "-np", "0"]) == 2
    assert run(["evaluate", str(tmp_path), str(tmp_path), "-l"]) == 2


LABEL = st.one_of(st.integers(0, 6), st.lists(st.integers(0, 6), min_size=1, max_size=3))


@settings(max_examples=150, deadline=None)
@given(values=st.lists(LABEL, min_size=1, max_size=6), has_ignore=st.booleans())
def test_labels_and_regions_are_those_of_nnunets_label_manager(values: list[Any], has_ignore: bool) -> None:
    labels: dict[str, Any] = {"background": 0, **{f"label {i}": value for i, value in enumerate(values)}}
    highest = max(member for value in values for member in (value if isinstance(value, list) else [value]))
    if has_ignore:
        labels["ignore"] = highest + 1
    regions = [value for value in values if set(value if isinstance(value, list) else [value]) != {0}]
    manager = LabelManager(labels, [1] * len(regions))
    expected = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    dataset = Field({"labels": labels}, "dataset.json")
    if not expected:
        with pytest.raises(InputError):
            labels_from_dataset_json(dataset)
        return
    found, ignore = labels_from_dataset_json(dataset)
    assert found == tuple(dict.fromkeys(expected))
    assert [str(label) for label in found] == [
        theirs.label_or_region_to_key(label) for label in dict.fromkeys(expected)
    ]
    assert ignore == manager.ignore_label


@pytest.mark.parametrize("labels", [{"a": 1.5}, {"a": []}, {"a": -1}, {"a": None}, {"a": True}, {"a": [[1]]}, {}, []])
def test_labels_that_are_none_are_refused(labels: Any) -> None:
    with pytest.raises((InputError, ModelError)):
        labels_from_dataset_json(Field({"labels": labels}, "dataset.json"))


class Deadly:
    """In place of a path: ends the process that unpickles it, as a crash of an image library does."""

    def __reduce__(self) -> Any:
        return os._exit, (1,)

    def __str__(self) -> str:
        return "deadly.nii.gz"


def test_a_process_that_dies_is_named_with_its_case_and_the_others_are_measured(tmp_path: Path) -> None:
    folders = Folders(tmp_path, LABELS).fill(cases=4)

    def job(case: int) -> Job:
        name = f"case_{case}.nii.gz"
        reference: Any = Deadly() if case == 1 else folders.reference / name
        pair = Pair(case=f"case_{case}", reference=reference, prediction=folders.prediction / name)
        return Job(pair=pair, reader="SimpleITKIO", labels=(1, 2), ignore=None, tolerance=None)

    outcomes = {outcome.case: outcome for outcome in measured_cases([job(case) for case in range(4)], 2)}
    assert sorted(outcomes) == [f"case_{case}" for case in range(4)]
    assert [case for case, outcome in outcomes.items() if outcome.error] == ["case_1"]
    assert "ended by itself" in str(outcomes["case_1"].error)


@pytest.mark.parity
def test_processes_give_what_threads_give_and_a_run_loads_neither_torch_nor_nnunet(tmp_path: Path) -> None:
    folders = Folders(tmp_path, LABELS).fill()
    for name in (
        "torch",
        "nnunetv2",
        "onnx",
        "onnxruntime",
        "openvino",
        "numba",
    ):  # also for the processes: an import of these fails
        (tmp_path / "block" / name).mkdir(parents=True)
        (tmp_path / "block" / name / "__init__.py").write_text("raise RuntimeError('must not be imported')")
    command = [sys.executable, "-m", "trtbuild", "evaluate", str(folders.reference), str(folders.prediction),
               *folders.files(), "-np", "2", "--surface"]  # fmt: skip
    path = os.pathsep.join([str(tmp_path / "block"), str(Path(__file__).parents[1])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    spawned = folders.summary()
    (folders.prediction / "summary.json").unlink()
    with contextlib.ExitStack() as stack:
        monkeypatch = stack.enter_context(pytest.MonkeyPatch.context())
        monkeypatch.setattr(evaluate_cases, "_pool", lambda processes: ThreadPoolExecutor(processes))
        assert folders.evaluate(*folders.files(), "--surface") == 0
    assert close(folders.summary(), spawned)


def test_the_number_of_processes_follows_cpus_cases_and_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Folders(tmp_path, LABELS).fill(cases=3, shape=(10, 100, 100))
    (folders.reference / "case_1.nii.gz").write_bytes(b"no image")
    pairs = tuple(Pair(case=c, reference=folders.reference / f"{c}.nii.gz", prediction=folders.prediction / c)
                  for c in ("case_0", "case_1", "case_2"))  # fmt: skip
    evaluation = Evaluation(pairs=pairs, labels=(1,), names={}, ignore=None, reader="SimpleITKIO", not_predicted=())
    each = 10 * 100 * 100 * (1 + evaluate_cases.COUNTING_BYTES)
    monkeypatch.setattr(evaluate_cases, "usable_cpus", lambda: 8)
    for free, expected in ((None, 3), (10 * each, 3), (2 * each, 2), (0, 1)):
        monkeypatch.setattr(evaluate_cases, "available_memory", lambda free=free: free)
        assert processes_for(evaluation, surface=False) == expected
    monkeypatch.setattr(evaluate_cases, "available_memory", lambda: 2 * each)
    assert processes_for(evaluation, surface=True) == 1
    monkeypatch.setattr(evaluate_cases, "usable_cpus", lambda: 1)
    assert processes_for(evaluation, surface=False) == 1


@pytest.mark.usefixtures("threads")
def test_lack_of_memory_fails_one_case_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = Folders(tmp_path, LABELS).fill(cases=2)
    real = evaluate_cases.overlaps
    calls: Iterator[int] = iter(range(9))

    def starved(*arguments: Any) -> Any:
        if next(calls) == 0:
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(evaluate_cases, "overlaps", starved)
    ended: list[CaseOutcome] = []
    from trtbuild.steps.evaluation.folders import evaluate_folders

    config = EvaluateConfig(reference=folders.reference, prediction=folders.prediction, dataset=folders.dataset,
                            processes=1)  # fmt: skip
    report = evaluate_folders(config, case_ended=ended.append)
    assert len(ended) == 2
    assert [outcome.case for outcome in report.failed] == ["case_0"]
    assert "memory" in str(report.failed[0].error)
    assert report.output.name == "summary.incomplete.json"


@pytest.mark.usefixtures("threads")
def test_an_interrupted_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trtbuild import show_evaluation

    def interrupted(outcome: CaseOutcome) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(show_evaluation, "_ended", interrupted)
    folders = Folders(tmp_path, LABELS).fill()
    assert folders.evaluate(*folders.files()) == 130
    assert not list(folders.prediction.glob("*.json"))
