"""The benchmarks for GPUs, as far as they are proven without one: tables, order, what is launched, and what is said."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_cuda import CUBIN
from gpu_places import fake_place

from trtbuild.nvinfer import no_driver
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu

REPOSITORY = Path(__file__).resolve().parent.parent
GPU = REPOSITORY / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

import beside_nnunet  # noqa: E402
import events  # noqa: E402
import gpu_tests  # noqa: E402
import kernel_jobs  # noqa: E402
import kernels  # noqa: E402
import machine  # noqa: E402
import measure  # noqa: E402
import share  # noqa: E402
import targets  # noqa: E402
import ways  # noqa: E402
from card import peak_used  # noqa: E402
from interleaved import Times, abba  # noqa: E402
from random_model import RandomModel, write_model  # noqa: E402
from torch_engine import TorchEngine  # noqa: E402
from verdicts import Row, markdown, record, row_from_json  # noqa: E402

MARKED = re.compile(r"pytest\.mark\.gpu|\bfrom gpu_places import\b.*\b(BOTH|REAL)\b")
MACHINE = {
    "gpu": "Test GPU", "capability": "8.6", "driver": "13.0", "cpu": "CPU", "processors": 2, "date": "2026-01-01",
    "commit": "abc", "python": "3.11", "versions": {"trtbuild": "0.1.0"},
}  # fmt: skip


# --- targets and the table


@pytest.mark.parametrize(
    ("value", "limit", "at_least", "verdict"),
    [
        (70.0, 70.0, True, "met"),
        (69.9, 70.0, True, "missed"),
        (5.0, 5.0, False, "met"),
        (5.1, 5.0, False, "missed"),
        (float("nan"), 5.0, False, "missed"),
        (float("nan"), 5.0, True, "missed"),
        (1.0, None, True, "recorded"),
        (None, 5.0, True, "not run"),
        (None, None, True, "not run"),
    ],
)
def test_a_number_is_judged_by_its_target(
    value: float | None, limit: float | None, at_least: bool, verdict: str
) -> None:
    assert Row(part="p", name="n", value=value, limit=limit, at_least=at_least).verdict == verdict


def test_the_table_has_every_row_with_its_target_and_why_it_was_not_run() -> None:
    rows = [
        Row(part="kernels", name="gather f32", value=81.25, unit="%", limit=70.0),
        Row(part="share", name="outside the network", value=7.0, unit="%", limit=5.0, at_least=False),
        Row(part="beside nnU-Net", name="times faster, 105 classes", value=12.34, unit="x", limit=10.0),
        Row(part="sanitizer", name="memcheck", value=None, limit=0, note="not on the | PATH\nat all"),
    ]
    table = markdown(rows, MACHINE, "How.")
    assert "| kernels | gather f32 | 81.2 % | >= 70.0 % | met |  |" in table
    assert "| share | outside the network | 7.0 % | <= 5.0 % | missed |  |" in table
    assert "| beside nnU-Net | times faster, 105 classes | 12.34 x | >= 10 x | met |  |" in table
    assert "| sanitizer | memcheck |  | >= 0 | not run | not on the / PATH at all |" in table
    assert "Targets: 2 met, 1 missed, 1 not run." in table
    assert "Test GPU, compute capability 8.6" in table


def test_a_row_comes_back_from_its_record() -> None:
    row = Row(part="p", name="n", value=None, unit="%", limit=3.0, at_least=False, note="why")
    line = json.loads(json.dumps(record(row)))
    assert line["verdict"] == "not run"
    assert row_from_json(line) == row


# --- order


def test_the_contenders_take_turns_as_abba() -> None:
    order: list[str] = []
    clock = count(1)

    def contender(name: str) -> Any:
        def run() -> float:
            order.append(name)
            return float(next(clock))

        return run

    times = abba(contender("A"), contender("B"), 2)
    assert "".join(order) == "ABBAABBA"
    assert (times.ours, times.theirs) == ((1, 4, 5, 8), (2, 3, 6, 7))


def test_the_ratio_is_the_median_of_the_pairs() -> None:
    times = Times(ours=(1.0, 1.0, 2.0), theirs=(3.0, 50.0, 8.0))
    assert times.ratio == 4.0
    assert "3.00 to 50.00 over 3 pairs" in times.text


# --- kernels


class Marks:
    """Stands for `Events`: each mark is a tenth of a second after the one before; the work is waited for."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.now = gpu, count()

    def mark(self) -> int:
        self.gpu.stream.synchronize()
        return next(self.now)

    def seconds(self, first: int, last: int) -> float:
        return (last - first) / 10

    def forget(self) -> None:
        pass


SMALL = kernel_jobs.Sizes(patch=(6, 5, 7), grid=(8, 10, 9), heads=(3, 14), batch=2, copy=1 << 12, repeats=2)


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with fake_place(), opened_device() as device, opened_gpu(device, CUBIN, 1 << 16) as opened:
        yield opened


@pytest.mark.parametrize("job", list(kernel_jobs.jobs(SMALL)), ids=lambda job: job.name)
def test_every_kernel_runs_inside_its_arrays_and_moves_what_is_counted(gpu: Gpu, job: kernel_jobs.Job) -> None:
    """The fake GPU ends the work at a wrong address."""
    found = kernels.bandwidth(gpu, Marks(gpu), job, lambda: None, 2)
    assert found == pytest.approx(job.nbytes / 0.1)
    large = sorted((array if isinstance(array, int) else array.nbytes for array in job.arrays), reverse=True)[:2]
    assert min(large) < job.nbytes <= 3 * max(large)


def test_all_kernels_of_the_issue_are_measured() -> None:
    names = [job.name for job in kernel_jobs.jobs(kernel_jobs.Sizes())]
    assert names[:2] == ["gather f32", "gather f16"]
    for heads in (3, 14, 105):
        assert f"labels, {heads} classes" in names
        assert f"blend f32 into f32, {heads} classes" in names
        assert f"blend f16 into f16, {heads} classes" in names
    assert names[-3:] == [f"resize along {axis}" for axis in "zyx"]


def test_kernels_are_a_share_of_the_copy(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    zeroed: list[int] = []
    zero, repeated = gpu.stream.zero, kernels.repeated

    def counted_zero(buffer: Any, nbytes: int) -> None:
        zeroed.append(nbytes)
        zero(buffer, nbytes)

    def watched(marks: Any, work: Any, before: Any, repeats: int) -> Any:
        zeroed.clear()
        before()
        assert zeroed == [SMALL.copy], "what fills the cache and keeps the GPU busy"
        return repeated(marks, work, before, repeats)

    monkeypatch.setattr(kernels, "copy_bandwidth", lambda *arguments: 1e5)
    monkeypatch.setattr(kernels, "repeated", watched)
    monkeypatch.setattr(gpu.stream, "zero", counted_zero)
    rows = list(kernels.rows_of_kernels(gpu, Marks(gpu), SMALL))
    assert (rows[0].name, rows[0].value, rows[0].unit) == ("copy within the card", 1e-4, "GB/s")
    gather = rows[1]
    assert gather.value == pytest.approx(100 * (2 * 210 * 8 / 0.1) / 1e5)
    assert all((row.limit, row.at_least) == (70.0, True) for row in rows[1:])
    assert rows[-1].name == "slowest kernel"
    assert (rows[-1].value, rows[-1].note) == min((row.value, row.name) for row in rows[1:-1])


def test_time_is_that_between_events_on_the_stream(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the fake GPU's events, which must be freed where a context is current; each is a millisecond later."""
    cuda, order = gpu.device.cuda, list[Any]()
    before = cuda.events

    def record(self: Any, stream: Any) -> None:
        plain(self, stream)
        order.append(id(self))

    plain = cuda.Event.record
    monkeypatch.setattr(cuda.Event, "record", record)
    monkeypatch.setattr(
        cuda.Event,
        "time_till",
        lambda self, other: float(order.index(id(other)) - order.index(id(self))),
        raising=False,
    )
    found = events.Events(gpu)
    first, _, last = found.mark(), found.mark(), found.mark()
    assert found.seconds(first, last) == pytest.approx(0.002)
    found.forget()
    assert cuda.events == before
    order.clear()
    calls: list[str] = []
    times = events.repeated(found, lambda: calls.append("work"), lambda: calls.append("before"), 3)
    assert times == pytest.approx([0.001] * 3), "between the marks beside the work"
    assert calls == ["before", "work"] * 5, "two warm-ups"
    assert cuda.events == before


def test_the_copy_counts_bytes_that_are_read_and_written(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []

    def memcpy_dtod_async(dest: int, src: int, size: int, stream: Any = None) -> None:
        cuda.at(dest, size), cuda.at(src, size)
        copies.append(size)
        assert stream.queue is not None

    cuda = gpu.device.cuda
    monkeypatch.setattr(cuda, "memcpy_dtod_async", memcpy_dtod_async, raising=False)
    assert kernels.copy_bandwidth(gpu, Marks(gpu), 4096, lambda: None, 3) == pytest.approx(2 * 4096 / 0.1)
    assert copies == [4096] * 5


# --- share


def test_the_networks_time_is_that_of_its_calls(gpu: Gpu) -> None:
    class Engine:
        calls = 0

        def enqueue(self, source: int, target: int, stream: int, batch: int) -> None:
            self.calls += 1

    engine = Engine()
    runner = events.TimedRunner(engine, Marks(gpu))
    for _ in range(3):
        runner.enqueue(1, 2, 3, 4)
    assert engine.calls == 3
    assert runner.taken() == pytest.approx(0.3)
    assert runner.taken() == 0


def test_the_share_outside_the_network_leaves_warm_ups_out() -> None:
    walls, networks = iter([9.0, 9.0, 2.0, 2.0, 1.0]), iter([1.0, 1.0, 1.9, 1.8, 0.5])
    runs = share.runs_of(lambda: next(walls), lambda: next(networks), 3)
    outside, case, network = share.rows_of_share(runs, "torch")
    assert outside.value == pytest.approx(10.0)
    assert (outside.verdict, outside.limit) == ("missed", 5.0)
    assert (case.value, network.value) == (2.0, 1.8)


# --- beside nnU-Net


@pytest.mark.parametrize(
    ("engine", "classes", "ratio", "verdict"),
    [
        ("torch", 3, 1.3, "met"), ("torch", 3, 1.29, "missed"), ("torch", 105, 4.9, "missed"),
        ("tensorrt", 14, 2.9, "missed"), ("tensorrt", 105, 10.0, "met"), ("tensorrt-rtx", 3, 3.0, "met"),
    ],
)  # fmt: skip
def test_the_target_depends_on_engine_and_classes(engine: str, classes: int, ratio: float, verdict: str) -> None:
    case = beside_nnunet.Case(classes=classes, model=Path("m"), bundle=None, work=Path("w"))
    times = Times(ours=(1.0,), theirs=(ratio,))
    assert beside_nnunet.rows_of_times(case, times, engine, 99.0)[0].verdict == verdict


def test_memory_may_be_as_much_as_theirs() -> None:
    case = beside_nnunet.Case(classes=3, model=Path("m"), bundle=None, work=Path("w"))
    assert beside_nnunet.row_of_memory(case, 100, 100, "torch").verdict == "met"
    assert beside_nnunet.row_of_memory(case, 101, 100, "torch").verdict == "missed"


ECHO = """
import json, sys
print(json.dumps({"ready": 7}), flush=True)
for number, _ in enumerate(sys.stdin):
    print(json.dumps({"seconds": number + float(sys.argv[1])}), flush=True)
"""


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> beside_nnunet.Case:
    starts = {"trtbuild": "0.25", "nnunet": "0.5"}
    monkeypatch.setattr(
        beside_nnunet.Case, "command", lambda self, who: [sys.executable, "-c", ECHO, starts[who]]
    )  # what a contender says, without what it does
    return beside_nnunet.Case(classes=3, model=tmp_path, bundle=None, work=tmp_path)


def test_contenders_run_when_they_are_told_to(case: beside_nnunet.Case) -> None:
    times = beside_nnunet.times_of(case, 1)
    assert (times.ours, times.theirs) == ((0.25, 1.25), (0.5, 1.5))


def test_a_contender_that_ends_is_told_with_its_words(
    case: beside_nnunet.Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('no such card')"]
    monkeypatch.setattr(beside_nnunet.Case, "command", lambda self, who: command)
    with pytest.raises(RuntimeError, match="no such card"):
        beside_nnunet.times_of(case, 1)


def test_memory_is_the_peak_above_what_others_take(case: beside_nnunet.Case) -> None:
    class Card:
        values = iter([100, 100, 130, 180])

        def used(self) -> int:
            return next(self.values, 150)

    assert beside_nnunet.memory_of(case, "trtbuild", Card()) == 80
    with peak_used(Card()) as peak:
        pass
    assert peak.used == 150


def test_a_card_without_nvml_is_told() -> None:
    if no_driver() is None:
        pytest.skip("there is a driver")
    assert str(beside_nnunet.opened_card()).startswith("NVML: ")


# --- the engine of torch


def test_both_ways_give_the_same_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nnU-Net on the CPU beside the device path on the fake GPU with the same network in float32."""
    model = write_model(RandomModel(classes=3, patch=(16, 16, 16), spacing=(1.0,) * 3, features=(4, 8)), tmp_path)
    image = ways.body((20, 30, 26), (1.2, 0.8, 1.0))
    expected = ways.nnunet_labels(ways.nnunet_predictor(model, "cpu"), image)
    assert len(np.unique(expected)) > 1
    with fake_place() as cuda:
        monkeypatch.setattr(ways, "kernels_cubin", lambda capability: CUBIN)
        monkeypatch.setattr("torch_engine.on_gpu", lambda network, spec: OnFake(cuda).engine_of(network, spec))
        with ways.device_path(model, None) as path:
            found = path.predict(image)
    assert found.shape == expected.shape
    assert np.mean(found == expected) > 0.999, "nnU-Net adds in float16"


class OnFake:
    """What torch does on a GPU, on the fake one: its memory is the host's, and work runs when somebody waits for it."""

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda

    def at(self, address: int, shape: tuple[int, ...], kind: str) -> Any:
        import torch

        nbytes = int(np.prod(shape)) * np.dtype(kind).itemsize
        return torch.from_numpy(self.cuda.at(address, nbytes).view(kind).reshape(shape))

    def engine_of(self, network: Any, spec: Any) -> TorchEngine:
        cuda = self.cuda

        class Queued(TorchEngine):
            def enqueue(self, source: int, target: int, stream: int, batch: int) -> None:
                cuda.run_on(
                    stream, lambda: super(Queued, self).enqueue(source, target, stream, batch), {source, target}
                )

        return Queued(network.eval(), spec, self.at, lambda stream: nullcontext(), device="cpu")


# --- the command


def test_without_a_gpu_the_command_says_so_and_writes_nothing(tmp_path: Path) -> None:
    if no_driver() is None:
        pytest.skip("there is a driver")
    for options in ([], ["--check"], ["--only", "kernels"]):
        command = [sys.executable, str(GPU / "measure.py"), "--results", str(tmp_path / "results"), *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
        assert done.returncode == 1
        assert "this needs an NVIDIA GPU" in done.stderr or "no NVIDIA driver" in done.stderr
        assert done.stdout == ""
    assert not (tmp_path / "results").exists()


def junit(*cases: str) -> str:
    return f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"


def one(name: str, inside: str = "", file: str = "tests.test_gpu_runners") -> str:
    return f'<testcase classname="{file}" name="{name}">{inside}</testcase>'


FAILED, ERROR, SKIPPED = '<failure message="x"/>', '<error message="y"/>', '<skipped message="no TensorRT"/>'
CONTRACT = "failed: contract of ONNX Runtime's CUDA provider"


def row_of(report: str, name: str) -> Row:
    files = {file for file, _ in targets.TESTS}
    rows = gpu_tests.rows_of_tests(dict.fromkeys(files, report), dict.fromkeys(files, "exit code 5: no tests ran"))
    (row,) = [row for row in rows if row.name == name]
    return row


def test_a_group_of_tests_is_met_when_all_of_it_passed() -> None:
    row = row_of(junit(one("t[onnxruntime-cuda-f32]"), one("u[onnxruntime-cuda-f32]")), CONTRACT)
    assert (row.verdict, row.note) == ("met", "2 passed")


def test_a_test_that_failed_is_named() -> None:
    report = junit(
        one("t[onnxruntime-cuda-f32]", FAILED), one("u[onnxruntime-cuda-f32]", ERROR), one("v[tensorrt-f32]")
    )
    row = row_of(report, CONTRACT)
    assert (row.value, row.verdict) == (2, "missed")
    assert row.note == "t[onnxruntime-cuda-f32], u[onnxruntime-cuda-f32]"
    assert row_of(report, "failed: contract of TensorRT").verdict == "met"


def test_one_skipped_test_keeps_its_group_from_being_met() -> None:
    report = junit(one("t[tensorrt-f32]"), one("u[tensorrt-f32]", SKIPPED), one("v[tensorrt-rtx-f32]"))
    row = row_of(report, "failed: contract of TensorRT")
    assert (row.verdict, row.note) == ("not run", "1 passed; 1 skipped: no TensorRT")
    assert row_of(report, "failed: contract of TensorRT-RTX").verdict == "met"
    assert row_of(report, CONTRACT).note == "exit code 5: no tests ran"


def test_a_process_that_ends_leaves_its_file_not_run_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files: list[str] = []

    def run(command: list[str]) -> Any:
        files.append(command[-1])
        if command[-1] == "tests/test_gpu_cases.py":
            return subprocess.CompletedProcess(command, -11, stdout="", stderr="Fatal Python error")
        (tmp_path / f"{Path(command[-1]).stem}.xml").write_text(junit(one("t[onnxruntime-cuda-f32]")))
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(measure, "_run", run)
    rows = {row.name: row for row in measure.tests_part(tmp_path)}
    assert rows["failed: parity with nnU-Net, float32 engine"].note == "exit code -11: Fatal Python error"
    assert rows[CONTRACT].verdict == "met"
    assert sorted(files) == sorted({f"tests/{file}.py" for file, _ in targets.TESTS}), "each once"


@pytest.mark.parametrize(
    ("error", "note"),
    [
        ("E   ModuleNotFoundError: No module named 'SimpleITK'", "SimpleITK is not installed"),
        ("x = 1\nE   trtbuild.errors.EngineError: OpenVINO cannot be loaded.\nE     got: No module named 'openvino'\n"
         "E     next: pip install openvino", "openvino is not installed"),
        ("E   SyntaxError: invalid syntax", "SyntaxError: invalid syntax"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_was_not_run(error: str, note: str) -> None:
    inside = f'<error message="collection failure">{error}</error>'
    report = junit(
        f'<testcase classname="" name="tests.test_gpu_cases">{inside}</testcase>', one("t[onnxruntime-cuda-")
    )
    row = row_of(report, "failed: parity with nnU-Net, float32 engine")
    assert (row.verdict, row.note) == ("not run", note)
    assert row_of(report, CONTRACT).verdict == "met"


def test_every_file_with_tests_for_a_gpu_is_in_the_table() -> None:
    found = {path.stem for path in (REPOSITORY / "tests").glob("test_*.py") if MARKED.search(path.read_text())}
    assert found == {file for file, _ in targets.TESTS}


def test_every_group_of_a_file_has_tests(tmp_path: Path) -> None:
    if no_driver() is None:
        pytest.skip("they would run")
    groups = {file: [part for name, part in targets.TESTS if name == file] for file, part in targets.TESTS if part}
    for file, parts in groups.items():
        _, report = measure._pytest([], file, tmp_path / f"{file}.xml")
        for part in parts:
            found = gpu_tests.counted(report, file, part)
            assert not found.passed
            assert set(found.skipped) == {f"GPU engines cannot run here: {no_driver()}."}


# --- what is missing


def test_every_target_of_a_part_is_there_when_nothing_was_measured() -> None:
    names = {part: [row.name for row in targets.with_missing(part, [], "why")] for part in measure.PARTS}
    assert all(names.values())
    assert names["beside_nnunet"] == [
        *(f"times faster, {n} classes" for n in (3, 14, 105)), *(f"device memory, {n} classes" for n in (3, 14, 105))
    ]  # fmt: skip
    assert names["share"] == ["outside the network"]
    assert names["kernels"] == ["slowest kernel"]
    rows = [row for part in measure.PARTS for row in targets.with_missing(part, [], "why")]
    assert {(row.verdict, row.note) for row in rows} == {("not run", "why")}
    assert all(row.limit is not None for row in rows)


def test_a_target_with_a_number_is_not_named_again() -> None:
    measured = Row(part="share", name="outside the network", value=3.0, unit="%", limit=5.0, at_least=False)
    assert targets.with_missing("share", [measured], "why") == [measured]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("Traceback ...\nModuleNotFoundError: No module named 'nnunetv2.inference'\n", "nnunetv2 is not installed"),
        ("No module named 'tensorrt'\nRuntimeError: the card fell off", "exit code 1: No module named 'tensorrt' Run"),
        ("", "exit code 1: "),
    ],
)
def test_a_missing_package_is_the_reason_only_where_it_ended_the_process(said: str, reason: str) -> None:
    assert targets.reason_of(1, said).startswith(reason)


def test_without_nnunet_its_targets_are_not_run_and_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real script, in a process that cannot import nnU-Net."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Without:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'nnunetv2':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Without())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows = measure.PARTS["beside_nnunet"](tmp_path)
    assert len(rows) == 6
    assert {(row.verdict, row.note) for row in rows} == {("not run", "nnunetv2 is not installed")}


def test_versions_are_those_of_what_is_installed() -> None:
    assert machine.versions(("numpy", "no-such-package")) == {"numpy": np.__version__}


def test_a_part_that_hangs_does_not_keep_the_table_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "share.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(measure, "HERE", tmp_path)
    monkeypatch.setattr(measure, "LIMIT", 0.5)
    (row,) = measure.script_part("share")(tmp_path)
    assert row.verdict == "not run"
    assert "not ready after 0.5 s" in row.note


def test_a_part_that_fails_is_a_row_with_its_words_beside_what_it_measured(tmp_path: Path) -> None:
    (tmp_path / "share.py").write_text(
        "import sys, json\n"
        'row = {"part": "half", "name": "n", "value": 1.0, "unit": "", "limit": None, "at_least": True, "note": ""}\n'
        'open(sys.argv[2], "w").write(json.dumps({**row, "verdict": "recorded"}) + "\\n")\n'
        'raise SystemExit("the card fell off")\n'
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "HERE", tmp_path)
        measured, failed = measure.script_part("share")(tmp_path)
    assert (measured.value, measured.verdict) == (1.0, "recorded")
    assert (failed.name, failed.verdict) == ("outside the network", "not run")
    assert "the card fell off" in failed.note


def test_a_part_that_fails_after_its_targets_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row(part="share", name="outside the network", value=1.0, unit="%", limit=5.0, at_least=False)
    (tmp_path / "share.py").write_text(
        "import sys\n"
        f"open(sys.argv[2], 'w').write({json.dumps(record(row))!r})\n"
        'raise SystemExit("the card fell off")\n'
    )
    monkeypatch.setattr(measure, "HERE", tmp_path)
    measured, failed = measure.script_part("share")(tmp_path)
    assert measured == row
    assert (failed.name, failed.verdict) == ("all of it", "not run")


KERNEL_TEST = one("test_the_kernels", file="tests.test_kernels_on_gpu")


@pytest.mark.parametrize(
    ("code", "report", "verdict"),
    [
        (0, junit(KERNEL_TEST), "met"),
        (measure.FOUND, junit(KERNEL_TEST), "missed"),
        (measure.FOUND, junit(one("t", FAILED, "tests.test_kernels_on_gpu")), "missed"),
        (measure.FOUND, "", "missed"),
        (1, junit(one("t", FAILED, "tests.test_kernels_on_gpu")), "not run"),
        (0, junit(one("t", SKIPPED, "tests.test_kernels_on_gpu")), "not run"),
        (0, "", "not run"),
    ],
)
def test_a_sanitizer_that_finds_something_is_no_failure_of_the_tests(
    code: int, report: str, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str]) -> Any:
        commands.append(command)
        if report:
            (tmp_path / "racecheck.xml").write_text(report)
        return subprocess.CompletedProcess(command, code, stdout="", stderr="Invalid __global__ write")

    monkeypatch.setattr(measure.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(measure, "_run", run)
    (row,) = measure.sanitizer_part("racecheck")(tmp_path)
    assert (row.name, row.verdict) == ("racecheck found something", verdict)
    assert commands[0][:3] == ["compute-sanitizer", "--tool", "racecheck"]


def test_a_sanitizer_that_is_not_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.shutil, "which", lambda name: None)
    (row,) = measure.sanitizer_part("memcheck")(tmp_path)
    assert (row.verdict, row.note) == ("not run", "compute-sanitizer is not on the PATH")


def test_the_record_holds_the_machine_and_every_row(tmp_path: Path) -> None:
    rows = [Row(part="p", name="n", value=1.0, unit="s"), Row(part="p", name="m", value=None, note="why")]
    table = measure.write(rows, MACHINE, tmp_path / "gpu")
    lines = [json.loads(line) for line in (tmp_path / "gpu" / "gpu.jsonl").read_text().splitlines()]
    assert lines[0] == {"machine": MACHINE}
    assert [row_from_json(line) for line in lines[1:]] == rows
    assert (tmp_path / "gpu" / "gpu.md").read_text() == table


@pytest.mark.parametrize(("value", "code"), [(80.0, 0), (60.0, 1), (None, 1)])
def test_the_command_ends_with_1_unless_every_target_was_met(
    value: float | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = Row(part="kernels", name="gather f32", value=value, unit="%", limit=70.0)
    monkeypatch.setattr(measure, "why_not", lambda: None)
    monkeypatch.setattr(measure, "machine", lambda: MACHINE)
    monkeypatch.setattr(measure, "PARTS", {"kernels": lambda work: [row]})
    done = CliRunner().invoke(measure.main, ["--results", str(tmp_path)])
    assert done.exit_code == code, done.output
    assert f"| {row.verdict} |" in done.output
    assert (tmp_path / "gpu.jsonl").is_file()


def test_only_the_parts_that_were_asked_for_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {name: Row(part=name, name="n", value=1.0, limit=1.0) for name in ("kernels", "share", "tests")}
    monkeypatch.setattr(measure, "why_not", lambda: None)
    monkeypatch.setattr(measure, "machine", lambda: MACHINE)
    parts = {name: lambda work, row=row: [row] for name, row in rows.items()}
    monkeypatch.setattr(measure, "PARTS", parts)
    done = CliRunner().invoke(measure.main, ["--results", str(tmp_path), "--only", "kernels", "--only", "share"])
    assert done.exit_code == 0, done.output
    lines = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines[1:]] == ["kernels", "share"]
