"""An onnxruntime-gpu without a GPU: the installed onnxruntime, with sessions whose work goes to the fake GPU.

Signatures are those of the installed package. What would go wrong in silence on a GPU is a fault of the fake GPU: a
binding to memory of another device, a stream that is not there, a run that waits, a session that outlives its stream.
Networks are computed by a CPU session over device memory, when somebody waits for the stream.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as real
import pytest
from fake_cuda import Cuda, installed

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
DEFAULTS: Mapping[str, str] = {
    "device_id": "0", "has_user_compute_stream": "0", "user_compute_stream": "0", "use_tf32": "1",
    "cudnn_conv_algo_search": "EXHAUSTIVE", "arena_extend_strategy": "kNextPowerOfTwo",
}  # fmt: skip
"""Options of the CUDA provider as ONNX Runtime's documentation gives them; another name is refused by it."""
WEIGHTS = 4096
"""Bytes of device memory that a session takes."""
Failure = real.capi.onnxruntime_pybind11_state.RuntimeException
FATAL = 4
ON_CPU = (
    "[ONNXRuntimeError] : 1 : FAIL : This session contains graph nodes that are assigned to the default CPU EP, but "
    "fallback to CPU EP has been explicitly disabled by the user."
)
"""What the real one (1.31.1) says where a node has to run on the CPU, and where its CUDA libraries are not there."""
Fail = real.capi.onnxruntime_pybind11_state.Fail


@dataclass
class Script:
    """What the fake does otherwise than it should."""

    providers: tuple[str, ...] = (CUDA, CPU)
    loaded: tuple[str, ...] = (CUDA, CPU)
    said: str = ""
    held: dict[str, str] = field(default_factory=dict)
    fail_opening: Exception | None = None
    fail_strict: Exception | None = None
    fail_run: Exception | None = None
    runs: int = 0


class FakeOnnxruntime(ModuleType):
    """The module onnxruntime. `sessions` are those that live."""

    def __init__(self, cuda: Cuda, script: Script) -> None:
        super().__init__("onnxruntime")
        self.cuda, self.script = cuda, script
        self.sessions: weakref.WeakSet[FakeSession] = weakref.WeakSet()
        self.severity = 2

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    def get_available_providers(self) -> list[str]:
        return list(self.script.providers)

    def InferenceSession(self, *args: Any, **kwargs: Any) -> Any:
        inspect.signature(real.InferenceSession.__init__).bind(None, *args, **kwargs)
        if kwargs.get("providers") == [CPU]:
            return real.InferenceSession(*args, **kwargs)
        return FakeSession(self, *args, **kwargs)

    def set_default_logger_severity(self, level: int) -> None:
        self.severity = level

    def preload_dlls(self) -> None:
        if self.script.said:
            print(self.script.said)


class FakeSession:
    def __init__(
        self, module: FakeOnnxruntime, path: str, sess_options: Any, *, providers: list[str],
        provider_options: list[dict[str, str]], enable_fallback: int,
    ) -> None:  # fmt: skip
        self.cuda, self.script = module.cuda, module.script
        self.cuda.need_context("cudaSetDevice")
        if enable_fallback or providers != [CUDA]:
            self.cuda.fault("a session that falls back on the CPU")
        try:
            strict = sess_options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
        except RuntimeError:  # as the real ones do where there is no such entry
            strict = False
        self.on_gpu = strict and CUDA in self.script.loaded
        if module.severity != FATAL:
            self.cuda.fault("ONNX Runtime's own log would write")
        if CUDA not in self.script.loaded:
            if strict:
                raise Fail(ON_CPU)
            return
        for error in (self.script.fail_opening, self.script.fail_strict if strict else None):
            if error is not None:
                raise error
        (given,) = provider_options
        if set(given) - set(DEFAULTS) or not all(isinstance(value, str) for value in given.values()):
            raise Fail(f"Unknown provider option: {sorted(given)}")
        self.options = {**DEFAULTS, **given, **self.script.held}
        self.stream = int(given["user_compute_stream"])
        if self.stream not in self.cuda.streams:
            self.cuda.fault("a session on a stream that is not there")
        options = real.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 2, 4
        self.session = real.InferenceSession(path, options, providers=[CPU], enable_fallback=0)
        try:
            self.weights = self.cuda.mem_alloc(WEIGHTS)
        except self.cuda.MemoryError as error:
            raise Failure("CUDA failure 2: out of memory ; GPU=0 ; expr=cudaMalloc((void**)&p, size);") from error
        module.sessions.add(self)

    def disable_fallback(self) -> None:
        """Nothing falls back here."""

    def get_providers(self) -> list[str]:
        return list(self.script.loaded)

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return {CUDA: self.options, CPU: {}}

    def get_inputs(self) -> Any:
        return self.session.get_inputs()

    def get_outputs(self) -> Any:
        return self.session.get_outputs()

    def io_binding(self) -> FakeBinding:
        return FakeBinding(self)

    def run_with_iobinding(self, iobinding: FakeBinding, run_options: Any = None) -> None:
        self.cuda.need_context("cudaSetDevice")
        if not self.on_gpu:
            self.cuda.fault("nodes may run on the CPU")
        self.script.runs += 1
        if self.script.fail_run is not None:
            error, self.script.fail_run = self.script.fail_run, None
            raise error
        if iobinding.session is not self:
            raise ValueError("IOBinding must be used with the session that created it.")
        if run_options.get_run_config_entry("disable_synchronize_execution_providers") != "1":
            self.cuda.fault("a run waits for its end")
        (source, shape), (target, out) = iobinding.bound["input"], iobinding.bound["output"]
        for address, sizes in ((source, shape), (target, out)):
            self.cuda.at(address, 4 * int(np.prod(sizes)))

        def compute() -> None:
            batch = self.cuda.at(source, 4 * int(np.prod(shape))).view(np.float32).reshape(shape)
            (logits,) = self.session.run(None, {self.get_inputs()[0].name: batch.copy()})
            self.cuda.at(target, 4 * int(np.prod(out))).view(np.float32).reshape(out)[...] = logits

        self.cuda.run_on(self.stream, compute, {source, target})

    def __del__(self) -> None:
        if not hasattr(self, "weights"):
            return
        if not self.cuda.stack():
            self.cuda.fault("a session was closed where no context is current")
            return
        if self.stream not in self.cuda.streams:
            self.cuda.fault("a session outlived its stream")
        elif self.cuda.streams[self.stream].work:
            self.cuda.fault("a session was closed with work under way")
        self.weights.free()


class FakeBinding:
    """Checks what is bound, as ONNX Runtime does when it runs; a wrong address is nowhere checked but here."""

    def __init__(self, session: FakeSession) -> None:
        self.session = session
        self.bound: dict[str, tuple[int, tuple[int, ...]]] = {}

    def bind_input(self, *args: Any) -> None:
        inspect.signature(real.IOBinding.bind_input).bind(self, *args)
        self._bind("input", *args)

    def bind_output(self, *args: Any) -> None:
        inspect.signature(real.IOBinding.bind_output).bind(self, *args)
        self._bind("output", *args)

    def _bind(self, role: str, name: str, device: str, number: int, kind: Any, shape: Any, address: int) -> None:
        ports = self.session.get_inputs() if role == "input" else self.session.get_outputs()
        if name != ports[0].name:
            raise Fail(f"Invalid {role} name: {name}")
        if (device, str(number), kind) != ("cuda", self.session.options["device_id"], np.float32):
            self.session.cuda.fault(f"{role} bound as {device} {number} {kind}")
        self.bound[role] = (int(address), tuple(shape))


def install(monkeypatch: pytest.MonkeyPatch, cuda: Cuda | None = None) -> FakeOnnxruntime:
    """The fake in place of onnxruntime and pycuda."""
    cuda = cuda or Cuda()
    module = FakeOnnxruntime(cuda, Script())
    for name, fake in {**installed(cuda), "onnxruntime": module}.items():
        monkeypatch.setitem(sys.modules, name, fake)
    monkeypatch.setattr("trtbuild.runtime.device.no_driver", lambda: None)
    return module
