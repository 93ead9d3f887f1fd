"""What the cases on one GPU share: a stream, the kernels, page-locked memory, and engines that run on that stream."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, cast
from weakref import WeakSet

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import EngineError
from trtbuild.runtime.device import Buffer, Device, Module, Pinned, Stream
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


@dataclass(frozen=True, kw_only=True, eq=False)
class DeviceEngine:
    """One fold: its runner, the fewest and most tiles of a call, and the bytes that its first call on a stream takes
    for activations."""

    runner: Enqueues
    smallest: int
    largest: int
    activations: int

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

    `stream` is one for all cases: an engine keeps activations for every stream that it has seen. `warm` are the
    runners that have theirs.
    """

    device: Device
    stream: Stream
    module: Module
    staging: Pinned
    warm: WeakSet[Any] = field(default_factory=WeakSet)

    def launch(self, launch: Launch) -> None:
        """Begin to run a kernel."""
        arguments = cast(Sequence["np.number[Any]"], launch.arguments)
        self.stream.launch(self.module.kernel(launch.kernel), launch.grid, launch.block, arguments)

    def run(self, engine: DeviceEngine, source: int, target: int, batch: int) -> None:
        """Begin to run a network."""
        engine.runner.enqueue(source, target, self.stream.handle, batch)
        self.warm.add(engine.runner)

    def activations(self, engines: Sequence[DeviceEngine]) -> int:
        """Bytes that the engines have not taken yet."""
        return sum(engine.activations for engine in engines if engine.runner not in self.warm)

    def upload(self, target: Buffer, source: NDArray[Any]) -> None:
        """Copy an array (C order) to the start of a buffer; done at the end."""
        content, stage = source.reshape(-1).view(np.uint8), self.staging.array
        for first in range(0, len(content), len(stage)):
            part = content[first : first + len(stage)]
            stage[: len(part)] = part
            self.stream.copy_in(target, stage[: len(part)], first)
            self.stream.synchronize()  # before the stage is written again

    def download(self, target: NDArray[Any], source: Buffer, offset: int = 0) -> None:
        """Fill an array (C order) from a buffer, `offset` bytes from its start, after all that was begun before."""
        content, stage = target.reshape(-1).view(np.uint8), self.staging.array
        for first in range(0, len(content), len(stage)):
            part = content[first : first + len(stage)]
            self.stream.copy_out(stage[: len(part)], source, offset + first)
            self.stream.synchronize()
            part[...] = stage[: len(part)]


@contextmanager
def opened_gpu(device: Device, cubin: bytes, staging: int = STAGING) -> Iterator[Gpu]:
    """The device with what its cases share, given back with the block. The engines are closed before.

    Args:
        device: of `opened_device`.
        cubin: the kernels for its architecture.
        staging: bytes of page-locked memory, a multiple of 4.

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
        stack.callback(stream.close)  # the last that was opened is closed first: it waits
        yield Gpu(device=device, stream=stream, module=module, staging=pinned)


def engine_from_runner(runner: Enqueues, record: BuildRecord) -> DeviceEngine:
    """A fold's engine as the record says it was built."""
    activations = max(record.memory.device_per_batch.values(), default=0)
    smallest, largest = record.profile.min[0], record.profile.max[0]
    return DeviceEngine(runner=runner, smallest=smallest, largest=largest, activations=int(activations))
