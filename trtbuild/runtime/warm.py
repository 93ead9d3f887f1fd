"""Loading the compiled loops before the first case, beside the opening of the engines."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np

from trtbuild.spec import ModelSpec
from trtbuild.volume import CaseGrid


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
    from trtbuild.stitch.accumulate import add_window, empty_accumulator
    from trtbuild.volume.back import empty_segmentation, label_slices, probability_block, way_back

    heads = spec.labels.heads
    box = (slice(1, 3), slice(1, 3), slice(1, 3))
    grid = CaseGrid(shape=(4, 4, 4), box=box, spacing=(1.0,) * 3, target=(1.0,) * 3, resampled=(2, 2, 2))
    way, crop = way_back(grid, spec), empty_segmentation(grid, spec)[box]
    ones, window = np.ones(2, dtype=np.float32), np.ones((heads, 2, 2, 2), dtype=np.float32)
    kinds: tuple[Literal["float32", "float16"], ...] = ("float32", "float16")  # which, is chosen case by case
    for kind in kinds:
        total = empty_accumulator((heads, 2, 2, 2), kind)
        add_window(total, window, (ones, ones, ones), (0, 0, 0), (False, False, False))
        label_slices(total, 0, way, crop, 0, 2, threads=1)
        probability_block(total, way, (slice(0, 2), slice(0, 2), slice(0, 2)))
