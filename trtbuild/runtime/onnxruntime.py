"""The ONNX Runtime runner: an ordered list of execution providers, each of which must really be there.

The one file that imports onnxruntime (with trtbuild's extra `graph`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np

from trtbuild.errors import EngineError, MissingExtra, PrecisionMismatch
from trtbuild.machine import cpu_description
from trtbuild.runtime.fit import Fit, check_model_file, fit_from_record
from trtbuild.runtime.lanes import LaneRunner
from trtbuild.runtime.ports import input_from_ports, output_from_ports
from trtbuild.runtime.runner import Batch, Runner, RunnerInfo, engine_errors
from trtbuild.spec import BuildRecord, TensorSpec

NAME = "onnxruntime"
CPU = "CPUExecutionProvider"
# The providers whose float32 can be pinned, with the options that pin it (CUDA would take TF32). A provider that is
# not here might compute in something else than the record says, and is refused.
PROVIDERS: Mapping[str, Mapping[str, str]] = {CPU: {}, "CUDAExecutionProvider": {"use_tf32": "0"}}
SESSION_CONFIG: Mapping[str, str] = {
    "mlas.enable_gemm_fastmath_arm64_bfloat16": "0",  # bf16 matrix products on Arm: off, so that f32 means f32
    "session.intra_op.allow_spinning": "0",  # idle threads would take the CPUs from stitching
}


def onnxruntime_module() -> Any:
    """The onnxruntime package, quiet: no telemetry, and errors are raised, not logged.

    The variable is set before the import, which by itself writes a session's number into the temporary folder.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise MissingExtra("onnxruntime", "graph", "run a network in ONNX Runtime") from error
    except (ImportError, OSError) as error:
        raise EngineError("ONNX Runtime cannot be loaded.", got=error, hint="pip install 'trtbuild[graph]'") from error
    onnxruntime.disable_telemetry_events()
    return onnxruntime


def onnxruntime_version() -> str:
    """The installed version; MissingExtra or EngineError where ONNX Runtime cannot be loaded."""
    return str(onnxruntime_module().__version__)


def open_onnxruntime(record: BuildRecord, model: Path, *, threads: int | None = None) -> Runner:
    """Open an ONNX file with the record's providers, in their order.

    Args:
        record: `inference_precision` "f32"; `options` threads, streams, batch, and providers (comma-separated).
        model: the network's ONNX file (one float32 input, one float32 output).
        threads: in place of the record's.

    Raises:
        EngineError: a provider that is not there, another precision than f32, an unreadable file, wrong shapes.
        PrecisionMismatch: a pinned option did not hold.
        OutOfMemory: an allocation failed.
    """
    ort = onnxruntime_module()
    check_model_file(model)
    fit = fit_from_record(record, version=onnxruntime_version(), threads=threads)
    if record.inference_precision != "f32":
        raise EngineError("ONNX Runtime computes in f32.", expected="f32", got=record.inference_precision,
                          where=f"engine of {record.network}", hint="compile with --backend openvino")  # fmt: skip
    providers = _providers(record, ort.get_available_providers())
    with engine_errors("ONNX Runtime cannot open the network.", model, RuntimeError, *error_types(ort)):
        session = ort.InferenceSession(
            str(model), session_options(ort, fit, providers), providers=list(providers),
            provider_options=[dict(PROVIDERS[name]) for name in providers],
        )  # fmt: skip
    session.disable_fallback()
    check_read_back(session, providers, model)
    info = _info(session, record, fit, model)
    pool = ThreadPoolExecutor(max_workers=fit.streams, thread_name_prefix="trtbuild-onnxruntime")

    def open_lane(background: bool) -> _OrtLane:
        return _OrtLane(session, info, error_types(ort), pool if background else None)

    return LaneRunner(info, open_lane, pool.shutdown)


def _providers(record: BuildRecord, available: Sequence[str]) -> tuple[str, ...]:
    asked = tuple(name.strip() for name in str(record.options.get("providers", CPU)).split(","))
    for name in asked:
        if name not in PROVIDERS:
            raise EngineError("The precision of this execution provider cannot be pinned.", got=name,
                              expected=", ".join(PROVIDERS), where="options.providers")  # fmt: skip
        if name not in available:
            raise EngineError("The execution provider is not there.", expected=name, got=", ".join(available),
                              where="onnxruntime", hint="install the onnxruntime package that has it")  # fmt: skip
    return asked


def session_options(ort: Any, fit: Fit, providers: Sequence[str]) -> Any:
    """Options of a session, whose nodes run on the CPU only where that is asked for."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = fit.threads, 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.enable_cpu_mem_arena = False  # the arena keeps the peak of every buffer size for ever
    options.log_severity_level = 4  # fatal only: whatever goes wrong is raised
    for key, value in SESSION_CONFIG.items():
        options.add_session_config_entry(key, value)
    if CPU not in providers:  # else nodes that the provider lacks would run on the CPU, unasked
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def check_read_back(session: Any, providers: Sequence[str], model: Path) -> None:
    """The providers that the session really has, in order, and their pinned options."""
    got = tuple(name for name in session.get_providers() if name in providers)
    if got != tuple(providers):
        raise EngineError("ONNX Runtime took other execution providers than asked.", expected=", ".join(providers),
                          got=", ".join(session.get_providers()), where=model)  # fmt: skip
    for name in providers:
        options = session.get_provider_options().get(name, {})
        for key, value in PROVIDERS[name].items():
            if options.get(key) != value:
                raise PrecisionMismatch("A pinned provider option did not hold.", expected=f"{key}={value}",
                                        got=options.get(key), where=name)  # fmt: skip


def _info(session: Any, record: BuildRecord, fit: Fit, model: Path) -> RunnerInfo:
    inputs = input_from_ports([port_spec(port) for port in session.get_inputs()], record, model)
    outputs = output_from_ports([port_spec(port) for port in session.get_outputs()], record, model)
    details = {
        "providers": ", ".join(session.get_providers()),
        "threads": str(fit.threads),
        "streams": str(fit.streams),
        "batch": str(fit.batch),
        **fit.notes,
    }
    return RunnerInfo(
        backend=NAME, version=onnxruntime_version(), inputs=inputs, outputs=outputs, parallel=fit.streams,
        batch=fit.batch, inference_precision="f32", device=cpu_description()["model"], details=details,
    )  # fmt: skip


def port_spec(port: Any) -> TensorSpec:
    """An input or output of a session; a free dimension without a name is "?"."""
    dtype = {"tensor(float)": "float32"}.get(port.type, port.type)
    return TensorSpec(name=port.name, dtype=dtype, shape=tuple("?" if dim is None else dim for dim in port.shape))


def error_types(ort: Any) -> tuple[type[Exception], ...]:
    """ONNX Runtime's exceptions; they share no base class below Exception."""
    module = ort.capi.onnxruntime_pybind11_state
    return tuple(kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, Exception))


class _OrtLane:
    """Runs in the calling thread, or with a pool in the background. Input and output are bound, not copied."""

    def __init__(
        self, session: Any, info: RunnerInfo, errors: tuple[type[Exception], ...], pool: ThreadPoolExecutor | None
    ) -> None:
        self._session, self._info, self._errors, self._pool = session, info, errors, pool
        self._input = self._output = np.empty(0, dtype=np.float32)
        self._future: Future[None] | None = None

    def start(self, batch: Batch) -> None:
        if len(self._output) != len(batch):
            self._output = np.empty((len(batch), *map(int, self._info.outputs.shape[1:])), dtype=np.float32)
        if self._pool is None:
            self._run(np.ascontiguousarray(batch))
        else:
            if self._input.shape != batch.shape:
                self._input = np.empty(batch.shape, dtype=np.float32)
            self._input[...] = batch
            self._future = self._pool.submit(self._run, self._input)

    def wait(self) -> Batch:
        if self._future is not None:
            self._future.result()
        return self._output

    def settle(self) -> None:
        if self._future is not None:
            wait([self._future])

    def _run(self, batch: Batch) -> None:
        with engine_errors("ONNX Runtime failed.", NAME, RuntimeError, *self._errors):
            for first in range(0, len(batch), self._info.batch):
                part = slice(first, first + self._info.batch)
                binding = self._session.io_binding()
                for bind, spec, array in (
                    (binding.bind_input, self._info.inputs, batch[part]),
                    (binding.bind_output, self._info.outputs, self._output[part]),
                ):
                    bind(spec.name, "cpu", 0, np.float32, array.shape, array.ctypes.data)
                self._session.run_with_iobinding(binding)
