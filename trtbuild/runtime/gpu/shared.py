"""What the cases on one GPU share: a stream, the kernels, page-locked memory, and engines that run on that stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable
from weakref import WeakSet

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtbuild.errors import EngineError
from trtbuild.runtime.device import Buffer, Device, Module, Pinned, Stream
from trtbuild.runtime.gpu.contexts import ContextMemory
from trtbuild.runtime.gpu.graph import Call, Graphs
from trtbuild.runtime.gpu.staging import Staging
from trtbuild.runtime.runner import Runner
from trtbuild.spec import BuildRecord
from trtbuild.stitch.launches import Float, Launch

STAGING = 32 << 20
"""Bytes of page-locked memory through which images and labels go. Locking takes longer than copying, so that there is
one piece for all cases, and none for each."""
TYPES: dict[str, Float] = {"float32": "f32", "float16": "f16", "half": "f16"}


class Enqueues(Runner, Protocol):
    """A Runner that also takes work that is on the GPU already: `TensorRTRunner`, for one."""

    def enqueue(self, source: int, target: int, stream: int, batch: int) -> None:
        """Begin to compute logits (batch, heads, *patch) from (batch, C, *patch), device memory to device memory."""


@runtime_checkable
class OfGpu(Protocol):
    """A Runner that may be opened for a Gpu."""

    @property
    def shares_memory(self) -> bool:
        """Whether its calls on the Gpu's stream compute in the Gpu's `ContextMemory`, and take none of their own."""

    @property
    def capturable(self) -> bool:
        """Whether a call on the Gpu's stream, after a first one with the same arguments, may become a CUDA graph."""


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceEngine:
    """One fold: its runner, the fewest and most tiles of a call, and the bytes that its first call on a stream takes
    for activations of its own: none where it shares the Gpu's `ContextMemory`. `capturable` as in `OfGpu`."""

    runner: Enqueues
    smallest: int
    largest: int
    activations: int
    capturable: bool = False

    @property
    def kinds(self) -> tuple[Float, Float]:
        """Types of input and output.

        Raises:
            EngineError: the kernels do not know one of them.
        """
        info = self.runner.describe()
        for port in (info.inputs, info.outputs):
            if port.dtype not in TYPES:
                raise EngineError("The kernels do not know the type of this engine's tensor.", got=port.dtype,
                                  expected=" or ".join(TYPES), where=f"{info.backend}, {port.name}")  # fmt: skip
        return TYPES[info.inputs.dtype], TYPES[info.outputs.dtype]


@dataclass(frozen=True, kw_only=True, eq=False)
class Gpu:
    """An opened device with everything that outlives a case. One thread uses it at a time.

    `stream` is one for all cases and engines: those that can share `contexts` for their activations, the others keep
    some for every stream that they have seen. `warm` are the runners that have theirs.
    """

    device: Device
    stream: Stream
    module: Module
    staging: Pinned
    copies: Staging
    graphs: Graphs
    contexts: ContextMemory
    warm: WeakSet[Any] = field(default_factory=WeakSet)

    def launch(self, launch: Launch) -> None:
        """Begin to run a kernel."""
        arguments = cast(Sequence["np.number[Any]"], launch.arguments)
        self.stream.launch(self.module.kernel(launch.kernel), launch.grid, launch.block, arguments)

    def run(self, engine: DeviceEngine, source: int, target: int, batch: int, calls: int = 1) -> None:
        """Begin to run a network. `calls` is how many times the case does it with these very arguments, before it
        ends with `graphs.clear`."""

        def work() -> None:
            engine.runner.enqueue(source, target, self.stream.handle, batch)

        if engine.capturable:
            call = Call(runner=id(engine.runner), source=source, target=target, batch=batch)
            self.graphs.run(call, work, calls)
        else:
            work()
        self.warm.add(engine.runner)

    def activations(self, engines: Sequence[DeviceEngine]) -> int:
        """Bytes that the engines have not taken yet, each of its own, and all together where they share them."""
        own = sum(engine.activations for engine in engines if engine.runner not in self.warm)
        return own + self.contexts.missing

    def upload(self, target: Buffer, source: NDArray[Any], *, offset: int = 0, dtype: DTypeLike | None = None) -> None:
        """As `Staging.upload`: copy an array to a buffer; done at the end."""
        self.copies.upload(target, source, offset=offset, dtype=dtype)

    def download(self, target: NDArray[Any], source: Buffer, offset: int = 0) -> None:
        """As `Staging.download`: fill an array from a buffer, after all that was begun before."""
        self.copies.download(target, source, offset)


@contextmanager
def opened_gpu(device: Device, cubin: bytes, staging: int = STAGING) -> Iterator[Gpu]:
    """The device with what its cases share, given back with the block. The engines are closed before.

    Args:
        device: of `opened_device`.
        cubin: the kernels for its architecture.
        staging: bytes of page-locked memory, at least 32.

    Raises:
        EngineError: the kernels cannot be loaded.
        OutOfMemory: there is no memory.
    """
    with ExitStack() as stack:
        module = device.module(cubin)
        stack.callback(module.close)
        pinned = device.pinned((staging,), np.uint8)
        stack.callback(pinned.close)
        stream = device.stream()
        stack.callback(stream.close)
        copies, graphs = Staging(device, stream, pinned), Graphs(device, stream)
        contexts = ContextMemory(device, stream, graphs)
        stack.callback(contexts.close)
        stack.callback(copies.close)
        stack.callback(stream.synchronize)  # the first that happens at the end
        yield Gpu(
            device=device, stream=stream, module=module, staging=pinned, copies=copies, graphs=graphs, contexts=contexts
        )


def engine_from_runner(runner: Enqueues, record: BuildRecord) -> DeviceEngine:
    """A fold's engine as the record says it was built."""
    shares, capturable = (runner.shares_memory, runner.capturable) if isinstance(runner, OfGpu) else (False, False)
    activations = 0 if shares else int(max(record.memory.device_per_batch.values(), default=0))
    smallest, largest = record.profile.min[0], record.profile.max[0]
    return DeviceEngine(
        runner=runner, smallest=smallest, largest=largest, activations=activations, capturable=capturable
    )
