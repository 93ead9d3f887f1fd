"""The TensorRT runner: engines that TensorRT-RTX really builds, refused for real where there is no GPU; the rest on a
fake GPU with the names and signatures of the real bindings of TensorRT 10, 11 and RTX."""

from __future__ import annotations

import gc
import hashlib
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bindings_facts import VERSIONS, facts_of
from fake_cuda import Cuda, LaunchError
from fake_nvinfer import BUDGET, SCRATCH, WEIGHTS, FakeTensorRT, device_record, install, plan_of, write_plan
from runner_samples import CHANNELS, HEADS, PATCHES, patches, reference_logits, small_unet

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt import plan_from_onnx
from trtbuild.errors import EngineError, MissingExtra, OutOfMemory
from trtbuild.nvinfer import no_driver, nvinfer
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.runtime_cache import kept_cache
from trtbuild.runtime.select import available_backends, choose_backend, open_runner
from trtbuild.runtime.tensorrt import TensorRTRunner
from trtbuild.runtime.tensorrt_fit import check_gpu, check_version
from trtbuild.runtime.tensorrt_lanes import parts
from trtbuild.runtime.tensorrt_log import Errors, error_log
from trtbuild.spec import BuildRecord

pytest_plugins = ["cache_samples"]
TEN, ELEVEN = VERSIONS
FLAVOURS = [("tensorrt", TEN), ("tensorrt", ELEVEN), ("tensorrt-rtx", "rtx")]
Opened = tuple[TensorRTRunner, FakeTensorRT]
Open = Callable[..., Opened]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    """Opens a plan on a fake GPU, and looks at the GPU after the test."""
    opened: list[Opened] = []

    def start(
        backend: str = "tensorrt-rtx", version: str | None = None, *, batches: tuple[int, int, int] = (1, 2, 2),
        gpu: Cuda | None = None, prepare: Callable[[FakeTensorRT], None] = lambda fake: None,
        plan: Mapping[str, Any] | None = None, cache: str | None = "cache", **changes: Any,
    ) -> Opened:  # fmt: skip
        if cache is not None:
            monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path / cache))
        fake = install(monkeypatch, backend, cuda=gpu, version=version)
        faked.append(fake)
        prepare(fake)
        content = plan_of(3, batches, **(plan or {}))
        record = device_record(backend, content, batches=batches, **changes)
        real = facts_of(version or TEN)["version"] if backend == "tensorrt" else record.version
        record = replace(record, version=real, flavour=f"{backend}-{real.partition('.')[0]}")
        runner = open_runner(record, write_plan(tmp_path / "x.engine", content))
        assert isinstance(runner, TensorRTRunner)
        opened.append((runner, fake))
        return opened[-1]

    faked: list[FakeTensorRT] = []
    yield start
    for runner, _ in opened:
        runner.close()
    gc.collect()
    for fake in faked:
        assert fake.cuda.faults == []
        assert fake.leaks() == []
        assert fake.cuda.leaks() == []
        assert fake.cuda.stack() == []


def assert_right(logits: Any, batch: Any) -> None:
    want = reference_logits(batch)
    assert logits.shape == want.shape
    assert np.abs(logits - want).max() <= 1e-6 * np.abs(want).max()  # one rounding to float32


# --- batches, profiles, streams


@pytest.mark.parametrize(("backend", "version"), FLAVOURS)
def test_every_flavour_runs_by_the_names_of_its_own_bindings(backend: str, version: str, start: Open) -> None:
    runner, fake = start(backend, version)
    batch = patches(5, 3)
    assert_right(runner.infer(batch), batch)
    info = runner.describe()
    assert (info.backend, info.version, info.device) == (backend, facts_of(version)["version"], "Test GPU")
    runner.close()
    asked = {"ComputeCapability", "IRuntimeCache", "Runtime.get_engine_validity"}  # what only TensorRT-RTX has
    assert set(fake.twin.missing) == (set() if backend == "tensorrt-rtx" else asked)


def test_the_parts_of_a_call_cover_it_once_inside_the_profile() -> None:
    for smallest in range(1, 5):
        for largest in range(smallest, 6):
            for count in range(1, 20):
                calls = list(parts(count, smallest, largest))
                covered = [n for first, size, _ in calls for n in range(first, first + size)]
                assert covered == list(range(count))
                assert all(padded == max(size, smallest) <= largest for _, size, padded in calls)
                assert len(calls) == -(-count // largest)


@pytest.mark.parametrize("batches", [(1, 1, 1), (2, 3, 4), (3, 3, 3)])
def test_batches_outside_the_profile_are_split_and_filled_up(batches: tuple[int, int, int], start: Open) -> None:
    runner, fake = start(batches=batches)
    for count in (1, 2, 3, 4, 5, 7, 9, 2):
        batch = patches(count, 3, seed=count)
        fake.twin.calls.clear()
        assert_right(runner.infer(batch), batch)
        sizes = [call["shape"][0] for call in fake.twin.of("IExecutionContext.set_input_shape")]
        assert len(sizes) == -(-count // batches[2])
        assert all(batches[0] <= size <= batches[2] for size in sizes)
        assert next(iter(runner.stream([batch]))).shape == (count, HEADS, *PATCHES[3])


@pytest.mark.parametrize("calls", [1, 2])
def test_a_batch_is_filled_up_with_zeros(calls: int, start: Open) -> None:
    """NaN would poison nothing else, but denormals and what a caller sent before could take time, or show up."""
    runner, fake = start(batches=(3, 3, 3))
    for _ in range(calls):
        runner.infer(patches(3, 3))
    runner.infer(patches(1, 3))
    assert fake.seen[-1].shape[0] == 3
    assert fake.seen[-1][0].any()
    assert not fake.seen[-1][1:].any()


def test_a_stream_has_two_lanes_and_ended_ones_are_used_again(start: Open) -> None:
    runner, fake = start()
    batches = [patches(2, 3, seed=n) for n in range(6)]
    for _ in range(5):
        for batch, logits in zip(batches, runner.stream(batches), strict=True):
            assert_right(logits, batch)
        stream = runner.stream(batches)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert not any(queue.work for queue in fake.cuda.streams.values())
        gc.collect()
        assert len(fake.cuda.streams) == 2
        assert len(fake.twin.of("ICudaEngine.create_execution_context")) == 2


def test_closing_waits_for_what_is_under_way_before_anything_is_given_back(start: Open) -> None:
    runner, fake = start()
    fake.calls_left = 1
    with pytest.raises(EngineError, match="API Usage Error"):
        runner.infer(patches(4, 3))
    assert any(queue.work for queue in fake.cuda.streams.values()), "the first half is under way"
    runner.close()
    assert fake.cuda.leaks() == []


def test_two_engines_are_open_at_once(start: Open) -> None:
    (one, fake), batch = start(), patches(2, 3)
    held = one.infer(batch)
    other, _ = start(gpu=fake.cuda, batches=(1, 1, 1))
    assert_right(other.infer(batch[:1]), batch[:1])
    one.close()
    assert_right(other.infer(batch), batch)
    assert_right(held, batch)


def test_the_rtx_switches_are_set_and_those_that_are_missing_are_not(start: Open) -> None:
    runner, fake = start("tensorrt-rtx")
    config = fake.twin.of("IRuntimeConfig.cuda_graph_strategy")
    assert [call["value"].name for call in config] == ["WHOLE_GRAPH_CAPTURE"]
    kernels = fake.twin.of("IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy")
    assert [call["value"].name for call in kernels] == ["EAGER"]
    assert len(fake.twin.of("IRuntimeConfig.set_runtime_cache")) == 1
    assert runner.describe().details["CUDA graph"] == "asked for: WHOLE_GRAPH_CAPTURE"
    assert len(fake.twin.of("Runtime.get_engine_validity")) == 1
    _, plain = start("tensorrt")
    assert not any("Cache" in name or "graph" in name for name in plain.twin.names())


def test_a_switch_that_tensorrt_does_not_take_is_not_claimed(start: Open) -> None:
    def other(fake: FakeTensorRT) -> None:
        switch = property(lambda config: fake.twin.CudaGraphStrategy.DISABLED, lambda config, value: None)
        fake.twin.IRuntimeConfig.cuda_graph_strategy = switch

    runner, _ = start(prepare=other)
    assert runner.describe().details["CUDA graph"] == "asked for: DISABLED"


@pytest.mark.parametrize(("backend", "version"), FLAVOURS)
def test_weights_are_streamed_where_the_record_says_so(backend: str, version: str, start: Open) -> None:
    """By itself TensorRT keeps all weights on the GPU; the budget is set before the first context, as it must be."""
    plain, fake = start(backend, version)
    assert "weight streaming" not in plain.describe().details
    assert not any("streaming" in name for name in fake.twin.names())
    runner, fake = start(backend, version, options={"weight_streaming": True})
    batch = patches(2, 3)
    assert_right(runner.infer(batch), batch)
    assert fake.twin.of("ICudaEngine.weight_streaming_budget_v2") == [{"value": BUDGET}]
    names = fake.twin.names()
    budget = names.index("ICudaEngine.weight_streaming_budget_v2")
    assert budget < names.index("ICudaEngine.create_execution_context")
    details = runner.describe().details
    assert details["weight streaming"] == f"{BUDGET} of {WEIGHTS} bytes of weights stay on the GPU"
    assert details["activation memory"] == f"{4096 + SCRATCH} bytes per lane", "read after the budget was set"


@pytest.mark.parametrize("how", ["raises", "ignores it"])
def test_a_refused_budget_is_an_error_and_leaves_nothing(how: str, start: Open) -> None:
    def put(engine: Any, value: int) -> None:
        if how == "raises":
            del engine  # the real binding is C++, whose frames no traceback holds; nor is one here
            raise RuntimeError("Failed to set weight streaming budget!")

    def refuse(fake: FakeTensorRT) -> None:
        fake.twin.ICudaEngine.weight_streaming_budget_v2 = property(lambda engine: WEIGHTS, put)
        fake.twin.ICudaEngine.__setattr__ = object.__setattr__

    with pytest.raises(EngineError, match="refused a budget"):
        start(prepare=refuse, options={"weight_streaming": True})


@pytest.mark.parametrize(("backend", "version"), FLAVOURS)
def test_a_plan_without_weights_is_refused_before_anything_is_loaded(
    backend: str, version: str, start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes: list[FakeTensorRT] = []
    monkeypatch.setattr("trtbuild.runtime.tensorrt.engine_content", pytest.fail)
    with pytest.raises(EngineError, match="has no weights") as caught:
        start(backend, version, prepare=fakes.append, options={"strip_plan": True, "refit": True})
    assert "--stripWeights" in str(caught.value.hint)
    assert "refit it with TensorRT's own tools" in str(caught.value.hint)
    assert fakes[0].twin.calls == []
    assert not fakes[0].cuda.initialised


def test_only_a_version_compatible_plan_may_bring_code_for_the_host(start: Open) -> None:
    _, fake = start("tensorrt")
    assert fake.twin.of("Runtime.engine_host_code_allowed") == []
    _, fake = start("tensorrt", options={"version_compatible": True})
    assert fake.twin.of("Runtime.engine_host_code_allowed") == [{"value": True}]


def test_what_is_read_back_and_what_is_the_records_is_told(start: Open) -> None:
    runner, _ = start(inference_precision="f16")
    info = runner.describe()
    assert info.inference_precision == "f16"
    assert "record" in info.details["precision"]
    assert info.details["activation memory"] == "4096 bytes per lane"
    assert info.details["capability"] == "8.6"


# --- the device pipeline


def _device_arrays(runner: TensorRTRunner, device: Any, batch: Any) -> Any:
    """Memory on the GPU with a batch, and room for its logits full of NaN."""
    source, target = device.pinned(batch.shape), device.pinned((len(batch), HEADS, *PATCHES[3]))
    source.array[...] = batch
    return source, target, device.buffer(source.array.nbytes), device.buffer(target.array.nbytes)


@pytest.mark.parametrize("count", [1, 2])
def test_enqueue_computes_from_pointer_to_pointer_and_does_not_wait(count: int, start: Open) -> None:
    runner, fake = start()
    batch = patches(count, 3)
    with opened_device() as device:
        for _ in range(2):  # each stream has a context of its own
            stream = device.stream()
            source, target, there, back = _device_arrays(runner, device, batch)
            stream.copy_in(there, source.array)
            runner.enqueue(there.address, back.address, stream.handle, count)
            stream.copy_out(target.array, back)
            assert np.isnan(target.array).all()
            stream.synchronize()
            assert_right(target.array, batch)
        assert len(fake.twin.of("ICudaEngine.create_execution_context")) == 2
        runner.close()
        with pytest.raises(EngineError, match="closed"):
            runner.enqueue(there.address, back.address, stream.handle, count)


@pytest.mark.parametrize("count", [0, 1, 5, -1])
def test_enqueue_refuses_a_batch_outside_the_profile(count: int, start: Open) -> None:
    runner, fake = start(batches=(2, 3, 4))
    with pytest.raises(EngineError, match="profile") as caught:
        runner.enqueue(1, 2, 3, count)
    assert caught.value.expected == "2 to 4"
    assert not fake.twin.of("IExecutionContext.execute_async_v3")


def _enqueued(runner: TensorRTRunner, device: Any, batch: Any) -> tuple[Any, Any]:
    """A batch whose logits are under way on a stream of ours."""
    stream = device.stream()
    source, target, there, back = _device_arrays(runner, device, batch)
    stream.copy_in(there, source.array)
    runner.enqueue(there.address, back.address, stream.handle, len(batch))
    stream.copy_out(target.array, back)
    return stream, target


def test_closing_waits_for_streams_that_are_not_the_runners(start: Open) -> None:
    """The fake tells of a context that is destroyed with work under way."""
    runner, fake = start()
    batch = patches(2, 3)
    with opened_device() as device:
        _, target = _enqueued(runner, device, batch)
        assert any(queue.work for queue in fake.cuda.streams.values())
        runner.close()
        assert_right(target.array, batch)
        assert fake.leaks() == []


def test_a_gpu_that_fails_while_it_is_waited_for_leaves_nothing_behind(start: Open) -> None:
    runner, fake = start()
    runner.infer(patches(1, 3))
    with opened_device() as device:
        stream, _ = _enqueued(runner, device, patches(2, 3))
        slots = runner._slots
        for slot in slots._all:
            slot.wait()  # so that the failure meets the wait for other streams
        fake.cuda.fail_next = LaunchError("unspecified launch failure")
        with pytest.raises(EngineError, match="launch failure"):
            runner.close()
        assert fake.leaks() == []
        stream.close()


def test_contexts_of_streams_are_made_one_at_a_time(start: Open) -> None:
    """Two threads may come for the first time at once, each with its stream."""
    runner, fake = start()
    held: list[bool] = []
    fake.when_a_context_is_made = lambda: held.append(runner._slots._making.locked())
    with opened_device() as device:

        def work() -> None:
            _enqueued(runner, device, patches(1, 3))[0].synchronize()

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert held == [True, True]


# --- what goes wrong on the GPU


def test_a_refusal_of_tensorrt_is_told_in_its_words_and_the_next_call_works(start: Open) -> None:
    runner, fake = start()
    batch = patches(2, 3)
    fake.calls_left = 0
    with pytest.raises(EngineError, match="API Usage Error") as caught:
        runner.infer(batch)
    assert "not a reason" not in str(caught.value)
    with pytest.raises(EngineError, match="API Usage Error"):
        list(runner.stream([batch, batch]))
    fake.calls_left = float("inf")
    assert_right(runner.infer(batch), batch)
    assert_right(next(iter(runner.stream([batch]))), batch)


def test_a_reason_is_told_once_and_for_its_own_failure(start: Open) -> None:
    start()[0].close()  # keeps a cache
    runner, fake = start(prepare=lambda fake: setattr(fake, "cache_fits", False))
    fake.calls_left = 0
    for _ in range(2):
        with pytest.raises(EngineError) as caught:
            runner.infer(patches(1, 3))
        assert caught.value.got == "Error Code 3: API Usage Error (an input shape or address is not set)"


@pytest.mark.parametrize(
    ("member", "words"),
    [
        ("IRuntimeConfig.set_runtime_cache", "refused a runtime cache"),
        ("IExecutionContext.set_tensor_address", "failed"),
    ],
)
def test_a_refusal_that_is_only_a_false_is_one(member: str, words: str, start: Open) -> None:
    def refuse(fake: FakeTensorRT) -> None:
        usual = fake.twin.answers.get(member)
        fake.twin.answers[member] = lambda call: usual is not None and usual(call) and False

    with pytest.raises(EngineError, match=words):
        start(prepare=refuse)[0].infer(patches(1, 3))


def test_a_stream_that_is_given_up_does_not_raise_what_it_never_waited_for(start: Open) -> None:
    runner, fake = start()
    batches = [patches(2, 3, seed=n) for n in range(4)]
    stream = runner.stream(batches)
    next(stream)
    fake.cuda.fail_next = LaunchError("unspecified launch failure")
    stream.close()  # type: ignore[attr-defined]
    assert fake.cuda.fail_next is None, "it was met"
    assert_right(runner.infer(batches[0]), batches[0])


def test_what_fails_holds_no_context_beyond_the_engine(start: Open) -> None:
    runner, fake = start()
    fake.calls_left = 0
    with pytest.raises(EngineError) as caught:
        runner.infer(patches(1, 3))
    runner.close()
    gc.collect()
    assert caught.value.__traceback__ is not None
    assert fake.leaks() == []


def test_a_reason_goes_to_the_engine_that_it_is_of(start: Open) -> None:
    (one, first), (other, second) = start("tensorrt"), start("tensorrt")
    first.calls_left = second.calls_left = 0
    with pytest.raises(EngineError, match="an input shape") as caught:
        other.infer(patches(1, 3))
    assert str(caught.value.got).count("API Usage Error") == 1
    with pytest.raises(EngineError, match="an input shape") as caught:
        one.infer(patches(1, 3))
    assert str(caught.value.got).count("API Usage Error") == 1


def test_the_first_logger_outlives_its_engine(start: Open) -> None:
    """TensorRT writes to it as long as the process lives; the fake tells where it is freed."""
    runner, fake = start()
    runner.close()
    del runner
    gc.collect()
    assert fake.first_logger is not None
    assert fake.first_logger() is not None


def test_a_logger_of_the_real_bindings_stays_and_its_rows_go() -> None:
    module = nvinfer("tensorrt-rtx").module
    errors = Errors()
    log = weakref.ref(error_log(module, errors))
    rows = weakref.ref(errors)
    gc.collect()
    logger = log()
    assert logger is not None
    logger.log(module.ILogger.ERROR, "a reason")
    logger.log(module.ILogger.WARNING, "no reason")
    assert errors.rows == ["a reason"]
    del errors
    assert rows() is None
    logger.log(module.ILogger.ERROR, "of nobody")


def _destroyed_in_a_wrong_way(fake: FakeTensorRT, how: str) -> None:
    with opened_device() as device, device.current():
        runtime = fake.twin.Runtime(error_log(fake.twin, Errors()))
        engine = runtime.deserialize_cuda_engine(plan_of())
        context = engine.create_execution_context(engine.create_runtime_config())
        if how == "order":
            engine = None
        context = None  # noqa: F841 - destroys it
        if how == "no context of CUDA":
            device.cuda.Context.pop()
            engine = None
            device.cuda.Context().push()
        engine = None
        runtime = None


@pytest.mark.parametrize(
    ("how", "words"),
    [("order", "before IExecutionContext"), ("no context of CUDA", "no CUDA context"), ("right", "")],
)
def test_the_fake_tells_of_a_wrong_destruction(how: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install(monkeypatch, "tensorrt")
    _destroyed_in_a_wrong_way(fake, how)
    assert any(words in fault for fault in fake.cuda.faults) is bool(words)


def test_what_a_failed_call_left_under_way_is_waited_for_before_its_memory_is_used_again(start: Open) -> None:
    runner, fake = start()
    fake.calls_left = 1
    with pytest.raises(EngineError, match="API Usage Error"):
        runner.infer(patches(4, 3))
    assert any(queue.work for queue in fake.cuda.streams.values()), "the first half is under way"
    fake.calls_left = float("inf")
    batch = patches(9, 3)  # needs more page-locked memory
    assert_right(runner.infer(batch), batch)
    assert len(fake.cuda.streams) == 1


def test_page_locked_memory_grows_and_the_smaller_one_is_given_back(start: Open) -> None:
    runner, fake = start()
    for count in (1, 3, 9, 2):
        runner.infer(patches(count, 3))
        assert len(fake.cuda.pinned) == 2
    assert sorted(len(each.array) for each in fake.cuda.pinned) == [9, 9]


def test_an_error_of_the_kernels_is_told_where_they_are_waited_for(start: Open) -> None:
    runner, fake = start()
    batch = patches(2, 3)
    fake.cuda.fail_next = LaunchError("unspecified launch failure")
    with pytest.raises(EngineError, match="launch failure"):
        runner.infer(batch)
    assert_right(runner.infer(batch), batch)


def _no_memory(fake: FakeTensorRT) -> None:
    fake.no_memory = True


def test_a_lack_of_memory_for_the_weights_is_an_error_of_its_own(start: Open) -> None:
    with pytest.raises(OutOfMemory, match="cannot load the engine"):
        start(prepare=_no_memory)


def test_a_lack_of_memory_for_activations_or_buffers_leaves_nothing_behind(start: Open) -> None:
    runner, fake = start()
    fake.no_memory = True
    with pytest.raises(OutOfMemory, match="execution context"):
        runner.infer(patches(1, 3))
    assert fake.cuda.leaks() == []
    fake.no_memory = False
    fake.cuda.memory = 2 * 4 * CHANNELS * int(np.prod(PATCHES[3])) + 4  # room for the input, and 4 bytes
    with pytest.raises(OutOfMemory, match="GPU has no memory left"):
        runner.infer(patches(1, 3))
    assert fake.cuda.leaks() == []
    fake.cuda.memory = 1 << 30
    assert_right(runner.infer(patches(1, 3)), patches(1, 3))


@pytest.mark.parametrize("left", [0, 1])
def test_a_lack_of_page_locked_memory_is_told_and_the_next_call_works(left: int, start: Open) -> None:
    runner, fake = start()
    assert_right(runner.infer(patches(1, 3)), patches(1, 3))
    fake.cuda.allocations_left, fake.cuda.recovers = left, True
    with pytest.raises(OutOfMemory, match="GPU has no memory left"):
        runner.infer(patches(9, 3))
    assert_right(runner.infer(patches(9, 3)), patches(9, 3))


# --- plans that do not fit


def test_a_plan_that_tensorrt_does_not_load_is_told_with_its_reason(start: Open, tmp_path: Path) -> None:
    runner, _ = start("tensorrt")
    record = device_record("tensorrt", b"nonsense")
    with pytest.raises(EngineError, match="magicTag"):
        open_runner(record, write_plan(tmp_path / "y.engine", b"nonsense"))
    assert runner.describe()


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"dtypes": ["HALF", "FLOAT"]}, "inputs do not fit"),
        ({"dtypes": ["FLOAT", "HALF"]}, "outputs do not fit"),
        ({"dtypes": ["FLOAT", "FLOAT", "FLOAT"]}, "outputs do not fit"),
        ({"shapes": [[-1, CHANNELS + 1, 8, 6, 10], [-1, HEADS, 8, 6, 10]]}, "input shape"),
        ({"shapes": [[-1, CHANNELS, 8, 6, 10], [-1, HEADS, 8, 6, 12]]}, "no map over its patch"),
        ({"profile": [[1, CHANNELS, 8, 6, 10]] * 3}, "profile"),
        ({"profile": [[n, CHANNELS, 8, 6, 10] for n in (1, 2, 4)]}, "profile"),
    ],
)
def test_a_plan_with_other_ports_than_the_record_is_refused(plan: Any, words: str, start: Open) -> None:
    with pytest.raises(EngineError, match=words):
        start(plan=plan)


def test_rtx_judges_the_header_itself_where_there_is_a_driver(start: Open) -> None:
    def invalid(fake: FakeTensorRT) -> None:
        fake.validity = (2, 2 | 4)

    def suboptimal(fake: FakeTensorRT) -> None:
        fake.validity = (1, 16)

    with pytest.raises(EngineError, match="does not run this engine") as caught:
        start(prepare=invalid)
    assert caught.value.got == "UNSUPPORTED_CC, OLD_CUDA_DRIVER"
    runner, _ = start(prepare=suboptimal)
    assert runner.describe().details["note.validity"] == "suboptimal: INSUFFICIENT_GPU_MEMORY"


@pytest.mark.parametrize(
    ("backend", "device", "options", "capability", "fits"),
    [
        ("tensorrt-rtx", {"capabilities": "86,89"}, {}, "8.6", True),
        ("tensorrt-rtx", {"capabilities": "86,89"}, {}, "9.0", False),
        ("tensorrt-rtx", {"capabilities": "89,120"}, {}, "12.0", True),
        ("tensorrt-rtx", {"capabilities": "120"}, {}, "12.1", False),
        ("tensorrt-rtx", {"capabilities": "current", "gpu": "Test GPU", "capability": "8.6"}, {}, "8.6", True),
        ("tensorrt-rtx", {"capabilities": "current", "gpu": "Test GPU", "capability": "8.6"}, {}, "8.9", False),
        ("tensorrt-rtx", {"capabilities": "current"}, {}, "8.6", False),
        ("tensorrt-rtx", {"capabilities": "all"}, {}, "9.0", True),  # TensorRT-RTX judges it itself
        ("tensorrt", {"capability": "9.0"}, {}, "9.0", True),
        ("tensorrt", {"capability": "9.0"}, {}, "10.0", False),
        ("tensorrt", {"capability": "8.0"}, {}, "8.6", False),
        ("tensorrt", {"capability": "8.0"}, {"hardware_compatibility": "ampere+"}, "12.0", True),
        ("tensorrt", {"capability": "8.6"}, {"hardware_compatibility": "ampere+"}, "8.0", True),
        ("tensorrt", {"capability": "8.0"}, {"hardware_compatibility": "ampere+"}, "7.5", False),
        ("tensorrt", {"capability": "8.6"}, {"hardware_compatibility": "sameComputeCapability"}, "8.6", True),
        ("tensorrt", {"capability": "8.6"}, {"hardware_compatibility": "sameComputeCapability"}, "8.9", False),
        ("tensorrt", {"capability": "8.6"}, {"hardware_compatibility": "turing"}, "8.6", False),
        ("tensorrt", {}, {}, "8.6", False),
        ("tensorrt-rtx", {}, {}, "8.6", False),
    ],
)
def test_an_engine_runs_on_the_gpus_that_it_was_built_for(
    backend: str, device: dict[str, str], options: dict[str, Any], capability: str, fits: bool
) -> None:
    record = device_record(backend, b"", device=device, options=options)
    if fits:
        assert check_gpu(record, name="Test GPU", capability=capability) == {}
    else:
        with pytest.raises(EngineError):
            check_gpu(record, name="Test GPU", capability=capability)


def test_another_model_of_the_same_capability_is_noted(start: Open) -> None:
    runner, _ = start("tensorrt", device={"gpu": "RTX 3090", "capability": "8.6", "driver": "13.0"})
    assert "RTX 3090" in runner.describe().details["note.gpu"]


def test_the_wrong_gpu_is_refused_before_the_plan_is_loaded(start: Open) -> None:
    fakes: list[FakeTensorRT] = []
    with pytest.raises(EngineError, match="not built for this GPU") as caught:
        start(gpu=Cuda(capability=(9, 0)), prepare=fakes.append)
    assert "--backend tensorrt-rtx" in str(caught.value)
    assert fakes[0].twin.calls == []


@pytest.mark.parametrize(
    ("backend", "built", "here", "compatible", "differs"),
    [
        ("tensorrt", "10.16.1.11", "10.16.1.11", False, None),
        ("tensorrt", "10.16.1.11", "10.16.1.12", False, "version"),
        ("tensorrt", "10.16.1.11", "11.4.0.106", False, "flavour"),
        ("tensorrt", "10.16.1.11", "11.4.0.106", True, None),
        ("tensorrt", "10.9.0.34", "10.16.1.11", True, None),  # 9 is older than 16
        ("tensorrt", "10.16.1.11", "10.9.0.34", True, "version"),
        ("tensorrt", "11.4.0.106", "10.16.1.11", True, "version"),
        ("tensorrt", "10.16.1.11", "12.0.0.1", True, "version"),
        ("tensorrt-rtx", "1.7.1.116", "1.7.1.117", False, "version"),
        ("tensorrt-rtx", "1.7.1.116", "1.7.1.117", True, "version"),
        ("tensorrt-rtx", "1.7.1.116", "2.0.0.1", False, "flavour"),
        ("tensorrt", "10.x", "10.16.1.11", True, "not made of numbers"),
        ("tensorrt", "10.13.3.9.post1", "10.13.3.9.post1", True, None),
        ("tensorrt", "10.9.0.34", "10.13.3.9.post1", True, None),
        ("tensorrt", "10.13.3.9.post1", "10.9.0.34", True, "version"),
        ("tensorrt", "10.13.3.9", "10.13.3.9.post1", False, None),  # another package of the same TensorRT
        ("tensorrt", "10.13.3.9.post1", "10.13.3.10", False, "version"),
        ("tensorrt", "10.13.3.9", "10.13.3.9-2", False, "not made of numbers"),
    ],
)
def test_an_engine_runs_in_the_versions_that_can(
    backend: str, built: str, here: str, compatible: bool, differs: str | None
) -> None:
    record = replace(
        device_record(backend, b"", options={"version_compatible": compatible}),
        version=built, flavour=f"{backend}-{built.partition('.')[0]}",
    )  # fmt: skip
    if differs is None:
        check_version(record, flavour=f"{backend}-{here.partition('.')[0]}", version=here)
        return
    with pytest.raises(EngineError, match=differs):
        check_version(record, flavour=f"{backend}-{here.partition('.')[0]}", version=here)


# --- the runtime cache


def _kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "runtime").glob("*"))


def test_compiled_kernels_are_kept_and_given_to_the_next_run(start: Open, tmp_path: Path) -> None:
    runner, fake = start()
    assert "new" in runner.describe().details["runtime cache"]
    runner.close()
    (path,) = _kept(tmp_path)
    before = path.stat()
    again, fake = start()
    assert fake.taken_caches == [b"kernels"]
    again.close()
    assert path.stat().st_ino == before.st_ino, "an unchanged cache is not written again"
    more, _ = start(prepare=lambda fake: setattr(fake, "compiled", b"more kernels"))
    more.close()
    assert start()[1].taken_caches == [b"more kernels"]


def test_the_cache_of_another_engine_or_gpu_is_not_taken(start: Open, tmp_path: Path) -> None:
    for options in ({}, {"gpu": Cuda(capability=(8, 9))}, {"gpu": Cuda(name="Other")}, {"batches": (1, 1, 1)}):
        runner, fake = start(**options)  # type: ignore[arg-type]
        runner.close()
        assert fake.taken_caches == []
    assert len(_kept(tmp_path)) == 4


def test_the_cache_of_another_version_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT-RTX would refuse it, and each version would throw away what the other one compiled."""
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path))
    same: dict[str, Any] = {"engine": "e", "gpu": "g", "capability": "8.6"}
    paths = {kept_cache(version=version, **same).path for version in ("1.7.1.116", "1.7.1.117", "1.7.1.116")}
    assert len(paths) == 2


@pytest.mark.parametrize("compiled", [b"", None])
def test_a_cache_without_content_replaces_none(compiled: bytes | None, start: Open, tmp_path: Path) -> None:
    start()[0].close()
    (path,) = _kept(tmp_path)
    before = path.read_bytes()
    runner, fake = start(prepare=lambda fake: setattr(fake, "compiled", compiled))
    runner.infer(patches(1, 3))
    if compiled is None:  # TensorRT-RTX failed to write it
        with pytest.warns(RuntimeWarning, match="no compiled kernels"):
            runner.close()
    else:
        runner.close()
    assert fake.leaks() == []
    assert fake.cuda.leaks() == []
    assert path.read_bytes() == before, "what was compiled earlier stays"


def test_kept_kernels_are_bounded_and_strays_go(start: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start()[0].close()
    (first,) = _kept(tmp_path)
    stray = first.parent / ".trtbuild-x.partial.kernels"
    stray.write_bytes(b"of a killed process")
    os.utime(first, (1, 1))
    start()[0].close()
    assert first.stat().st_mtime > 1, "what is used is not the next to go"
    monkeypatch.setattr("trtbuild.runtime.runtime_cache.LIMIT", first.stat().st_size)
    start(gpu=Cuda(name="Other"))[0].close()
    (left,) = _kept(tmp_path)
    assert left != first


def test_kernels_that_another_user_planted_are_not_taken(
    start: Open, tmp_path: Path, foreign: Callable[[Path], None]
) -> None:
    start()[0].close()
    (path,) = _kept(tmp_path)
    before = path.read_bytes()
    foreign(path)
    runner, fake = start(prepare=lambda fake: setattr(fake, "compiled", b"others"))
    assert "belongs to another user" in runner.describe().details["runtime cache"]
    assert_right(runner.infer(patches(1, 3)), patches(1, 3))
    runner.close()
    assert fake.taken_caches == []
    assert path.read_bytes() == before


def test_without_a_home_folder_the_engine_runs_all_the_same(start: Open, homeless: None) -> None:
    runner, _ = start(cache=None)
    assert runner.describe().details["runtime cache"].startswith("none:")
    assert "TRTBUILD_CACHE" in runner.describe().details["runtime cache"]
    assert_right(runner.infer(patches(1, 3)), patches(1, 3))


def test_a_refused_or_damaged_cache_is_made_anew_and_told(start: Open, tmp_path: Path) -> None:
    start()[0].close()
    runner, _ = start(prepare=lambda fake: setattr(fake, "cache_fits", False))
    assert "refused" in runner.describe().details["runtime cache"]
    batch = patches(1, 3)
    assert_right(runner.infer(batch), batch)
    runner.close()
    (path,) = _kept(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    runner, fake = start()
    assert "damaged" in runner.describe().details["runtime cache"]
    runner.close()
    assert fake.taken_caches == []
    assert start()[1].taken_caches == [b"kernels"]


def test_without_a_cache_folder_the_engine_runs_all_the_same(start: Open, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in the way")
    runner, _ = start()
    assert runner.describe().details["runtime cache"].startswith("none:")
    assert_right(runner.infer(patches(1, 3)), patches(1, 3))


def test_a_cache_that_cannot_be_written_is_a_warning(start: Open, tmp_path: Path) -> None:
    runner, fake = start()
    (tmp_path / "cache" / "runtime").rmdir()
    with pytest.warns(RuntimeWarning, match="not kept"):
        runner.close()
    assert fake.cuda.leaks() == []


# --- for real: engines that TensorRT-RTX builds, on a machine without a GPU


@pytest.fixture(scope="module")
def built() -> tuple[BuildRecord, bytes]:
    """The small network's engine, and its record."""
    rtx = nvinfer("tensorrt-rtx")
    shape = (CHANNELS, *PATCHES[3])
    shapes = {"input": ((1, *shape), (2, *shape), (2, *shape))}
    model = small_unet(3).SerializeToString()
    plan = plan_from_onnx(model, nvinfer=rtx, config=TensorRTConfig(max_batch=2), shapes=shapes)
    return device_record("tensorrt-rtx", plan.content, device={"capabilities": "all"}), plan.content


without_gpu = pytest.mark.skipif(no_driver() is None, reason="tells what happens without an NVIDIA driver")


@without_gpu
def test_a_good_engine_without_a_driver_gets_one_message(built: tuple[BuildRecord, bytes], tmp_path: Path) -> None:
    record, content = built
    with pytest.raises(EngineError, match="no NVIDIA driver") as caught:
        open_runner(record, write_plan(tmp_path / "x.engine", content))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("change", ["cut", "empty", "one byte", "one byte more", "another build"])
def test_an_engine_that_is_not_the_built_one_is_refused_first(
    change: str, built: tuple[BuildRecord, bytes], tmp_path: Path
) -> None:
    record, content = built
    middle = len(content) // 2
    altered = {
        "cut": content[:middle],
        "empty": b"",
        "one byte": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "one byte more": content + b"\0",
        "another build": bytes(len(content)),
    }[change]
    with pytest.raises(EngineError, match="cut off or altered") as caught:
        open_runner(record, write_plan(tmp_path / "x.engine", altered))
    assert hashlib.sha256(content).hexdigest() in str(caught.value.expected)
    assert f"{len(altered)} bytes" in str(caught.value.got)
    assert "x.engine" in str(caught.value.where)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"version": "1.6.0.1"}, "version"),
        ({"version": "1.7.1.115"}, "version"),
        ({"flavour": "tensorrt-rtx-2"}, "flavour"),
    ],
)
def test_an_engine_of_another_version_is_refused_with_the_field(
    changes: dict[str, str], field: str, built: tuple[BuildRecord, bytes], tmp_path: Path
) -> None:
    record, content = built
    with pytest.raises(EngineError, match=f"the {field} differs") as caught:
        open_runner(replace(record, **changes), write_plan(tmp_path / "x.engine", content))  # type: ignore[arg-type]
    assert caught.value.expected == next(iter(changes.values()))
    assert getattr(record, field) in str(caught.value.got)
    assert "trtbuild compile BUNDLE --backend tensorrt-rtx" in str(caught.value.hint)


def test_the_loaded_module_has_the_last_word_on_the_version(start: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    version = facts_of("rtx")["version"]
    monkeypatch.setattr("trtbuild.runtime.tensorrt.installed_version", lambda backend: version)
    with pytest.raises(EngineError, match="version differs") as caught:
        start(prepare=lambda fake: setattr(fake.twin, "__version__", "1.6.0.1"))
    assert caught.value.got == "1.6.0.1, installed here"


@pytest.mark.parametrize("value", [None, 5, True])
def test_a_record_without_a_hash_is_refused(value: Any, built: tuple[BuildRecord, bytes], tmp_path: Path) -> None:
    record, content = built
    options = {**record.options, "sha256": value} if value is not None else {}
    with pytest.raises(EngineError, match=r"options\.sha256"):
        open_runner(replace(record, options=options), write_plan(tmp_path / "x.engine", content))


@pytest.mark.parametrize("what", ["nothing", "a folder"])
def test_no_file_at_all_is_named(what: str, built: tuple[BuildRecord, bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.engine"
    if what == "a folder":
        path.mkdir()
    with pytest.raises(EngineError, match="missing or cannot be read") as caught:
        open_runner(built[0], path)
    assert caught.value.where == path


def test_a_flavour_that_is_not_installed_is_told_with_its_extra(
    built: tuple[BuildRecord, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, content = built
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(MissingExtra, match=r"trtbuild\[rtx\]"):
        open_runner(record, write_plan(tmp_path / "x.engine", content))


@without_gpu
def test_without_a_driver_neither_opening_nor_choosing_loads_tensorrt(
    built: tuple[BuildRecord, bytes], tmp_path: Path
) -> None:
    write_plan(tmp_path / "x.engine", built[1])
    code = """
import sys
from pathlib import Path
from fake_nvinfer import device_record
from trtbuild.errors import EngineError
from trtbuild.runtime.select import available_backends, choose_backend, open_runner
for call in (available_backends, lambda: choose_backend("auto"), lambda: choose_backend("tensorrt-rtx"),
             lambda: open_runner(device_record("tensorrt-rtx", Path("x.engine").read_bytes()), Path("x.engine"))):
    try:
        call()
    except EngineError as error:
        assert "no NVIDIA driver" in str(error), error
print([name for name in ("tensorrt", "tensorrt_rtx", "pycuda") if name in sys.modules])
"""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True,
                            check=False)  # fmt: skip
    assert (result.stdout.strip(), result.stderr) == ("[]", "")


# --- choosing


@without_gpu
def test_without_a_driver_auto_takes_a_cpu_and_says_why_in_few_words() -> None:
    choice = choose_backend("auto")
    assert choice.name == "openvino"
    assert [name for name, _ in choice.refused] == ["tensorrt", "tensorrt-rtx"]
    assert all("no NVIDIA driver" in reason and len(reason) < 100 for _, reason in choice.refused)
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        choose_backend("tensorrt-rtx")


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_with_a_driver_auto_takes_the_first_flavour_that_is_installed(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = install(monkeypatch, backend)
    monkeypatch.setattr("trtbuild.runtime.tensorrt.find_spec", lambda name: None)  # of the other flavour
    choice = choose_backend("auto")
    assert choice.name == backend
    status = {each.name: each for each in available_backends()}
    assert status[backend].version == fake.twin.__version__
    assert fake.twin.calls == []


def test_without_pycuda_no_flavour_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt-rtx")
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(MissingExtra, match=r"trtbuild\[gpu\]"):
        choose_backend("tensorrt-rtx")
    assert choose_backend("auto").name == "openvino"
