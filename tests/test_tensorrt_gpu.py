"""TensorRT's engines of one Gpu: one memory for all their activations, CUDA graphs, and whole cases through them."""

from __future__ import annotations

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bindings_facts import VERSIONS, facts_of
from device_samples import PLAIN, assert_same, check_unharmed
from fake_cuda import CUBIN, Cuda, LaunchError
from fake_kernels import give_kernels
from fake_nvinfer import ACTIVATIONS, SCRATCH, FakeTensorRT, device_record, install, plan_of, write_plan
from numpy.typing import NDArray
from runner_samples import CHANNELS, HEADS, PATCHES, patches, reference_logits
from test_tiles import image

from trtbuild.errors import EngineError, OutOfMemory
from trtbuild.runtime import Member, Prediction, Settings
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu.case import prediction_on_device
from trtbuild.runtime.gpu.shared import Gpu, engine_from_runner, opened_gpu
from trtbuild.runtime.predictor import Clock, prediction_from_prepared
from trtbuild.runtime.tensorrt import TensorRTRunner, open_tensorrt
from trtbuild.spec import BuildRecord, Memory, NoNormalization
from trtbuild.volume import prepared_from_array

TEN, ELEVEN = VERSIONS
FLAVOURS = [("tensorrt", TEN), ("tensorrt", ELEVEN), ("tensorrt-rtx", "rtx")]
STREAMED = {"weight_streaming": True}
"""Options of an engine that takes more memory for its activations."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """A fake GPU with one flavour of TensorRT; `opened` gives a runner, which is closed before the Gpu."""

    gpu: Gpu
    cuda: Cuda
    fake: FakeTensorRT
    record: BuildRecord
    opened: Callable[..., TensorRTRunner]


@contextmanager
def place(folder: Path, backend: str = "tensorrt", version: str = TEN, batches: Any = (1, 3, 3)) -> Iterator[Place]:
    """Looks at the GPU afterwards."""
    cuda = Cuda(memory=1 << 26)
    give_kernels(cuda)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTBUILD_CACHE", str(folder / "cache"))
        fake = install(patch, backend, cuda=cuda, version=version)
        content = plan_of(3, batches)
        record = device_record(backend, content, batches=batches)
        real = facts_of(version)["version"]
        record = replace(record, version=real, flavour=f"{backend}-{real.partition('.')[0]}")
        path = write_plan(folder / "x.engine", content)
        with opened_device() as device:
            with opened_gpu(device, CUBIN, 1 << 10) as gpu, ExitStack() as stack:

                def opened(**options: Any) -> TensorRTRunner:
                    runner = open_tensorrt(replace(record, options=record.options | options), path, gpu=gpu)
                    stack.callback(runner.close)
                    return runner

                yield Place(gpu=gpu, cuda=cuda, fake=fake, record=record, opened=opened)
                assert cuda.execs == {}
            assert cuda.live == {}, "it goes with the Gpu"
        gc.collect()
        assert fake.leaks() == []
    check_unharmed(cuda)


@pytest.fixture(params=FLAVOURS, ids=lambda flavour: flavour[1])
def flavour(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path, *request.param) as one:
        yield one


@pytest.fixture
def ten(tmp_path: Path) -> Iterator[Place]:
    with place(tmp_path) as one:
        yield one


@pytest.fixture
def few_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtbuild.runtime.gpu.graph.REPLAYS", 2)


def shared_buffers(one: Place) -> list[int]:
    """Sizes of what is allocated now, but for inputs and outputs."""
    return sorted(each.size for each in one.cuda.live.values())


@contextmanager
def tensors(one: Place, count: int) -> Iterator[tuple[NDArray[np.float32], int, int, Callable[[], Any]]]:
    """A batch on the GPU, its address, that of room for its logits, and what gives them back."""
    batch, device = patches(count, 3), one.gpu.device
    source, target = device.buffer(batch.nbytes), device.buffer(4 * count * HEADS * int(np.prod(PATCHES[3])))
    logits = np.empty((count, HEADS, *PATCHES[3]), np.float32)

    def result() -> NDArray[np.float32]:
        one.gpu.download(logits, target)
        return logits

    one.gpu.upload(source, batch)
    try:
        yield batch, source.address, target.address, result
    finally:
        one.gpu.stream.synchronize()
        source.close()
        target.close()


def enqueued(one: Place, runner: TensorRTRunner, count: int = 2) -> tuple[Any, Any]:
    """Logits and what they should be."""
    with tensors(one, count) as (batch, source, target, result):
        runner.enqueue(source, target, one.gpu.stream.handle, count)
        return result().copy(), reference_logits(batch)


def assert_right(logits: Any, want: Any) -> None:
    assert np.abs(logits - want).max() <= 1e-6 * np.abs(want).max()  # one rounding to float32


# --- one memory for activations


def test_all_engines_of_a_gpu_compute_in_one_memory(flavour: Place) -> None:
    runners = [flavour.opened() for _ in range(3)]
    assert shared_buffers(flavour) == [], "nothing is taken before the first call"
    for runner in (*runners, runners[0]):
        assert_right(*enqueued(flavour, runner))
        assert shared_buffers(flavour) == [ACTIVATIONS]
    strategy = flavour.fake.twin.ExecutionContextAllocationStrategy.USER_MANAGED
    name = "IRuntimeConfig.set_execution_context_allocation_strategy"
    assert flavour.fake.twin.of(name) == [{"strategy": strategy}] * 3
    given = flavour.fake.twin.of("IExecutionContext.set_device_memory")
    assert [call["size"] for call in given] == [ACTIVATIONS] * 3
    assert len({call["memory"] for call in given}) == 1


def test_the_binding_is_asked_for_nothing_that_it_lacks(flavour: Place) -> None:
    enqueued(flavour, flavour.opened())
    rtx = {"ComputeCapability", "IRuntimeCache", "Runtime.get_engine_validity"}
    assert set(flavour.fake.twin.missing) <= rtx


def test_rtx_gives_the_same_kernels_to_both_kinds_of_context(tmp_path: Path) -> None:
    with place(tmp_path, "tensorrt-rtx", "rtx") as one:
        runner = one.opened()
        enqueued(one, runner)
        runner.infer(patches(1, 3))
        graphs = one.fake.twin.of("IRuntimeConfig.cuda_graph_strategy")
        assert [call["value"].name for call in graphs] == ["WHOLE_GRAPH_CAPTURE"] * 2
        kernels = one.fake.twin.of("IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy")
        assert [call["value"].name for call in kernels] == ["EAGER"] * 2
        assert len(one.fake.twin.of("IRuntimeConfig.set_runtime_cache")) == 2


def test_the_planner_counts_the_memory_once_and_only_what_is_missing(ten: Place) -> None:
    assert ten.gpu.activations([]) == 0
    record = replace(ten.record, memory=Memory(host=None, device_per_batch={"3": 1 << 20}, measured=True))
    engines = [engine_from_runner(ten.opened(), record) for _ in range(3)]
    assert [engine.activations for engine in engines] == [0, 0, 0]
    assert ten.gpu.activations(engines) == ACTIVATIONS
    enqueued(ten, engines[1].runner)  # type: ignore[arg-type]
    assert ten.gpu.activations(engines) == 0
    ten.opened(**STREAMED)
    assert ten.gpu.activations(engines) == SCRATCH, "the old one is given back before"


def test_the_memory_grows_for_a_larger_engine_when_nothing_is_under_way(ten: Place) -> None:
    small = ten.opened()
    with tensors(ten, 2) as (batch, source, target, result):
        stream = ten.gpu.stream.handle
        small.enqueue(source, target, stream, 2)
        large = ten.opened(**STREAMED)
        for runner in (large, small, large):
            runner.enqueue(source, target, stream, 2)  # the fake tells of memory that is freed under work
            assert_right(result(), reference_logits(batch))
    assert shared_buffers(ten) == [ACTIVATIONS + SCRATCH]


def test_a_smaller_engine_that_is_opened_later_changes_nothing(ten: Place) -> None:
    large, small = ten.opened(**STREAMED), ten.opened()
    assert ten.gpu.activations([]) == ACTIVATIONS + SCRATCH
    for runner in (large, small):
        assert_right(*enqueued(ten, runner))
    assert shared_buffers(ten) == [ACTIVATIONS + SCRATCH]


def test_memory_that_grows_takes_the_graphs_with_it(ten: Place, few_replays: None) -> None:
    """They hold its address; the fake tells of memory that goes before them."""
    small = engine_from_runner(ten.opened(), ten.record)
    with tensors(ten, 2) as (batch, source, target, result):
        for _ in range(3):
            ten.gpu.run(small, source, target, 2, calls=3)
        assert len(ten.cuda.execs) == 1
        large = engine_from_runner(ten.opened(**STREAMED), ten.record)
        for engine in (large, small):
            ten.gpu.run(engine, source, target, 2)
            assert_right(result(), reference_logits(batch))
        ten.gpu.graphs.clear()


def test_an_engine_without_activations_gets_an_address_all_the_same(ten: Place) -> None:
    ten.fake.activations = 0
    assert_right(*enqueued(ten, ten.opened()))


def test_each_batch_has_a_context_of_its_own(ten: Place) -> None:
    """TensorRT sets up anew what depends on a shape, and a graph holds for a context that nobody changes."""
    runner = ten.opened()
    for count in (1, 2, 3, 2, 1):
        assert_right(*enqueued(ten, runner, count))
    assert len(ten.fake.twin.of("ICudaEngine.create_execution_context")) == 3
    assert shared_buffers(ten) == [ACTIVATIONS]


def test_on_another_stream_an_engine_has_activations_of_its_own(ten: Place) -> None:
    """The fake tells of one memory in which two streams compute at once."""
    runner = ten.opened()
    with tensors(ten, 2) as (batch, source, target, result):
        other = ten.gpu.device.stream()
        runner.enqueue(source, target, ten.gpu.stream.handle, 2)
        with tensors(ten, 2) as (_, source2, target2, result2):
            runner.enqueue(source, target, ten.gpu.stream.handle, 2)
            runner.enqueue(source2, target2, other.handle, 2)
            other.synchronize()
            assert_right(result2(), reference_logits(batch))
        assert_right(result(), reference_logits(batch))
        runner.close()
        other.close()
    assert len(ten.fake.twin.of("IExecutionContext.set_device_memory")) == 1


def test_the_host_path_of_the_same_runner_goes_on_beside_it(flavour: Place) -> None:
    runner, batch = flavour.opened(), patches(2, 3)
    assert_right(*enqueued(flavour, runner))
    assert_right(runner.infer(batch), reference_logits(batch))
    assert_right(*enqueued(flavour, runner))
    assert len(flavour.fake.twin.of("IExecutionContext.set_device_memory")) == 1


def test_no_memory_for_activations_is_an_error_and_the_next_call_tries_again(ten: Place) -> None:
    runner = ten.opened()
    with tensors(ten, 2) as (batch, source, target, result):
        ten.cuda.allocations_left, ten.cuda.recovers = 0, True
        with pytest.raises(OutOfMemory, match="no memory left"):
            runner.enqueue(source, target, ten.gpu.stream.handle, 2)
        assert ten.gpu.activations([]) == ACTIVATIONS
        runner.enqueue(source, target, ten.gpu.stream.handle, 2)
        assert_right(result(), reference_logits(batch))


def test_no_memory_to_grow_leaves_none_and_the_next_call_tries_again(ten: Place) -> None:
    small = ten.opened()
    enqueued(ten, small)
    large = ten.opened(**STREAMED)
    with tensors(ten, 2) as (batch, source, target, result):
        ten.cuda.allocations_left, ten.cuda.recovers = 0, True
        with pytest.raises(OutOfMemory):
            large.enqueue(source, target, ten.gpu.stream.handle, 2)
        assert ten.gpu.activations([]) == ACTIVATIONS + SCRATCH
        for runner in (small, large):
            runner.enqueue(source, target, ten.gpu.stream.handle, 2)
            assert_right(result(), reference_logits(batch))


def test_work_that_failed_is_told_before_the_memory_grows(ten: Place) -> None:
    small = ten.opened()
    enqueued(ten, small)
    with tensors(ten, 2) as (_, source, target, _):
        small.enqueue(source, target, ten.gpu.stream.handle, 2)
        large = ten.opened(**STREAMED)
        ten.cuda.fail_next = LaunchError("an illegal memory access was encountered")
        with pytest.raises(EngineError, match="illegal memory access"):
            large.enqueue(source, target, ten.gpu.stream.handle, 2)
    assert shared_buffers(ten) == [ACTIVATIONS]


def test_memory_that_tensorrt_refuses_is_an_error_in_its_words(ten: Place) -> None:
    ten.fake.twin.answers["ICudaEngine.device_memory_size_v2"] = ACTIVATIONS - 1
    with pytest.raises(EngineError, match=f"{ACTIVATIONS} are needed"):
        enqueued(ten, ten.opened())


def test_a_config_that_rtx_refuses_is_made_anew_the_next_time(tmp_path: Path) -> None:
    with place(tmp_path, "tensorrt-rtx", "rtx") as one:
        runner = one.opened()
        one.fake.twin.answers["IRuntimeConfig.set_runtime_cache"] = False
        with pytest.raises(EngineError, match="refused a runtime cache"):
            enqueued(one, runner)
        one.fake.twin.answers["IRuntimeConfig.set_runtime_cache"] = True
        assert_right(*enqueued(one, runner))
        given = one.fake.twin.of("IRuntimeConfig.set_runtime_cache")
        assert len(given) == 3, "of the runner, refused, and of the next try"


def test_the_memory_goes_with_the_gpu_after_the_engines(ten: Place) -> None:
    runner = ten.opened()
    enqueued(ten, runner)
    runner.close()
    assert shared_buffers(ten) == [ACTIVATIONS]


def test_an_engine_that_cannot_be_opened_leaves_the_gpu_as_it_is(ten: Place) -> None:
    ten.fake.no_memory = True
    with pytest.raises(OutOfMemory, match="cannot load"):
        ten.opened()
    ten.fake.no_memory = False
    assert ten.gpu.activations([]) == 0
    assert_right(*enqueued(ten, ten.opened()))


# --- CUDA graphs, and whole cases


SPEC = replace(PLAIN, patch=PATCHES[3], channels=("T1", "T2"), normalization=(NoNormalization(),) * CHANNELS)


def on_both(one: Place, *, folds: int = 2, **options: Any) -> tuple[Prediction, Prediction, list[str]]:
    """A case on the GPU and on the host, by the same engines; and what was reported."""
    runners = tuple(one.opened(**options) for _ in range(folds))
    record = replace(one.record, options=one.record.options | options)
    engines = [engine_from_runner(runner, record) for runner in runners]
    prepared = prepared_from_array(image((CHANNELS, 17, 14, 22)), (1.0, 1.0, 1.0), SPEC)
    member, notes = Member(spec=SPEC, runners=runners, mirror_axes=(1,)), list[str]()
    expected = prediction_from_prepared(prepared, member, Settings(), None, Clock())
    found = prediction_on_device(prepared, member, Settings(), engines, one.gpu, None, notes.append, Clock())
    return found, expected, notes


def test_a_case_through_tensorrt_has_the_labels_of_the_host_path(flavour: Place, few_replays: None) -> None:
    """TensorRT's calls are captured, and TensorRT-RTX captures them by itself."""
    found, expected, notes = on_both(flavour)
    assert_same(found, expected)
    assert notes == []
    assert (count(flavour, "cuGraphLaunch") > 0) is (flavour.record.backend == "tensorrt")


def test_an_engine_that_streams_its_weights_is_not_captured(ten: Place, few_replays: None) -> None:
    assert_same(*on_both(ten, **STREAMED)[:2])
    assert count(ten, "cuStreamBeginCapture") == 0


@pytest.mark.filterwarnings("error")
def test_graphs_serve_case_after_case(ten: Place, few_replays: None) -> None:
    assert_same(*on_both(ten)[:2])
    first = count(ten, "cuGraphInstantiate")
    assert first >= 2, "one for each fold"
    assert_same(*on_both(ten)[:2])
    assert count(ten, "cuGraphInstantiate") == 2 * first, "each case has memory of its own"


def test_a_capture_that_tensorrt_refuses_costs_a_warning_and_no_label(ten: Place, few_replays: None) -> None:
    ten.fake.refuses_capture = True
    found, expected, notes = on_both(ten)
    assert_same(found, expected)
    assert len(notes) == 1
    assert re.match("No CUDA graph .*when stream is capturing", notes[0])
    assert count(ten, "cuStreamBeginCapture") == 1
    assert count(ten, "cuGraphLaunch") == 0


def test_a_runner_that_no_gpu_was_given_shares_and_captures_nothing(ten: Place, tmp_path: Path) -> None:
    with open_tensorrt(ten.record, tmp_path / "x.engine") as runner:
        assert isinstance(runner, TensorRTRunner)
        assert (runner.shares_memory, runner.capturable) == (False, False)
        assert_right(*enqueued(ten, runner))
    assert ten.fake.twin.of("IExecutionContext.set_device_memory") == []


def count(one: Place, function: str) -> int:
    """Calls of the driver's for graphs."""
    return one.cuda.graph_calls.count(function)
