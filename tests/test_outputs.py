"""What stands in an output folder: nothing that was not made as its record says, nothing of the user's overwritten."""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import Subject, subject

import trtbuild
from trtbuild.atomic import remove_strays
from trtbuild.cli import run
from trtbuild.config import CompileConfig, PredictConfig
from trtbuild.errors import EngineError, InputError, ModelError, OutOfMemory, OutputError, TrtbuildError
from trtbuild.runtime.select import Choice
from trtbuild.source.folder import find_model
from trtbuild.steps.compilation import compile as compiling
from trtbuild.steps.folder_run.cases import predict_cases
from trtbuild.steps.folder_run.claim import CLAIM
from trtbuild.steps.folder_run.inputs import files_beside_case, marks_from_cases
from trtbuild.steps.folder_run.outputs import MANIFEST_LIMIT, Folder, check_folder, check_inputs, prepared_folder
from trtbuild.steps.folder_run.record import RECORD
from trtbuild.steps.prediction.predictor import Predictor
from trtbuild.volume.cases import Case
from trtbuild.volume.resampling.image import MAX_VOXELS, new_shape

END = ".nii.gz"
SETTINGS = {"bundle": "abc", "step_size": 0.5}
flocks = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")


@pytest.fixture(scope="module")
def who() -> Subject:
    return subject("iso3d")


@pytest.fixture
def images(who: Subject, tmp_path: Path) -> Path:
    """A folder with two good cases, a and b."""
    folder = tmp_path / "images"
    folder.mkdir()
    for case in "ab":
        for number, file in enumerate(who.model.cases["small"]):
            shutil.copy(file, folder / f"{case}_{number:04}{END}")
    return folder


def predict(who: Subject, images: Path, out: Path, *more: str) -> int:
    return run(["predict", str(who.bundle), "-i", str(images), "-o", str(out), "--disable_tta", *more])


def prepare(out: Path, *cases: str, continuing: bool = False, **settings: Any) -> None:
    with running(out, *cases, continuing=continuing, **settings):
        pass


def running(
    out: Path, *cases: str, continuing: bool = False, images: Path = Path("images"), **settings: Any
) -> AbstractContextManager[frozenset[str]]:
    """A run that has prepared its folder, and lives in the block."""
    return prepared_folder(
        Folder(path=out, ending=END, reader="SimpleITKIO"),
        [Case(id=case, files=(images / f"{case}_0000{END}",)) for case in cases],
        lambda case: (),
        copies={"plans.json": b"{}"},
        arguments={"save_probabilities": False, "trtbuild": {**SETTINGS, **settings}},
        continuing=continuing,
    )


def folder(path: Path) -> Folder:
    return Folder(path=path, ending=END, reader="SimpleITKIO")


def touched(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"old")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ---- inputs stay


def test_an_input_is_never_overwritten(
    who: Subject, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A list whose case is called like its own file, and predictions into the folder of the images."""
    source = images / f"a{END}"
    shutil.copy(images / f"a_0000{END}", source)
    listing = tmp_path / "list.json"
    listing.write_text(json.dumps([{"id": "a", "files": [f"images/a{END}", f"images/a_0001{END}"]}]))
    before = {path: path.read_bytes() for path in images.iterdir()}
    assert predict(who, listing, images) == 1
    assert "An output would overwrite an input" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in images.iterdir()} == before


@pytest.mark.parametrize("name", [f"a{END}", "a.npz", "a.pkl", "dataset.json", "plans.json", RECORD])
def test_every_output_is_compared_with_every_input_through_links(tmp_path: Path, name: str) -> None:
    touched(tmp_path / "real", name)
    (tmp_path / "link").symlink_to("real")
    case = Case(id="a", files=(tmp_path / "link" / name,))
    with pytest.raises(InputError, match="overwrite an input"):
        check_inputs(folder(tmp_path / "real"), [case], [])
    with pytest.raises(InputError, match="overwrite an input"):
        check_inputs(folder(tmp_path / "real"), [Case(id="a", files=())], [tmp_path / "link" / name])
    check_inputs(folder(tmp_path / "elsewhere"), [case], [tmp_path / "link"])


# ---- what an earlier run left


def test_old_outputs_are_gone_before_the_new_record_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash at the record leaves no output that a later run could take for one of the new settings."""
    out = tmp_path / "out"
    prepare(out, "a", "b")
    touched(out, f"a{END}", "a.npz", "a.pkl", f"b{END}", f"other{END}")
    left: list[set[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        for module in ("outputs", "record"):
            patch.setattr(f"trtbuild.steps.folder_run.{module}.write_whole", lambda *_: left.append(names(out)))
        prepare(out, "a", "b", step_size=0.8)
    assert left
    assert all(there == {f"other{END}", RECORD, "plans.json", CLAIM} for there in left)


def test_a_run_with_other_settings_that_dies_cannot_be_continued_into_old_outputs(
    who: Subject, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert predict(who, images, out, "--save_probabilities") == 0
    old = (out / f"b{END}").stat().st_mtime_ns
    assert {"a.npz", "b.npz", "b.pkl"} <= names(out)
    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "predict_prepared", died)
        with pytest.raises(ZeroDivisionError):
            predict(who, images, out, "-step_size", "1")
    assert not {f"a{END}", f"b{END}", "a.npz", "b.npz", "b.pkl"} & names(out)
    assert predict(who, images, out, "-step_size", "1", "--continue_prediction") == 0
    assert (out / f"b{END}").stat().st_mtime_ns != old
    assert "b.npz" not in names(out)


def died(*_: object, **__: object) -> None:
    raise ZeroDivisionError  # as good as a killed process: nothing in the package handles it


def test_a_case_that_fails_has_no_old_segmentation(who: Subject, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    touched(out, f"b{END}", "b.npz", "b.pkl")
    (images / f"b_0001{END}").write_bytes(b"no image")
    assert predict(who, images, out) == 4
    assert {name for name in names(out) if name.startswith(("a", "b"))} == {f"a{END}"}


def test_an_output_of_unknown_origin_is_not_continued(tmp_path: Path) -> None:
    touched(tmp_path / "out", f"a{END}")
    with pytest.raises(OutputError, match="unknown how") as error:
        prepare(tmp_path / "out", "a", continuing=True)
    assert "new folder" in str(error.value.hint)
    assert names(tmp_path / "out") == {f"a{END}"}


def test_a_record_speaks_only_for_the_cases_of_its_run(tmp_path: Path) -> None:
    """a was made in one way, then b in another: a continued run in b's way must not keep a."""
    out = tmp_path / "out"
    prepare(out, "a")
    touched(out, f"a{END}")
    prepare(out, "b", step_size=0.8)
    touched(out, f"b{END}", "c.npz")
    with pytest.raises(OutputError, match="in another way"):
        prepare(out, "a", "b", continuing=True, step_size=0.8)
    prepare(out, "c", continuing=True, step_size=0.8)
    assert json.loads((out / RECORD).read_text())["trtbuild"]["cases"].keys() == {"b", "c"}
    assert names(out) == {f"a{END}", f"b{END}", RECORD, "plans.json"}  # c's leftover is gone
    with pytest.raises(OutputError, match="in another way"):
        prepare(out, "b", continuing=True)


@pytest.mark.parametrize("record", ["[", "[]", "{}", '{"trtbuild": 1}', '{"trtbuild": {"cases": [1]}}', "[" * 100_000])
def test_a_record_that_is_none_is_refused(tmp_path: Path, record: str) -> None:
    touched(tmp_path, f"a{END}")
    (tmp_path / RECORD).write_text(record)
    with pytest.raises(OutputError):
        prepare(tmp_path, "a", continuing=True)


def test_a_record_that_does_not_say_what_its_cases_were_made_of_vouches_for_none(tmp_path: Path) -> None:
    prepare(tmp_path, "a")
    record = json.loads((tmp_path / RECORD).read_bytes())
    record["trtbuild"]["cases"] = ["a"]  # as it was written once
    (tmp_path / RECORD).write_text(json.dumps(record))
    touched(tmp_path, f"a{END}")
    with pytest.raises(OutputError, match="unknown how"):
        prepare(tmp_path, "a", continuing=True)
    assert (tmp_path / f"a{END}").exists()


def test_outputs_of_changed_inputs_go_before_the_new_record_comes_and_after_every_refusal(tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    touched(images, f"a_0000{END}", f"b_0000{END}", f"c_0000{END}")
    with running(out, "a", "b", images=images):
        touched(out, f"a{END}", "a.npz", f"b{END}", "b.npz", f"c{END}")
    os.utime(images / f"a_0000{END}", ns=(1, 1))
    before = names(out)
    with pytest.raises(OutputError, match="unknown how"), running(out, "a", "b", "c", images=images, continuing=True):
        pass
    assert names(out) == before
    left: list[set[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trtbuild.steps.folder_run.record.write_whole", lambda *_: left.append(names(out)))
        with running(out, "a", "b", images=images, continuing=True) as changed:
            assert changed == {"a"}
    assert left == [before - {f"a{END}", "a.npz"} | {CLAIM}]


def test_marks_tell_images_series_and_files_beside_them(tmp_path: Path) -> None:
    """Size, time, place, an added slice, and a file that was missing; not a hidden file of a series."""
    touched(tmp_path, "a.tif")
    touched(tmp_path / "series", "1.dcm", "2.dcm")
    cases = [Case(id="a", files=(tmp_path / "a.tif",)), Case(id="s", files=(tmp_path / "series",))]
    beside = partial(files_beside_case, reader="Tiff3DIO", ending=".tif", previous=tmp_path / "before")
    seen = [marks_from_cases(cases, beside)]

    def changed(case: str) -> bool:
        seen.append(marks_from_cases(cases, beside))
        return seen[-1][case] != seen[-2][case]

    assert not changed("a")
    (tmp_path / "a.tif").write_bytes(b"longer")
    assert changed("a")
    os.utime(tmp_path / "a.tif", ns=(5, 5))
    assert changed("a")
    for file in ("a.json", "before/a.tif", "before/a.json"):
        touched((tmp_path / file).parent, Path(file).name)
        assert changed("a"), file
    assert not changed("s")
    touched(tmp_path / "series", ".DS_Store")
    assert not changed("s")
    touched(tmp_path / "series", "3.dcm")
    assert changed("s")
    os.utime(tmp_path / "series" / "1.dcm", ns=(9, 2**62))
    assert changed("s")


# ---- two runs at once


@flocks
def test_runs_with_equal_settings_share_a_folder_and_the_last_removes_the_claim(tmp_path: Path) -> None:
    with running(tmp_path, "a"):
        with running(tmp_path, "b"):
            assert CLAIM in names(tmp_path)
            assert remove_strays(tmp_path) == 0
        assert CLAIM in names(tmp_path)
        with pytest.raises(OutputError, match="other settings") as error, running(tmp_path, "c", step_size=0.8):
            pass
        assert "step_size" in str(error.value)
        assert "0.8" in str(error.value)
        assert json.loads((tmp_path / RECORD).read_bytes())["trtbuild"]["cases"].keys() == {"a", "b"}
        with pytest.raises(OutputError, match="other inputs"), running(tmp_path, "a", images=tmp_path / "other"):
            pass
        with running(tmp_path, "b", images=Path("images")):
            pass
    assert CLAIM not in names(tmp_path)
    with running(tmp_path, "c", step_size=0.8):
        pass
    assert names(tmp_path) == {RECORD, "plans.json"}


@flocks
def test_the_claim_of_a_killed_run_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import os, sys, signal; from pathlib import Path; from test_outputs import running\n"
        "with running(Path(sys.argv[1]), 'a'): print('lives', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=Path(__file__).parent,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "lives\n"
    with pytest.raises(OutputError, match="other settings"), running(tmp_path, "a", step_size=0.8):
        pass
    process.kill()
    process.communicate()
    assert CLAIM in names(tmp_path)
    with running(tmp_path, "a", step_size=0.8):
        assert CLAIM in names(tmp_path)
    assert CLAIM not in names(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff"])
def test_a_claim_that_nobody_holds_is_replaced_whatever_it_says(tmp_path: Path, content: bytes) -> None:
    (tmp_path / CLAIM).write_bytes(content)
    with running(tmp_path, "a"):
        pass
    if sys.platform != "win32":
        assert CLAIM not in names(tmp_path)


def test_where_there_are_no_locks_runs_are_not_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network drive: nothing is left behind, and nothing refused."""
    monkeypatch.setattr("trtbuild.atomic.try_lock", lambda *_, **__: None)
    with running(tmp_path, "a"), running(tmp_path, "a", step_size=0.8):
        assert CLAIM not in names(tmp_path)


@flocks
def test_a_run_whose_folder_is_removed_ends_without_another_error(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(out, "a"):
        shutil.rmtree(out)
    with running(out, "a"):
        shutil.rmtree(out)
        with running(out, "b", step_size=0.8):
            pass


# ---- stacks, whose spacing stands beside them


def test_the_files_of_spacings_count_as_inputs_and_as_outputs(tmp_path: Path) -> None:
    """-o is the folder of the images: a.json is read for a_0000.tif, and would be written for a.tif."""
    touched(tmp_path, "a_0000.tif", "a.json")
    stacks = Folder(path=tmp_path, ending=".tif", reader="Tiff3DIO")
    case = Case(id="a", files=(tmp_path / "a_0000.tif",))
    beside = files_beside_case(case, reader="Tiff3DIO", ending=".tif", previous=tmp_path / "before")
    assert beside == (tmp_path / "a.json", tmp_path / "before" / "a.tif", tmp_path / "before" / "a.json")
    with pytest.raises(InputError, match="overwrite an input"):
        check_inputs(stacks, [case], beside)
    assert set(stacks.targets("a").beside) == {tmp_path / "a.json", tmp_path / "disagreement" / "a.json"}
    assert set(stacks.targets("a").beside) < set(stacks.targets("a"))
    assert folder(tmp_path).targets("a").beside == ()


# ---- places that an output must not have


@pytest.mark.parametrize("content", ['{"name": "shop", "format": 1}', "[]", "no JSON", "[" * 100_000, b"\xff\xfe"])
def test_a_bundle_json_of_another_program_is_no_bundle(tmp_path: Path, content: str | bytes) -> None:
    (tmp_path / "bundle.json").write_bytes(content.encode() if isinstance(content, str) else content)
    check_folder(tmp_path / "site" / "out")


def test_a_bundle_json_larger_than_any_manifest_is_not_read(tmp_path: Path) -> None:
    manifest = b'{"format": 1, "stages": []}'
    (tmp_path / "bundle.json").write_bytes(manifest)
    with pytest.raises(OutputError, match="a bundle"):
        check_folder(tmp_path / "out")
    (tmp_path / "bundle.json").write_bytes(manifest.ljust(MANIFEST_LIMIT + 1))
    check_folder(tmp_path / "out")


def test_a_bundle_is_no_output_folder(who: Subject, images: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "copy.trtb"
    shutil.copytree(who.bundle, bundle)
    (tmp_path / "link").symlink_to(bundle)
    for out in (bundle, bundle / "networks", bundle / "new" / "folder", tmp_path / "link"):
        assert run(["predict", str(bundle), "-i", str(images), "-o", str(out)]) == 1
        with pytest.raises(OutputError, match="a bundle"):
            check_folder(out)
    assert run(["inspect", str(bundle), "--verify"]) == 0
    check_folder(tmp_path)


def test_a_trained_model_is_no_output_folder(who: Subject, images: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(who.model.folder, model)
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    assert predict(who, images, model) == 1
    assert {path: path.stat().st_mtime_ns for path in model.rglob("*")} == before
    with pytest.raises(OutputError, match="trained model"):
        check_folder(model)


def test_an_output_that_is_a_file_is_called_a_file(tmp_path: Path) -> None:
    touched(tmp_path, "out")
    with pytest.raises(OutputError, match=r"The output is a file, not a folder\."):
        check_folder(tmp_path / "out")


# ---- memory


@pytest.mark.parametrize("error", [MemoryError("8 GiB"), OutOfMemory("No memory.")])
@pytest.mark.parametrize(
    "where",
    [
        "trtbuild.steps.folder_run.worker_main._reading",
        "trtbuild.steps.prediction.predictor.Predictor.predict_prepared",
        "trtbuild.steps.folder_run.writing.write_whole",
        "trtbuild.volume.io.simpleitk_io.write_segmentation",
    ],
)
def test_a_case_that_memory_cannot_hold_fails_alone(
    who: Subject, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    """While it is read, predicted, and written before and after its probabilities."""
    original: Callable[..., Any] = pkgutil.resolve_name(where)
    calls: list[int] = []

    def starved(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise error
        return original(*arguments)

    monkeypatch.setattr(where, starved)
    out = tmp_path / "out"
    config = PredictConfig(
        bundles=(who.bundle,), inputs=(images,), output=out, mirroring=False, save_probabilities=True, preparing=0
    )
    summary = predict_cases(config)
    assert [(o.case, o.error is None) for o in summary.outcomes] == [("a", False), ("b", True)]
    assert "memory" in str(summary.outcomes[0].error).lower()
    assert names(out) == {f"b{END}", "b.npz", "b.pkl", "dataset.json", "plans.json", RECORD}
    calls.clear()
    assert predict(who, images, out, "-npp", "0", "--save_probabilities") == 4


@pytest.mark.parametrize("spacing", [(100.0, 100.0, 100.0), (1e300, 1.0, 1.0), (1e308, 1e-308, 1e308)])
def test_an_absurd_spacing_is_refused_before_memory_is_asked_for(spacing: tuple[float, ...]) -> None:
    target = (0.5, 0.5, 0.5) if spacing[1] >= 1 else (1e-3, 1e-308, 1e-3)
    with pytest.raises(InputError, match="too many voxels") as error:
        new_shape((64, 64, 64), spacing, target)
    assert error.value.hint == "check the spacing in the file's header"


def test_the_largest_grid_is_taken() -> None:
    assert np.prod(new_shape((2048, 2048, 2048), (1.0,) * 3, (1.0,) * 3)) == MAX_VOXELS
    with pytest.raises(InputError):
        new_shape((2048, 2048, 2049), (1.0,) * 3, (1.0,) * 3)


# ---- compiling: what is cheap comes first


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(*_: object) -> None:
        raise AssertionError("the export began")

    monkeypatch.setattr(compiling, "networks_from_model", work)
    monkeypatch.setattr(compiling, "networks_from_bundle", work)


@pytest.mark.usefixtures("no_work")
def test_a_bundle_without_a_place_is_refused_before_the_work(tmp_path: Path) -> None:
    touched(tmp_path, "there.trtb", "file")
    for name in ("name", "there.trtb", "no/such/folder/x.trtb", "file/x.trtb"):
        with pytest.raises(OutputError):
            trtbuild.compile(tmp_path, tmp_path / name)
    assert names(tmp_path) == {"there.trtb", "file"}
    (tmp_path / "other").mkdir()
    with pytest.raises(OutputError, match=r"there\.trtb"):
        trtbuild.compile(tmp_path, tmp_path / "there.trtb", overwrite=True)
    with pytest.raises(AssertionError, match="the export began"):
        trtbuild.compile(tmp_path, tmp_path / "free.trtb")


@pytest.mark.usefixtures("no_work")
def test_a_backend_or_precision_that_cannot_be_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x.trtb"
    with pytest.raises(EngineError, match="no such backend"):
        trtbuild.compile(tmp_path, out, backends=("onnxruntime", "opnvino"))
    with pytest.raises(EngineError, match="this precision"):
        trtbuild.compile(tmp_path, out, backends=("onnxruntime",), precision="bf16")
    monkeypatch.setattr("trtbuild.runtime.openvino.PRECISIONS", {"f32": ("FP32", ""), "bf16": ("NO_SUCH_UNIT", "")})
    with pytest.raises(EngineError, match="this precision") as error:
        trtbuild.compile(tmp_path, out, backends=("openvino",), precision="bf16")
    assert error.value.expected == "fp32 or fp16 or int8"


@pytest.mark.usefixtures("no_work")
def test_two_names_of_one_backend_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtbuild.runtime.select.choose_backend", lambda asked: Choice(name="onnxruntime", refused=()))
    with pytest.raises(EngineError, match="the same one"):
        trtbuild.compile(tmp_path, tmp_path / "x.trtb", backends=("auto", "onnxruntime"))


def test_a_model_path_that_the_system_cannot_take_is_no_model(tmp_path: Path) -> None:
    for folder in (tmp_path / ("x" * 300), tmp_path / "a\0b"):
        with pytest.raises(ModelError, match=r"plans\.json"):
            trtbuild.compile(folder, tmp_path / "x.trtb")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everywhere; the next test refuses in the system's place")
def test_a_model_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0)
    with pytest.raises(ModelError, match="locked"):
        find_model(tmp_path / "locked", None, "checkpoint_final.pth")


def test_a_model_folder_that_the_system_refuses_to_list_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(ModelError, match="Permission denied"):
        find_model(tmp_path, None, "checkpoint_final.pth")


# ---- the Python functions


@pytest.mark.parametrize("folds", [[], [0, 0], ["0", 0], "01", 7, "x"])
def test_folds_that_mean_nothing_are_refused(who: Subject, folds: Any) -> None:
    with pytest.raises(ModelError, match="fold"):
        trtbuild.open(who.bundle, folds=folds)


def test_a_single_fold_may_be_a_number_or_a_name(who: Subject) -> None:
    for fold in (0, "0", [0]):
        with trtbuild.open(who.bundle, folds=fold) as predictor:
            assert [len(stage.runners) for model in predictor.models for stage in model.stages] == [1]


def test_settings_that_cannot_be_are_refused_at_once(who: Subject, tmp_path: Path) -> None:
    with pytest.raises(TrtbuildError, match=r"^The number of threads"):
        trtbuild.open(who.bundle, threads=0)
    config: dict[str, Any] = {"model": tmp_path, "output": tmp_path / "x.trtb"}
    with pytest.raises(TrtbuildError, match="fp32 or fp16 or bf16 or int8"):
        CompileConfig(**config, precision="int4")
    with pytest.raises(TrtbuildError, match="INT8 needs patches"):
        CompileConfig(**config, precision="int8")
    for text in ("openvino", "auto"):
        with pytest.raises(TrtbuildError, match=r"tuple .*\(\"openvino\",\)"):
            CompileConfig(**config, backends=text)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="distinct folds"):
        CompileConfig(**config, folds=())
