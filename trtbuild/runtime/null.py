"""The null runner: right shapes, call counts, a closed-form answer, no hardware and no file.

With m the mean of a voxel over the channels, head h answers `2 h m - h²`. That is m² - (m - h)² less m², so argmax
over H heads is the whole number nearest to m within 0..H-1 (a tie takes the lower one), and as regions
(sigmoid > 0.5, that is logit > 0) head h >= 1 is set where m > h / 2 and head 0 nowhere.
"""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np

from trtbuild import __version__
from trtbuild.machine import cpu_description
from trtbuild.runtime.fit import fit_from_record, positive_option
from trtbuild.runtime.lanes import LaneRunner
from trtbuild.runtime.runner import Batch, RunnerInfo
from trtbuild.spec import BuildRecord, TensorSpec

NAME = "null"


def null_logits(batch: Batch, heads: int) -> Batch:
    """The closed form: (B, C, *patch) -> (B, heads, *patch), float32."""
    mean: Batch = batch.mean(axis=1, keepdims=True, dtype=np.float32)
    head = np.arange(heads, dtype=np.float32).reshape(1, heads, *[1] * (batch.ndim - 2))
    logits: Batch = 2 * head * mean - head * head
    return logits


class NullRunner(LaneRunner):
    """`calls` and `patches` count what was computed. Every lane overwrites its one buffer, as real engines do."""

    def __init__(self, info: RunnerInfo) -> None:
        self.calls = 0
        self.patches = 0
        self._counting = threading.Lock()
        super().__init__(info, lambda background: _NullLane(self), lambda: None)

    def answer(self, batch: Batch) -> Batch:
        """One computation. Tests override it to fail where they want."""
        with self._counting:
            self.calls, self.patches = self.calls + 1, self.patches + len(batch)
        return null_logits(batch, int(self._info.outputs.shape[1]))


class _NullLane:
    def __init__(self, runner: NullRunner) -> None:
        self._runner = runner
        self._output = np.empty(0, dtype=np.float32)

    def start(self, batch: Batch) -> None:
        answer = self._runner.answer(batch)
        if self._output.shape != answer.shape:
            self._output = np.empty_like(answer)
        self._output[...] = answer

    def wait(self) -> Batch:
        return self._output

    def settle(self) -> None:
        """Nothing is ever under way."""


def null_info(record: BuildRecord, *, threads: int | None = None) -> RunnerInfo:
    """What a null runner of `record` says of itself; `options.heads` is the number of output channels."""
    fit = fit_from_record(record, version=__version__, threads=threads)
    channels, *patch = record.profile.max[1:]
    return RunnerInfo(
        backend=NAME,
        version=__version__,
        inputs=TensorSpec(name="input", dtype="float32", shape=("batch", channels, *patch)),
        outputs=TensorSpec(name="logits", dtype="float32", shape=("batch", positive_option(record, "heads"), *patch)),
        parallel=fit.streams,
        batch=fit.batch,
        inference_precision=record.inference_precision,
        device=cpu_description()["model"],
        details={"threads": str(fit.threads), "streams": str(fit.streams), "batch": str(fit.batch), **fit.notes},
    )


def open_null(record: BuildRecord, model: Path, *, threads: int | None = None) -> NullRunner:
    """A null runner. `model` is not read."""
    return NullRunner(null_info(record, threads=threads))
