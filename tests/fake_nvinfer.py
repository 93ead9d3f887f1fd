"""TensorRT without a GPU: a twin of the real bindings (tests/bindings.py) that computes the small network.

Names, signatures and types are the bindings' own. What TensorRT answers is scripted here: it refuses what TensorRT
refuses, with None or False and a line in the logger, and queues its work on the fake GPU (tests/fake_cuda.py), where it
reads and writes device memory by address when somebody waits for the stream. Objects that are destroyed before what
stands on them, outside a CUDA context or with work under way are faults of the GPU, and so is a logger that is freed.
"""

from __future__ import annotations

import hashlib
import json
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bindings import Twin
from bindings_facts import facts_of
from bindings_members import Call
from fake_cuda import NAN, Cuda, LogicError, installed
from numpy.typing import NDArray
from runner_samples import CHANNELS, HEADS, PATCHES, reference_logits

from trtbuild.spec import BuildRecord, Memory, Profile

VERSIONS = {"tensorrt": "10.16.1.11", "tensorrt-rtx": "rtx"}
"""Whose bindings stand for a backend."""
MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
MAGIC = b"fake plan "
BUDGET, WEIGHTS, SCRATCH, ACTIVATIONS = 3 << 20, 5 << 20, 512, 4096
"""Bytes: of weights on the GPU that TensorRT chooses, of all of them, what streaming takes per context, and what every
context takes."""


def plan_of(dimensions: int = 3, batches: tuple[int, int, int] = (1, 2, 2), **changes: Any) -> bytes:
    """A plan of the small network for a smallest, usual and largest batch."""
    patch = PATCHES[dimensions]
    facts: dict[str, Any] = {
        "dtypes": ["FLOAT", "FLOAT"],
        "profile": [[batch, CHANNELS, *patch] for batch in batches],
        "shapes": [[-1, CHANNELS, *patch], [-1, HEADS, *patch]],
    }
    return MAGIC + json.dumps(facts | changes).encode()


def device_record(
    backend: str, plan: bytes, *, dimensions: int = 3, batches: tuple[int, int, int] = (1, 2, 2), **changes: Any
) -> BuildRecord:
    """The record of a plan; `options` among the changes are added to its own."""
    version = facts_of(VERSIONS[backend])["version"]
    shapes = [(batch, CHANNELS, *PATCHES[dimensions]) for batch in batches]
    device = {"tensorrt": {"gpu": "Test GPU", "capability": "8.6", "driver": "13.0"}}
    options = {"sha256": hashlib.sha256(plan).hexdigest(), "key": "k", "version_compatible": False,
               "hardware_compatibility": "none", **changes.pop("options", {})}  # fmt: skip
    record = BuildRecord(
        network="fold_0_fp32", backend=backend, flavour=f"{backend}-{version.partition('.')[0]}", version=version,
        file="engines/x.engine", precision="fp32", inference_precision="f32",
        profile=Profile(min=shapes[0], opt=shapes[1], max=shapes[2]),
        device=device.get(backend, {"capabilities": "86,89"}), options=options,
        memory=Memory(host=None, device_per_batch={}, measured=False),
    )  # fmt: skip
    return replace(record, **changes)


@dataclass(eq=False, kw_only=True)
class Life:
    """An object that TensorRT made, as long as Python holds it. It keeps its logger, and stands on what is `below`."""

    kind: str
    below: tuple[Life, ...]
    logger: Any
    facts: dict[str, Any] = field(default_factory=dict)


class Calls(list[Call]):
    """Calls of a twin that keep no object of TensorRT's alive: the name of its class stands for it."""

    def __init__(self, base: type) -> None:
        super().__init__()
        self.base = base

    def append(self, call: Call) -> None:
        plain = {n: type(v).__name__ if isinstance(v, self.base) else v for n, v in call.arguments.items()}
        super().append(Call(call.name, plain, None))


class FakeTensorRT:
    """A twin and the GPU that it computes on. What a test wants to go wrong is set in the fields before it does."""

    def __init__(self, cuda: Cuda, version: str) -> None:
        self.cuda = cuda
        self.no_memory = False
        self.refuses_capture, self.activations = False, ACTIVATIONS
        self.calls_left = float("inf")
        """Calls of execute_async_v3 that go well."""
        self.validity, self.cache_fits, self.compiled = (0, 0), True, b"kernels"
        self.taken_caches: list[bytes] = []
        self.seen: list[NDArray[np.float32]] = []
        """What the network was given."""
        self.when_a_context_is_made: Callable[[], None] = lambda: None
        self.alive: list[Life] = []
        self.first_logger: Callable[[], Any] | None = None
        names = [name for name in dir(self) if name.startswith("do_")]
        self.twin = Twin(facts_of(version), {}, "tensorrt_rtx" if version == "rtx" else "tensorrt")
        self.twin.calls = Calls(self.twin.base)
        for name in names:
            cls, _, member = name[3:].partition("__")
            if self._has(cls, member):
                self.twin.answers[f"{cls}.{member}" if member else cls] = _function(getattr(self, name))

    def _has(self, cls: str, member: str) -> bool:
        fact = self.twin.facts["classes"].get(cls)
        return fact is not None and (not member or member in fact["methods"] or member in fact["properties"])

    # --- Runtime

    def do_Runtime(self, call: Call) -> Any:
        self.first_logger = self.first_logger or weakref.ref(call.arguments["logger"])
        self._born(call.on, Life(kind="Runtime", below=(), logger=call.arguments["logger"]))

    def do_Runtime__get_engine_validity(self, call: Call) -> Any:
        return self.twin.EngineValidity(self.validity[0]), self.validity[1]

    def do_Runtime__deserialize_cuda_engine(self, call: Call) -> Any:
        self._needs_context("deserialize_cuda_engine")
        content = bytes(call.arguments["serialized_engine"])
        if not content.startswith(MAGIC) or self.no_memory:
            reason = "OutOfMemory (Requested size was 8 bytes.)" if self.no_memory else "magicTag != 'ptrt'"
            return self._refuse(call, reason)
        return self._new("ICudaEngine", call, **json.loads(content[len(MAGIC) :]))

    # --- ICudaEngine

    def do_ICudaEngine__num_io_tensors(self, call: Call) -> Any:
        return len(self._of(call)["dtypes"])

    def do_ICudaEngine__num_optimization_profiles(self, call: Call) -> Any:
        return 1

    def do_ICudaEngine__get_tensor_name(self, call: Call) -> Any:
        return ("input", "logits", "more")[call.arguments["index"]]

    def do_ICudaEngine__get_tensor_mode(self, call: Call) -> Any:
        modes = self.twin.TensorIOMode
        return modes.INPUT if call.arguments["name"] == "input" else modes.OUTPUT

    def do_ICudaEngine__get_tensor_dtype(self, call: Call) -> Any:
        return self.twin.DataType.__members__[self._of(call)["dtypes"][call.arguments["name"] == "logits"]]

    def do_ICudaEngine__get_tensor_shape(self, call: Call) -> Any:
        return tuple(self._of(call)["shapes"][call.arguments["name"] == "logits"])

    def do_ICudaEngine__get_tensor_profile_shape(self, call: Call) -> Any:
        assert (call.arguments["name"], call.arguments["profile_index"]) == ("input", 0)
        return [tuple(shape) for shape in self._of(call)["profile"]]

    def do_ICudaEngine__device_memory_size_v2(self, call: Call) -> Any:
        return self._needs(call.on)

    def do_ICudaEngine__get_weight_streaming_automatic_budget(self, call: Call) -> Any:
        return BUDGET

    def do_ICudaEngine__streamable_weights_size(self, call: Call) -> Any:
        return WEIGHTS

    def do_ICudaEngine__create_runtime_config(self, call: Call) -> Any:
        return self._new("IRuntimeConfig", call, strategy=None)

    def do_ICudaEngine__create_execution_context(self, call: Call) -> Any:
        self._needs_context("create_execution_context")
        self.when_a_context_is_made()
        if self.no_memory:
            return self._refuse(call, "[defaultAllocator.cpp] Error Code 1: Cuda Runtime (out of memory)")
        config, user_managed = call.arguments.get("runtime_config"), False
        if config is not None:
            user_managed = config._life.facts["strategy"] == self.twin.ExecutionContextAllocationStrategy.USER_MANAGED
        return self._new("IExecutionContext", call, engine=self._of(call), addresses={}, shape=None, busy=[],
                         needs=self._needs(call.on), user_managed=user_managed, memory=None, set_up=None)  # fmt: skip

    def do_IRuntimeConfig__set_execution_context_allocation_strategy(self, call: Call) -> Any:
        self._of(call)["strategy"] = call.arguments["strategy"]

    # --- IExecutionContext

    def do_IExecutionContext__set_device_memory(self, call: Call) -> Any:
        facts, memory = self._of(call), (int(call.arguments["memory"]), int(call.arguments["size"]))
        self._changes(call, memory != facts["memory"])
        if not facts["user_managed"]:
            self.cuda.fault("memory for a context that allocates its own")
        self.cuda.at(*memory)
        if memory[1] < facts["needs"]:
            return self._refuse(call, f"Error Code 3: API Usage Error ({memory[1]} bytes, {facts['needs']} are needed)")
        facts["memory"] = memory
        return None

    def do_IExecutionContext__set_tensor_address(self, call: Call) -> Any:
        addresses, name, memory = self._of(call)["addresses"], call.arguments["name"], int(call.arguments["memory"])
        self._changes(call, addresses.get(name) != memory)
        addresses[name] = memory
        return name in ("input", "logits")

    def do_IExecutionContext__set_input_shape(self, call: Call) -> Any:
        smallest, _, largest = self._of(call)["engine"]["profile"]
        shape = tuple(call.arguments["shape"])
        inside = len(shape) == len(largest) and all(
            low <= got <= high for low, got, high in zip(smallest, shape, largest, strict=True)
        )
        if not inside:
            self._refuse(call, f"Runtime dimension does not satisfy any optimization profile: {shape}")
            return False
        self._changes(call, self._of(call)["shape"] != shape)
        self._of(call)["shape"] = shape
        return True

    def do_IExecutionContext__execute_async_v3(self, call: Call) -> Any:
        self._needs_context("execute_async_v3")
        facts, stream = self._of(call), call.arguments["stream_handle"]
        self.calls_left -= 1
        if self.calls_left < 0 or facts["shape"] is None or set(facts["addresses"]) != {"input", "logits"}:
            self._refuse(call, "Error Code 3: API Usage Error (an input shape or address is not set)")
            return False
        if facts["user_managed"] and facts["memory"] is None:
            self._refuse(call, "Error Code 3: API Usage Error (no device memory is set)")
            return False
        if self.cuda.captures(stream) and not self._capturable(call):
            return False
        facts["set_up"] = facts["shape"]
        self._compute(call.on._life, stream)
        return True

    def _capturable(self, call: Call) -> bool:
        """What a call does for a new shape waits for the GPU, and so does every call that streams its weights."""
        facts = self._of(call)
        streams = facts["needs"] > self.activations
        if facts["set_up"] == facts["shape"] and not streams and not self.refuses_capture:
            return True
        with suppress(LogicError):
            self.cuda.need_no_capture("cudaStreamSynchronize")
        self._refuse(call, "Error Code 1: Cuda Runtime (operation not permitted when stream is capturing)")
        return False

    def _compute(self, life: Life, stream: int) -> None:
        """Queues it; what goes into a graph is under way only when that is launched."""
        facts, shape, addresses = life.facts, life.facts["shape"], dict(life.facts["addresses"])
        spaces = [facts["memory"]] if facts["user_managed"] else []
        if set(facts["busy"]) - {stream}:
            self.cuda.fault("an execution context is used on two streams at once")
        if any(self._works_in(space, stream) for space in spaces):
            self.cuda.fault("two contexts compute in one memory at once")
        captured = self.cuda.captures(stream)
        if not captured:
            facts["busy"].append(stream)

        def compute() -> None:
            if not captured:
                facts["busy"].remove(stream)
            for space in spaces:
                self.cuda.at(*space)[:] = NAN
            batch = _floats(self.cuda, addresses["input"], shape)
            if not np.isfinite(batch).all():
                self.cuda.fault("the network got NaN")
            self.seen.append(batch.copy())
            out = _floats(self.cuda, addresses["logits"], (shape[0], HEADS, *shape[2:]))
            out[...] = reference_logits(batch)

        self.cuda.run_on(stream, compute, {*addresses.values(), *(space[0] for space in spaces)}, life)

    def _works_in(self, space: tuple[int, int], stream: int) -> bool:
        """Whether another stream will write there."""
        queues = [queue for handle, queue in self.cuda.streams.items() if handle != stream]
        return any(space[0] in work.addresses for queue in queues for work in queue.work)

    def _needs(self, engine: Any) -> int:
        return self.activations + SCRATCH * ("ICudaEngine.weight_streaming_budget_v2" in engine.__dict__)

    def _changes(self, call: Call, different: bool) -> None:
        """A graph is of the context as it was captured."""
        if different and self._has_graphs(call.on._life):
            self.cuda.fault("a context was changed of which there is a graph")

    def _has_graphs(self, life: Life) -> bool:
        return any(work.owner is life for graph in self.cuda.execs.values() for work in graph)

    # --- TensorRT-RTX's runtime cache

    def do_IRuntimeConfig__create_runtime_cache(self, call: Call) -> Any:
        return self._new("IRuntimeCache", call)

    def do_IRuntimeCache__deserialize(self, call: Call) -> Any:
        self._needs_context("IRuntimeCache.deserialize")
        if not self.cache_fits:
            self._refuse(call, "the runtime cache is of another driver")
            return False
        self.taken_caches.append(bytes(call.arguments["blob"]))
        return True

    def do_IRuntimeCache__serialize(self, call: Call) -> Any:
        if any(queue.work for queue in self.cuda.streams.values()):
            self.cuda.fault("the runtime cache is read while kernels are under way")
        return self.compiled

    # --- lives

    def leaks(self) -> list[str]:
        """What is not destroyed."""
        return [life.kind for life in self.alive]

    def _new(self, kind: str, call: Call, **facts: Any) -> Any:
        """An object that stands on the one that was asked for it."""
        made, on = self.twin.kinds.new(kind), call.on._life
        self._born(made, Life(kind=kind, below=(on,), logger=on.logger, facts=facts))
        return made

    def _born(self, made: Any, life: Life) -> None:
        object.__setattr__(made, "_life", life)
        self.alive.append(life)
        weakref.finalize(made, self._gone, life).atexit = False

    def _gone(self, life: Life) -> None:
        self.alive.remove(life)
        for other in self.alive:
            if life in other.below:
                self.cuda.fault(f"{life.kind} was destroyed before {other.kind}, which stands on it")
        if self._has_graphs(life):
            self.cuda.fault(f"{life.kind} was destroyed before a graph of it")
        if life.facts.get("busy"):
            self.cuda.fault(f"{life.kind} was destroyed with work under way")
        if not self.cuda.stack():
            self.cuda.fault(f"{life.kind} was destroyed where no CUDA context is current")

    def _of(self, call: Call) -> Any:
        return call.on._life.facts

    def _refuse(self, call: Call, text: str) -> None:
        logger = call.on._life.logger
        logger.log(self.twin.ILogger.ERROR, text)
        logger.log(self.twin.ILogger.INFO, "not a reason")

    def _needs_context(self, what: str) -> None:
        if not self.cuda.stack():
            self.cuda.fault(f"{what} where no CUDA context is current")
        if self.first_logger is not None and self.first_logger() is None:
            self.cuda.fault(f"{what} after TensorRT's global logger was freed")


def install(patch: pytest.MonkeyPatch, backend: str, *, cuda: Cuda | None = None, version: str | None = None) -> Any:
    """Put a GPU, its driver, pycuda and one flavour of TensorRT into this process."""
    fake = FakeTensorRT(cuda or Cuda(), version or VERSIONS[backend])
    for name, module in installed(fake.cuda).items():
        patch.setitem(sys.modules, name, module)
    for name in MODULES.values():
        patch.delitem(sys.modules, name, raising=False)
    patch.setitem(sys.modules, MODULES[backend], fake.twin)
    patch.setattr("trtbuild.runtime.device.no_driver", lambda: None)
    return fake


def write_plan(path: Path, plan: bytes) -> Path:
    path.write_bytes(plan)
    return path


def _function(method: Any) -> Any:
    return lambda call: method(call)  # the twin tells a script from a value by its being a function


def _floats(cuda: Cuda, address: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return cuda.at(address, 4 * int(np.prod(shape))).view(np.float32).reshape(shape)
