"""A null engine on the fake GPU: a Runner that also takes work in device memory, with logits known in closed form."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from fake_cuda import Cuda, LogicError
from numpy.typing import NDArray
from test_slabs import Bumpy
from test_tiles import record

from trtbuild.errors import EngineError, OutOfMemory
from trtbuild.runtime.gpu.shared import DeviceEngine
from trtbuild.runtime.null import null_info
from trtbuild.runtime.runner import Batch
from trtbuild.spec import ModelSpec


class FakeEngine(Bumpy):
    """Logits depend on the place in the patch and on the fold, so that weights, flips and the order of folds matter.

    `batches` are those of every call. A call of number `fail_at` (from 0) is refused, one that is `bad_at` writes NaN,
    and the first one finds no memory `out_of_memory` times. A patch with a voxel above `poison` gives a NaN there.
    Where it is `capturable`, a call may go into a CUDA graph, after a first one of that batch has waited for the GPU.
    """

    def __init__(
        self, spec: ModelSpec, cuda: Cuda, *, fold: int = 0, batch: int = 1, smallest: int = 1, kind: str = "float32"
    ) -> None:
        info = null_info(record(spec, batch=batch))
        inputs, outputs = (replace(port, dtype=kind) for port in (info.inputs, info.outputs))
        super().__init__(replace(info, inputs=inputs, outputs=outputs))
        self.kind = np.dtype(kind)
        self.cuda, self.fold, self.smallest, self.largest = cuda, fold, smallest, batch
        self.patch, self.channels, self.heads = spec.patch, spec.network_channels, spec.labels.heads
        self.batches: list[int] = []
        self.fail_at: int | None = None
        self.bad_at: int | None = None
        self.bad_value = float("nan")
        self.out_of_memory = 0
        self.capturable = False
        self.set_up: set[int] = set()
        self.poison = np.inf

    def answer(self, batch: Batch) -> Batch:
        logits = super().answer(batch.astype(self.kind).astype(np.float32))
        wave = 0.1 * self.fold * np.sin(np.arange(logits.shape[-1], dtype=np.float32))
        bad = np.where(batch.max(axis=1, keepdims=True) > self.poison, np.nan, 0)
        return (logits + wave + bad).astype(self.kind).astype(np.float32)

    def enqueue(self, source: int, target: int, stream: int, batch: int) -> None:
        if self.out_of_memory:
            self.out_of_memory -= 1
            raise OutOfMemory("TensorRT cannot make an execution context.", got="out of memory")
        number = len(self.batches)
        self.batches.append(batch)
        if number == self.fail_at:
            raise EngineError("TensorRT failed.", got="as the test wants it")
        if not self.smallest <= batch <= self.largest:
            self.cuda.fault(f"a batch of {batch}, outside {self.smallest} to {self.largest}")
        if self.cuda.captures(stream) and batch not in self.set_up:
            with self.cuda_errors("the first call of a batch"):
                self.cuda.need_no_capture("cudaStreamSynchronize")
        self.set_up.add(batch)

        def compute() -> None:
            patches = self._array(source, (batch, self.channels, *self.patch))
            if not np.isfinite(patches).all():
                self.cuda.fault("the network got NaN")
            logits = self._array(target, (batch, self.heads, *self.patch))
            logits[...] = self.answer(patches.astype(np.float32))
            if number == self.bad_at:
                logits[(-1, *[0] * (logits.ndim - 1))] = self.bad_value

        self.cuda.run_on(stream, compute, {source, target})

    @staticmethod
    @contextmanager
    def cuda_errors(what: str) -> Iterator[None]:
        try:
            yield
        except LogicError as error:
            raise EngineError(f"TensorRT failed: {what}.", got=error) from error

    def _array(self, address: int, shape: tuple[int, ...]) -> NDArray[Any]:
        nbytes = self.kind.itemsize * int(np.prod(shape))
        return self.cuda.at(address, nbytes).view(self.kind).reshape(shape)


def device_engine(runner: FakeEngine, activations: int = 0) -> DeviceEngine:
    """As the pipeline takes it."""
    return DeviceEngine(
        runner=runner, smallest=runner.smallest, largest=runner.largest, activations=activations,
        capturable=runner.capturable,
    )  # fmt: skip
