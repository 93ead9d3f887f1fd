"""A plan that TensorRT has loaded, and the execution contexts that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtbuild.errors import EngineError, OutOfMemory
from trtbuild.nvinfer import Nvinfer
from trtbuild.runtime.device import NO_ROOM, Device
from trtbuild.runtime.runtime_cache import KeptCache, keep_cache, kept_cache
from trtbuild.runtime.tensorrt_fit import rebuild_hint
from trtbuild.spec import BuildRecord, TensorSpec

NO_MEMORY = ("OutOfMemory", "out of memory")
"""What TensorRT's log says where cudaMalloc found no memory, and its own error code."""
PROFILE = 0
"""The one optimisation profile that trtbuild builds; it is a context's without being set."""


class LoadedEngine:
    """An engine on the GPU. `details` say how it runs, `activation_memory` is one context's, in bytes."""

    def __init__(self, library: Nvinfer, device: Device, record: BuildRecord, content: bytes, where: Path) -> None:
        self._module, self._device, self._where = library.module, device, where
        self.details: dict[str, str] = {}
        with device.current():
            self._log = _error_log(library.module)
            self._runtime = library.module.Runtime(self._log)
            if record.options.get("version_compatible") is True:
                self._runtime.engine_host_code_allowed = True
            self._check_validity(content, rebuild_hint(record))
            self._engine = self._runtime.deserialize_cuda_engine(content)
            if self._engine is None:
                raise self._failure("TensorRT cannot load the engine.")
            self._config = self._engine.create_runtime_config()
            self._cache: Any = None
            self._kept = self._runtime_cache(library, record)
            self.activation_memory = int(self._engine.device_memory_size_v2)

    def ports(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Inputs and outputs; a free dimension is "?"."""
        modes = self._module.TensorIOMode
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [self._spec(name) for name in names if self._engine.get_tensor_mode(name) == modes.INPUT]
        return inputs, [self._spec(name) for name in names if self._engine.get_tensor_mode(name) == modes.OUTPUT]

    def profile(self, name: str) -> list[tuple[int, ...]]:
        """Smallest, usual and largest shape of an input."""
        return [tuple(map(int, shape)) for shape in self._engine.get_tensor_profile_shape(name, PROFILE)]

    def context(self) -> Any:
        """A new execution context with its own activations. To be made and dropped inside `Device.current`."""
        context = self._engine.create_execution_context(self._config)
        if context is None:
            raise self._failure("TensorRT cannot make an execution context.")
        return context

    def run(self, context: Any, stream: int, shape: tuple[int, ...], addresses: dict[str, int], name: str) -> None:
        """Begin to compute in a context: `name` is the input, `addresses` are those of the input and the output."""
        done = all(context.set_tensor_address(tensor, address) for tensor, address in addresses.items())
        if not (done and context.set_input_shape(name, shape) and context.execute_async_v3(stream)):
            raise self._failure("TensorRT failed.")

    def close(self) -> None:
        """To be called when nothing is under way; contexts are dropped before."""
        with self._device.current():
            if self._cache is not None:
                keep_cache(self._kept, bytes(self._cache.serialize()))
            del self._cache, self._config, self._engine, self._runtime

    def _check_validity(self, content: bytes, rebuild: str) -> None:
        """What TensorRT-RTX reads from the plan's header; without a driver it calls every engine invalid."""
        if not hasattr(self._runtime, "get_engine_validity"):
            return
        validity, reasons = self._runtime.get_engine_validity(content)
        known = self._module.EngineInvalidityDiagnostics.__members__.items()
        text = ", ".join(name for name, bit in known if int(reasons) & int(bit)) or "no reason given"
        if validity == self._module.EngineValidity.INVALID:
            raise EngineError("TensorRT-RTX does not run this engine here.", got=text, where=self._where, hint=rebuild)
        if validity == self._module.EngineValidity.SUBOPTIMAL:
            self.details["note.validity"] = f"suboptimal: {text}"

    def _runtime_cache(self, library: Nvinfer, record: BuildRecord) -> KeptCache:
        """TensorRT-RTX compiles at run time: its kernels come from a file, and one launch runs them all.

        By itself it computes with general kernels until those for a shape are compiled in the background, and logits
        would change in rounding in the middle of a case. So the first call waits for them.
        """
        if not library.features.runtime_cache:
            return KeptCache(path=None, content=b"", note="")
        strategies = self._module.DynamicShapesKernelSpecializationStrategy
        self._config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        self._config.cuda_graph_strategy = self._module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self._cache = self._config.create_runtime_cache()
        kept = kept_cache(engine=str(record.options["sha256"]), version=library.version, gpu=self._device.name,
                          capability=self._device.capability)  # fmt: skip
        note = kept.note
        if kept.content and not self._cache.deserialize(kept.content):
            note += ", made anew: TensorRT-RTX refused it"
        if not self._config.set_runtime_cache(self._cache):
            raise self._failure("TensorRT-RTX refused a runtime cache.")
        self._log.errors.clear()  # a refused cache is no error of what comes next
        self.details.update({"runtime cache": note, "CUDA graph": "whole"})
        return kept

    def _spec(self, name: str) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name)
        dtype = "float32" if kind == self._module.DataType.FLOAT else str(kind.name).lower()
        shape = tuple("?" if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
        return TensorSpec(name=name, dtype=dtype, shape=shape)

    def _failure(self, what: str) -> EngineError:
        rows = list(self._log.errors)
        self._log.errors.clear()
        text = "; ".join(rows) or "TensorRT gave no reason"
        if any(mark in text for mark in NO_MEMORY):
            return OutOfMemory(what, got=text, where=self._where, hint=NO_ROOM)
        return EngineError(what, got=text, where=self._where)


def _error_log(module: Any) -> Any:
    """A logger that keeps errors; TensorRT returns None or False, and tells the reason here alone."""

    class ErrorLog(module.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.ERROR, module.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return ErrorLog()
