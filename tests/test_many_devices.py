"""Folder runs over several GPUs: predictors that say they are on one, around the null network, in threads that meet.

What is expected is what the same bundle gives in a run without a GPU, byte for byte.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import SimpleITK as sitk
from null_bundles import END, FIRST, SECOND, null_bundle, write_cases
from numpy.typing import NDArray

from trtbuild.atomic import PREFIX
from trtbuild.config import PredictConfig
from trtbuild.errors import Cancelled, EngineError, InputError, NonFinite, OutputError, TrtbuildError
from trtbuild.runtime import Prediction, Progress, Settings
from trtbuild.runtime.gpu.parallel import at_once
from trtbuild.runtime.memory import CaseBytes
from trtbuild.steps.folder_run import cases as cases_module
from trtbuild.steps.folder_run import flow, opened, worker_main, writing
from trtbuild.steps.folder_run.case_queue import WAITED, CaseQueue
from trtbuild.steps.folder_run.cases import Summary, predict_cases
from trtbuild.steps.folder_run.flow import Events
from trtbuild.steps.folder_run.local import LocalWorker
from trtbuild.steps.folder_run.messages import Message, Reading, Request
from trtbuild.steps.folder_run.opened import opened_predictors
from trtbuild.steps.folder_run.planned import Ahead
from trtbuild.steps.folder_run.planning import CasePlan, Planner
from trtbuild.steps.folder_run.record import RECORD
from trtbuild.steps.folder_run.worker import Worker, open_worker
from trtbuild.steps.folder_run.worker_main import answer
from trtbuild.steps.folder_run.workers import Workers, open_workers
from trtbuild.steps.prediction.predictor import Predictor, open_predictor
from trtbuild.volume import Prepared, prepared_from_array
from trtbuild.volume.image import LabelImage

PATIENCE = 60.0
"""Seconds until a test that waits for another thread fails."""


@dataclass
class Diary:
    """What the GPUs did; `before` is called with (GPU, number of its cases so far) before each case."""

    before: Callable[[int, int], None] = lambda device, number: None
    threads: dict[int, int] = field(default_factory=dict)
    cases: dict[str, int] = field(default_factory=dict)
    prepared: list[tuple[int, int, int]] = field(default_factory=list)
    opened: list[int] = field(default_factory=list)

    def noting(self, **more: Any) -> Events:
        """Callbacks that note which thread has which case."""

        def progress(case: str, stage: str, done: int, total: int) -> None:
            self.cases[case] = threading.get_ident()

        return Events(case_progress=progress, **more)

    def taken(self) -> dict[int, str]:
        """By GPU the cases that it has taken, by name."""
        return {device: "".join(c for c, thread in sorted(self.cases.items()) if self.threads[thread] == device)
                for device in self.opened}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FakeGpu(Predictor):
    """A predictor of the CPU that says it is on a GPU, and notes what it is asked for."""

    device: int
    diary: Diary

    @property
    def on_device(self) -> bool:
        return True

    def prepared(
        self,
        model: int,
        stage: int,
        data: NDArray[Any],
        spacing: Any,
        labels: NDArray[Any] | None,
        uploaded: Any = None,
    ) -> Prepared:
        assert uploaded is None, "several GPUs take nothing ahead"
        self.diary.prepared.append((self.device, model, stage))
        return prepared_from_array(data, spacing, self.models[model].stages[stage].spec, labels)

    def predict_prepared(self, prepare: Any, settings: Settings, progress: Progress | None) -> Prediction:
        self.diary.threads[threading.get_ident()] = self.device
        self.diary.before(self.device, list(self.diary.threads.values()).count(self.device))
        return super().predict_prepared(prepare, settings, progress)


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> Diary:
    """Of the GPUs that the runs of this test have; without it there is none."""
    notes = Diary()

    def on_gpu(paths: Any, *, device: int = 0, device_memory: int | None = None, **more: Any) -> Predictor:
        notes.opened.append(device)
        real = open_predictor(paths, **more)
        return FakeGpu(**{f.name: getattr(real, f.name) for f in fields(real)}, device=device, diary=notes)

    monkeypatch.setattr(opened, "open_predictor", on_gpu)
    return notes


class InThread(LocalWorker):
    """Reads in a thread, where a process would take a second to start."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = ThreadPoolExecutor(1, "trtbuild-reader")

    def _answered(self, message: Message) -> Future[Any]:
        return self.pool.submit(answer, message, self._kept, lambda stage: None)


@contextmanager
def readers(count: int = 1) -> Iterator[Workers]:
    workers = [InThread() for _ in range(count)]
    try:
        yield Workers(cast("Any", workers))
    finally:
        for worker in workers:
            worker.pool.shutdown(cancel_futures=True)


@pytest.fixture(autouse=True)
def in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No run starts a process, but for the tests that put `open_workers` back."""
    monkeypatch.setattr(cases_module, "open_worker", readers)
    monkeypatch.setattr(cases_module, "open_workers", readers)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    null_bundle(folder / "one.trtb", folds=("0", "1"))
    null_bundle(folder / "cascade.trtb", FIRST, SECOND)
    null_bundle(folder / "second.trtb", SECOND)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five cases, which no test may change."""
    return write_cases(tmp_path_factory.mktemp("images"), *"abcde")


@pytest.fixture(scope="module")
def expected(bundles: Path, images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the five cases from a run without a GPU."""
    out = tmp_path_factory.mktemp("expected")
    predict_cases(config(bundles, images, out, devices=(0,)))
    return contents(out)


def config(bundles: Path, images: Path, out: Path, *names: str, **changes: Any) -> PredictConfig:
    chosen = tuple(bundles / f"{name}.trtb" for name in names or ("one",))
    return PredictConfig(bundles=chosen, inputs=(images,), output=out, **({"devices": (0, 1)} | changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but the record, by its path in the folder."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != RECORD)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def states(summary: Summary) -> dict[str, str]:
    return {o.case: "failed" if o.error else "done" if o.output else "kept" for o in summary.outcomes}


def check_stopped(out: Path, expected: dict[str, bytes], again: PredictConfig) -> None:
    """No thread is left, what is there is whole, and continuing completes it."""
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("trtbuild")]
    assert not [name for name in contents(out) if Path(name).name.startswith(PREFIX)]
    assert contents(out).items() <= expected.items()
    assert predict_cases(replace(again, continue_prediction=True)).failed == ()
    assert contents(out) == expected


# ---- the same outputs, whoever made them


@pytest.mark.parametrize("members", [("one",), ("cascade",), ("one", "cascade")])
@pytest.mark.parametrize("processes", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_number_of_gpus_gives_the_bytes_of_the_cpu(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch, members: Any,
    processes: bool,
) -> None:  # fmt: skip
    """The host reads and prepares nothing: every stage of every model is prepared by the GPU that has the case."""
    changes = {"save_probabilities": True, "disagreement": True}
    if processes:
        monkeypatch.setattr(cases_module, "open_worker", open_worker)
        monkeypatch.setattr(cases_module, "open_workers", open_workers)
    with monkeypatch.context() as cpu:
        cpu.setattr(opened, "open_predictor", open_predictor)
        summary = predict_cases(config(bundles, images, tmp_path / "cpu", *members, devices=(0,), **changes))
    assert not diary.opened
    assert set(states(summary).values()) == {"done"}
    stages = 5 * sum(2 if name == "cascade" else 1 for name in members)
    for number, devices in enumerate([(0,), (3, 1), (0, 1, 2)]):
        out = tmp_path / str(number)
        diary.prepared.clear()
        again = predict_cases(config(bundles, images, out, *members, devices=devices, **changes))
        assert contents(out) == contents(tmp_path / "cpu")
        assert states(again) == dict.fromkeys("abcde", "done")
        assert len(diary.prepared) == stages
        assert {device for device, _, _ in diary.prepared} <= set(devices)
    assert diary.opened == [0, 3, 1, 0, 1, 2]
    labels = [np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"{case}{END}")))) for case in "abcde"]
    assert all(found.size > 1 for found in labels)


@pytest.mark.parametrize(("preparing", "beside"), [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_both_gpus_work_at_once_and_cases_are_told_in_order(
    bundles: Path, tmp_path: Path, diary: Diary, preparing: int, beside: int
) -> None:
    """The first cases of both meet in the network. a, c, f and g are kept, d cannot be read, though its header can."""
    images, out = write_cases(tmp_path / "images", *"abcdefg"), tmp_path / "out"
    base = config(bundles, images, out, continue_prediction=True, preparing=preparing, writing=beside)
    assert set(states(predict_cases(base)).values()) == {"done"}
    for case in "bde":
        (out / (case + END)).unlink()
    damaged = images / f"d_0000{END}"
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    both = threading.Barrier(2)
    diary.before = lambda device, number: _meet(both)
    diary.cases.clear()
    seen: list[str] = []
    summary = predict_cases(
        base,
        diary.noting(
            started=lambda count, predictor: seen.append(f"{count} cases"),
            case_started=lambda plan: seen.append(f"{plan.case} starts"),
            case_ended=lambda outcome: seen.append(f"{outcome.case} ends"),
        ),
    )
    expected = ["kept", "done", "kept", "failed", "done", "kept", "kept"]
    assert states(summary) == dict(zip("abcdefg", expected, strict=True))
    assert seen[0] == "7 cases"
    assert [text for text in seen if "ends" in text] == [f"{case} ends" for case in "abcdefg"]
    assert sorted(text[0] for text in seen if "starts" in text) == ["b", "d", "e"]
    assert {diary.threads[diary.cases[case]] for case in "be"} == {0, 1}


def _meet(barrier: threading.Barrier) -> None:
    barrier.wait(PATIENCE)


def test_a_gpu_that_is_free_takes_the_next_case(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes],
) -> None:  # fmt: skip
    """The first to come keeps its case until the other has written all that are left; none after it is told before."""
    told, written, seen = list[str](), list[str](), list[str]()
    others = threading.Event()
    first = threading.Lock()
    write = writing.write_case

    def before(device: int, number: int) -> None:
        if first.acquire(blocking=False):
            assert others.wait(PATIENCE), "the other GPU did not take what was left"
            seen.extend(told)

    def noted(prediction: Any, place: Any, targets: Any, spec: Any) -> None:
        write(prediction, place, targets, spec)
        written.append(targets.segmentation.name.removesuffix(END))
        if len(written) == 4:
            others.set()

    diary.before = before
    monkeypatch.setattr(flow, "write_case", noted)
    events = diary.noting(case_ended=lambda outcome: told.append(outcome.case))
    summary = predict_cases(config(bundles, images, tmp_path / "out"), events)
    assert states(summary) == dict.fromkeys("abcde", "done")
    assert told == list("abcde")
    last = written[-1]
    assert all(case < last for case in seen)
    assert sorted(diary.taken().values()) == sorted([last, "abcde".replace(last, "")])
    assert contents(tmp_path / "out") == expected


def test_with_one_gpu_the_next_case_is_read_while_one_is_in_the_network(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {case: threading.Event() for case in "abcde"}
    submit = Workers.submit

    def submitted(self: Workers, request: Request) -> Future[Reading]:
        assert request.raw
        assert not request.keep
        future = submit(self, request)
        future.add_done_callback(lambda _: read[request.case].set())
        return future

    number = iter("bcde")
    diary.before = lambda device, count: _is_set(read.get(next(number, "")))
    monkeypatch.setattr(Workers, "submit", submitted)
    summary = predict_cases(config(bundles, images, tmp_path / "out", "cascade", devices=(0,)))
    assert states(summary) == dict.fromkeys("abcde", "done")


def _is_set(event: threading.Event | None) -> None:
    assert event is None or event.wait(PATIENCE), "the next case was not read"


@pytest.mark.parametrize("devices", [(0,), (0, 1)])
@pytest.mark.parametrize("preparing", [0, 1])
def test_labels_of_a_previous_stage_reach_the_gpu(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch, devices: Any,
    preparing: int,
) -> None:  # fmt: skip
    before = tmp_path / "before"
    with monkeypatch.context() as cpu:
        cpu.setattr(opened, "open_predictor", open_predictor)
        predict_cases(config(bundles, images, before, devices=(0,)))
        given = {"previous_stage": before, "devices": (0,)}
        predict_cases(config(bundles, images, tmp_path / "cpu", "second", **given))
    (before / f"b{END}").unlink()
    base = config(bundles, images, tmp_path / "out", "second", previous_stage=before)
    summary = predict_cases(replace(base, devices=devices, preparing=preparing))
    assert states(summary) == dict.fromkeys("abcde", "done") | {"b": "failed"}
    assert "no prediction of the previous stage" in str(summary.outcomes[1].error)
    whole = contents(tmp_path / "cpu")
    del whole[f"b{END}"]
    assert contents(tmp_path / "out") == whole
    for case in "acde":
        labels = sitk.GetArrayFromImage(sitk.ReadImage(str(before / f"{case}{END}")))
        assert labels.any(), "labels of nothing would not show that they came"


@pytest.mark.parametrize("devices", [(0,), (0, 1)])
def test_seconds_and_warnings_are_those_of_the_reading_and_of_the_gpu(
    bundles: Path, tmp_path: Path, diary: Diary, devices: Any
) -> None:
    images = write_cases(tmp_path / "images", "a")
    sitk.WriteImage(sitk.Image([11, 14, 9], sitk.sitkFloat32), str(images / f"b_0000{END}"))
    summary = predict_cases(config(bundles, images, tmp_path / "out", devices=devices))
    for outcome in summary.outcomes:
        assert list(outcome.seconds) == ["prepare", "network", "back", "read", "write"]
        assert all(second > 0 for second in outcome.seconds.values())
    assert [outcome.warnings for outcome in summary.outcomes] == [(), ("every voxel of the image is 0",)]


@pytest.mark.parametrize("previous", [False, True])
def test_a_raw_reading_holds_the_voxels_and_nothing_prepared(
    images: Path, monkeypatch: pytest.MonkeyPatch, previous: bool
) -> None:
    """With the labels of a previous stage and what was noted about them, where their file is named."""
    file = images / f"a_0000{END}"
    before = LabelImage(labels=np.ones((9, 14, 11), np.uint8), spacing=(1.1, 0.9, 1.2), geometry=cast("Any", None),
                        warnings=("another origin",))  # fmt: skip
    monkeypatch.setattr(worker_main, "_labels", lambda file, spec, image: before)
    request = Request(case="a", files=(file,), specs=(SECOND,), previous=file if previous else None, raw=True)
    reading = LocalWorker().submit(request).result()
    voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    np.testing.assert_array_equal(reading.image.data, voxels[None])
    assert reading.prepared == ()
    assert reading.previous is (before.labels if previous else None)
    assert reading.image.warnings == (("another origin",) if previous else ())
    assert set(reading.seconds) == {"read", "prepare"}
    assert reading.seconds["prepare"] == 0


# ---- memory


@dataclass
class Held:
    """Bytes of every case from when it is asked for to when it is written, and their sums whenever one is asked for."""

    plans: dict[str, CasePlan] = field(default_factory=dict)
    now: dict[str, int] = field(default_factory=dict)
    sums: list[int] = field(default_factory=list)

    def progress(self, case: str, stage: str, done: int, total: int) -> None:
        """A case that is written holds what that takes."""
        bytes_ = self.plans[case].bytes
        if stage == "write" and bytes_ is not None:
            self.now[case] = bytes_.writing


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Held:
    found = Held()
    plan, submit, write = Planner.plan, Workers.submit, writing.write_case

    def planned(self: Planner, case: str, header: Any, files: int) -> CasePlan:
        found.plans[case] = plan(self, case, header, files)
        return found.plans[case]

    def submitted(self: Workers, request: Request) -> Future[Reading]:
        bytes_ = found.plans[request.case].bytes
        found.now[request.case] = 0 if bytes_ is None else bytes_.alone
        found.sums.append(sum(found.now.values()))
        return submit(self, request)

    def written(prediction: Any, place: Any, targets: Any, spec: Any) -> None:
        write(prediction, place, targets, spec)
        del found.now[targets.segmentation.name.removesuffix(END)]

    monkeypatch.setattr(Planner, "plan", planned)
    monkeypatch.setattr(Workers, "submit", submitted)
    monkeypatch.setattr(flow, "write_case", written)
    return found


def test_there_are_at_most_as_many_cases_ahead_as_there_are_gpus(
    bundles: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both GPUs hold their first case until two more are asked for and the next has to wait."""
    images = write_cases(tmp_path / "images", *"abcdefgh")
    asked, taken = list[str](), list[str]()
    four = threading.Event()
    submit, has_place = Workers.submit, CaseQueue._has_place

    def submitted(self: Workers, request: Request) -> Future[Reading]:
        asked.append(request.case)
        assert len(asked) - len(taken) <= 2
        return submit(self, request)

    def looked(self: CaseQueue) -> bool:
        found = has_place(self)
        if not found and len(asked) == 4:
            four.set()
        return found

    diary.before = lambda device, number: _is_set(four)
    monkeypatch.setattr(Workers, "submit", submitted)
    monkeypatch.setattr(CaseQueue, "_has_place", looked)
    events = Events(case_started=lambda plan: taken.append(plan.case))
    summary = predict_cases(config(bundles, images, tmp_path / "out"), events)
    assert states(summary) == dict.fromkeys("abcdefgh", "done")
    assert asked == list("abcdefgh")
    assert sorted(taken) == asked


@pytest.mark.parametrize("most", [1, 2, 3])
def test_no_more_cases_are_in_flight_than_memory_holds(
    bundles: Path, tmp_path: Path, diary: Diary, held: Held, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """The limit is that of `most` cases; the first goes on once so many are asked for."""
    images, started = write_cases(tmp_path / "images", *"abcdefgh"), list[CasePlan]()
    enough = threading.Event()
    submit, fits = Workers.submit, CaseQueue._fits
    limits: list[int] = []

    def submitted(self: Workers, request: Request) -> Future[Reading]:
        future = submit(self, request)
        if len(held.sums) == most:
            enough.set()
        return future

    def limited(self: CaseQueue, plan: CasePlan) -> bool:
        assert plan.bytes is not None
        limits.append(self._planner.base + most * plan.bytes.alone)
        self._planner = replace(self._planner, limit=limits[0])
        return fits(self, plan)

    diary.before = lambda device, number: _is_set(enough)
    monkeypatch.setattr(Workers, "submit", submitted)
    monkeypatch.setattr(CaseQueue, "_fits", limited)
    events = Events(case_started=started.append, case_progress=held.progress)
    summary = predict_cases(config(bundles, images, tmp_path / "out"), events)
    assert states(summary) == dict.fromkeys("abcdefgh", "done")
    alone = held.plans["a"].bytes
    assert alone is not None
    assert max(held.sums) == most * alone.alone, "as many as fit, and no more"
    assert all(one.peak is not None and one.peak <= limits[0] for one in started)
    assert "a" not in [outcome.case for outcome in summary.outcomes if outcome.adapted]
    assert {words for outcome in summary.outcomes for words in outcome.adapted} <= {WAITED}


def test_a_case_of_unknown_size_goes_alone(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Planner.plan
    alone: list[set[str]] = []

    def planned(self: Planner, case: str, header: Any, files: int) -> CasePlan:
        return plan(self, case, None if case == "c" else header, files)

    def started(one: CasePlan) -> None:
        if one.case == "c":
            assert one.peak is None
            alone.append(set(held.now))

    monkeypatch.setattr(Planner, "plan", planned)
    summary = predict_cases(config(bundles, images, tmp_path / "out"), Events(case_started=started))
    assert states(summary) == dict.fromkeys("abcde", "done")
    assert alone == [{"c"}]


def test_the_engines_of_every_gpu_count(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engines of GPU 1 will take more than the limit on the host, those of GPU 0 nothing."""
    growth = {0: 0, 1: 1 << 50}
    monkeypatch.setattr(cases_module, "host_growth", lambda predictor: growth[predictor.device])
    base = config(bundles, images, tmp_path / "out", max_memory=1 << 45)
    assert set(states(predict_cases(base)).values()) == {"failed"}
    growth[1] = 0
    assert set(states(predict_cases(base)).values()) == {"done"}


def plan_of(case: str, size: int) -> CasePlan:
    bytes_ = CaseBytes(preparing=size, network=size, writing=1)
    return CasePlan(case=case, settings=Settings(), bytes=bytes_, peak=None)


def put(queue: CaseQueue, plan: CasePlan, *, read: bool = True) -> Future[Reading]:
    """A case that has been read, or is being read."""
    reading: Future[Reading] = Future()
    if read:
        reading.set_result(cast("Reading", None))
    queue.put(Ahead(case=cast("Any", SimpleNamespace(id=plan.case)), plan=plan, request=cast("Any", None)), reading)
    return reading


def test_the_memory_of_a_case_shrinks_with_its_steps() -> None:
    """60 of 100 are free beside a until it is written; b needs 99, waits for that, and fits then."""
    looked = threading.Event()

    class Memory:
        base = 0

        @property
        def limit(self) -> int:
            looked.set()
            return 100

    queue = CaseQueue(cast("Planner", Memory()), gpus=2, ahead=True)
    first = queue.admit(plan_of("a", 40))
    assert first is not None
    assert first.adapted == ()
    put(queue, first)
    taken = queue.take()
    assert taken is not None
    assert taken.ahead.plan.peak == 40
    later = taken.ahead.plan.bytes

    def written() -> None:
        if looked.wait(PATIENCE):  # the other thread has seen that b does not fit, and holds the lock until it waits
            queue.writes("a", later)

    thread = threading.Thread(target=written)
    thread.start()
    second = queue.admit(plan_of("b", 99))
    thread.join()
    assert second is not None
    assert second.adapted == (WAITED,)
    put(queue, second)
    taken = queue.take()
    assert taken is not None
    assert taken.ahead.plan.peak == 100


def test_no_gpu_waits_for_a_case_that_is_still_being_read_while_another_is_ready() -> None:
    queue = CaseQueue(cast("Planner", SimpleNamespace(base=0, limit=None)), gpus=2, ahead=True)
    slow = put(queue, plan_of("a", 1), read=False)
    put(queue, plan_of("b", 1))
    queue.close()
    order = []
    for reading in (None, slow):
        if reading is not None:
            reading.set_result(cast("Reading", None))
        taken = queue.take()
        assert taken is not None
        order.append(taken.ahead.plan.case)
    assert order == ["b", "a"]
    assert queue.take() is None


def test_a_queue_that_is_stopped_gives_nothing_and_takes_nothing() -> None:
    queue = CaseQueue(cast("Planner", SimpleNamespace(base=0, limit=None)), gpus=1, ahead=True)
    put(queue, plan_of("a", 1))
    first = ValueError("first")
    queue.stop(first)
    queue.stop(ValueError("second"))
    assert queue.error is first
    assert queue.take() is None
    assert queue.admit(plan_of("b", 1)) is None


# ---- faults


@pytest.mark.parametrize("error", [NonFinite, InputError, MemoryError])
def test_what_fails_a_case_on_one_gpu_fails_no_other(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, expected: dict[str, bytes], error: type[Exception]
) -> None:
    """Whoever comes first fails its case, which is a or b."""
    first = threading.Lock()

    def before(device: int, number: int) -> None:
        if first.acquire(blocking=False):
            raise error("this case is bad")

    diary.before = before
    summary = predict_cases(config(bundles, images, tmp_path / "out"))
    (failed,) = summary.failed
    assert "this case is bad" in str(failed.error)
    assert [outcome.case for outcome in summary.outcomes] == list("abcde")
    assert contents(tmp_path / "out") == {n: b for n, b in expected.items() if n != f"{failed.case}{END}"}


@pytest.mark.parametrize("broken", [0, 1])
def test_a_broken_engine_ends_the_run_and_its_gpu_is_named(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes], broken: int,
) -> None:  # fmt: skip
    """Both have a case by then; the one of the GPU that works is stopped at its next progress."""
    out, both, stopped = tmp_path / "out", threading.Barrier(2), threading.Event()
    stop = CaseQueue.stop

    def stopping(self: CaseQueue, error: BaseException) -> None:
        stop(self, error)
        stopped.set()

    def before(device: int, number: int) -> None:
        both.wait(PATIENCE)
        if device == broken:
            raise EngineError("The GPU failed.", got="illegal address", where="a card", hint="reset it")
        assert stopped.wait(PATIENCE)

    diary.before = before
    monkeypatch.setattr(CaseQueue, "stop", stopping)
    with pytest.raises(EngineError) as caught:
        predict_cases(config(bundles, images, out))
    assert caught.value.where == f"GPU {broken}: a card"
    assert (caught.value.what, caught.value.got, caught.value.hint) == (
        "The GPU failed.",
        "illegal address",
        "reset it",
    )
    assert isinstance(caught.value.__cause__, EngineError)
    assert not [name for name in contents(out) if name.endswith(END)]
    diary.before = lambda device, number: None
    check_stopped(out, expected, config(bundles, images, out))


def test_a_bug_is_raised_as_it_is(bundles: Path, images: Path, tmp_path: Path, diary: Diary) -> None:
    bug = ValueError("a bug")

    def before(device: int, number: int) -> None:
        raise bug

    diary.before = before
    with pytest.raises(ValueError, match="a bug") as caught:
        predict_cases(config(bundles, images, tmp_path / "out"))
    assert caught.value is bug


@pytest.mark.parametrize("preparing", [0, 1])
@pytest.mark.parametrize("ticks", [1, 9, 20])
def test_a_callback_that_says_stop_ends_all_gpus(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, expected: dict[str, bytes], ticks: int, preparing: int
) -> None:
    left = ticks

    def progress(stage: str, done: int, total: int) -> bool:
        nonlocal left
        left -= 1
        return left > 0

    base = config(bundles, images, tmp_path / "out", preparing=preparing)
    with pytest.raises(Cancelled):
        predict_cases(base, Events(progress=progress))
    check_stopped(tmp_path / "out", expected, base)


@pytest.mark.parametrize("how", ["case_started", "progress", "case_progress", "case_ended"])
def test_an_interrupt_in_any_callback_ends_the_run(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, expected: dict[str, bytes], how: str
) -> None:
    """`progress` raises it in the thread of a GPU, where Ctrl-C was lost before; a case's end in one that writes."""

    def interrupted(*values: Any) -> None:
        raise KeyboardInterrupt

    base = config(bundles, images, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        predict_cases(base, Events(**{how: interrupted}))
    check_stopped(tmp_path / "out", expected, base)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal for one thread")
def test_ctrl_c_while_the_gpus_work_ends_them_all(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes],
) -> None:  # fmt: skip
    """The signal comes to the main thread, which waits; both GPUs have a case. With processes, as the user has it."""
    monkeypatch.setattr(cases_module, "open_workers", open_workers)
    both, stopped = threading.Barrier(2), threading.Event()
    stop, main = CaseQueue.stop, threading.main_thread().ident

    def stopping(self: CaseQueue, error: BaseException) -> None:
        stop(self, error)
        stopped.set()

    def before(device: int, number: int) -> None:
        if both.wait(PATIENCE) == 0:
            signal.pthread_kill(main or 0, signal.SIGINT)
        assert stopped.wait(PATIENCE)

    diary.before = before
    monkeypatch.setattr(CaseQueue, "stop", stopping)
    base = config(bundles, images, tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        predict_cases(base)
    diary.before = lambda device, number: None
    check_stopped(tmp_path / "out", expected, base)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no signal for one thread")
def test_what_the_gpus_use_outlives_them_however_often_ctrl_c_comes() -> None:
    """A thread goes on through three, each once the one before has been heard, and is waited for."""
    main, heard, over, ended = threading.main_thread().ident or 0, threading.Semaphore(0), threading.Event(), [False]

    def note(number: int, frame: Any) -> None:
        if not over.is_set():
            raise KeyboardInterrupt

    def work() -> None:
        for _ in range(3):
            signal.pthread_kill(main, signal.SIGINT)
            while not heard.acquire(timeout=0.1):  # one that comes just before a thread begins to wait is not seen
                if over.is_set():
                    return
                signal.pthread_kill(main, signal.SIGINT)
        over.set()
        ended[0] = True

    def interrupted() -> None:
        with at_once([work], lambda error: heard.release()):
            threading.Event().wait(PATIENCE)

    before = signal.signal(signal.SIGINT, note)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert ended == [True]
    finally:
        over.set()
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_the_threads_are_started_lets_none_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes when the second has been started and nobody has been told."""
    submit, begun, stopped = ThreadPoolExecutor.submit, list[int](), list[BaseException]()
    calls = iter((False, True))

    def submitted(self: ThreadPoolExecutor, *arguments: Any) -> Future[Any]:
        future = submit(self, *arguments)
        if next(calls):
            raise KeyboardInterrupt
        return future

    monkeypatch.setattr(ThreadPoolExecutor, "submit", submitted)
    with (
        pytest.raises(KeyboardInterrupt),
        at_once([partial(begun.append, 0), partial(begun.append, 1)], stopped.append),
    ):
        pytest.fail("the block runs without its threads")
    assert begun == []
    assert len(stopped) == 1


DEADLY = """
import os, signal
from trtbuild.volume import io

named = io.reader_named

class Deadly:
    def __init__(self, reader):
        self.reader = reader
    def __getattr__(self, name):
        return getattr(self.reader, name)
    def read_image(self, files, channels):
        if files[0].name[0] in "ac":
            os.kill(os.getpid(), signal.SIGKILL)
        return self.reader.read_image(files, channels)

io.reader_named = lambda name: Deadly(named(name))
"""
"""A start-up file of the processes that read: they die over the cases a and c, whose headers they can read."""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_process_that_dies_while_the_gpus_wait_for_it_fails_its_own_case(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes],
) -> None:  # fmt: skip
    monkeypatch.setattr(cases_module, "open_workers", open_workers)
    (tmp_path / "sitecustomize.py").write_text(DEADLY)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])]))
    summary = predict_cases(config(bundles, images, tmp_path / "out"))
    assert states(summary) == dict.fromkeys("abcde", "done") | dict.fromkeys("ac", "failed")
    assert all("SIGKILL while reading" in str(outcome.error) for outcome in summary.failed)
    assert contents(tmp_path / "out") == {n: b for n, b in expected.items() if n[0] not in "ac" or n[1:] != END}


@pytest.mark.parametrize("beside", [0, 1])
def test_a_full_disk_ends_the_run_with_whole_files_only(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, bytes], beside: int,
) -> None:  # fmt: skip
    replace_file = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == f"c{END}":
            raise OSError(errno.ENOSPC, "No space left on device", str(source))
        replace_file(source, target)

    base = config(bundles, images, tmp_path / "out", writing=beside)
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", full)
        with pytest.raises(OutputError, match="free some space"):
            predict_cases(base)
    check_stopped(tmp_path / "out", expected, base)


def test_a_write_that_fails_stops_the_networks_that_run(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first case is written while both GPUs have another, which go on when they are told to stop."""
    first, stopped = threading.Lock(), threading.Event()
    stop = CaseQueue.stop

    def stopping(self: CaseQueue, error: BaseException) -> None:
        stop(self, error)
        stopped.set()

    def before(device: int, number: int) -> None:
        assert first.acquire(blocking=False) or stopped.wait(PATIENCE), "the run did not stop"

    def full(*values: Any) -> None:
        raise OutputError("A file cannot be written.")

    diary.before = before
    monkeypatch.setattr(CaseQueue, "stop", stopping)
    monkeypatch.setattr(flow, "write_case", full)
    with pytest.raises(OutputError):
        predict_cases(config(bundles, images, tmp_path / "out"))
    assert not [name for name in contents(tmp_path / "out") if name.endswith(END)]


# ---- what cannot be run on several GPUs


def test_engines_of_a_cpu_do_not_go_over_gpus(bundles: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="several GPUs") as caught:
        predict_cases(config(bundles, images, tmp_path / "out"))
    assert "null" in str(caught.value.got)
    assert "--devices" in str(caught.value.hint)


def test_gpus_that_would_run_other_engines_are_refused(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPU 1 computes in another precision, so that outputs would depend on who takes a case."""
    real = opened._engines
    monkeypatch.setattr(opened, "_engines", lambda p: ["null 0 in f16"] if cast("FakeGpu", p).device == 1 else real(p))
    with ExitStack() as stack, pytest.raises(EngineError, match="same engines") as caught:
        opened_predictors(config(bundles, images, tmp_path / "out"), stack)
    assert caught.value.where == "GPU 1"


def test_gpus_of_two_kinds_are_refused(
    bundles: Path, images: Path, tmp_path: Path, diary: Diary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same engine may round in another way on another card."""
    on_gpu = vars(opened)["open_predictor"]

    def on_card(paths: Any, *, device: int = 0, **more: Any) -> Predictor:
        predictor: Predictor = on_gpu(paths, device=device, **more)
        for runner in predictor.models[0].stages[0].runners:
            info = replace(runner.describe(), device=f"card {device // 2}")
            monkeypatch.setattr(runner, "describe", lambda info=info: info)
        return predictor

    monkeypatch.setattr(opened, "open_predictor", on_card)
    with ExitStack() as stack:
        opened_predictors(config(bundles, images, tmp_path / "out", devices=(2, 3)), stack)
        with pytest.raises(EngineError, match="same engines") as caught:
            opened_predictors(config(bundles, images, tmp_path / "out", devices=(1, 2)), stack)
    assert caught.value.where == "GPU 2"
    assert "card 0" in str(caught.value.expected)
    assert "card 1" in str(caught.value.got)


# ---- several processes that read


def test_processes_share_the_reading_and_keep_their_cases(images: Path) -> None:
    """The two first cases go to different processes; a second stage is prepared where its image lies."""
    asked: dict[int, list[str]] = {0: [], 1: []}
    futures: list[Future[Any]] = []

    class Recorded(Worker):
        def __init__(self, number: int) -> None:
            self.number = number

        def note(self, what: str) -> Future[Any]:
            asked[self.number].append(what)
            futures.append(Future())
            return futures[-1]

        def look(self, request: Request) -> Future[Any]:
            return self.note(f"look {request.case}")

        def submit(self, request: Request) -> Future[Any]:
            return self.note(f"read {request.case}")

        def second(self, case: str, spec: Any, segmentation: Any) -> Future[Any]:
            return self.note(f"second {case}")

        def forget(self, case: str) -> None:
            asked[self.number].append(f"forget {case}")

        def warm(self, specs: Any) -> Future[Any]:
            return self.note("warm")

    workers = Workers([Recorded(0), Recorded(1)])
    first, second, third = (Request(case=name, files=(images,), specs=(FIRST,)) for name in "abc")
    workers.submit(first)
    workers.submit(second)
    futures[1].set_result(None)
    workers.look(third)
    workers.second("b", SECOND, np.zeros((1, 1, 1), np.uint8))
    futures[0].set_result(None)
    workers.submit(third)
    for case in "abbc":
        workers.forget(case)
    assert asked == {0: ["read a", "read c", "forget a", "forget c"], 1: ["read b", "look c", "second b", "forget b"]}
    with pytest.raises(KeyError):
        workers.second("a", SECOND, np.zeros((1, 1, 1), np.uint8))


def test_all_processes_are_warm_before_the_memory_is_measured() -> None:
    futures: list[Future[None]] = []

    def warm(specs: Any) -> Future[None]:
        futures.append(Future())
        return futures[-1]

    workers = Workers(cast("Any", [SimpleNamespace(warm=warm, pids=(n,)) for n in (7, 8)]))
    assert workers.pids == (7, 8)
    done = workers.warm([FIRST])
    futures[1].set_result(None)
    assert not done.done()
    futures[0].set_exception(TrtbuildError("no library"))
    with pytest.raises(TrtbuildError, match="no library"):
        done.result()
