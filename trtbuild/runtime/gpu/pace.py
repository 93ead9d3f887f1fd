"""How the host keeps pace with the device: near enough to report and to stop, far enough that the device has work."""

from __future__ import annotations

from collections import deque

from trtbuild.runtime.device import Event
from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.runtime.predictor import Progress, tell

PACE = 16
"""Calls of a network between two marks: often enough to report and to stop, seldom enough to cost nothing."""


class Pace:
    """Marks behind calls of a network, which are waited for only when as many calls again have been begun."""

    def __init__(self, gpu: Gpu, progress: Progress | None, total: int) -> None:
        self._gpu, self._progress, self._total = gpu, progress, total
        self._events: list[Event] = []
        self._marked: deque[tuple[Event, int]] = deque()
        self._calls = 0

    def mark(self, done: int, *, now: bool) -> None:
        """A call was begun, after which `done` tiles are done. It is marked if it is its turn, or `now`."""
        self._calls += 1
        if self._calls % PACE == 0 or now:
            if not self._events:
                self._events.append(self._gpu.device.event())
            self._marked.append((self._events.pop(), done))
            self._gpu.stream.mark(self._marked[-1][0])

    def wait(self, *, left: int) -> None:
        """Until no more than `left` marks are to be reached; reports each.

        Raises:
            EngineError: the work failed.
            Cancelled: `progress` said so.
        """
        while len(self._marked) > left:
            event, done = self._marked[0]
            event.wait()
            self._events.append(self._marked.popleft()[0])
            tell(self._progress, "network", done, self._total)

    def close(self) -> None:
        """What is under way goes on."""
        self._events.extend(event for event, _ in self._marked)
        self._marked.clear()
        while self._events:
            self._events.pop().close()
