"""Time on the GPU itself, by CUDA events on the stream of the device path, and the time that a network takes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from trtbuild.runtime.gpu.shared import DeviceEngine, Enqueues, Gpu
from trtbuild.runtime.runner import RunnerInfo


class Events:
    """Marks on a Gpu's stream, by number. pycuda's events live here alone: it frees them only where a context is current."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._events: list[Any] = []

    def mark(self) -> int:
        """A point that the stream has come to, when it has."""
        with self._gpu.device.current():
            self._events.append(self._gpu.device.cuda.Event())
            self._events[-1].record(self._gpu.stream.made())
        return len(self._events) - 1

    def seconds(self, first: int, last: int) -> float:
        """From mark to mark; waits for the last."""
        with self._gpu.device.current():
            self._events[last].synchronize()
            return float(self._events[first].time_till(self._events[last])) / 1000

    def forget(self) -> None:
        """All marks, which count from 0 again."""
        with self._gpu.device.current():
            self._events.clear()


class TimedRunner:
    """An engine whose calls are marked on both sides."""

    def __init__(self, runner: Enqueues, events: Events) -> None:
        self._runner, self._events = runner, events
        self.marks: list[tuple[int, int]] = []

    def describe(self) -> RunnerInfo:
        return self._runner.describe()

    def enqueue(self, source: int, target: int, stream: int, batch: int) -> None:
        first = self._events.mark()
        self._runner.enqueue(source, target, stream, batch)
        self.marks.append((first, self._events.mark()))

    def taken(self) -> float:
        """Seconds of all calls since the last time."""
        marks, self.marks = self.marks, []
        taken = sum(self._events.seconds(*pair) for pair in marks)
        self._events.forget()
        return taken


def timed_engine(engine: DeviceEngine, events: Events) -> tuple[DeviceEngine, TimedRunner]:
    """The engine with marks; not captured in a graph, which would hide its calls."""
    runner = TimedRunner(engine.runner, events)
    return replace(engine, runner=cast(Enqueues, runner), capturable=False), runner


def repeated(events: Events, work: Callable[[], None], before: Callable[[], None], repeats: int) -> list[float]:
    """Seconds of `work`, `repeats` times, after two that do not count; what comes `before` each is not timed.

    That keeps the GPU busy until the host has begun the work, whose time is the GPU's own then, and its cache cold.
    """
    marks = []
    for _ in range(repeats + 2):
        before()
        first = events.mark()
        work()
        marks.append((first, events.mark()))
    times = [events.seconds(*pair) for pair in marks[2:]]
    events.forget()
    return times
