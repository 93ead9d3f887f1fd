"""A session of ONNX Runtime's CUDA provider: opened on a stream, read back, run on device memory, errors mapped."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from traceback import clear_frames
from typing import Any

import numpy as np

from trtbuild.errors import EngineError, OutOfMemory
from trtbuild.runtime.device import NO_ROOM, Device, Stream
from trtbuild.runtime.fit import Fit
from trtbuild.runtime.onnxruntime import CPU, PROVIDERS, check_read_back, error_types, port_spec, session_options
from trtbuild.runtime.ports import input_from_ports, output_from_ports
from trtbuild.runtime.runner import engine_errors
from trtbuild.spec import BuildRecord

CUDA = "CUDAExecutionProvider"
FIXED: Mapping[str, str] = {
    **PROVIDERS[CUDA],
    "cudnn_conv_algo_search": "HEURISTIC",  # timing the algorithms would give other bits each time it is opened
    "arena_extend_strategy": "kSameAsRequested",  # the arena's own steps double, and a case would lack that memory
}
ON_CPU = "assigned to the default CPU EP"
NO_MEMORY = ("out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""Of CUDA, and of cuBLAS and cuDNN, in ONNX Runtime's texts."""
FATAL = 4
"""For the log that is no session's, which would warn of plugins and of libraries: whatever goes wrong is raised."""
UNWAITED = "disable_synchronize_execution_providers"
"""Option of a run: it returns when the work is on the stream, and does not wait for its end."""


class CudaSession:
    """A session whose work goes to one stream. To be closed before that stream, and when nothing is under way."""

    def __init__(self, device: Device, stream: Stream, model: Path, ort: Any, record: BuildRecord) -> None:
        self.device, self.stream, self._model = device, stream, model
        self._kinds = error_types(ort)
        self._running = threading.Lock()  # calls on one stream come one after the other
        self._sessions: list[Any] = []
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry(UNWAITED, "1")
        try:
            with device.current(), self._errors("ONNX Runtime cannot open the network."):
                self._open(ort, record)
        except BaseException:
            self.close()
            raise

    def enqueue(self, source: int, target: int, batch: int) -> None:
        """As the runner's, on its stream."""
        with self._running, self.device.current(), self._errors("ONNX Runtime failed."):
            self._run(source, target, batch)

    def close(self) -> None:
        with self.device.current():
            self._sessions.clear()  # frees its memory with the last reference, and in no other way

    def _open(self, ort: Any, record: BuildRecord) -> None:
        options = {**FIXED, "device_id": str(self.device.index), "user_compute_stream": str(self.stream.handle)}
        fit = Fit(threads=1, streams=1, batch=record.profile.max[0], notes={})
        session = self._session(ort, fit, options)
        self._sessions.append(session)
        _check_options(session, options, self._model)
        self.inputs = input_from_ports([port_spec(port) for port in session.get_inputs()], record, self._model)
        self.outputs = output_from_ports([port_spec(port) for port in session.get_outputs()], record, self._model)

    def _session(self, ort: Any, fit: Fit, options: Mapping[str, str]) -> Any:
        """Without its libraries the provider is left out, and what is told then is that all nodes go to the CPU."""
        ort.set_default_logger_severity(FATAL)
        said = _loaded_libraries(ort)

        def opened(*allowed: str) -> Any:
            return ort.InferenceSession(
                str(self._model), session_options(ort, fit, allowed), providers=[CUDA], provider_options=[options],
                enable_fallback=0,
            )  # fmt: skip

        try:
            return opened(CUDA)
        except self._kinds as error:
            if ON_CPU not in str(error) or CUDA in opened(CUDA, CPU).get_providers():
                raise
            raise EngineError("ONNX Runtime cannot load its CUDA provider.", expected=CUDA, where=self._model,
                              got=said or CPU, hint="pip install 'onnxruntime-gpu[cuda,cudnn]'") from error  # fmt: skip

    def _run(self, source: int, target: int, batch: int) -> None:
        binding = self._sessions[0].io_binding()
        for bind, port, address in (
            (binding.bind_input, self.inputs, source),
            (binding.bind_output, self.outputs, target),
        ):
            shape = (batch, *map(int, port.shape[1:]))
            bind(port.name, "cuda", self.device.index, np.float32, shape, address)
        self._sessions[0].run_with_iobinding(binding, self._run_options)

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        """ONNX Runtime's errors as ours; CUDA's own lack of memory comes through it as text.

        The frames of what failed would keep a session alive, which must go before its stream: they are emptied.
        """
        try:
            with engine_errors(what, self._model, RuntimeError, *self._kinds):
                yield
        except BaseException as error:
            clear_frames(error.__traceback__)
            if error.__cause__ is not None:
                clear_frames(error.__cause__.__traceback__)
            if type(error) is EngineError and any(mark in str(error.got) for mark in NO_MEMORY):
                raise OutOfMemory(what, got=error.got, where=self._model, hint=NO_ROOM) from error.__cause__
            raise


def _check_options(session: Any, options: Mapping[str, str], model: Path) -> None:
    """The provider has every option that was set."""
    session.disable_fallback()
    check_read_back(session, (CUDA,), model)
    found = session.get_provider_options()[CUDA]
    for name, value in options.items():
        if found.get(name) != value:
            raise EngineError("An option of ONNX Runtime's CUDA provider did not hold.", expected=f"{name}={value}",
                              got=found.get(name), where=model)  # fmt: skip


def _loaded_libraries(ort: Any) -> str:
    """Loads CUDA and cuDNN from their pip packages, where they are; what could not be loaded, else nothing.

    ONNX Runtime finds those of the system by itself. It prints where others raise.
    """
    said = io.StringIO()
    if hasattr(ort, "preload_dlls"):  # since 1.21
        with redirect_stdout(said):
            ort.preload_dlls()
    return "; ".join(said.getvalue().split("\n")).strip("; ")
