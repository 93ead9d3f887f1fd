"""The command line from the outside: words, exit codes, files, messages."""

from __future__ import annotations

import copy
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from models import DEMO, subject
from reference import segmentation_from_file

from trtbuild.cli import run
from trtbuild.config import PredictConfig
from trtbuild.errors import Cancelled, MissingExtra
from trtbuild.runtime.predictor import tell
from trtbuild.steps.folder_run.cases import Summary
from trtbuild.steps.folder_run.flow import Events


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
        (["-f=0", "-f=3"], ("0", "3")),
        ([], None),
    ],
)
def test_folds_are_read_as_nnunet_reads_them(
    words: list[str], folds: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "trtbuild.commands.compile.CompileConfig", lambda **options: seen.append(options["folds"]) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        run(["compile", *words, "MODEL", "-o", "x.trtb"])
    with pytest.raises(ZeroDivisionError):
        run(["compile", "MODEL", *words, "-o", "x.trtb"])
    assert seen == [folds, folds]


@pytest.mark.parametrize(
    "words",
    [
        ["-f", "0", "0"],
        ["-f", "all", "1"],
        ["-f", "x"],
        ["-f"],
        ["-f0"],
        ["-f=x"],
        ["-f="],
        ["-f", ""],
        ["-f", "-o", "y"],
        ["-o", "x", "-ofoo"],
    ],
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


def nothing_predicted(config: PredictConfig, events: Events) -> Summary:
    return Summary(bundle="", engine={}, refused=(), outcomes=())


@pytest.mark.parametrize(
    ("words", "inputs"),
    [
        (["B.trtb", "-i", "a.nii", "b.nii", "-o", "out"], ("a.nii", "b.nii")),
        (["-i", "a.nii", "b.nii", "B.trtb", "-o", "out"], ("a.nii", "b.nii")),
        (["-o", "out", "-i", "a.nii", "b.nii", "B.trtb/"], ("a.nii", "b.nii")),
        (["-o", "out", "-i", "a.nii", "b.nii", "--", "B.trtb"], ("a.nii", "b.nii")),
        (["B.trtb", "-i", "a.nii", "-o", "out", "-i", "b.nii"], ("a.nii", "b.nii")),
        (["B.trtb", "-i=a=1.nii", "-i=b.nii", "-o=out"], ("a=1.nii", "b.nii")),
    ],
)
def test_inputs_may_be_what_a_shell_makes_of_a_pattern(
    words: list[str], inputs: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[PredictConfig] = []
    monkeypatch.setattr(
        "trtbuild.steps.folder_run.cases.predict_cases",
        lambda config, events: seen.append(config) or nothing_predicted(config, events),
    )
    assert run(["predict", *words]) == 0
    assert seen[0].inputs == tuple(map(Path, inputs))
    assert (seen[0].bundles, seen[0].output) == ((Path("B.trtb"),), Path("out"))


@pytest.mark.parametrize(
    "words",
    [
        ["B.trtb", "-o", "out", "-i"],
        ["B.trtb", "-i", "-o", "out"],
        ["B.trtb", "-i=", "-o", "out"],
        ["-i", "a", "B", "-o", "out"],
    ],
)
def test_missing_inputs_and_a_bundle_taken_for_an_input_are_usage_errors(words: list[str]) -> None:
    assert run(["predict", *words]) == 2


def lost_interrupt() -> None:
    """Ctrl-C while C calls Python: the KeyboardInterrupt goes no further."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        return
    pytest.fail("no KeyboardInterrupt was raised")


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_lost_interrupt_ends_predict_at_the_next_progress(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def predict_cases(config: PredictConfig, events: Events) -> Summary:
        lost_interrupt()
        assert events.progress is not None
        events.progress("network", 1, 2)
        return pytest.fail("the run went on")

    monkeypatch.setattr("trtbuild.steps.folder_run.cases.predict_cases", predict_cases)
    before = signal.getsignal(signal.SIGINT)
    assert run(["predict", "B.trtb", "-i", "a", "-o", "out", *words]) == 130
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr("trtbuild.steps.folder_run.cases.predict_cases", nothing_predicted)
    assert run(["predict", "B.trtb", "-i", "a", "-o", "out", *words]) == 0


INTERRUPTED_AT = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                sum(range(100))  # the signal is handled between two instructions
            except BaseException:
                if {swallowed}:
                    return None
                raise

signal.signal(signal.SIGINT, {handler})
sys.meta_path.insert(0, Interrupting())
sys.argv = ["trtbuild", "doctor", "--json"]
from trtbuild.__main__ import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("swallowed", [False, True])
@pytest.mark.parametrize("module", ["trtbuild.cli", "click", "trtbuild.commands.compile", "trtbuild.commands.predict"])
def test_ctrl_c_while_the_command_line_is_imported_is_130_and_one_line(module: str, swallowed: bool) -> None:
    """Also where the library that is being imported catches everything."""
    code = INTERRUPTED_AT.format(module=module, swallowed=swallowed, handler="signal.default_int_handler")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
@pytest.mark.parametrize("module", ["click", "trtbuild.steps.doctor"])
def test_an_ignored_ctrl_c_stays_ignored(module: str) -> None:
    code = INTERRUPTED_AT.format(module=module, swallowed=False, handler="signal.SIG_IGN")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    json.loads(done.stdout)


def test_the_handler_of_ctrl_c_is_python_s_own_while_a_command_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import trtbuild.__main__

    seen: list[object] = []
    monkeypatch.setattr("trtbuild.cli.run", lambda: seen.append(signal.getsignal(signal.SIGINT)) or 7)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as caught:
            trtbuild.__main__.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (caught.value.code, seen) == (7, [signal.default_int_handler])


def test_ctrl_c_behind_the_command_is_130_and_one_line(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import trtbuild.__main__

    def interrupted() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("trtbuild.cli.run", interrupted)
    with pytest.raises(SystemExit) as caught:
        trtbuild.__main__.main()
    assert (caught.value.code, capfd.readouterr().err) == (130, "Interrupted.\n")


@pytest.mark.parametrize("ticks", [0, 1])
def test_a_lost_interrupt_ends_compile_and_export(ticks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(*config: object, report=None, **options: object):  # type: ignore[no-untyped-def]
        lost_interrupt()
        for _ in range(ticks):
            (report or config[-1])("a line")
            pytest.fail("the run went on")
        return ()

    monkeypatch.setattr("trtbuild.steps.compilation.export.export_folder", step)
    monkeypatch.setattr("trtbuild.steps.compilation.compile.compile_bundle", step)
    monkeypatch.setattr("trtbuild.steps.inspect.overview", lambda bundle: {})
    assert run(["export", "MODEL", "-o", "out", "--json"]) == 130
    assert run(["compile", "MODEL", "-o", "out.trtb", "--json"]) == 130


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/somewhere/x"), "No space left on device: /somewhere/x"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("no number"), "no number"),
    ],
)
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_an_error_of_the_system_that_nobody_expected_is_one_message(
    error: OSError, message: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("trtbuild.steps.inspect.inspect_bundle", fails)
    assert run(["inspect", "B.trtb", *words]) == 1
    shown = capsys.readouterr().err
    text = json.loads(shown)["message"] if words else shown.removeprefix("Error: ").rstrip()
    assert text == f"The system refused: {message}"


def test_what_cannot_be_read_is_an_error_of_the_input_not_of_the_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    assert run(["inspect", str(tmp_path)]) == 1
    assert "Usage" not in capsys.readouterr().err


def test_clean_in_place_compares_with_the_file_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import onnx

    nodes = [onnx.helper.make_node("Identity", ["x"], ["a"]), onnx.helper.make_node("Relu", ["a"], ["y"])]
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:])
    file = tmp_path / "a.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9), file)
    assert run(["clean", str(file), "-o", str(file), "--overwrite", "--json"]) == 0
    rows = {row["what"]: (row["before"], row["after"]) for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["Identity"] == (1, 0)
    assert rows["nodes"] == (2, 1)


def test_every_error_survives_pickling_and_copying() -> None:
    error = MissingExtra("onnx", "graph", "clean a model")
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(other) is MissingExtra
        assert str(other) == str(error)
        assert (other.package, other.extra, other.hint) == ("onnx", "graph", "pip install 'trtbuild[graph]'")


@pytest.mark.parametrize("wish", [False, np.False_, 0])
def test_any_false_value_but_none_stops(wish: object) -> None:
    with pytest.raises(Cancelled):
        tell(lambda *values: wish, "network", 1, 2)  # type: ignore[arg-type,return-value]
    tell(lambda *values: None, "network", 1, 2)
    tell(lambda *values: True, "network", 1, 2)


def test_without_a_place_for_a_cache_the_loops_compile_and_a_warning_says_so_once() -> None:
    code = (
        "from numba.core import caching\n"
        "for name in ('CacheImpl', '_CacheImpl'):\n"
        "    if hasattr(caching, name): getattr(caching, name)._locator_classes = []\n"
        "import numpy as np; from trtbuild.stitch.accumulate import add_window\n"
        "import trtbuild.volume.back.interpolate\n"
        "total, ones = np.ones((1, 2, 2, 2), np.float32), np.ones(2, np.float32)\n"
        "assert add_window(total, total.copy(), (ones,) * 3, (0, 0, 0), (False,) * 3); print(total.max())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "2.0"
    assert result.stderr.count("NUMBA_CACHE_DIR") == 1


def test_a_closed_pipe_does_not_change_the_exit_code() -> None:
    command = f"{sys.executable} -m trtbuild doctor | head -c 1; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", command], capture_output=True).returncode == 0


@pytest.mark.parametrize("size", ["", "G", "0", "-1G", "1" * 400 + "G", "inf", "nan", "1e9G", "8 X"])
def test_a_memory_limit_that_is_none_is_refused(size: str, tmp_path: Path) -> None:
    assert run(["predict", str(tmp_path), "-i", str(tmp_path), "-o", str(tmp_path), f"--max-memory={size}"]) == 2


@pytest.mark.parametrize(
    ("text", "size"), [("8G", 8 << 30), ("512M", 512 << 20), ("1.5GiB", 3 << 29), ("7", 7), ("2 kb", 2048)]
)
def test_a_memory_limit_is_written_as_for_docker(text: str, size: int) -> None:
    from trtbuild.options import BYTES

    assert BYTES.convert(text, None, None) == size


def test_control_characters_of_a_name_do_not_reach_the_terminal() -> None:
    from trtbuild.show import printable

    assert printable("a\x1b[31m\nb ä") == "a\\x1b[31m\\nb ä"
