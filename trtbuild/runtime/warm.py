"""Loading the compiled loops before the first case, beside the opening of the engines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from trtbuild.spec import ModelSpec
from trtbuild.volume import CaseGrid, segmentation_from_logits


@contextmanager
def loops_loading(spec: ModelSpec) -> Iterator[None]:
    """Loads (at the very first run: compiles) the loops of the tile loop and of the way back in a thread of its own.

    While the block opens engines, which wait for other threads anyway. A thread of its own also because Ctrl-C in the
    middle of Numba's loading would be swallowed there: Python delivers it to the main thread only.
    """
    errors: list[BaseException] = []

    def work() -> None:
        try:
            _run_once(spec)
        except BaseException as error:  # noqa: BLE001  # handed to the caller below, whatever it is
            errors.append(error)

    thread = threading.Thread(target=work, name="trtbuild-loops", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if errors:
        raise errors[0]


def _run_once(spec: ModelSpec) -> None:
    """Every loop once, with the types that a case has."""
    from trtbuild.stitch.accumulate import add_window, divide_by_weights

    heads = spec.labels.heads
    total = np.zeros((heads, 2, 2, 2), dtype=np.float32)
    ones = np.ones(2, dtype=np.float32)
    add_window(total, np.ones_like(total), (ones, ones, ones), (0, 0, 0), (False, False, False))
    wide = np.ones(2)
    divide_by_weights(total, (wide, wide, wide), 1)
    box = (slice(1, 3), slice(1, 3), slice(1, 3))
    grid = CaseGrid(shape=(4, 4, 4), box=box, spacing=(1.0,) * 3, target=(1.0,) * 3, resampled=(2, 2, 2))
    segmentation_from_logits(total, grid, spec, threads=1)
