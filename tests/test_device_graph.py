"""CUDA graphs on the fake GPU: what is captured and launched is what would have been begun, and nothing is left."""

from __future__ import annotations

import gc
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from cuda.bindings import driver as real
from device_samples import EXAMPLES, Bench, assert_same, check_unharmed, fake_gpu, opened_bench
from fake_cuda import Cuda, LaunchError
from fake_graphs import FUNCTIONS, Driver
from test_device_mutants import mutated

from trtbuild.errors import Cancelled, EngineError, MissingExtra, NonFinite, OutOfMemory
from trtbuild.runtime.device import Device, opened_device
from trtbuild.runtime.gpu import case as pipeline
from trtbuild.runtime.gpu.graph import REPLAYS
from trtbuild.runtime.gpu.labels import DeviceLabels
from trtbuild.runtime.gpu.outputs import Output
from trtbuild.runtime.gpu.parts import Buffer, Pinned, Stream
from trtbuild.runtime.gpu.rows import added_rows
from trtbuild.runtime.predictor import Clock

Result = real.CUresult
CASES = ("mirrored, several windows in a call", "2D, many slices in a call", "folds", "a batch that engines need")
LONG = replace(EXAMPLES["folds"], shape=(1, 19, 40, 23), batch=3)


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test."""
    with fake_gpu() as fake:
        yield fake
        check_unharmed(fake)


@pytest.fixture
def device(cuda: Cuda) -> Iterator[Device]:
    with opened_device() as opened:
        yield opened


@pytest.fixture
def few_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtbuild.runtime.gpu.graph.REPLAYS", 2)


def driver() -> Driver:
    found = sys.modules["cuda.bindings.driver"]
    assert isinstance(found, Driver)
    return found


class Copies:
    """A stream that copies numbers from the host to the GPU and back, so that it can be told what has run."""

    def __init__(self, device: Device) -> None:
        self.stream: Stream = device.stream()
        self.buffer: Buffer = device.buffer(16)
        self.source: Pinned = device.pinned((4,))
        self.target: Pinned = device.pinned((4,))
        self.target.array[...] = 0

    def begin(self) -> None:
        self.stream.copy_in(self.buffer, self.source.array)
        self.stream.copy_out(self.target.array, self.buffer)

    def check_works(self) -> None:
        """The stream is as any other."""
        self.source.array[...] = self.source.array + 1
        self.begin()
        self.stream.synchronize()
        np.testing.assert_array_equal(self.target.array, self.source.array)


@pytest.fixture
def copies(device: Device) -> Copies:
    made = Copies(device)
    made.source.array[...] = 7
    return made


# --- one graph


def test_what_is_captured_is_begun_by_each_launch_and_not_before(device: Device, copies: Copies) -> None:
    graph = device.graph(copies.stream, copies.begin)
    copies.stream.synchronize()
    assert not copies.target.array.any()
    for number in (7, 8, 9):
        copies.source.array[...] = number
        graph.launch()
        assert not (copies.target.array == number).any(), "nothing has waited for it"
        copies.stream.synchronize()
        assert (copies.target.array == number).all()
    graph.close()
    graph.close()


def test_a_launch_stands_behind_what_was_begun_before(device: Device, copies: Copies) -> None:
    graph = device.graph(copies.stream, lambda: copies.stream.copy_out(copies.target.array, copies.buffer))
    copies.stream.copy_in(copies.buffer, copies.source.array)
    graph.launch()
    copies.stream.zero(copies.buffer, 16)
    copies.stream.synchronize()
    assert (copies.target.array == 7).all()


def test_a_closed_graph_is_not_launched(device: Device, copies: Copies) -> None:
    graph = device.graph(copies.stream, copies.begin)
    graph.close()
    with pytest.raises(EngineError, match="given back"):
        graph.launch()


def test_a_graph_that_is_left_is_closed_with_the_device(cuda: Cuda) -> None:
    with opened_device() as device:
        copies = Copies(device)
        device.graph(copies.stream, copies.begin)


@pytest.mark.parametrize(
    "error", [EngineError("TensorRT failed."), KeyboardInterrupt(), Cancelled("stopped"), RuntimeError("a binding's")]
)
def test_work_that_fails_ends_the_capture(device: Device, copies: Copies, error: BaseException) -> None:
    def work() -> None:
        copies.begin()
        raise error

    with pytest.raises(type(error)):
        device.graph(copies.stream, work)
    copies.check_works()


FORBIDDEN: dict[str, Callable[[Device, Copies], Any]] = {
    "waits": lambda device, copies: copies.stream.synchronize(),
    "waits for everything": lambda device, copies: device.cuda.Context.synchronize(),
    "allocates": lambda device, copies: device.buffer(16),
    "allocates on the host": lambda device, copies: device.pinned((4,)),
    "frees": lambda device, copies: copies.buffer._allocations[0].free(),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_work_that_does_what_no_graph_can_hold_is_an_error(device: Device, copies: Copies, what: str) -> None:
    def work() -> None:
        copies.begin()
        with device.current():
            FORBIDDEN[what](device, copies)

    with pytest.raises(EngineError, match="not permitted when stream is capturing"):
        device.graph(copies.stream, work)
    copies.check_works()


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_that_holds_device_memory_breaks_no_capture(device: Device, copies: Copies, enabled: bool) -> None:
    cycle: list[Any] = [DeviceLabels(device.buffer(16), (1, 4, 4), np.dtype(np.uint8), 0)]
    cycle.append(cycle)
    held, before = [cycle], gc.get_threshold()
    del cycle

    def work() -> None:
        copies.begin()
        held.clear()
        gc.set_threshold(1, 1, 1)
        _ = [[number] for number in range(100)]  # enough for the collector to begin

    try:
        if not enabled:
            gc.disable()
        graph = device.graph(copies.stream, work)
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
        gc.set_threshold(*before)
    gc.collect()
    graph.launch()
    copies.stream.synchronize()
    assert (copies.target.array == 7).all()


def test_work_that_hides_its_failure_is_an_error_all_the_same(device: Device, copies: Copies) -> None:
    def work() -> None:
        with pytest.raises(EngineError):
            device.buffer(16)

    with pytest.raises(EngineError, match="INVALIDATED"):
        device.graph(copies.stream, work)
    copies.check_works()


def test_work_on_another_stream_is_noticed() -> None:
    with fake_gpu() as cuda, opened_device() as device:
        copies, other = Copies(device), Copies(device)
        device.graph(copies.stream, other.begin)
        other.stream.synchronize()
        assert cuda.faults == ["work on another stream than the one that is captured"] * 2


@pytest.mark.parametrize("function", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
@pytest.mark.parametrize(
    ("result", "kind"), [(Result.CUDA_ERROR_OUT_OF_MEMORY, OutOfMemory), (Result.CUDA_ERROR_NOT_SUPPORTED, EngineError)]
)
def test_a_driver_that_refuses_is_an_error_of_ours(
    device: Device, copies: Copies, function: str, result: Any, kind: type[EngineError]
) -> None:
    driver().failing[function] = result
    with pytest.raises(EngineError) as caught:
        device.graph(copies.stream, copies.begin)
    assert type(caught.value) is kind
    assert caught.value.got == result.name
    copies.check_works()


def test_a_launch_that_is_refused_is_an_error(device: Device, copies: Copies) -> None:
    graph = device.graph(copies.stream, copies.begin)
    driver().failing["cuGraphLaunch"] = Result.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(OutOfMemory, match="CUDA graph"):
        graph.launch()
    copies.check_works()


@pytest.mark.parametrize("function", ["cuStreamBeginCapture", "cuGraphInstantiate"])
def test_a_driver_without_graphs_is_told(
    device: Device, copies: Copies, function: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*given: Any) -> None:
        raise RuntimeError(f'Function "{function}" not found')

    monkeypatch.setattr(driver(), function, missing)
    with pytest.raises(EngineError, match="cannot capture CUDA graphs"):
        device.graph(copies.stream, copies.begin)
    copies.check_works()


def test_without_the_bindings_the_extra_is_named(
    device: Device, copies: Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(MissingExtra, match=r"trtbuild\[gpu\]"):
        device.graph(copies.stream, copies.begin)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_fake_driver_takes_what_the_real_bindings_take(function: str) -> None:
    told = re.match(r"\w+\((.*)\)", str(getattr(real, function).__doc__))
    assert told is not None
    own = list(inspect.signature(getattr(Driver, function)).parameters)[1:]
    assert len(own) == len(told[1].split(","))


# --- when a graph is made


def calls(bench: Bench, count: int, of: int) -> list[str]:
    """What the driver was asked for in some of `of` calls with the same arguments."""
    engine, case = bench.engines[0], bench.case
    sizes = (4 * case.shape[0] * int(np.prod(case.patch)), case.logit_bytes)
    source, target = (bench.gpu.device.buffer(size) for size in sizes)
    bench.gpu.stream.zero(source, sizes[0])
    before = len(bench.cuda.graph_calls)
    for _ in range(count):
        bench.gpu.run(engine, source.address, target.address, 1, of)
    bench.gpu.graphs.clear()
    bench.gpu.stream.synchronize()
    source.close()
    target.close()
    return bench.cuda.graph_calls[before:]


def capturable(bench: Bench) -> Bench:
    for runner in bench.runners:
        runner.capturable = True
    return bench


def test_the_first_call_is_a_call_and_all_others_are_launches(cuda: Cuda) -> None:
    with opened_bench(cuda, EXAMPLES["3D"]) as bench:
        asked = calls(capturable(bench), 5, of=REPLAYS + 1)
        assert asked.count("cuStreamBeginCapture") == asked.count("cuGraphInstantiate") == 1
        assert asked.count("cuGraphLaunch") == 4
        assert asked.count("cuGraphExecDestroy") == asked.count("cuGraphDestroy") == 1
        assert len(bench.runners[0].batches) == 2, "called, and captured"


@pytest.mark.parametrize("of", [1, REPLAYS])
def test_too_few_calls_make_no_graph(cuda: Cuda, of: int) -> None:
    with opened_bench(cuda, EXAMPLES["3D"]) as bench:
        assert calls(capturable(bench), 5, of=of) == []


def test_an_engine_that_does_not_allow_it_is_never_captured(cuda: Cuda) -> None:
    with opened_bench(cuda, EXAMPLES["3D"]) as bench:
        assert calls(bench, 5, of=100) == []


def test_each_pair_of_addresses_has_a_graph_of_its_own(cuda: Cuda, few_replays: None) -> None:
    with opened_bench(cuda, EXAMPLES["3D"]) as bench:
        check_addresses(capturable(bench))


def check_addresses(bench: Bench) -> None:
    """Pairs of buffers in turn, the logits of each from its own patch."""
    gpu, case, engine = bench.gpu, bench.case, bench.engines[0]
    shape = (1, case.shape[0], *case.patch)
    rng = np.random.default_rng(0)
    sizes = (4 * int(np.prod(shape)), case.logit_bytes)
    sources, targets = ([gpu.device.buffer(size) for _ in range(2)] for size in sizes)
    for _ in range(4):
        for source, target in product(sources, targets):
            patch = rng.standard_normal(shape, dtype=np.float32)
            logits = np.empty((1, case.spec.labels.heads, *case.patch), dtype=np.float32)
            gpu.upload(source, patch)
            gpu.run(engine, source.address, target.address, 1, calls=4)
            gpu.download(logits, target)
            np.testing.assert_array_equal(logits, bench.runners[0].answer(patch))
    gpu.graphs.clear()
    for buffer in (*sources, *targets):
        buffer.close()


# --- whole cases


@pytest.mark.parametrize("name", CASES)
def test_a_case_has_the_labels_of_the_cpu_path(cuda: Cuda, few_replays: None, name: str) -> None:
    with opened_bench(cuda, EXAMPLES[name]) as bench:
        check_labels(capturable(bench))


def check_labels(bench: Bench) -> None:
    """Case after case; a graph for each fold and batch is made, and only the calls that it stands for are not made."""
    expected = bench.on_cpu()
    for _ in range(2):
        before, made = sum(len(runner.batches) for runner in bench.runners), len(bench.cuda.graph_calls)
        assert_same(bench.on_device(), expected)
        asked = bench.cuda.graph_calls[made:]
        called = sum(len(runner.batches) for runner in bench.runners) - before
        batches = Counter(group.batch for row in bench.plans()[0].groups for group in row)
        captured = [n for n in batches.values() if n > 2]
        assert captured
        assert asked.count("cuGraphInstantiate") == len(captured) * len(bench.runners)
        assert asked.count("cuGraphLaunch") == sum(n - 1 for n in captured) * len(bench.runners)
        assert called == sum(2 if n > 2 else n for n in batches.values()) * len(bench.runners)
        check_given_back(bench)


def check_given_back(bench: Bench) -> None:
    assert bench.cuda.live == {}
    assert (bench.cuda.graphs, bench.cuda.execs) == ({}, {})


@pytest.mark.parametrize("stop_at", [0, 2, 4])
def test_a_case_that_is_stopped_leaves_no_graph(cuda: Cuda, few_replays: None, stop_at: int) -> None:
    with opened_bench(cuda, LONG) as bench:
        check_stop(capturable(bench), stop_at)
        assert_same(bench.on_device(), bench.on_cpu())


def check_stop(bench: Bench, stop_at: int) -> None:
    seen = 0

    def progress(stage: str, done: int, total: int) -> bool:
        nonlocal seen
        seen += 1
        return seen <= stop_at

    with pytest.raises(Cancelled):
        bench.on_device(progress)
    check_given_back(bench)


def test_a_failure_beside_the_network_leaves_no_graph(
    cuda: Cuda, few_replays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs go before the memory, though the rows are not at their end; the fake tells of the other order."""

    def lap(clock: Clock, name: str) -> None:
        if name == "back":
            raise KeyboardInterrupt

    with opened_bench(cuda, LONG) as bench:
        monkeypatch.setattr(Clock, "lap", lap)
        with pytest.raises(KeyboardInterrupt):
            capturable(bench).on_device()
        assert "cuGraphLaunch" in cuda.graph_calls
        check_given_back(bench)


def test_graphs_go_before_the_memory_though_somebody_holds_the_rows(
    cuda: Cuda, few_replays: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever holds a generator keeps it from ending, a debugger for one."""
    held = list[Any]()

    def kept(*given: Any) -> Any:
        held.append(added_rows(*given))
        return held[0]

    def finish(base: int, final: int) -> None:
        raise KeyboardInterrupt

    with opened_bench(cuda, LONG) as bench:
        monkeypatch.setattr(pipeline, "added_rows", kept)
        monkeypatch.setattr(pipeline, "_outputs", lambda run: (Output(finish=finish, result=lambda: np.empty(0)),))
        with pytest.raises(KeyboardInterrupt):
            capturable(bench).on_device()
        assert "cuGraphLaunch" in cuda.graph_calls
        check_given_back(bench)
        held.clear()


def test_a_gpu_that_fails_in_a_graph_is_told(cuda: Cuda, few_replays: None) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        if "cuGraphLaunch" in cuda.graph_calls:
            cuda.fail_next = LaunchError("an illegal memory access was encountered")

    with opened_bench(cuda, LONG) as bench:
        with pytest.raises(EngineError, match="illegal memory access"):
            capturable(bench).on_device(progress)
        check_given_back(bench)


def test_what_is_not_finite_is_found_in_a_graph_too(cuda: Cuda, few_replays: None) -> None:
    with opened_bench(cuda, LONG) as bench:
        for runner in capturable(bench).runners:
            runner.poison = float(np.partition(bench.prepared.data.ravel(), -2)[-2])  # type: ignore[union-attr]
        messages = []
        for run in (bench.on_cpu, bench.on_device):
            with pytest.raises(NonFinite) as caught:
                run()
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
        check_given_back(bench)


@pytest.mark.parametrize("function", ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate"])
def test_a_capture_that_fails_is_told_once_and_changes_no_label(cuda: Cuda, few_replays: None, function: str) -> None:
    with opened_bench(cuda, LONG) as bench:
        driver().failing[function] = Result.CUDA_ERROR_NOT_SUPPORTED
        check_fallback(capturable(bench))
        assert cuda.graph_calls.count("cuStreamBeginCapture") == 1


def check_fallback(bench: Bench) -> None:
    found = [bench.on_device() for _ in range(2)]
    assert len(bench.notes) == 1
    assert re.match("No CUDA graph .*NOT_SUPPORTED", bench.notes[0])
    for each in found:
        assert_same(each, bench.on_cpu())
    check_given_back(bench)


def test_a_graph_that_finds_no_memory_begins_the_case_again(cuda: Cuda, few_replays: None) -> None:
    with opened_bench(cuda, replace(EXAMPLES["mirrored"], batch=8)) as bench:
        fake, launch = driver(), driver().cuGraphLaunch

        def once(graph: Any, stream: Any) -> tuple[Any]:
            del fake.cuGraphLaunch  # the method again
            return (Result.CUDA_ERROR_OUT_OF_MEMORY,)

        fake.cuGraphLaunch = once  # type: ignore[method-assign]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
            assert_same(capturable(bench).on_device(), bench.on_cpu())
        assert len(bench.notes) == 1
        assert "begins again" in bench.notes[0]
        assert fake.cuGraphLaunch == launch


# --- mistakes


MUTANTS = {
    "graphs that outlive the case": ("run", "stack.callback(gpu.graphs.clear)", "pass"),
    "graphs that nobody destroys": ("graph", "self._graphs.popitem()[1].close()", "self._graphs.popitem()"),
    "a graph that is not destroyed": (
        "graph", "_value(self._driver, self._driver.cuGraphExecDestroy(self._graphs.pop()))", "self._graphs.pop()",
    ),
    "what a graph was made of is left": ("graph", "_value(driver, driver.cuGraphDestroy(graph))", "pass"),
    "other addresses": ("shared", "source=source, target=target", "source=0, target=0"),
    "another output": ("shared", "target=target, batch", "target=0, batch"),
    "another batch": ("shared", "target=target, batch=batch)", "target=target, batch=0)"),
    "another engine": ("shared", "runner=id(engine.runner)", "runner=0"),
    "a capture without a call before": ("graph", "call in self._called and call not", "call not"),
    "a capture for every call": ("graph", "call not in self._graphs and calls", "calls"),
    "a capture that no call pays": ("graph", "calls > REPLAYS", "calls > -1"),
    "no capture at all": ("graph", "calls > REPLAYS", "calls < 0"),
    "captured and not launched": ("graph", "self._capture(call, work)\n", "return self._capture(call, work)\n"),
    "a second try after a failure": ("graph", "self._failed = True", "pass"),
    "a failure in silence": ("graph", "self._notes.append(", "str("),
    "a failure that no case tells of": ("attempts", "for note in gpu.graphs.notes()", "for note in ()"),
    "a failure that every case tells of": ("graph", "= self._notes, []", "= self._notes, self._notes"),
    "a capture that is not ended": (
        "graph", "_value(driver, driver.cuGraphDestroy(_value(driver, driver.cuStreamEndCapture(handle))))", "pass",
    ),
    "a capture that others disturb": ("graph", "CAPTURE_MODE_THREAD_LOCAL", "CAPTURE_MODE_GLOBAL"),
    "results that are not looked at": ("graph", "if result != driver.CUresult.CUDA_SUCCESS", "if False"),
    "an engine that was never asked": ("shared", "if engine.capturable:", "if True:"),
}  # fmt: skip
"""What is wrong, in which module of the device path, and what is replaced by what."""


def battery() -> None:
    """Raises where anything is wrong."""
    with pytest.MonkeyPatch.context() as patch, fake_gpu() as cuda:
        patch.setattr("trtbuild.runtime.gpu.graph.REPLAYS", 2)
        for example in (LONG, EXAMPLES["2D, many slices in a call"]):
            with opened_bench(cuda, example) as bench:
                check_labels(capturable(bench))
        with opened_bench(cuda, EXAMPLES["3D"]) as bench:
            assert calls(bench, 4, of=100) == []
            assert calls(capturable(bench), 4, of=2) == []
            check_addresses(bench)
        with opened_bench(cuda, LONG) as bench:
            check_stop(capturable(bench), 1)
        check_failures(cuda)
        check_unharmed(cuda)


def check_failures(cuda: Cuda) -> None:
    with opened_bench(cuda, LONG) as bench:
        driver().failing["cuGraphInstantiate"] = Result.CUDA_ERROR_NOT_SUPPORTED
        check_fallback(capturable(bench))
        driver().failing.clear()
    with opened_device() as device:
        copies = Copies(device)
        with pytest.raises(ZeroDivisionError):
            device.graph(copies.stream, lambda: 1 // 0)  # type: ignore[arg-type,return-value]
        copies.check_works()


def test_without_a_mistake_nothing_is_noticed() -> None:
    battery()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name: str) -> None:
    with mutated(*MUTANTS[name]), pytest.raises((Exception, pytest.fail.Exception)):
        battery()
