"""The cases between the processes that read and the GPUs: how many there may be, and the memory that they share."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, replace

from trtbuild.runtime.memory import CaseBytes
from trtbuild.steps.folder_run.messages import Reading
from trtbuild.steps.folder_run.planned import Ahead
from trtbuild.steps.folder_run.planning import CasePlan, Planner

WAITED = "it waited for the memory of others"
"""What was done to a case that did not fit beside those before it, as it stands in its outcome."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Waiting:
    """A case that is being read, or is ready for a network."""

    ahead: Ahead
    reading: Future[Reading]


class CaseQueue:
    """One thread brings cases in their order (`admit`, `put`, `close`), and each GPU's takes the first that is ready.

    A case holds the memory that it will take at most from there to its end, so that none has to wait half-way and hold
    up others: first the largest of its steps, then of those that are left. One whose size is not known goes alone.
    """

    def __init__(self, planner: Planner, *, gpus: int, ahead: bool) -> None:
        self._planner, self._gpus, self._ahead = planner, gpus, ahead
        self._changed = threading.Condition()
        self._waiting: deque[Waiting] = deque()
        self._held: dict[str, int | None] = {}
        self._takers = 0
        self._closed = False
        self._error: BaseException | None = None

    @property
    def error(self) -> BaseException | None:
        """What stopped the run, the first of all."""
        return self._error

    def admit(self, plan: CasePlan) -> CasePlan | None:
        """Waits until the case may be read: its plan, which says so if memory was short; None where the run stops.

        As many are read, or ready, as there are GPUs; with `ahead` False, as many as there are GPUs that wait for one.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._error is not None or self._has_place())
            short = not self._fits(plan)
            self._changed.wait_for(lambda: self._error is not None or self._fits(plan))
            if self._error is not None:
                return None
            self._held[plan.case] = None if plan.bytes is None else plan.bytes.alone
            return replace(plan, adapted=(*plan.adapted, WAITED)) if short else plan

    def put(self, ahead: Ahead, reading: Future[Reading]) -> None:
        """The admitted case is being read."""
        with self._changed:
            self._waiting.append(Waiting(ahead=ahead, reading=reading))
        reading.add_done_callback(lambda _: self._tell())

    def take(self) -> Waiting | None:
        """Waits for the next case that has been read, with the peak of the run in its plan; None where none comes."""
        with self._changed:
            self._takers += 1
            self._changed.notify_all()
            try:
                self._changed.wait_for(lambda: self._error is not None or self._ready() is not None or self._is_empty())
                found = None if self._error is not None else self._ready()
                if found is None:
                    return None
                self._waiting.remove(found)
            finally:
                self._takers -= 1
            plan = found.ahead.plan
            peak = self._total() if plan.bytes is not None else None
            self._lower(plan.case, None if plan.bytes is None else max(plan.bytes.network, plan.bytes.writing))
            return replace(found, ahead=replace(found.ahead, plan=replace(plan, peak=peak)))

    def writes(self, case: str, needed: CaseBytes | None) -> None:
        """The case has left its network; `needed` is what its plan says by now."""
        with self._changed:
            self._lower(case, None if needed is None else needed.writing)

    def ended(self, case: str) -> None:
        """The case is written, or has failed."""
        with self._changed:
            self._held.pop(case, None)
            self._changed.notify_all()

    def close(self) -> None:
        """No more cases come."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def stop(self, error: BaseException) -> None:
        """Nothing more begins; of several errors the first counts."""
        with self._changed:
            if self._error is None:
                self._error = error
            self._changed.notify_all()

    def _tell(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _ready(self) -> Waiting | None:
        return next((one for one in self._waiting if one.reading.done()), None)

    def _is_empty(self) -> bool:
        return self._closed and not self._waiting

    def _has_place(self) -> bool:
        return len(self._waiting) < (self._gpus if self._ahead else self._takers)

    def _lower(self, case: str, needed: int | None) -> None:
        self._held[case] = needed
        self._changed.notify_all()

    def _fits(self, plan: CasePlan) -> bool:
        if not self._held:
            return True
        total = self._total()
        if plan.bytes is None or total is None:
            return False
        return self._planner.limit is None or total + plan.bytes.alone <= self._planner.limit

    def _total(self) -> int | None:
        """Of the run with all cases in flight; None where the size of one is not known."""
        held = list(self._held.values())
        known = [size for size in held if size is not None]
        return self._planner.base + sum(known) if len(known) == len(held) else None
