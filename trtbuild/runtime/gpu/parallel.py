"""Work on several GPUs at once, each in a thread of its own: they end together, and tell their progress as one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from trtbuild.errors import EngineError
from trtbuild.runtime.predictor import Progress

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class Share(Generic[Result]):
    """What one GPU does: `name` for errors, `tiles` for progress. `run` calls its argument as a Progress of "network",
    and stops where that says so."""

    name: str
    tiles: int
    run: Callable[[Progress], Result]


def run_shares(shares: Sequence[Share[Result]], progress: Progress | None) -> list[Result]:
    """The results, in the order of the shares.

    Args:
        shares: each is run in a thread.
        progress: called with ("network", tiles done by all, tiles of all), by one thread at a time.

    Raises:
        EngineError: of a share, which is named. What any of them raises stops all; of several errors the first in time
            is raised, once all have ended.
    """
    lock = threading.Lock()
    done, errors = [0] * len(shares), list[BaseException]()
    total = sum(share.tiles for share in shares)

    def told(number: int, tiles: int) -> bool | None:
        with lock:
            if errors:
                return False
            done[number] = tiles
            return None if progress is None else progress("network", sum(done), total)

    def run(number: int) -> Result:
        share = shares[number]
        try:
            return share.run(lambda stage, tiles, of: told(number, tiles))
        except BaseException as error:
            with lock:
                errors.append(named_error(error, share.name))
            raise

    def stop(error: BaseException) -> None:
        with lock:
            errors.append(error)

    with at_once([partial(run, number) for number in range(len(shares))], stop) as futures:
        pass
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


@contextmanager
def at_once(works: Sequence[Callable[[], Any]], stop: Callable[[BaseException], None]) -> Iterator[list[Future[Any]]]:
    """Each work in a thread. After the block all have ended, however often Ctrl-C comes: what they use is closed then.

    Args:
        works: one per GPU. All begin, or none.
        stop: makes them end; called with what was raised in the block, or while they are waited for, which is raised
            when they have.
    """
    gate, complete = threading.Event(), threading.Event()
    errors, futures = list[BaseException](), list[Future[Any]]()

    def begun(work: Callable[[], Any]) -> Any:
        gate.wait()
        return work() if complete.is_set() else None

    with ThreadPoolExecutor(len(works), "trtbuild-gpu") as pool:
        try:
            futures = [pool.submit(begun, work) for work in works]
            complete.set()  # Ctrl-C inside of `submit` would have left a thread behind that nobody knows
            gate.set()
            yield futures
        except BaseException as error:  # noqa: BLE001  # raised below
            errors.append(error)
        while True:
            try:
                gate.set()
                if errors:
                    stop(errors[-1])
                wait(futures)  # not the end of the threads: Python 3.11 believes in it when Ctrl-C interrupts a join
                break
            except KeyboardInterrupt as error:
                errors.append(error)
    if errors:
        raise errors[0]


def named_error(error: BaseException, name: str) -> BaseException:
    """An engine's error with the GPU's name before its `where`, and the first one as its cause; any other as it is."""
    if not isinstance(error, EngineError):
        return error
    where = name if error.where is None else f"{name}: {error.where}"
    named = type(error)(error.what, expected=error.expected, got=error.got, where=where, hint=error.hint)
    named.__cause__ = error
    return named
