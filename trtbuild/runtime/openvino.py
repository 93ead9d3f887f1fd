"""The OpenVINO runner (CPU): opens the ONNX file itself, in a pinned precision that is read back on every open.

The one file that imports openvino. It is imported here without its telemetry package, which would otherwise write to
the user's home and try to send an event as soon as `import openvino` runs.
"""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trtbuild.errors import EngineError, PrecisionMismatch
from trtbuild.machine import cpu_description
from trtbuild.runtime.fit import Fit, check_model_file, fit_from_record
from trtbuild.runtime.lanes import LaneRunner
from trtbuild.runtime.ports import input_from_ports, output_from_ports
from trtbuild.runtime.runner import Batch, Runner, RunnerInfo, engine_errors
from trtbuild.spec import BuildRecord, TensorSpec

NAME = "openvino"
# Per inference precision: what the CPU must be capable of, and the execution mode. ACCURACY keeps the CPU plugin from
# choosing anything below the precision that was asked for.
PRECISIONS: Mapping[str, tuple[str, str]] = {"f32": ("FP32", "ACCURACY"), "bf16": ("BF16", "PERFORMANCE")}
# Node types of the compiled model that do nearly all of the work; their executed precision is checked.
COMPUTE = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
RT_INFO = ("layerType", "runtimePrecision")
INTEGERS = ("u8", "i8")
_import_lock = threading.Lock()


def openvino_module() -> Any:
    """The openvino package, imported silently."""
    with _import_lock:
        silenced = "openvino" not in sys.modules and "openvino_telemetry" not in sys.modules
        if silenced:
            sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]  # its import fails; openvino has a stub
        try:
            import openvino
        except (ImportError, OSError) as error:
            raise EngineError("OpenVINO cannot be loaded.", got=error, hint="pip install openvino") from error
        finally:
            if silenced:
                del sys.modules["openvino_telemetry"]
    return openvino


def openvino_version() -> str:
    """The installed version; EngineError where OpenVINO cannot be loaded."""
    return str(openvino_module().get_version())


def open_openvino(record: BuildRecord, model: Path, *, threads: int | None = None) -> Runner:
    """Open an ONNX file as the record says: precision, threads, streams, and the batch as a fixed shape.

    Args:
        record: `inference_precision` "f32" or "bf16"; `options` threads, streams, batch; `profile` the shapes.
        model: the network's ONNX file (free batch dimension, one float32 input, one float32 output).
        threads: in place of the record's.

    Raises:
        EngineError: no such precision on this CPU, unreadable file, wrong shapes, or OpenVINO failed.
        PrecisionMismatch: OpenVINO took another precision than was set.
        OutOfMemory: an allocation failed.
    """
    openvino = openvino_module()
    check_model_file(model)
    fit = fit_from_record(record, version=openvino_version(), threads=threads)
    with engine_errors("OpenVINO cannot open the network.", model, RuntimeError, openvino.frontend.GeneralFailure):
        core = openvino.Core()
        config = _config(record, fit, core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
        network, inputs, outputs = _network(openvino, record, fit, model)
        compiled = core.compile_model(network, "CPU", config)
        precision, executed = _checked_precision(record, model, compiled)
    details = {
        "threads": str(compiled.get_property("INFERENCE_NUM_THREADS")),
        "streams": str(compiled.get_property("NUM_STREAMS")),
        "batch": str(fit.batch),
        "executed": executed,
        **fit.notes,
    }
    info = RunnerInfo(
        backend=NAME, version=openvino_version(), inputs=inputs, outputs=outputs, parallel=fit.streams, batch=fit.batch,
        inference_precision=precision, device=cpu_description()["model"], details=details,
    )  # fmt: skip
    return LaneRunner(info, lambda background: _OpenVinoLane(openvino, compiled, background), lambda: None)


def _config(record: BuildRecord, fit: Fit, capabilities: list[str]) -> dict[str, Any]:
    known = [name for name, (capability, _) in PRECISIONS.items() if capability in capabilities]
    if record.inference_precision not in known:
        raise EngineError("The CPU does not compute in this precision.", expected=" or ".join(known),
                          got=record.inference_precision, where=cpu_description()["model"],
                          hint="compile with --precision fp32")  # fmt: skip
    return {
        "INFERENCE_PRECISION_HINT": record.inference_precision,
        "EXECUTION_MODE_HINT": PRECISIONS[record.inference_precision][1],
        "INFERENCE_NUM_THREADS": fit.threads,
        "NUM_STREAMS": fit.streams,
        # Pinning gained 1 % or less on a quiet machine, and loses where another process holds the same CPUs.
        "ENABLE_CPU_PINNING": False,
    }


def _network(openvino: Any, record: BuildRecord, fit: Fit, model: Path) -> tuple[Any, TensorSpec, TensorSpec]:
    """The network with a fixed input shape, and its input and output.

    The ONNX frontend is named, so that no other one guesses at the file.
    """
    frontend = openvino.frontend.FrontEndManager().load_by_framework("onnx")
    network = frontend.convert(frontend.load(str(model)))
    inputs = input_from_ports([_spec(port) for port in network.inputs], record, model)
    network.reshape([fit.batch, *record.profile.max[1:]])
    return network, inputs, output_from_ports([_spec(port) for port in network.outputs], record, model)


def _spec(port: Any) -> TensorSpec:
    dims = (dim.get_length() if dim.is_static else "?" for dim in port.get_partial_shape())
    dtype = port.get_element_type().to_dtype().name
    return TensorSpec(name=port.get_any_name(), dtype=dtype, shape=tuple(dims))


def _checked_precision(record: BuildRecord, model: Path, compiled: Any) -> tuple[str, str]:
    """The precision hint read back, and what the working layers run in, as text; both must be as recorded.

    In bf16 a layer may stay in f32 (OpenVINO keeps some). In int8 as many layers as were quantised compute in it: on a
    CPU where OpenVINO prefers float32 for one, that one would be slower than the record promises.
    """
    hint: str = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    layers = Counter(_layer_precisions(compiled))
    allowed = {"f32": {"f32"}, "bf16": {"f32", "bf16"}}[record.inference_precision]
    allowed |= set(INTEGERS) if record.precision == "int8" else set()
    executed = ", ".join(f"{count} x {name}" for name, count in sorted(layers.items())) or "not reported"
    missing = record.precision != "int8" and bool(layers) and record.inference_precision not in layers
    quantized = record.options.get("quantized_layers")
    missing |= quantized is not None and quantized != sum(layers[name] for name in INTEGERS)
    if hint != record.inference_precision or missing or not allowed.issuperset(layers):
        raise PrecisionMismatch("OpenVINO computes in another precision than the record says.", where=model,
                                expected=_expected(record), got=f"{hint}, layers: {executed}")  # fmt: skip
    return hint, executed


def _expected(record: BuildRecord) -> str:
    quantized = record.options.get("quantized_layers")
    return record.inference_precision + ("" if quantized is None else f", and {quantized} layers in int8")


def _layer_precisions(compiled: Any) -> Iterator[str]:
    """The executed precision of every layer that does real work, as the plugin itself accounts for it."""
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = {key: str(value.astype(str)) for key, value in node.get_rt_info().items() if key in RT_INFO}
        if info.get("layerType") in COMPUTE and "runtimePrecision" in info:
            yield info["runtimePrecision"]


class _OpenVinoLane:
    """Infer requests that share one output buffer; more than one only where a batch is larger than the fixed one.

    A short batch is filled up with zeros: a second compiled shape would hold the weights twice. Everything runs
    through `start_async`, so that only the executor's own threads compute.
    """

    def __init__(self, openvino: Any, compiled: Any, background: bool) -> None:
        self._tensor, self._compiled, self._background = openvino.Tensor, compiled, background
        self._size: int = compiled.input(0).get_shape()[0]
        self._requests: list[Any] = []
        self._lent = self._own = self._output = np.empty(0, dtype=np.float32)
        self._count = 0

    def start(self, batch: Batch) -> None:
        self._count = len(batch)
        rounds = -(-len(batch) // self._size)
        with engine_errors("OpenVINO failed.", NAME, RuntimeError):
            if rounds != len(self._requests):
                self._resize(rounds)
            source = self._source(batch, rounds * self._size)
            for number, request in enumerate(self._requests):
                part = source[number * self._size : (number + 1) * self._size]
                request.set_input_tensor(self._tensor(part, shared_memory=True))
                request.start_async()

    def wait(self) -> Batch:
        with engine_errors("OpenVINO failed.", NAME, RuntimeError):
            try:
                for request in self._requests:
                    request.wait()
            finally:
                self.settle()
        return self._output[: self._count]

    def settle(self) -> None:
        for request in self._requests:
            with suppress(RuntimeError):  # `wait` reports it; here only the end of the work matters
                request.wait()

    def _resize(self, rounds: int) -> None:
        heads_and_patch = tuple(self._compiled.output(0).get_shape())[1:]
        self._output = np.empty((rounds * self._size, *heads_and_patch), dtype=np.float32)
        self._requests = [self._compiled.create_infer_request() for _ in range(rounds)]
        for part, request in zip(np.split(self._output, rounds), self._requests, strict=True):
            request.set_output_tensor(self._tensor(part, shared_memory=True))

    def _source(self, batch: Batch, count: int) -> Batch:
        """The batch itself where its memory can be lent until `wait`, else a copy, filled up to `count` patches."""
        if not self._background and len(batch) == count and batch.flags.carray:
            self._lent = batch
            return batch
        if len(self._own) != count:
            self._own = np.empty((count, *batch.shape[1:]), dtype=np.float32)
        self._own[: len(batch)] = batch
        self._own[len(batch) :] = 0  # not what lies there: NaN and denormals can be slow
        return self._own
