"""Several processes that read cases, one per GPU, as one source: a single one would keep the GPUs waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import TypeVar

from trtbuild.spec import ModelSpec
from trtbuild.steps.folder_run.messages import Reading, Request
from trtbuild.steps.folder_run.worker import Worker, open_worker
from trtbuild.volume.image import Header, Segmentation
from trtbuild.volume.preparation.preprocess import Prepared

Answer = TypeVar("Answer")


class Workers:
    """Gives each request to the process that has the least to do. Made by `open_workers`; threads may share it."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self._workers = tuple(workers)
        self._lock = threading.Lock()
        self._asked = [0] * len(self._workers)
        self._of_case: dict[str, int] = {}

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes, as far as they run."""
        return tuple(pid for worker in self._workers for pid in worker.pids)

    def look(self, request: Request) -> Future[Header | None]:
        """See `Worker.look`."""
        number = self._least_asked()
        return self._counted(number, self._workers[number].look(request))

    def submit(self, request: Request) -> Future[Reading]:
        """See `Worker.submit`. What the case needs later is asked of the same process, until `forget`."""
        number = self._least_asked()
        self._of_case[request.case] = number
        return self._counted(number, self._workers[number].submit(request))

    def second(self, case: str, spec: ModelSpec, segmentation: Segmentation) -> Future[Prepared]:
        """See `Worker.second`. KeyError where the case was not submitted."""
        number = self._of_case[case]
        return self._counted(number, self._workers[number].second(case, spec, segmentation), 1)

    def forget(self, case: str) -> None:
        """See `Worker.forget`."""
        number = self._of_case.pop(case, None)
        if number is not None:
            self._workers[number].forget(case)

    def warm(self, specs: Sequence[ModelSpec]) -> Future[None]:
        """All of them import what these models need; done with the last, or with the first error."""
        done: Future[None] = Future()
        futures = [worker.warm(specs) for worker in self._workers]
        for future in futures:
            future.add_done_callback(lambda _: _joined(futures, done, self._lock))
        return done

    def _least_asked(self) -> int:
        """The process with the fewest requests that are not answered; one more of them is its own from here on."""
        with self._lock:
            number = min(range(len(self._workers)), key=self._asked.__getitem__)
            self._asked[number] += 1
        return number

    def _counted(self, number: int, future: Future[Answer], more: int = 0) -> Future[Answer]:
        def answered(_: Future[Answer]) -> None:
            with self._lock:
                self._asked[number] -= 1

        with self._lock:
            self._asked[number] += more
        future.add_done_callback(answered)
        return future


def _joined(futures: Sequence[Future[None]], done: Future[None], lock: threading.Lock) -> None:
    """Hands on the end of all futures, or the first error among them, once."""
    with lock:
        if not done.done() and all(future.done() for future in futures):
            error = next((error for error in map(Future.exception, futures) if error is not None), None)
            done.set_result(None) if error is None else done.set_exception(error)


@contextmanager
def open_workers(count: int) -> Iterator[Workers]:
    """Starts `count` processes; they end with the block, whatever they are doing.

    Raises:
        TrtbuildError: there is no Python interpreter to start.
    """
    with ExitStack() as stack:
        yield Workers([stack.enter_context(open_worker()) for _ in range(count)])
