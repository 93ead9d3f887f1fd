"""Batches of the host on a network that computes from device memory to device memory, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from math import prod

import numpy as np

from trtbuild.errors import EngineError
from trtbuild.runtime.device import Buffer, Device, Pinned, Stream
from trtbuild.runtime.runner import Batch, RunnerInfo

FLOAT = 4
"""Bytes of a float32."""


class DeviceBatches:
    """Copies in, computes, copies out, on one stream. Its memory, for the largest batch, is taken by the first call."""

    def __init__(
        self, device: Device, stream: Stream, info: RunnerInfo, enqueue: Callable[[int, int, int], None]
    ) -> None:
        self._device, self._stream, self._enqueue, self._largest = device, stream, enqueue, info.batch
        self._source, self._target = (tuple(map(int, port.shape[1:])) for port in (info.inputs, info.outputs))
        self._pinned: list[Pinned] = []
        self._buffers: list[Buffer] = []
        self._memory = ExitStack()
        self._using = threading.Lock()
        self._closed = False
        self.background = ThreadPoolExecutor(max_workers=1, thread_name_prefix="trtbuild-cuda")

    def output(self, count: int) -> Batch:
        """Room for the logits of `count` patches."""
        return np.empty((count, *self._target), dtype=np.float32)

    def compute(self, batch: Batch, logits: Batch) -> None:
        """Fills `logits` (B, heads, *patch) for a batch (B, C, *patch), both float32.

        Raises:
            EngineError: closed, or the network or the device failed.
            OutOfMemory: there is no memory for the largest batch.
        """
        with self._using:
            if self._closed:
                raise EngineError("The runner is closed.", hint="Open the engine again.")
            self._take_memory()
            for first in range(0, len(batch), self._largest):
                part = slice(first, first + self._largest)
                self._part(batch[part], logits[part])

    def close(self) -> None:
        """Wait for what is under way, and give the memory back."""
        self.background.shutdown()
        with self._using:
            self._closed = True
            self._memory.close()

    def _part(self, batch: Batch, logits: Batch) -> None:
        source, target = (pinned.array[: len(batch)] for pinned in self._pinned)
        source[...] = batch
        with ExitStack() as stack:
            stack.callback(self._stream.synchronize)  # also after an error: nothing is under way any more
            self._stream.copy_in(self._buffers[0], source)
            self._enqueue(self._buffers[0].address, self._buffers[1].address, len(batch))
            self._stream.copy_out(target, self._buffers[1])
        logits[...] = target

    def _take_memory(self) -> None:
        if self._buffers:
            return
        with ExitStack() as stack:
            pinned, buffers = [], []
            for patch in (self._source, self._target):
                buffers.append(self._device.buffer(FLOAT * self._largest * prod(patch)))
                stack.callback(buffers[-1].close)
                pinned.append(self._device.pinned((self._largest, *patch)))
                stack.callback(pinned[-1].close)
            self._buffers, self._pinned, self._memory = buffers, pinned, stack.pop_all()


class DeviceLane:
    """Runs in the calling thread, or in the background; the logits are the lane's own array."""

    def __init__(self, batches: DeviceBatches, background: bool) -> None:
        self._batches, self._background = batches, background
        self._output = np.empty(0, dtype=np.float32)
        self._future: Future[None] | None = None

    def start(self, batch: Batch) -> None:
        if len(self._output) != len(batch):
            self._output = self._batches.output(len(batch))
        if self._background:
            self._future = self._batches.background.submit(self._batches.compute, batch.copy(), self._output)
        else:
            self._batches.compute(batch, self._output)

    def wait(self) -> Batch:
        if self._future is not None:
            self._future.result()
        return self._output

    def settle(self) -> None:
        if self._future is not None:
            wait([self._future])
