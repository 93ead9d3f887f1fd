"""How far a build is, and how it is stopped.

TensorRT calls back from C++, which prints an exception and forgets it. So nothing is raised there: it is kept, the
build is told to stop, and who started the build raises it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Tell = Callable[[str, float], None]
"""Called with the phase in words and the fraction done, 0 to 1, never falling; may raise to stop the build."""


def silent(phase: str, fraction: float) -> None:
    """Tells nobody."""


@dataclass(kw_only=True)
class Stop:
    """The first exception that was raised while TensorRT was running."""

    error: BaseException | None = None

    def keep(self, error: BaseException) -> None:
        self.error = self.error or error

    def check(self) -> None:
        """Raise it, if there is one."""
        if self.error is not None:
            raise self.error


@contextlib.contextmanager
def kept_interrupts(stop: Stop) -> Iterator[None]:
    """While the block runs, what the handler of Ctrl-C raises is kept in `stop`.

    A signal during C++ is handled at the first instruction of the next callback, before any `try` in it: there the
    exception would be lost. Only in the main thread, which is the one that handles signals.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def handler(number: int, frame: Any) -> None:
        try:
            before(number, frame)
        except BaseException as error:  # noqa: BLE001 # raised by `Stop.check`
            stop.keep(error)

    signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(kw_only=True)
class Phase:
    """A phase of the build; it takes the place of one step of its parent."""

    parent: str | None
    steps: int
    done: int = 0


@dataclass(kw_only=True)
class Phases:
    """The phases under way by name, and the largest fraction that was reached."""

    open: dict[str, Phase] = field(default_factory=dict)
    reached: float = 0.0

    def fraction(self) -> float:
        """Of the whole build; below 1 as long as it runs."""
        now = max((self._of(name) for name, phase in self.open.items() if phase.parent not in self.open), default=0.0)
        self.reached = max(self.reached, min(now, 0.99))
        return self.reached

    def _of(self, name: str) -> float:
        phase = self.open[name]
        inner = max((self._of(child) for child, other in self.open.items() if other.parent == name), default=0.0)
        return (min(phase.done, phase.steps - 1) + inner) / phase.steps if phase.done < phase.steps else 1.0


def new_monitor(module: Any, tell: Tell, stop: Stop) -> Any:
    """An IProgressMonitor of this TensorRT that tells every step, and stops the build once `stop` has an error.

    It must live longer than the build. TensorRT may call it from several threads at once.
    """
    phases, lock = Phases(), threading.RLock()

    def told(name: str) -> bool:
        try:
            if stop.error is None:
                tell(name, phases.fraction())
        except BaseException as error:  # noqa: BLE001 # raised by `Stop.check`
            stop.keep(error)
        return stop.error is None

    class Monitor(module.IProgressMonitor):  # type: ignore[misc] # a class of the module that is loaded
        def __init__(self) -> None:
            module.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with lock:
                phases.open[phase_name] = Phase(parent=parent_phase or None, steps=max(num_steps, 1))
                told(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with lock:
                if phase_name in phases.open:
                    phases.open[phase_name].done = step + 1
                return told(phase_name)

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                phases.open.pop(phase_name, None)

    return Monitor()
