"""How a case ends: written in a thread beside the network, or failed; told to the caller in the order of the cases."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol

from trtbuild.errors import CaseNotWritable, InputError, NonFinite, OutOfMemory, TrtbuildError, WorkerDied

CASE_ERRORS = (InputError, CaseNotWritable, NonFinite, OutOfMemory, WorkerDied)
"""What fails a case and not the run."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one case: `output` where it was written, `error` where it failed, neither where it was kept.

    `seconds` are wall times per stage; stages of different cases overlap. `predicted` is the peak of the run's memory
    in bytes that was predicted when the case started, None where its size was not known; `adapted` says what was
    done to keep within the limit (`planning.CasePlan`).
    """

    case: str
    output: str | None
    error: str | None
    seconds: Mapping[str, float]
    warnings: tuple[str, ...]
    predicted: int | None = None
    adapted: tuple[str, ...] = ()


class CaseEnding(Protocol):
    """Where cases end: `Ending`, or, with several networks at once, a `shared_ending.SharedEnding` for each."""

    def ended(self, outcome: Outcome) -> None:
        """A case that has nothing to write."""

    def write(self, work: Callable[[], Outcome]) -> None:
        """Writes a case once the one before it is written. What that one raised is raised here."""

    def settle(self, *, wait: bool = True) -> None:
        """Raises what the case that was being written has raised; with `wait`, once it is written."""


class Ending:
    """At most one case is being written while the next is in the network. Use it in a `with` block."""

    def __init__(self, tell: Callable[[Outcome], None], *, background: bool) -> None:
        self._tell, self._outcomes = tell, list[Outcome]()
        self._pool = ThreadPoolExecutor(1, "trtbuild-write") if background else None
        self._writing: Future[Outcome] | None = None
        self._later = deque[Outcome]()

    def ended(self, outcome: Outcome) -> None:
        """A case that has nothing to write; it is told after the one that is being written."""
        self._later.append(outcome)
        self.settle(wait=False)

    def write(self, work: Callable[[], Outcome]) -> None:
        """Writes a case once the one before it is written. What that one raised is raised here."""
        self.settle()
        if self._pool is None:
            self._note(work())
        else:
            self._writing = self._pool.submit(work)

    def settle(self, *, wait: bool = True) -> None:
        """Notes the case that was being written, if it is (or, with `wait`, once it is); raises what it raised."""
        if self._writing is not None:
            if not wait and not self._writing.done():
                return
            writing, self._writing = self._writing, None
            self._note(writing.result())
        while self._later:
            self._note(self._later.popleft())

    def finish(self) -> tuple[Outcome, ...]:
        """All outcomes, once the last case is written."""
        self.settle()
        return tuple(self._outcomes)

    def _note(self, outcome: Outcome) -> None:
        self._outcomes.append(outcome)
        self._tell(outcome)

    def __enter__(self) -> Ending:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()  # waits: a case that is being written gets whole


def timed(seconds: Mapping[str, float], stage: str, since: float) -> dict[str, float]:
    """The seconds with those of one more stage, which began at `since` (`time.perf_counter`)."""
    return {**seconds, stage: time.perf_counter() - since}


def failed_outcome(case: str, error: TrtbuildError | MemoryError, predicted: int | None = None) -> Outcome:
    """The outcome of a case that one of CASE_ERRORS, or Python's own MemoryError, has failed."""
    if isinstance(error, MemoryError):
        error = _out_of_memory(case, error)
    return Outcome(case=case, output=None, error=str(error), seconds={}, warnings=(), predicted=predicted)


def _out_of_memory(case: str, error: MemoryError) -> OutOfMemory:
    return OutOfMemory(
        "There is not enough memory for a case.",
        where=case,
        got=str(error) or "MemoryError",
        hint="check the spacing in the file's header, or predict on a machine with more memory",
    )
