"""How cases end where several networks run at once: each has one being written, and all are told in their order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

from trtbuild.steps.folder_run.ending import Outcome


class Order:
    """Outcomes in whatever order they come; the caller hears them in the order of the cases. Threads may share it."""

    def __init__(self, cases: Sequence[str], tell: Callable[[Outcome], None]) -> None:
        self._cases, self._tell = tuple(cases), tell
        self._lock = threading.Lock()
        self._waiting: dict[str, Outcome] = {}
        self._told: list[Outcome] = []

    def put(self, outcome: Outcome) -> None:
        """Tells it once those of all cases before it are told. What the caller's callback raises is raised here."""
        with self._lock:
            self._waiting[outcome.case] = outcome
            while len(self._told) < len(self._cases) and self._cases[len(self._told)] in self._waiting:
                following = self._waiting.pop(self._cases[len(self._told)])
                self._told.append(following)
                self._tell(following)

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """Those that were told."""
        return tuple(self._told)


class SharedEnding:
    """The cases of one of several networks: `ending.CaseEnding`.

    With `writers` a case is written beside the next; `failed` is told at once, from the writing thread, what it raised.
    """

    def __init__(self, order: Order, writers: Executor | None, failed: Callable[[BaseException], None]) -> None:
        self._order, self._writers, self._failed = order, writers, failed
        self._writing: Future[None] | None = None

    def ended(self, outcome: Outcome) -> None:
        """A case that has nothing to write."""
        self._order.put(outcome)

    def write(self, work: Callable[[], Outcome]) -> None:
        """Writes a case once the one before it is written. What that one raised is raised here."""
        self.settle()
        if self._writers is None:
            self._order.put(work())
        else:
            self._writing = self._writers.submit(self._written, work)

    def settle(self, *, wait: bool = True) -> None:
        """Raises what the case that was being written has raised; with `wait`, once it is written."""
        if self._writing is not None and (wait or self._writing.done()):
            writing, self._writing = self._writing, None
            writing.result()

    def _written(self, work: Callable[[], Outcome]) -> None:
        try:
            self._order.put(work())
        except BaseException as error:
            self._failed(error)
            raise
