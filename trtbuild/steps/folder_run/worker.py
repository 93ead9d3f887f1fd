"""Reading and preparing cases in a process beside the network: `open_worker`.

In a process because image libraries hold Python's lock while they read, and because they crash or exhaust memory over
damaged files: that fails one case, the next is read by a fresh process. The memory of a case goes back with it.
"""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import Cancelled
from trtbuild.spec import ModelSpec
from trtbuild.steps.folder_run.child import Child, death, worker_command
from trtbuild.steps.folder_run.messages import Done, Failed, Forget, Look, Message, Read, Reading, Request, Second, Warm
from trtbuild.volume.image import Header, Segmentation
from trtbuild.volume.preparation.preprocess import Prepared

__all__ = ["Reading", "Request", "Worker", "open_worker"]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    message: Message
    case: str
    files: Sequence[Path]
    future: Future[Any]


class Worker:
    """Takes requests and answers them in order, one at a time. Made by `open_worker`; threads may share it.

    A future raises what the reader or the preparation raised: the same class of trtbuild's errors with the same
    message, MemoryError, or RuntimeError with the traceback of a bug; and `WorkerDied` where the process ended over the
    case. Cancelling a future works as long as its request waits.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._kept: dict[str, Read] = {}
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._closed = False
        self._command = worker_command()
        # the process dies with the thread that starts it, so that one thread does all: start, ask, start again
        self._thread = threading.Thread(target=self._work, name="trtbuild-worker", daemon=True)
        self._thread.start()

    @property
    def pids(self) -> tuple[int, ...]:
        """The process; none where it has not started yet, or has ended and nothing has been asked since."""
        child = self._child
        return () if child is None else (child.process.pid,)

    def look(self, request: Request) -> Future[Header | None]:
        """What the case's header says; None where it says nothing, or cannot be read (reading it will say why)."""
        return self._put(Look(read=_read(request)), request)

    def submit(self, request: Request) -> Future[Reading]:
        """Reads and prepares a case once those before it are done. Relative paths start at the folder of now."""
        read = _read(request)
        if request.keep:
            self._kept[request.case] = read
        return self._put(read, request)

    def second(self, case: str, spec: ModelSpec, segmentation: Segmentation) -> Future[Prepared]:
        """Prepares a kept case for the second stage of a cascade.

        Args:
            case: of a request with `keep` that has not been forgotten.
            spec: the second stage.
            segmentation: labels (Z, Y, X) of the first stage on the grid of the image as read.

        Raises:
            KeyError: the case is not kept.
        """
        read = self._kept[case]
        return self._put(Second(read=read, spec=spec, segmentation=segmentation), read.request)

    def forget(self, case: str) -> None:
        """Frees a kept image. Nothing happens where there is none."""
        read = self._kept.pop(case, None)
        if read is not None:
            self._put(Forget(case=case), read.request)

    def warm(self, specs: Sequence[ModelSpec]) -> Future[None]:
        """Imports what these models need. An error may be left alone: the first case of the model meets it again."""
        return self._put(Warm(specs=tuple(specs)), None)

    def close(self) -> None:
        """Ends the process at once. Waiting futures are cancelled; the one under way raises `Cancelled`."""
        with self._lock:
            self._closed = True
            if self._child is not None:
                self._child.kill()
        self._jobs.put(None)
        self._thread.join()

    def _put(self, message: Message, request: Request | None) -> Future[Any]:
        future: Future[Any] = Future()
        case, files = ("", ()) if request is None else (request.case, request.files)
        with self._lock:
            if self._closed:
                raise RuntimeError("the worker is closed")
            self._jobs.put(_Job(message=message, case=case, files=files, future=future))
        return future

    def _work(self) -> None:
        # no local variable may hold the last case's arrays while the thread waits for the next
        while self._serve(self._jobs.get()):
            pass
        self._drop()

    def _serve(self, job: _Job | None) -> bool:
        """Answers one job; False for the last."""
        if job is None:
            return False
        if self._closed:
            job.future.cancel()
        if not job.future.set_running_or_notify_cancel():
            return True
        reply = self._reply(job)
        if isinstance(reply, Done):
            job.future.set_result(reply.value)
        else:
            job.future.set_exception(reply.error)
        return True

    def _reply(self, job: _Job, *, again: bool = True) -> Done | Failed:
        """The child's reply, or the error that stands for it."""
        try:
            return self._running().ask(job.message)
        except (EOFError, BrokenPipeError):
            return self._after_end(job, again=again)
        except Exception as error:  # noqa: BLE001  # the caller gets it, and the thread lives on for the other cases
            self._drop()
            return Failed(error=error.with_traceback(None))

    def _after_end(self, job: _Job, *, again: bool) -> Done | Failed:
        """What to reply where the child has ended by itself or was never there."""
        child, self._child = self._child, None
        died = None if child is None else death(job.case, job.files, child)  # waits for its end
        if child is None or died is None or self._closed:
            return Failed(error=Cancelled("Stopped while a case was read.", where=job.case))
        if again and child.stage is None:  # it did not die of this case: the system ended it while it was idle
            return self._reply(job, again=False)
        return Failed(error=died)

    def _running(self) -> Child:
        """The child, started if there is none. EOFError where it does not come up or the worker is closed."""
        if self._child is None:
            with self._lock:
                if self._closed:
                    raise EOFError("the worker is closed")
                self._child = Child(self._command)
            self._child.greet()
        return self._child

    def _drop(self) -> None:
        child, self._child = self._child, None
        if child is not None:
            child.kill()
            child.exit_code()


def _read(request: Request) -> Read:
    """The request with the folder of now, where its paths start there."""
    paths = (*request.files, *([request.previous] if request.previous else []))
    return Read(request=request, folder=None if all(p.is_absolute() for p in paths) else os.getcwd())


@contextmanager
def open_worker(specs: Sequence[ModelSpec] = ()) -> Iterator[Worker]:
    """Starts the process; it ends with the block, whatever it is doing.

    Args:
        specs: models whose reader and libraries it imports at once, while the caller opens the engines.

    Raises:
        TrtbuildError: there is no Python interpreter to start (a frozen or embedding program).
    """
    worker = Worker()
    try:
        worker.warm(specs)
        yield worker
    finally:
        worker.close()
