"""Calls to a TensorRT engine: each has a stream, memory on both sides and an execution context of its own."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from trtbuild.errors import EngineError
from trtbuild.runtime.device import Buffer, Device, Pinned
from trtbuild.runtime.runner import Batch, RunnerInfo
from trtbuild.runtime.tensorrt_context import Context
from trtbuild.runtime.tensorrt_engine import LoadedEngine
from trtbuild.spec import Profile

if TYPE_CHECKING:
    from trtbuild.runtime.gpu.shared import Gpu

FLOAT = 4
"""Bytes of a float32."""


def parts(count: int, smallest: int, largest: int) -> Iterator[tuple[int, int, int]]:
    """(first, patches, patches to compute) of the calls for `count` patches: whole ones, then the rest.

    A rest below the profile's smallest batch is filled up.
    """
    for first in range(0, count, largest):
        size = min(largest, count - first)
        yield first, size, max(size, smallest)


class Slots:
    """The slots of an engine. One that nobody uses any more waits for the next lane; all are closed together.

    Where the engine was opened for a `gpu`, what is begun on its stream computes in its `ContextMemory`.
    """

    def __init__(
        self, device: Device, loaded: LoadedEngine, profile: Profile, info: RunnerInfo, gpu: Gpu | None = None
    ) -> None:
        self.device, self.loaded, self.profile, self.info, self._gpu = device, loaded, profile, info, gpu
        if gpu is not None:
            gpu.contexts.reserve(loaded.activation_memory)
        self._all: list[Slot] = []
        self._free: list[Slot] = []
        self._contexts: dict[tuple[int, int], Context] = {}
        self._making = threading.Lock()

    def take(self) -> Slot:
        """A slot with nothing under way."""
        with self._making:
            slot = self._free.pop() if self._free else None
            if slot is None:
                slot = Slot(self)
                self._all.append(slot)
        slot.wait()  # of a call that its caller gave up
        return slot

    def give(self, slot: Slot) -> None:
        """May be called by the garbage collector, in any thread: it calls neither CUDA nor TensorRT."""
        self._free.append(slot)

    def enqueue(self, source: int, target: int, stream: int, batch: int) -> None:
        """As `TensorRTRunner.enqueue`, with a context for each stream; on the Gpu's, for each batch."""
        with self.device.current():
            self.run(self._context(stream, batch), stream, source, target, batch)

    def run(self, context: Context, stream: int, source: int, target: int, batch: int) -> None:
        """Begin to compute; inside `Device.current`."""
        addresses = {self.info.inputs.name: source, self.info.outputs.name: target}
        context.run(stream, (batch, *self.profile.max[1:]), addresses, self.info.inputs.name)

    def _context(self, stream: int, batch: int) -> Context:
        """In shared memory each sees one shape only: TensorRT has nothing to set up anew, and a graph of it holds."""
        memory = self._gpu.contexts if self._gpu is not None and stream == self._gpu.stream.handle else None
        key = (stream, 0 if memory is None else batch)
        with self._making:
            if key not in self._contexts:
                self._contexts[key] = self.loaded.context(memory)
        return self._contexts[key]

    def close(self) -> None:
        """Wait for all calls, and give back what they hold."""
        with self.device.current(), ExitStack() as stack:  # from the last to the first, whichever of them fails
            for context in self._contexts.values():
                stack.callback(context.close)
            if self._contexts:
                stack.callback(self.device.cuda.Context.synchronize)  # the streams are not ours
            for slot in self._all:
                stack.callback(slot.close)


class Slot:
    """One call at a time: a stream, device memory for the largest batch, page-locked memory for a call."""

    def __init__(self, slots: Slots) -> None:
        self._slots, device = slots, slots.device
        largest = slots.profile.max[0]
        self._patches = tuple(tuple(map(int, port.shape[1:])) for port in (slots.info.inputs, slots.info.outputs))
        with ExitStack() as stack:
            self._buffers: list[Buffer] = []
            for patch in self._patches:
                self._buffers.append(device.buffer(largest * FLOAT * prod(patch)))
                stack.callback(self._buffers[-1].close)
            with device.current():
                self._context = slots.loaded.context()
            stack.callback(self._drop_context)
            self._pinned: list[Pinned] = []
            stack.callback(self._unpin)
            self._stream = device.stream()
            stack.callback(self._stream.close)  # the last that was opened is closed first: it waits
            self._stack = stack.pop_all()
        self._count = 0

    def start(self, batch: Batch) -> None:
        """Copy the batch, and begin to compute."""
        profile = self._slots.profile
        calls = list(parts(len(batch), profile.min[0], profile.max[0]))
        first, _, padded = calls[-1]
        source, target = self._arrays(first + padded)
        source[: len(batch)] = batch
        source[len(batch) :] = 0  # not what lies there: NaN and denormals can be slow
        self._count = len(batch)
        buffers = self._buffers
        with self._slots.device.current():
            for first, size, padded in calls:
                self._stream.copy_in(buffers[0], source[first : first + padded])
                self._slots.run(self._context, self._stream.handle, buffers[0].address, buffers[1].address, padded)
                self._stream.copy_out(target[first : first + size], buffers[1])

    def wait(self) -> None:
        """Until nothing is under way."""
        self._stream.synchronize()

    def logits(self) -> Batch:
        """What `wait` waited for, in page-locked memory."""
        return self._pinned[1].array[: self._count]

    def close(self) -> None:
        self._stack.close()

    def _arrays(self, rows: int) -> list[Batch]:
        """Page-locked input and output of `rows` patches; nothing may be under way."""
        if len(self._pinned) < len(self._patches) or len(self._pinned[0].array) < rows:
            self._unpin()
            for patch in self._patches:
                self._pinned.append(self._slots.device.pinned((rows, *patch)))
        return [pinned.array[:rows] for pinned in self._pinned]

    def _drop_context(self) -> None:
        with self._slots.device.current():
            self._context.close()

    def _unpin(self) -> None:
        while self._pinned:
            self._pinned.pop().close()


class TensorRTLane:
    """A slot, and the array that the caller gets: page-locked memory dies with the engine, a caller's result may not.

    That costs one copy on the host (4 bytes times heads and voxels); `TensorRTRunner.enqueue` has none.
    """

    def __init__(self, slots: Slots) -> None:
        self._slot = slots.take()
        self._output = np.empty(0, dtype=np.float32)
        weakref.finalize(self, slots.give, self._slot).atexit = False

    def start(self, batch: Batch) -> None:
        self._slot.start(batch)

    def wait(self) -> Batch:
        self._slot.wait()
        logits = self._slot.logits()
        if self._output.shape != logits.shape:
            self._output = np.empty_like(logits)
        self._output[...] = logits
        return self._output

    def settle(self) -> None:
        with suppress(EngineError):  # `wait` reports it; here only the end of the work matters
            self._slot.wait()
