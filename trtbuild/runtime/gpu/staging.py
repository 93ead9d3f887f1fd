"""Copies between the device and any array of the host, through page-locked memory.

The device copies from and to nothing else in the background, and locking an array takes longer than copying it: there
is one piece for all. Its halves take turns: while the device copies one, the host fills or empties the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtbuild.errors import EngineError
from trtbuild.runtime.device import Buffer, Device, Event, Pinned, Stream

HALVES = 2
ALIGNMENT = 16
"""Bytes; no number is larger."""


class Staging:
    """Copies of one stream through `memory`, (n,) uint8 with n >= 32. One thread uses it at a time, and may use the
    memory between two copies."""

    def __init__(self, device: Device, stream: Stream, memory: Pinned) -> None:
        self._stream, self._memory = stream, memory
        self._events = [device.event() for _ in range(HALVES)]

    def upload(self, target: Buffer, source: NDArray[Any], *, offset: int = 0, dtype: DTypeLike | None = None) -> None:
        """Copy an array, in C order, to a buffer; done at the end.

        Args:
            target: where it goes.
            source: of any type; where it has gaps it is copied on the host first.
            offset: bytes from the buffer's start.
            dtype: what its numbers are there, rounded as NumPy does; None for their own type.

        Raises:
            EngineError: it does not fit, or the device failed.
        """
        for _ in self.pieces(target, source, offset=offset, dtype=dtype):
            pass
        self.settle()

    def pieces(
        self, target: Buffer, source: NDArray[Any], *, offset: int = 0, dtype: DTypeLike | None = None
    ) -> Iterator[None]:
        """As `upload`, a piece at each step: its copy is begun, and only that of the last but one waited for."""
        kind, flat = np.dtype(source.dtype if dtype is None else dtype), source.reshape(-1)
        for first, last, half, event in self._pieces(len(flat), kind):
            event.wait()  # before the half is written again
            with np.errstate(over="ignore"):  # float32 has a smaller range than float64: infinity, as in NumPy
                half[...] = flat[first:last]
            self._stream.copy_in(target, half, offset + kind.itemsize * first)
            self._stream.mark(event)
            yield

    def settle(self) -> None:
        """Wait until all copies are done."""
        self._stream.synchronize()

    def download(self, target: NDArray[Any], source: Buffer, offset: int = 0) -> None:
        """Fill an array from a buffer, `offset` bytes from its start, after all that was begun before.

        Raises:
            EngineError: the array is not in C order, there are not so many bytes, or the device failed.
        """
        if not target.flags.c_contiguous:
            raise EngineError(
                "An array that a GPU fills has gaps.", expected="C order", got=f"strides {target.strides}"
            )
        flat, begun = target.reshape(-1), list[tuple[NDArray[Any], NDArray[Any], Event]]()
        for first, last, half, event in self._pieces(len(flat), target.dtype):
            self._stream.copy_out(half, source, offset + target.itemsize * first)
            self._stream.mark(event)
            begun.append((flat[first:last], half, event))
            if len(begun) == HALVES:
                _emptied(*begun.pop(0))
        for piece in begun:
            _emptied(*piece)

    def close(self) -> None:
        """To be called when nothing is under way; the memory is closed by whoever gave it."""
        for event in self._events:
            event.close()

    def _pieces(self, count: int, kind: np.dtype[Any]) -> Iterator[tuple[int, int, NDArray[Any], Event]]:
        """From and to which number a piece goes, its room in a half, and the event of that half's last copy."""
        nbytes = len(self._memory.array) // HALVES // ALIGNMENT * ALIGNMENT
        step = nbytes // kind.itemsize
        for number, first in enumerate(range(0, count, step)):
            last = min(count, first + step)
            at = nbytes * (number % HALVES)
            half = self._memory.array[at : at + kind.itemsize * (last - first)].view(kind)
            yield first, last, half, self._events[number % HALVES]


def _emptied(part: NDArray[Any], half: NDArray[Any], event: Event) -> None:
    event.wait()
    part[...] = half
