"""The one seam between a network and everything that uses it: the Runner protocol.

A runner is opened by `select.open_runner`, answers batches of patches with logits, says what it is, and is closed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import EngineError, NonFinite, OutOfMemory
from trtbuild.spec import TensorSpec

Batch = NDArray[np.float32]

# What the allocators of the C++ standard library, OpenVINO (cpu_memory.cpp) and ONNX Runtime (its arena) say, and
# nothing else does. Any other text is not taken for a lack of memory.
NO_MEMORY = ("std::bad_alloc", "Failed to allocate")


@dataclass(frozen=True, kw_only=True)
class RunnerInfo:
    """What an opened runner is.

    `inputs` and `outputs` are (batch, C, *patch) and (batch, heads, *patch), float32. `parallel` is how many calls it
    works on at once, `batch` the largest useful batch (a larger one is split). `inference_precision` and `version`
    are read back from the backend, not copied from the record. `details` says which settings hold, and under
    `note.…` where this machine differs from the record.
    """

    backend: str
    version: str
    inputs: TensorSpec
    outputs: TensorSpec
    parallel: int
    batch: int
    inference_precision: str
    device: str
    details: Mapping[str, str]


class Runner(Protocol):
    """An opened engine. After `close` every other method raises EngineError; closing twice is allowed."""

    def infer(self, batch: Batch) -> Batch:
        """Logits (B, heads, *patch) of a batch (B, C, *patch), both float32, for any B >= 1.

        Up to `parallel` threads may call at once. The returned array belongs to the runner and holds until the same
        thread calls again; `batch` may have any strides and is only read.

        Raises:
            EngineError: wrong shape or type, or the backend failed.
            NonFinite: the batch holds NaN or infinity. This is checked because a backend may swallow it (OpenVINO's
                ReLU turns NaN into 0), and the segmentation would then be silently wrong.
            OutOfMemory: an allocation failed.
        """

    def stream(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Logits of every batch, in order, with the device kept busy while the caller works on a result.

        At most `parallel` + 1 batches are taken before the result of the first of them is given. A batch is copied
        when it is taken, so the producer may reuse its buffer; a result holds until the next one is asked for. When
        the caller stops or the producer raises, work under way is waited for and the error goes on unchanged.
        """

    def describe(self) -> RunnerInfo:
        """What was opened, as read back from the backend."""

    def close(self) -> None:
        """Give back what the engine holds. To be called when no call is under way."""

    def __enter__(self) -> Runner: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def check_batch(batch: Any, inputs: TensorSpec) -> None:
    """Refuse what is not a finite float32 array of shape (B >= 1, *inputs.shape[1:])."""
    expected = f"float32 ({', '.join(map(str, inputs.shape))})"
    if not isinstance(batch, np.ndarray) or batch.dtype != np.float32:
        got = batch.dtype if isinstance(batch, np.ndarray) else type(batch).__name__
        raise EngineError("The batch has the wrong type.", expected=expected, got=got, where=inputs.name)
    if batch.ndim != len(inputs.shape) or batch.shape[1:] != inputs.shape[1:] or len(batch) < 1:
        raise EngineError("The batch has the wrong shape.", expected=expected, got=batch.shape, where=inputs.name)
    if not np.isfinite(batch).all():
        raise NonFinite("The batch holds NaN or infinity.", expected="finite values", where=inputs.name)


@contextmanager
def engine_errors(what: str, where: object, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a backend's exceptions into EngineError, or OutOfMemory where that is certain; the cause is kept."""
    try:
        yield
    except MemoryError as error:
        raise OutOfMemory(what, got=error or "MemoryError", where=where) from error
    except kinds as error:
        text = "; ".join(line for line in str(error).splitlines() if line and not line.startswith("Exception from"))
        kind = OutOfMemory if any(mark in text for mark in NO_MEMORY) else EngineError
        raise kind(what, got=text, where=where) from error
