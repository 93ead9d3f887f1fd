"""The runner that all backends share: order, threads and closing, over lanes that a backend opens.

A lane is one call under way with its own output buffer. `infer` keeps one lane per calling thread, `stream` opens
`parallel` + 1 of them and goes round: while the caller holds the result of one, the others compute.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Protocol

from trtbuild.errors import EngineError
from trtbuild.runtime.runner import Batch, RunnerInfo, check_batch


class Lane(Protocol):
    """One call at a time: `start`, then `wait`."""

    def start(self, batch: Batch) -> None:
        """Begin to compute. A background lane copies the batch and returns at once."""

    def wait(self) -> Batch:
        """The logits, in the lane's buffer; an error is raised when nothing of this lane is under way any more."""

    def settle(self) -> None:
        """Wait until nothing is under way, whatever becomes of it."""


class LaneRunner:
    """A Runner over lanes. `open_lane(background)` makes one; `release` gives back what they share."""

    def __init__(self, info: RunnerInfo, open_lane: Callable[[bool], Lane], release: Callable[[], None]) -> None:
        self._info = info
        self._open_lane: Callable[[bool], Lane] | None = open_lane
        self._release = release
        self._mine = threading.local()

    def infer(self, batch: Batch) -> Batch:
        open_lane = self._opened()
        check_batch(batch, self._info.inputs)
        # Taken out and put back only after success, so that no failed or interrupted lane is used again.
        lane: Lane = self._mine.__dict__.pop("lane", None) or open_lane(False)
        lane.start(batch)
        logits = lane.wait()
        self._mine.lane = lane
        return logits

    def stream(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        open_lane = self._opened()
        return self._in_order(batches, [open_lane(True) for _ in range(self._info.parallel + 1)])

    def _in_order(self, batches: Iterable[Batch], lanes: Sequence[Lane]) -> Iterator[Batch]:
        free, busy = deque(lanes), deque[Lane]()
        try:
            for batch in batches:
                self._opened()
                check_batch(batch, self._info.inputs)
                busy.append(free.popleft())
                busy[-1].start(batch)
                if not free:
                    yield busy[0].wait()
                    free.append(busy.popleft())
            while busy:
                self._opened()
                yield busy.popleft().wait()
        finally:
            for lane in busy:
                lane.settle()

    def describe(self) -> RunnerInfo:
        self._opened()
        return self._info

    def close(self) -> None:
        if self._open_lane is not None:
            self._open_lane, self._mine = None, threading.local()
            self._release()

    def __enter__(self) -> LaneRunner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _opened(self) -> Callable[[bool], Lane]:
        if self._open_lane is None:
            raise EngineError("The runner is closed.", where=self._info.backend, hint="Open the engine again.")
        return self._open_lane
