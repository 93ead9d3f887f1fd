"""Folder runs around a network that takes no time: order, overlap, faults, continuing, parts, and how they end."""

from __future__ import annotations

import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import SimpleITK as sitk
import tifffile
from null_bundles import END, FIRST, SECOND, SPEC, null_bundle, write_cases

from trtbuild import atomic
from trtbuild.atomic import PREFIX, remove_strays, whole_file
from trtbuild.cli import run
from trtbuild.config import PredictConfig
from trtbuild.errors import Cancelled, InputError, OutputError
from trtbuild.steps.folder_run import child, flow
from trtbuild.steps.folder_run.cases import Summary, predict_cases
from trtbuild.steps.folder_run.ending import Ending, Outcome
from trtbuild.steps.folder_run.flow import Events
from trtbuild.steps.folder_run.messages import Request, Stage
from trtbuild.steps.folder_run.outputs import Folder, check_inputs, prepared_folder
from trtbuild.steps.folder_run.planning import CasePlan, Planner
from trtbuild.steps.folder_run.record import RECORD
from trtbuild.steps.folder_run.worker import Worker
from trtbuild.volume.cases import Case, cases_from_input

COMMON = {"dataset.json", "plans.json", RECORD}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one.trtb, other.trtb (the same model in another bundle), cascade.trtb and second.trtb."""
    folder = tmp_path_factory.mktemp("bundles")
    null_bundle(folder / "one.trtb", folds=("0", "1"))
    null_bundle(folder / "other.trtb", note="other")
    null_bundle(folder / "cascade.trtb", FIRST, SECOND)
    null_bundle(folder / "second.trtb", SECOND)
    return folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_cases(tmp_path / "images", *"abcde")


def config(bundles: Path, images: Path, out: Path, *names: str, **changes: Any) -> PredictConfig:
    chosen = tuple(bundles / f"{name}.trtb" for name in names or ("one",))
    return PredictConfig(bundles=chosen, inputs=(images,), output=out, **changes)


def words(bundles: Path, images: Path, out: Path, *more: str) -> list[str]:
    return ["predict", str(bundles / "one.trtb"), "-i", str(images), "-o", str(out), *more]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the record, by its path in the folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def states(summary: Summary) -> dict[str, str]:
    """Of every case, in order: done, failed or kept."""
    return {o.case: "failed" if o.error else "done" if o.output else "kept" for o in summary.outcomes}


def gone(pid: int, seconds: float = 20) -> bool:
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


# ---- order and overlap


@pytest.mark.parametrize(("preparing", "writing"), [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_cases_start_and_end_in_their_order_whatever_becomes_of_them(
    bundles: Path, tmp_path: Path, preparing: int, writing: int
) -> None:
    """a, c, f and g are kept, d cannot be read: its neighbours must neither wait for it nor be told before it."""
    images, out = write_cases(tmp_path / "images", *"abcdefg"), tmp_path / "out"
    base = config(bundles, images, out, continue_prediction=True, preparing=preparing, writing=writing)
    assert set(states(predict_cases(base)).values()) == {"done"}
    for case in "bde":
        (out / (case + END)).unlink()
    (images / f"d_0000{END}").write_bytes(b"no image")
    seen: list[str] = []
    told = Events(
        started=lambda count, predictor: seen.append(f"{count} cases"),
        case_started=lambda plan: seen.append(f"{plan.case} starts"),
        case_ended=lambda outcome: seen.append(f"{outcome.case} ends"),
    )
    summary = predict_cases(base, told)
    assert states(summary) == dict(
        zip("abcdefg", ["kept", "done", "kept", "failed", "done", "kept", "kept"], strict=True)
    )
    assert seen[0] == "7 cases"
    assert [text for text in seen if "ends" in text] == [f"{case} ends" for case in "abcdefg"]
    assert [text[0] for text in seen if "starts" in text] == ["b", "d", "e"]
    assert all(seen.index(f"{case} starts") < seen.index(f"{case} ends") for case in "bde")


@pytest.mark.parametrize("members", [("one",), ("cascade",), ("one", "cascade")])
def test_overlapped_and_in_turn_give_the_same_bytes(bundles: Path, images: Path, tmp_path: Path, members: Any) -> None:
    expected: dict[str, bytes] = {}
    for preparing, writing in ((1, 1), (0, 0), (1, 0), (0, 1)):
        out = tmp_path / f"{preparing}{writing}"
        summary = predict_cases(
            config(bundles, images, out, *members, save_probabilities=True, disagreement=True, preparing=preparing,
                   writing=writing)
        )  # fmt: skip
        assert set(states(summary).values()) == {"done"}
        expected = expected or contents(out)
        assert contents(out) == expected
    assert len(expected) == 5 * 4 + 2
    assert np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"a{END}")))).size > 1


def test_a_case_is_read_while_another_is_in_the_network_and_a_third_is_written(
    bundles: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """a is being written until c has been asked for, which is while b is in the network; d is not asked for by then."""
    asked: list[str] = []
    submit, write = Worker.submit, flow.write_case
    third = threading.Event()

    def submitted(self: Worker, request: Request) -> Any:
        asked.append(request.case)
        return submit(self, request)

    def slow(prediction: Any, place: Any, targets: Any, spec: Any) -> None:
        assert targets.segmentation.name != f"a{END}" or third.wait(60), "c was not asked for before a was written"
        write(prediction, place, targets, spec)

    def progress(stage: str, done: int, total: int) -> None:
        if len(asked) == 3 and not third.is_set():
            assert names(tmp_path / "out") & {case + END for case in "abcde"} == set()
            third.set()
        assert len(asked) <= 3 or third.is_set()

    monkeypatch.setattr(Worker, "submit", submitted)
    monkeypatch.setattr(flow, "write_case", slow)
    summary = predict_cases(config(bundles, images, tmp_path / "out"), Events(progress=progress))
    assert set(states(summary).values()) == {"done"}
    assert asked == list("abcde")


def test_a_case_whose_size_is_known_once_it_is_read_is_written_beside_the_next(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header of a says nothing; its plan does once it is read, and b may go into the network meanwhile."""
    images, out = write_cases(tmp_path / "images", *"ab"), tmp_path / "out"
    plan, write = Planner.plan, flow.write_case
    second = threading.Event()

    def planned(self: Planner, case: str, header: Any, files: int) -> CasePlan:
        return plan(self, case, None if case == "a" else header, files)

    def slow(prediction: Any, place: Any, targets: Any, spec: Any) -> None:
        assert targets.segmentation.name != f"a{END}" or second.wait(20), "b waited until a was written"
        write(prediction, place, targets, spec)

    started: list[CasePlan] = []

    def progress(stage: str, done: int, total: int) -> None:
        if len(started) == 2:
            second.set()

    monkeypatch.setattr(Planner, "plan", planned)
    monkeypatch.setattr(flow, "write_case", slow)
    summary = predict_cases(config(bundles, images, out), Events(case_started=started.append, progress=progress))
    assert states(summary) == {"a": "done", "b": "done"}
    assert started[0].bytes is None


def test_what_ends_while_another_case_is_written_is_told_after_it() -> None:
    told: list[str] = []
    go = threading.Event()

    def outcome(case: str) -> Outcome:
        return Outcome(case=case, output=None, error=None, seconds={}, warnings=())

    def work() -> Outcome:
        go.wait(60)
        return outcome("a")

    with Ending(lambda one: told.append(one.case), background=True) as ending:
        ending.write(work)
        ending.ended(outcome("b"))
        assert told == []
        go.set()
        ending.write(lambda: outcome("c"))
        assert told == ["a", "b"]
        assert [one.case for one in ending.finish()] == told == ["a", "b", "c"]


def test_where_memory_is_short_no_two_cases_are_in_flight(
    bundles: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A planner that lets nothing run beside anything: each case is written before the next is read."""
    monkeypatch.setattr(Planner, "fits", lambda self, *plans: sum(plan is not None for plan in plans) < 2)
    there: list[set[str]] = []
    submit = child.Child.ask

    def ask(self: child.Child, message: Any) -> Any:
        if type(message).__name__ == "Read":
            there.append({name for name in names(tmp_path / "out") if name.endswith(END)})
        return submit(self, message)

    monkeypatch.setattr(child.Child, "ask", ask)
    predict_cases(config(bundles, images, tmp_path / "out"))
    assert there == [{case + END for case in "abcde"[:count]} for count in range(5)]


# ---- faults


@pytest.mark.parametrize("writing", [0, 1])
def test_a_full_disk_ends_the_run_with_whole_files_only(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], writing: int
) -> None:
    images, out = write_cases(tmp_path / "images", *(f"c{n:02}" for n in range(30))), tmp_path / "out"
    replace_file = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == f"c03{END}":
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert run(words(bundles, images, out, "-nps", str(writing), "--save_probabilities")) == 1
    error = capsys.readouterr().err
    assert "free some space" in error
    assert "Traceback" not in error
    done = {name.removesuffix(END) for name in names(out) if name.endswith(END)}
    assert {"c00", "c01", "c02"} <= done <= {f"c{n:02}" for n in range(6)} - {"c03"}, "it ends soon"
    assert not [name for name in names(out) if name.startswith(PREFIX)]
    for case in done:
        np.load(out / f"{case}.npz")["probabilities"]
    monkeypatch.setattr(os, "replace", replace_file)
    assert run(words(bundles, images, out, "--save_probabilities", "--continue_prediction")) == 0
    assert len(names(out)) == 3 * 30 + 3


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit of a file's size")
def test_a_system_that_refuses_to_write_more_ends_the_run(bundles: Path, images: Path, tmp_path: Path) -> None:
    """RLIMIT_FSIZE: the system refuses every write beyond 4 kB, in a thread as well, as a full disk does."""
    import resource

    out = tmp_path / "out"
    process = subprocess.run(
        [sys.executable, "-m", "trtbuild", *words(bundles, images, out, "--save_probabilities")],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000)),
        timeout=300,
    )
    assert process.returncode == 1, process.stderr
    assert "Traceback" not in process.stderr
    assert "written" in process.stderr
    assert names(out) == COMMON


def test_an_error_of_writing_is_not_blamed_on_the_next_case(
    bundles: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer raises InputError (a DICOM series that changed under it): its own case fails, no other does."""
    write = flow.write_case

    def refuse(prediction: Any, place: Any, targets: Any, spec: Any) -> None:
        if targets.segmentation.name == f"b{END}":
            raise InputError("The series has changed.")
        write(prediction, place, targets, spec)

    monkeypatch.setattr(flow, "write_case", refuse)
    summary = predict_cases(config(bundles, images, tmp_path / "out"))
    assert states(summary) == dict.fromkeys("acde", "done") | {"b": "failed"}
    assert "The series has changed." in str(summary.outcomes[1].error)


def test_a_worker_that_is_killed_costs_the_case_that_it_reads(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = write_cases(tmp_path / "images", *"abcde"), tmp_path / "out"
    write_cases(images, "c", shape=(128, 128, 128))  # long enough to be killed over
    readers = readers_killed(monkeypatch, 3)
    assert run(words(bundles, images, out)) == 4
    error = capsys.readouterr().err
    assert "1 of 5 cases failed" in error
    assert "case c: The process that reads images was killed" in error
    assert f"c_0000{END}" in error
    assert names(out) - COMMON == {case + END for case in "abde"}
    assert len(set(readers)) == 2, "a new process read the others"
    assert all(gone(pid) for pid in readers)


def readers_killed(monkeypatch: pytest.MonkeyPatch, number: int = -1) -> list[int]:
    """Notes the ids of the processes that read, and kills one while it reads the `number`-th case (from 1)."""
    pids: list[int] = []
    ask, receive = child.Child.ask, child.receive
    reading = 0

    def asked(self: child.Child, message: Any) -> Any:
        pids.append(self.process.pid)
        return ask(self, message)

    def received(pipe: Any) -> object:
        nonlocal reading
        message = receive(pipe)
        if isinstance(message, Stage) and message.name == "reading":
            reading += 1
            if reading == number:
                os.kill(pids[-1], signal.SIGKILL)
        return message

    monkeypatch.setattr(child.Child, "ask", asked)
    monkeypatch.setattr(child, "receive", received)
    return pids


@pytest.mark.parametrize(("preparing", "ticks"), [(0, 1), (1, 1), (1, 9), (1, 20)])
def test_a_callback_that_says_stop_leaves_no_process_and_no_partial_file(
    bundles: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preparing: int, ticks: int
) -> None:
    pids = readers_killed(monkeypatch)
    left = ticks

    def progress(stage: str, done: int, total: int) -> bool:
        nonlocal left
        left -= 1
        return left > 0

    out = tmp_path / "out"
    with pytest.raises(Cancelled):
        predict_cases(config(bundles, images, out, preparing=preparing), Events(progress=progress))
    assert bool(pids) == bool(preparing)
    assert all(gone(pid) for pid in pids)
    check_stopped(bundles, images, out, tmp_path)


def check_stopped(bundles: Path, images: Path, out: Path, tmp_path: Path) -> None:
    """What is there is whole, and continuing completes it."""
    predict_cases(config(bundles, images, tmp_path / "expected"))
    expected = contents(tmp_path / "expected")
    assert contents(out).items() <= expected.items()
    assert predict_cases(config(bundles, images, out, continue_prediction=True)).failed == ()
    assert contents(out) == expected


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT for another process")
def test_ctrl_c_ends_with_130_with_whole_cases_and_without_an_orphan(bundles: Path, tmp_path: Path) -> None:
    images, out = write_cases(tmp_path / "images", *(f"c{n:03}" for n in range(80))), tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-m", "trtbuild", *words(bundles, images, out)], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("c001:") and line.rstrip().endswith(" s"):
            break
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) == 1
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert gone(workers[0].pid)
    assert 2 <= len(names(out) - COMMON) < 80
    check_stopped(bundles, images, out, tmp_path)


# ---- continuing


KEYS = ["version", "bundle", "networks", "backends", "precisions", "step_size", "mirroring", "save_probabilities",
        "weights", "vote", "disagreement", "dicom_seg", "max_memory", "device_memory", "gpus_per_case",
        "postprocessing", "previous_stage"]  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("how", ["changed", "missing"])
def test_outputs_made_in_another_way_are_not_continued(
    bundles: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, how: str
) -> None:
    """Whatever the record says otherwise than this run would: it is named, and nothing is touched."""
    out = tmp_path / "out"
    base = words(bundles, images, out, "-npp", "0", "-nps", "0")
    for case in "bcde":
        (images / f"{case}_0000{END}").unlink()
    assert run(base) == 0
    record = json.loads((out / RECORD).read_bytes())
    assert set(record["trtbuild"]) == {*KEYS, "cases"}, "a new key needs a line in KEYS"
    assert run([*base, "--continue_prediction"]) == 0
    del record["trtbuild"][key]
    if how == "changed":
        record["trtbuild"][key] = "something else"
    (out / RECORD).write_text(json.dumps(record))
    before = contents(out) | {RECORD: (out / RECORD).read_bytes()}
    capsys.readouterr()
    assert run([*base, "--continue_prediction"]) == 1
    assert key in capsys.readouterr().err
    assert contents(out) | {RECORD: (out / RECORD).read_bytes()} == before
    assert run(base) == 0, "without --continue_prediction it is made anew"


@pytest.mark.parametrize(
    ("key", "more"),
    [
        ("networks", ["-f", "1"]),
        ("step_size", ["-step_size", "0.75"]),
        ("mirroring", ["--disable_tta"]),
        ("save_probabilities", ["--save_probabilities"]),
        ("vote", ["--vote", "hard"]),
        ("disagreement", ["--disagreement"]),
        ("weights", ["--weights", "2,1"]),
        ("postprocessing", ["--postprocessing", "RULES"]),
    ],
)
def test_every_option_that_changes_outputs_stands_in_the_record(
    bundles: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, more: list[str]
) -> None:
    rules = {"input_folder": "", "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
             "postprocessing_kwargs": [{"labels_or_regions": [1, 2]}]}  # fmt: skip
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    base = words(bundles, images, tmp_path / "out", "-npp", "0", "-nps", "0")
    if key in ("vote", "weights"):  # of an ensemble
        base.insert(2, str(bundles / "other.trtb"))
    assert run(base) == 0
    more = [str(tmp_path / "rules.json") if word == "RULES" else word for word in more]
    capsys.readouterr()
    assert run([*base, *more, "--continue_prediction"]) == 1
    error = capsys.readouterr().err
    assert "made in another way" in error
    assert key in error
    assert run([*base, *more]) == 0
    assert run([*base, *more, "--continue_prediction"]) == 0
    assert "kept" in capsys.readouterr().err


def test_outputs_of_another_bundle_are_not_continued(
    bundles: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    predict_cases(config(bundles, images, tmp_path / "out"))
    again = replace(config(bundles, images, tmp_path / "out", "other"), continue_prediction=True)
    with pytest.raises(OutputError, match="bundle"):
        predict_cases(again)


@pytest.mark.parametrize("how", ["another folder", "written anew", "another link"])
def test_a_case_of_other_inputs_is_not_kept(bundles: Path, images: Path, tmp_path: Path, how: str) -> None:
    out, other = tmp_path / "out", write_cases(tmp_path / "other", *"abcde")
    changed = images / f"b_0000{END}"
    if how == "another link":
        changed.unlink()
        changed.symlink_to(other / f"c_0000{END}")
    predict_cases(config(bundles, images, out, save_probabilities=True))
    old = contents(out)
    if how == "another folder":
        images = other
    elif how == "another link":
        changed.unlink()
        changed.symlink_to(other / f"d_0000{END}")
    else:
        shutil.copy(other / f"d_0000{END}", changed)
    expected = dict.fromkeys("abcde", "done" if how == "another folder" else "kept") | {"b": "done"}
    again = config(bundles, images, out, save_probabilities=True, continue_prediction=True)
    summary = predict_cases(again)
    assert states(summary) == expected
    assert {o.case for o in summary.outcomes if flow.CHANGED in o.warnings} == {
        c for c in expected if expected[c] == "done"
    }
    predict_cases(config(bundles, images, tmp_path / "expected", save_probabilities=True))
    assert contents(out) == contents(tmp_path / "expected")
    assert (contents(out) == old) == (how == "another folder")
    assert set(states(predict_cases(again)).values()) == {"kept"}


def test_a_case_whose_previous_stage_was_made_anew_is_not_kept(bundles: Path, tmp_path: Path) -> None:
    """And the folder of that stage may be spelled in another way."""
    images, before = write_cases(tmp_path / "images", *"ab"), tmp_path / "before"
    predict_cases(config(bundles, images, before))
    base = config(bundles, images, tmp_path / "out", "second", previous_stage=before)
    predict_cases(base)
    again = replace(base, previous_stage=tmp_path / "out" / ".." / "before", continue_prediction=True)
    assert states(predict_cases(again)) == {"a": "kept", "b": "kept"}
    shutil.copy(before / f"a{END}", before / f"b{END}")
    assert states(predict_cases(again)) == {"a": "kept", "b": "done"}


# ---- runs at the same time


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
@pytest.mark.parametrize("continuing", [False, True])
def test_while_a_run_lives_no_run_with_other_settings_begins(
    bundles: Path, images: Path, tmp_path: Path, continuing: bool
) -> None:
    out = tmp_path / "out"
    seen: list[str] = []

    def intrude(stage: str, done: int, total: int) -> None:
        if not seen:
            for name, where in (("other", images), ("one", write_cases(tmp_path / "images2", *"abcde"))):
                with pytest.raises(OutputError, match="Another run") as error:
                    predict_cases(config(bundles, where, out, name, preparing=0, continue_prediction=continuing))
                seen.append(str(error.value))

    predict_cases(config(bundles, images, out), Events(progress=intrude))
    assert "bundle" in seen[0]
    assert "images2" in seen[1]
    assert names(out) == COMMON | {case + END for case in "abcde"}
    again = config(bundles, images, out, continue_prediction=True)
    assert set(states(predict_cases(again)).values()) == {"kept"}
    predict_cases(config(bundles, images, out, "other"))


# ---- parts


def test_the_parts_of_a_run_are_disjoint_and_make_the_whole(bundles: Path, images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_cases(config(bundles, images, tmp_path / "whole"))
    seen = []
    for part in range(3):
        summary = predict_cases(config(bundles, images, out, num_parts=3, part_id=part, preparing=0))
        seen.append(list(states(summary)))
    assert seen == [["a", "d"], ["b", "e"], ["c"]]
    assert contents(out) == contents(tmp_path / "whole")
    assert json.loads((out / RECORD).read_bytes())["trtbuild"]["cases"].keys() == set("abcde")
    summary = predict_cases(config(bundles, images, out, continue_prediction=True))
    assert set(states(summary).values()) == {"kept"}
    assert states(predict_cases(config(bundles, images, tmp_path / "many", num_parts=9, part_id=8))) == {}


def test_parts_that_run_at_the_same_time_do_not_disturb_each_other(bundles: Path, tmp_path: Path) -> None:
    images, out = write_cases(tmp_path / "images", *(f"c{n:02}" for n in range(40))), tmp_path / "out"

    def part(number: int) -> Summary:
        return predict_cases(config(bundles, images, out, num_parts=4, part_id=number, save_probabilities=True))

    with ThreadPoolExecutor(4) as pool:
        summaries = list(pool.map(part, range(4)))
    assert all(set(states(summary).values()) == {"done"} for summary in summaries)
    assert len(names(out)) == 3 * 40 + 3
    again = predict_cases(config(bundles, images, out, continue_prediction=True, save_probabilities=True))
    assert set(states(again).values()) == {"kept"}


def test_a_temporary_whose_writer_lives_is_no_stray(tmp_path: Path) -> None:
    dead = tmp_path / f"{PREFIX}x.partial{END}"
    dead.write_bytes(b"half")
    with whole_file(tmp_path / f"a{END}") as partial:
        assert partial.name.endswith(END)
        partial.write_bytes(b"whole")
        assert remove_strays(tmp_path) == 1
        assert names(tmp_path) == {partial.name}
    assert names(tmp_path) == {f"a{END}"}
    assert remove_strays(tmp_path) == 0


def test_a_temporary_that_is_taken_for_a_stray_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock: Callable[..., bool] = atomic._lock
    calls: list[int] = []

    def late(handle: int, *, wait: bool = False) -> bool:
        calls.append(handle)
        if len(calls) == 1:
            assert remove_strays(tmp_path) == 1
        return lock(handle, wait=wait)

    monkeypatch.setattr(atomic, "_lock", late)
    with whole_file(tmp_path / "a") as partial:
        partial.write_bytes(b"whole")
        assert remove_strays(tmp_path) == 0
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert names(tmp_path) == {"a"}


def test_a_temporary_that_gets_its_name_while_strays_are_sought_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / f"{PREFIX}x.partial").write_bytes(b"whole")

    def renamed(handle: int, *, wait: bool = False) -> bool:
        (tmp_path / f"{PREFIX}x.partial").rename(tmp_path / "a")
        return True

    monkeypatch.setattr(atomic, "_lock", renamed)
    assert remove_strays(tmp_path) == 0
    assert names(tmp_path) == {"a"}


# ---- a previous stage from a folder


def test_a_case_without_a_previous_stage_fails_by_name(
    bundles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, before = write_cases(tmp_path / "images", *"abc"), tmp_path / "before"
    predict_cases(config(bundles, images, before))
    (before / f"b{END}").unlink()
    base = config(bundles, images, tmp_path / "out", "second", previous_stage=before)
    for preparing in (1, 0):
        summary = predict_cases(replace(base, preparing=preparing))
        assert states(summary) == {"a": "done", "b": "failed", "c": "done"}
        assert "no prediction of the previous stage" in str(summary.outcomes[1].error)
        assert f"b{END}" in str(summary.outcomes[1].error)


def test_predictions_of_the_previous_stage_are_inputs_that_no_output_may_replace(bundles: Path, tmp_path: Path) -> None:
    images, before = write_cases(tmp_path / "images", *"ab"), tmp_path / "before"
    predict_cases(config(bundles, images, before))
    there = contents(before)
    with pytest.raises(InputError, match="overwrite an input"):
        predict_cases(config(bundles, images, before, "second", previous_stage=before))
    assert contents(before) == there


def test_an_output_that_is_the_input_of_another_part_is_refused(bundles: Path, tmp_path: Path) -> None:
    images = write_cases(tmp_path / "images", *"ab")
    for case in "ab":
        (images / f"{case}_0000{END}").rename(images / f"{case}{END}")
    swapped = [{"id": "a", "files": [f"images/b{END}"]}, {"id": "b", "files": [f"images/a{END}"]}]
    (tmp_path / "list.json").write_text(json.dumps(swapped))
    there = contents(images)
    with pytest.raises(InputError, match="overwrite an input"):
        predict_cases(config(bundles, tmp_path / "list.json", images, num_parts=2, part_id=0))
    assert contents(images) == there


def test_a_stack_is_not_predicted_over_the_file_of_its_spacing(tmp_path: Path) -> None:
    """Tiff3DIO reads a.json for a_0000.tif, and would write it for a.tif; b is predicted anew once b.json changes."""
    null_bundle(tmp_path / "stacks.trtb", replace(SPEC, reader="Tiff3DIO", file_ending=".tif"))
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for case in "ab":
        tifffile.imwrite(images / f"{case}_0000.tif", np.ones((9, 14, 11), np.float32))
        (images / f"{case}.json").write_text('{"spacing": [1.2, 0.9, 1.1]}')
    there = contents(images)
    with pytest.raises(InputError, match=r"overwrite an input(.|\n)*a\.json"):
        predict_cases(config(tmp_path, images, images, "stacks"))
    assert contents(images) == there
    again = config(tmp_path, images, out, "stacks", continue_prediction=True)
    assert states(predict_cases(again)) == {"a": "done", "b": "done"}
    (images / "b.json").write_text('{"spacing": [1.2, 0.9, 1.25]}')
    assert states(predict_cases(again)) == {"a": "kept", "b": "done"}
    assert json.loads((out / "b.json").read_text())["spacing"] == [1.2, 0.9, 1.25]


# ---- many cases


def test_a_folder_of_thousands_of_cases_is_listed_and_prepared_in_bounded_time_and_memory(tmp_path: Path) -> None:
    """What is quadratic in the number of cases would take minutes."""
    few, many, count = tmp_path / "few", tmp_path / "many", 3_000
    for folder, size in ((few, 1), (many, count)):
        folder.mkdir()
        for number in range(size):
            (folder / f"case_{number:05}_0000{END}").touch()

    def prepared(images: Path) -> Sequence[Case]:
        cases, out = cases_from_input([images], END), images / "out"
        folder = Folder(path=out, ending=END, reader="SimpleITKIO")
        for continuing in (False, True):
            check_inputs(folder, cases, [images])
            arguments = {"trtbuild": {"bundle": "x"}}
            with prepared_folder(
                folder, cases, lambda case: (), copies={}, arguments=arguments, continuing=continuing
            ) as changed:
                assert not changed
        return cases

    prepared(few)  # what is imported at the first call is not counted
    tracemalloc.start()
    started = time.process_time()
    cases = prepared(many)
    seconds, (held, peak) = time.process_time() - started, tracemalloc.get_traced_memory()
    # pathlib interns the parts of paths, and Python's one table of interned strings may double at any moment
    of_pathlib = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, pathlib.__file__)])
    interned = sum(trace.size for trace in of_pathlib.traces if trace.size > 1 << 20)
    tracemalloc.stop()
    assert len(cases) == count
    assert seconds < 30
    assert held - interned < count * 1000
    assert peak - interned < count * 2000


def test_memory_does_not_grow_with_the_number_of_cases_that_are_done(bundles: Path, tmp_path: Path) -> None:
    """Per finished case only its outcome is held: no array, no future, no image."""
    images = write_cases(tmp_path / "images", "c00", shape=(24, 32, 32))
    for number in range(1, 80):
        (images / f"c{number:02}_0000{END}").symlink_to(images / f"c00_0000{END}")
    held: list[int] = []

    def measure(outcome: Outcome) -> None:
        if outcome.case == "c20":
            tracemalloc.start()
        if tracemalloc.is_tracing():
            held.append(tracemalloc.get_traced_memory()[0])

    try:
        predict_cases(config(bundles, images, tmp_path / "out", mirroring=False), Events(case_ended=measure))
    finally:
        tracemalloc.stop()
    assert len(held) == 60
    assert min(held[-10:]) - min(held[10:20]) < 50 * 4000, "4 kB per case"


@pytest.fixture(autouse=True)
def no_orphans() -> Iterator[None]:
    """No test leaves a process that reads images."""
    yield
    left = [p for p in psutil.Process().children(recursive=True) if p.status() != psutil.STATUS_ZOMBIE]
    assert [p for p in left if "worker_main" in " ".join(p.cmdline())] == []


def test_the_null_bundle_is_what_these_tests_take_it_for(bundles: Path, images: Path, tmp_path: Path) -> None:
    """The labels are the nearest whole numbers of the voxels, where nothing is resampled."""
    plain = write_cases(tmp_path / "plain", "a", spacing=SPEC.spacing)
    predict_cases(config(bundles, plain, tmp_path / "out"))
    source, labels = (sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
                      for file in (plain / f"a_0000{END}", tmp_path / "out" / f"a{END}"))  # fmt: skip
    expected = np.clip(np.ceil(source - 0.5), 0, 2)
    near = np.abs(source - np.floor(source) - 0.5) < 1e-4
    np.testing.assert_array_equal(labels[~near], expected[~near])
