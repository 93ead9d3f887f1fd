"""ONNX Runtime's CUDA provider, on a fake GPU: the contract of every runner, and what is particular to it.

Whether a real provider takes these calls is for tests/test_gpu_runners.py; here the calls are held to the signatures
of the installed onnxruntime, and what it refuses without a GPU is the real one's doing.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import numpy as np
import pytest
from fake_cuda import CUBIN, Cuda
from fake_onnxruntime import CPU, CUDA, ON_CPU, WEIGHTS, Fail, Failure, FakeOnnxruntime, install
from runner_contract import contract_of
from runner_samples import CHANNELS, HEADS, PATCHES, make_record, patches, reference_logits, small_unet, write_model
from test_runners import Subject

from trtbuild.errors import EngineError, OutOfMemory, PrecisionMismatch
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu
from trtbuild.runtime.onnxruntime_cuda import OnnxRuntimeCudaRunner, open_onnxruntime_cuda, usable_version
from trtbuild.runtime.onnxruntime_lanes import DeviceBatches
from trtbuild.runtime.runner import Runner
from trtbuild.spec import BuildRecord

SUBJECT = Subject("onnxruntime-cuda", "f32", 3e-6)
SMALL = 1 << 12
Open = Callable[..., Runner]

globals().update(contract_of([SUBJECT]))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {n: write_model(folder / f"small_{n}d.onnx", small_unet(n)) for n in (2, 3)}


@pytest.fixture
def ort(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeOnnxruntime]:
    """The fake, which must be as it was after the test."""
    module = install(monkeypatch)
    yield module
    gc.collect()
    assert not module.sessions
    assert module.cuda.faults == []
    assert module.cuda.leaks() == []
    assert module.cuda.stack() == []


def record(dimensions: int = 3, batch: int = 2, precision: Any = "fp32", computed: str = "f32") -> BuildRecord:
    return replace(make_record("onnxruntime-cuda", dimensions, computed, batch=batch), precision=precision)


@pytest.fixture
def start(ort: FakeOnnxruntime, models: dict[int, Path]) -> Iterator[Open]:
    opened: list[Runner] = []

    def start(
        subject: Subject, dimensions: int = 3, threads: int | None = None, batch: int = 2, **ignored: Any
    ) -> Runner:
        opened.append(open_onnxruntime_cuda(record(dimensions, batch), models[dimensions], threads=threads))
        return opened[-1]

    yield start
    for runner in opened:
        runner.close()


@pytest.fixture
def gpu(ort: FakeOnnxruntime) -> Iterator[Gpu]:
    with opened_device() as device, opened_gpu(device, CUBIN, SMALL) as opened:
        yield opened


# --- work that is on the GPU


def enqueued(runner: OnnxRuntimeCudaRunner, gpu: Gpu, batch: Any, dimensions: int = 3) -> Any:
    """Logits by way of `enqueue`, with the device path's own copies before and after it."""
    logits = np.empty((len(batch), HEADS, *PATCHES[dimensions]), dtype=np.float32)
    buffers = [gpu.device.buffer(array.nbytes) for array in (batch, logits)]
    try:
        gpu.upload(buffers[0], batch)
        runner.enqueue(buffers[0].address, buffers[1].address, gpu.stream.handle, len(batch))
        gpu.download(logits, buffers[1])
    finally:
        gpu.stream.synchronize()
        for buffer in buffers:
            buffer.close()
    return logits


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("count", [1, 2])
def test_device_memory_goes_in_and_comes_out(gpu: Gpu, models: dict[int, Path], dimensions: int, count: int) -> None:
    batch = patches(count, dimensions)
    with open_onnxruntime_cuda(record(dimensions), models[dimensions], gpu=gpu) as runner:
        logits = enqueued(runner, gpu, batch, dimensions)
        assert np.abs(logits - reference_logits(batch)).max() <= 3e-6 * np.abs(reference_logits(batch)).max()


def test_a_call_waits_for_nothing(gpu: Gpu, ort: FakeOnnxruntime, models: dict[int, Path]) -> None:
    with open_onnxruntime_cuda(record(), models[3], gpu=gpu) as runner:
        buffers = [gpu.device.buffer(1 << 16) for _ in range(2)]
        gpu.stream.zero(buffers[0], 1 << 16)
        runner.enqueue(buffers[0].address, buffers[1].address, gpu.stream.handle, 1)
        assert len(ort.cuda.streams[gpu.stream.handle].work) == 2, "behind what came before, on the same stream"
        gpu.stream.synchronize()
        for buffer in buffers:
            buffer.close()


def test_the_streams_of_two_engines_are_the_gpus(gpu: Gpu, ort: FakeOnnxruntime, models: dict[int, Path]) -> None:
    with (
        open_onnxruntime_cuda(record(), models[3], gpu=gpu) as one,
        open_onnxruntime_cuda(record(), models[3], gpu=gpu) as other,
    ):
        assert np.array_equal(enqueued(one, gpu, patches(2, 3)), enqueued(other, gpu, patches(2, 3)))
        assert len(ort.cuda.streams) == 1


def test_another_stream_is_refused(gpu: Gpu, models: dict[int, Path]) -> None:
    other = gpu.device.stream()
    with open_onnxruntime_cuda(record(), models[3], gpu=gpu) as runner, pytest.raises(EngineError, match="stream"):
        runner.enqueue(1, 1, other.handle, 1)
    other.close()


@pytest.mark.parametrize("batch", [0, -1, 3])
def test_a_batch_beside_the_records_is_refused(gpu: Gpu, models: dict[int, Path], batch: int) -> None:
    with open_onnxruntime_cuda(record(), models[3], gpu=gpu) as runner:
        with pytest.raises(EngineError, match="profile") as caught:
            runner.enqueue(1, 1, gpu.stream.handle, batch)
        assert caught.value.expected == "1 to 2"


def test_a_closed_runner_takes_no_work(gpu: Gpu, models: dict[int, Path]) -> None:
    runner = open_onnxruntime_cuda(record(), models[3], gpu=gpu)
    runner.close()
    with pytest.raises(EngineError, match="closed"):
        runner.enqueue(1, 1, gpu.stream.handle, 1)


def test_work_from_the_device_takes_no_memory_of_its_own(gpu: Gpu, ort: FakeOnnxruntime, models: Any) -> None:
    before = sum(each.size for each in ort.cuda.live.values())
    with open_onnxruntime_cuda(record(), models[3], gpu=gpu) as runner:
        enqueued(runner, gpu, patches(2, 3))
        assert sum(each.size for each in ort.cuda.live.values()) == before + WEIGHTS


def test_work_that_is_under_way_is_waited_for_before_the_session_goes(gpu: Gpu, models: dict[int, Path]) -> None:
    """The fake GPU tells a session that is closed earlier."""
    buffers = [gpu.device.buffer(1 << 16) for _ in range(2)]
    with open_onnxruntime_cuda(record(), models[3], gpu=gpu) as runner:
        gpu.stream.zero(buffers[0], 1 << 16)
        runner.enqueue(buffers[0].address, buffers[1].address, gpu.stream.handle, 1)
    for buffer in buffers:
        buffer.close()


def test_the_provider_is_opened_for_the_same_bits_and_the_least_memory(start: Open, ort: FakeOnnxruntime) -> None:
    start(SUBJECT)
    (session,) = ort.sessions
    fixed = {"use_tf32": "0", "cudnn_conv_algo_search": "HEURISTIC", "arena_extend_strategy": "kSameAsRequested"}
    assert fixed.items() <= session.options.items()


def test_batches_of_two_threads_use_the_memory_one_after_the_other(gpu: Gpu, models: dict[int, Path]) -> None:
    entered: list[bool] = []
    second = Event()

    def enqueue(source: int, target: int, batch: int) -> None:
        entered.append(True)
        if len(entered) == 1:
            other.start()
            assert not second.wait(0.2), "the other call is in the middle of this one"
        else:
            second.set()

    with open_onnxruntime_cuda(record(), models[3], gpu=gpu) as runner:
        batches = DeviceBatches(gpu.device, gpu.stream, runner.describe(), enqueue)
        other = Thread(target=batches.compute, args=(patches(1, 3), batches.output(1)))
        batches.compute(patches(1, 3), batches.output(1))
        other.join()
        assert second.is_set()
        batches.close()


# --- faults


def test_a_run_that_fails_is_told_and_the_runner_works_on(start: Open, ort: FakeOnnxruntime) -> None:
    runner, batch = start(SUBJECT), patches(2, 3)
    want = runner.infer(batch).copy()
    ort.script.fail_run = Failure("CUDNN failure 5000: CUDNN_STATUS_EXECUTION_FAILED")
    with pytest.raises(EngineError, match="CUDNN_STATUS") as caught:
        runner.infer(batch)
    assert not isinstance(caught.value, OutOfMemory)
    assert isinstance(caught.value.__cause__, Failure)
    assert np.array_equal(runner.infer(batch), want)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);",
        "Failed to allocate memory for requested buffer of size 268435456",
        "CUDNN failure 2000: CUDNN_STATUS_ALLOC_FAILED ; GPU=0",
        "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0",
        "CUDNN failure 4003: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED ; GPU=0",
    ],
)
def test_a_run_without_memory_says_so(start: Open, ort: FakeOnnxruntime, text: str) -> None:
    runner = start(SUBJECT)
    ort.script.fail_run = Failure(text)
    with pytest.raises(OutOfMemory) as caught:
        runner.infer(patches(1, 3))
    assert isinstance(caught.value.__cause__, Failure)


def test_a_gpu_that_fails_in_a_run_is_told(start: Open, ort: FakeOnnxruntime) -> None:
    runner, batch = start(SUBJECT), patches(2, 3)
    want = runner.infer(batch).copy()
    ort.cuda.fail_next = ort.cuda.LaunchError("an illegal memory access was encountered")
    with pytest.raises(EngineError, match="illegal memory access"):
        runner.infer(batch)
    assert np.array_equal(runner.infer(batch), want)


@pytest.mark.parametrize("left", range(6))
def test_memory_that_is_not_there_is_an_error_and_leaves_nothing(
    ort: FakeOnnxruntime, models: dict[int, Path], left: int
) -> None:
    """Weights, then device and page-locked memory of the input and the output."""
    ort.cuda.allocations_left = left
    if left == 0:
        with pytest.raises(OutOfMemory):
            open_onnxruntime_cuda(record(), models[3])
        return
    with open_onnxruntime_cuda(record(), models[3]) as runner:
        batch = patches(2, 3)
        if left < 5:
            with pytest.raises(OutOfMemory):
                runner.infer(batch)
            assert len(ort.cuda.live) == 1
            ort.cuda.allocations_left = None
        assert runner.infer(batch).shape == (2, HEADS, *PATCHES[3])


# --- what it refuses


def test_the_installed_onnxruntime_without_cuda_says_what_to_install(models: dict[int, Path]) -> None:
    """The real package, which has none in the environment of the tests."""
    import onnxruntime

    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has the CUDA provider")
    for call in (lambda: open_onnxruntime_cuda(record(), models[3]), usable_version):
        with pytest.raises(EngineError, match="pip install 'onnxruntime-gpu") as caught:
            call()
        assert caught.value.expected == CUDA
        assert CPU in str(caught.value.got)


def test_a_provider_whose_libraries_are_missing_is_told_with_their_names(ort: FakeOnnxruntime, models: Any) -> None:
    """It is then left out, and the session without it could only run on the CPU."""
    ort.script.loaded, ort.script.said = (CPU,), "Failed to load libcudnn.so.9: cannot open shared object file"
    with pytest.raises(EngineError, match=r"libcudnn\.so\.9") as caught:
        open_onnxruntime_cuda(record(), models[3])
    assert caught.value.hint == "pip install 'onnxruntime-gpu[cuda,cudnn]'"
    assert "default CPU EP" in str(caught.value.__cause__)


def test_libraries_that_cannot_be_loaded_print_nothing(
    start: Open, ort: FakeOnnxruntime, capfd: pytest.CaptureFixture[str]
) -> None:
    ort.script.said = "Failed to load libcufft.so.11"
    start(SUBJECT)
    assert capfd.readouterr() == ("", "")


def test_tf32_that_stays_on_is_a_mismatch(ort: FakeOnnxruntime, models: dict[int, Path]) -> None:
    ort.script.held = {"use_tf32": "1"}
    with pytest.raises(PrecisionMismatch, match="use_tf32"):
        open_onnxruntime_cuda(record(), models[3])


@pytest.mark.parametrize("name", ["user_compute_stream", "device_id", "cudnn_conv_algo_search"])
def test_an_option_that_does_not_hold_is_an_error(ort: FakeOnnxruntime, models: dict[int, Path], name: str) -> None:
    ort.script.held = {name: "7"}
    with pytest.raises(EngineError, match=name):
        open_onnxruntime_cuda(record(), models[3])


def test_a_node_that_would_run_on_the_cpu_is_refused_with_the_reason(ort: FakeOnnxruntime, models: Any) -> None:
    ort.script.fail_strict = Fail(ON_CPU)
    with pytest.raises(EngineError, match="assigned to the default CPU EP"):
        open_onnxruntime_cuda(record(), models[3])


@pytest.mark.parametrize(
    ("precision", "computed"), [("int8", "f32"), ("bf16", "bf16"), ("fp16", "f32"), ("fp32", "f16"), ("fp32", "tf32")]
)
def test_a_precision_that_it_does_not_compute_in_is_refused(
    ort: FakeOnnxruntime, models: dict[int, Path], precision: str, computed: str
) -> None:
    with pytest.raises(EngineError, match="precision") as caught:
        open_onnxruntime_cuda(record(precision=precision, computed=computed), models[3])
    assert caught.value.got == f"{precision} in {computed}"


def test_fp16_networks_are_opened(ort: FakeOnnxruntime, models: dict[int, Path]) -> None:
    with open_onnxruntime_cuda(record(precision="fp16", computed="f16"), models[3]) as runner:
        assert runner.describe().inference_precision == "f16"


@pytest.mark.parametrize("content", [None, b"", b"\x00\x01nonsense" * 50, "truncated"])
def test_a_missing_or_corrupt_file_is_named_and_leaves_nothing(
    ort: FakeOnnxruntime, models: dict[int, Path], tmp_path: Path, content: Any
) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(models[3].read_bytes()[:1500] if content == "truncated" else content)
    with pytest.raises(EngineError, match=r"bad\.onnx"):
        open_onnxruntime_cuda(record(), path)


def test_a_network_of_another_shape_than_the_record_is_refused(ort: FakeOnnxruntime, models: dict[int, Path]) -> None:
    with pytest.raises(EngineError, match="input shape") as caught:
        open_onnxruntime_cuda(record(2), models[3])
    assert caught.value.expected == ("batch", CHANNELS, *PATCHES[2])


def test_a_machine_without_a_driver_is_told(
    ort: FakeOnnxruntime, models: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtbuild.runtime.device.no_driver", lambda: "no NVIDIA driver")
    for call in (lambda: open_onnxruntime_cuda(record(), models[3]), usable_version):
        with pytest.raises(EngineError, match="no NVIDIA driver"):
            call()


def test_what_is_usable_has_a_version(ort: FakeOnnxruntime, start: Open) -> None:
    assert usable_version() == start(SUBJECT).describe().version == ort.__version__
    assert isinstance(ort.cuda, Cuda)
