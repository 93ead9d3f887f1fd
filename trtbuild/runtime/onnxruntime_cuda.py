"""The runner of ONNX Runtime's CUDA provider (GPU): no engine is built, and work comes from and goes to device memory.

A session computes on one stream, that of the device path where there is one, so that nothing waits between the kernels
and the network. No node runs on the CPU, and float32 is float32 (no TF32).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.errors import EngineError
from trtbuild.runtime.device import check_device_usable, opened_device
from trtbuild.runtime.fit import check_model_file
from trtbuild.runtime.lanes import LaneRunner
from trtbuild.runtime.onnxruntime import onnxruntime_module, onnxruntime_version
from trtbuild.runtime.onnxruntime_lanes import DeviceBatches, DeviceLane
from trtbuild.runtime.onnxruntime_session import CUDA, FIXED, CudaSession
from trtbuild.runtime.runner import RunnerInfo
from trtbuild.spec import BuildRecord, Precision

if TYPE_CHECKING:
    from trtbuild.runtime.gpu.shared import Gpu

NAME = "onnxruntime-cuda"
COMPUTED: Mapping[Precision, str] = {"fp32": "f32", "fp16": "f16"}
"""What the provider computes in here: its Conv takes no 8-bit integers, and BF16 was not tried."""


class OnnxRuntimeCudaRunner(LaneRunner):
    """A Runner, and the same network for work that is on the GPU already."""

    def __init__(self, info: RunnerInfo, session: CudaSession, close: ExitStack) -> None:
        batches = DeviceBatches(session.device, session.stream, info, session.enqueue)
        close.callback(batches.close)
        super().__init__(info, lambda background: DeviceLane(batches, background), close.close)
        self._session = session

    def enqueue(self, source: int, target: int, stream: int, batch: int) -> None:
        """Begin to compute logits from device memory to device memory.

        Args:
            source: device pointer to (batch, C, *patch) float32 in C order, which holds finite numbers.
            target: device pointer to room for (batch, heads, *patch) float32.
            stream: the handle of the stream that the runner was opened for; its work comes from one thread at a time.
            batch: from 1 to the record's.

        Both must stay as they are until the stream has come so far. NaN is not looked for.

        Raises:
            EngineError: closed, another stream, a batch outside the record's, or ONNX Runtime failed.
            OutOfMemory: there is no memory for the activations.
        """
        self._opened()
        if stream != self._session.stream.handle:
            raise EngineError("The session computes on another stream.", expected=f"{self._session.stream.handle:#x}",
                              got=f"{stream:#x}", where=NAME, hint="open the engine with this GPU")  # fmt: skip
        if not 1 <= batch <= self._info.batch:
            raise EngineError("The batch is outside the engine's profile.", expected=f"1 to {self._info.batch}",
                              got=batch, where=NAME)  # fmt: skip
        self._session.enqueue(source, target, batch)


def usable_version() -> str:
    """The version of an ONNX Runtime that can run networks on a GPU here.

    Raises:
        EngineError: it has no CUDA provider, or there is no NVIDIA driver.
        MissingExtra: ONNX Runtime or pycuda is not installed.
    """
    _check_provider(onnxruntime_module())
    check_device_usable()
    return onnxruntime_version()


def open_onnxruntime_cuda(
    record: BuildRecord, model: Path, *, threads: int | None = None, gpu: Gpu | None = None
) -> OnnxRuntimeCudaRunner:
    """Open an ONNX file on the GPU.

    Args:
        record: `precision` "fp32" or "fp16" with the `inference_precision` that belongs to it; the largest batch is
            that of `profile`.
        model: the network's ONNX file (one float32 input, one float32 output).
        threads: has no meaning on a GPU beyond being a number of threads.
        gpu: whose stream the network computes on; it outlives the runner. None takes the first GPU and an own stream.

    Raises:
        EngineError: ONNX Runtime has no CUDA provider or cannot load it, a node of the network would run on the CPU,
            another precision, an unreadable file, wrong shapes, or no NVIDIA driver.
        MissingExtra: ONNX Runtime or pycuda is not installed.
        PrecisionMismatch: a pinned option did not hold.
        OutOfMemory: the GPU has no memory left for the weights.
    """
    if threads is not None and threads < 1:
        raise EngineError("The number of threads is out of range.", expected=">= 1", got=threads)
    ort = onnxruntime_module()
    _check_provider(ort)
    check_model_file(model)
    _check_precision(record)
    with ExitStack() as stack:
        device = stack.enter_context(opened_device()) if gpu is None else gpu.device
        stream = device.stream() if gpu is None else gpu.stream
        if gpu is None:
            stack.callback(stream.close)
        session = CudaSession(device, stream, model, ort, record)
        stack.callback(session.close)
        stack.callback(stream.synchronize)  # before the session goes
        return OnnxRuntimeCudaRunner(_info(record, session), session, stack.pop_all())


def _check_provider(ort: Any) -> None:
    available = ort.get_available_providers()
    if CUDA not in available:
        raise EngineError("This ONNX Runtime cannot run networks on a GPU.", expected=CUDA, got=", ".join(available),
                          where=f"onnxruntime {ort.__version__}",
                          hint="pip uninstall onnxruntime, then pip install 'onnxruntime-gpu[cuda,cudnn]'")  # fmt: skip


def _check_precision(record: BuildRecord) -> None:
    wanted = COMPUTED.get(record.precision)
    if wanted is None or record.inference_precision != wanted:
        raise EngineError("ONNX Runtime's CUDA provider does not compute in this precision.",
                          expected=", ".join(f"{kind} in {computed}" for kind, computed in COMPUTED.items()),
                          got=f"{record.precision} in {record.inference_precision}",
                          where=f"engine of {record.network}")  # fmt: skip


def _info(record: BuildRecord, session: CudaSession) -> RunnerInfo:
    version, device, batch = onnxruntime_version(), session.device, record.profile.max[0]
    details = {
        "providers": CUDA,
        "capability": device.capability,
        "driver": f"CUDA {device.driver}",
        "batch": str(batch),
        **FIXED,
    }
    if record.version != version:
        details["note.version"] = f"recorded {record.version!r}, here {version!r}"
    return RunnerInfo(
        backend=NAME, version=version, inputs=session.inputs, outputs=session.outputs, parallel=1, batch=batch,
        inference_precision=record.inference_precision, device=device.name, details=details,
    )  # fmt: skip
