"""A plan that TensorRT has loaded, and the execution contexts that are made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trtbuild.errors import EngineError, OutOfMemory
from trtbuild.nvinfer import Nvinfer
from trtbuild.runtime.device import NO_ROOM, Device
from trtbuild.runtime.gpu.contexts import ContextMemory
from trtbuild.runtime.runtime_cache import KeptCache, keep_cache, kept_cache
from trtbuild.runtime.tensorrt_context import Context
from trtbuild.runtime.tensorrt_fit import rebuild_hint
from trtbuild.runtime.tensorrt_log import Errors, error_log
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
        self._errors = Errors()
        self._runtime: Any = None
        self._engine: Any = None
        self._configs: dict[bool, Any] = {}  # by whether a context allocates its memory itself
        self._cache: Any = None
        with device.current():
            try:
                self._load(record, content)
                self._kept = self._runtime_cache(library, record)
            except BaseException:
                self._drop()
                raise

    def _load(self, record: BuildRecord, content: bytes) -> None:
        self._runtime = self._module.Runtime(error_log(self._module, self._errors))
        if record.options.get("version_compatible") is True:
            self._runtime.engine_host_code_allowed = True
        self._check_validity(content, rebuild_hint(record))
        self._engine = self._runtime.deserialize_cuda_engine(content)
        if self._engine is None:
            raise self.failure("TensorRT cannot load the engine.")
        if record.options.get("weight_streaming") is True:
            self._stream_weights()
        self.activation_memory = int(self._engine.device_memory_size_v2)  # depends on that
        self._configs[True] = self._engine.create_runtime_config()

    def ports(self) -> tuple[list[TensorSpec], list[TensorSpec]]:
        """Inputs and outputs; a free dimension is "?"."""
        modes = self._module.TensorIOMode
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        inputs = [self._spec(name) for name in names if self._engine.get_tensor_mode(name) == modes.INPUT]
        return inputs, [self._spec(name) for name in names if self._engine.get_tensor_mode(name) == modes.OUTPUT]

    def profile(self, name: str) -> list[tuple[int, ...]]:
        """Smallest, usual and largest shape of an input."""
        return [tuple(map(int, shape)) for shape in self._engine.get_tensor_profile_shape(name, PROFILE)]

    def context(self, memory: ContextMemory | None = None) -> Context:
        """A new execution context, which computes in `memory` where it is given."""
        return Context(self, memory)

    def made_context(self, *, own_memory: bool) -> Any:
        """TensorRT's own; for `Context`."""
        if own_memory not in self._configs:
            self._shared_config()
        context = self._engine.create_execution_context(self._configs[own_memory])
        if context is None:
            raise self.failure("TensorRT cannot make an execution context.")
        return context

    def failure(self, what: str) -> EngineError:
        """The error for what TensorRT refused, with the reasons that it logged since the last one."""
        rows = list(self._errors.rows)
        self._errors.rows.clear()
        text = "; ".join(rows) or "TensorRT gave no reason"
        if any(mark in text for mark in NO_MEMORY):
            return OutOfMemory(what, got=text, where=self._where, hint=NO_ROOM)
        return EngineError(what, got=text, where=self._where)

    def close(self) -> None:
        """To be called when nothing is under way; contexts are closed before."""
        with self._device.current():
            try:
                self._keep_kernels()
            finally:
                self._drop()

    def _keep_kernels(self) -> None:
        if self._cache is not None:
            content = self._cache.serialize()
            keep_cache(self._kept, None if content is None else bytes(content))

    def _drop(self) -> None:
        """In the order in which they stand on each other, the newest first."""
        self._configs.pop(False, None)
        self._cache = None
        self._configs.clear()
        self._engine = None
        self._runtime = None

    def _stream_weights(self) -> None:
        """Says how many of the weights stay on the GPU: by itself TensorRT keeps all of them there.

        The automatic budget is what is free now, less some room (NvInferRuntime.h, getWeightStreamingAutomaticBudget).
        It can be changed only before the first context, whose memory depends on it.
        """
        budget = int(self._engine.get_weight_streaming_automatic_budget())
        try:
            self._engine.weight_streaming_budget_v2 = budget
        except RuntimeError as error:
            raise self.failure("TensorRT refused a budget for its weights.") from error
        found = int(self._engine.weight_streaming_budget_v2)
        if found != budget:
            raise self.failure("TensorRT refused a budget for its weights.")
        size = int(self._engine.streamable_weights_size)
        self.details["weight streaming"] = f"{found} of {size} bytes of weights stay on the GPU"

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
        """TensorRT-RTX compiles at run time: its kernels come from a file."""
        if not library.features.runtime_cache:
            return KeptCache(path=None, content=b"", note="")
        self._cache = self._configs[True].create_runtime_cache()
        kept = kept_cache(engine=str(record.options["sha256"]), version=library.version, gpu=self._device.name,
                          capability=self._device.capability)  # fmt: skip
        note = kept.note
        if kept.content and not self._cache.deserialize(kept.content):
            note += ", made anew: TensorRT-RTX refused it"
        graph = self._compile_kernels(own_memory=True)
        self._errors.rows.clear()  # a refused cache is no error of what comes next
        self.details.update({"runtime cache": note, "CUDA graph": f"asked for: {graph}"})
        return kept

    def _compile_kernels(self, *, own_memory: bool) -> str:
        """One launch runs all kernels of TensorRT-RTX; the graph strategy that holds.

        By itself it computes with general kernels until those for a shape are compiled in the background, and logits
        would change in rounding in the middle of a case. So the first call waits for them.
        """
        configs = self._configs  # never a config itself: an error's traceback would keep it beyond the engine
        strategies = self._module.DynamicShapesKernelSpecializationStrategy
        configs[own_memory].dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        configs[own_memory].cuda_graph_strategy = self._module.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        if not configs[own_memory].set_runtime_cache(self._cache):
            raise self.failure("TensorRT-RTX refused a runtime cache.")
        return str(configs[own_memory].cuda_graph_strategy.name)  # whether a launch is captured is not told

    def _shared_config(self) -> None:
        """A config for contexts that get their memory: whether a context keeps its config is not told."""
        self._configs[False] = self._engine.create_runtime_config()
        try:
            strategies = self._module.ExecutionContextAllocationStrategy
            self._configs[False].set_execution_context_allocation_strategy(strategies.USER_MANAGED)
            if self._cache is not None:
                self._compile_kernels(own_memory=False)
        except BaseException:
            del self._configs[False]  # or the next context would take it as it is
            raise

    def _spec(self, name: str) -> TensorSpec:
        kind = self._engine.get_tensor_dtype(name)
        dtype = "float32" if kind == self._module.DataType.FLOAT else str(kind.name).lower()
        shape = tuple("?" if size < 0 else int(size) for size in self._engine.get_tensor_shape(name))
        return TensorSpec(name=name, dtype=dtype, shape=shape)
