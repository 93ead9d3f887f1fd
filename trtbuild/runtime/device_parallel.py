"""Work on several GPUs at once, each in a thread of its own: they end together, and tell their progress as one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Generic, TypeVar

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
                errors.append(_named(error, share.name))
            raise

    with ThreadPoolExecutor(len(shares), "trtbuild-gpu") as pool:
        futures = [pool.submit(run, number) for number in range(len(shares))]
        try:
            wait(futures)
        except BaseException as error:
            with lock:
                errors.append(error)
            raise
    if errors:
        raise errors[0]
    return [future.result() for future in futures]


def _named(error: BaseException, name: str) -> BaseException:
    if not isinstance(error, EngineError):
        return error
    where = name if error.where is None else f"{name}: {error.where}"
    named = type(error)(error.what, expected=error.expected, got=error.got, where=where, hint=error.hint)
    named.__cause__ = error
    return named
