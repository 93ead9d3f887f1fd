"""The next image on its way to the GPU while a case runs there. One thread does both: between two waits of the case it
begins one more copy, so that the device copies beside its kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import OutOfMemory
from trtbuild.runtime.device import Buffer
from trtbuild.runtime.gpu.image import image_pieces
from trtbuild.runtime.gpu.prepare_plan import FLOAT
from trtbuild.runtime.gpu.shared import STAGING, Gpu
from trtbuild.runtime.gpu.staging import Staging

SPARE = 2
"""An image goes ahead where so many of it would fit: what runs has its memory by then, but for a library's whims."""
REAL = "biuf"
"""Kinds of NumPy's types: truth values, integers, floats."""


class Uploads:
    """One image at a time, as float32 in C order, with `copies` of its own. Made by `opened_uploads`."""

    def __init__(self, gpu: Gpu, copies: Staging) -> None:
        self._gpu, self._copies = gpu, copies
        self._data: NDArray[Any] | None = None
        self._buffer: Buffer | None = None
        self._pieces: Iterator[None] = iter(())

    def step(self, data: NDArray[Any]) -> None:
        """Begin to copy one more piece of an image (C, Z, Y, X), if any is left and there was room for it. Another
        image than that of the last step takes its place."""
        if data is not self._data:
            self.close()
            self._begin(data)
        next(self._pieces, None)

    def taken(self, data: NDArray[Any]) -> Buffer | None:
        """The image on the device, which is the caller's to close; None where it is not this very array that is on its
        way there."""
        if data is not self._data or self._buffer is None:
            return None
        for _ in self._pieces:
            pass
        self._copies.settle()
        buffer, self._buffer, self._data = self._buffer, None, None
        return buffer

    def close(self) -> None:
        """Give back what nobody took."""
        if self._buffer is not None:
            self._copies.settle()
            self._buffer.close()
        self._buffer, self._data, self._pieces = None, None, iter(())

    def _begin(self, data: NDArray[Any]) -> None:
        self._data = data
        nbytes = FLOAT * data.size
        usual = data.ndim == 4 and data.size > 0 and data.dtype.kind in REAL
        if not usual or self._gpu.device.free_memory() < SPARE * nbytes:
            return  # it goes up when it is prepared, which also says what is wrong with it
        try:
            self._buffer = self._gpu.device.buffer(nbytes)
        except OutOfMemory:  # the same; another program was quicker
            return
        self._pieces = image_pieces(data, self._buffer, self._copies)


@contextmanager
def opened_uploads(gpu: Gpu, staging: int = STAGING) -> Iterator[Uploads]:
    """A stream and page-locked memory for images that go ahead, given back with the block.

    Args:
        gpu: where.
        staging: bytes of page-locked memory, at least 32.

    Raises:
        OutOfMemory: there is no memory.
        EngineError: the device failed.
    """
    with ExitStack() as stack:
        pinned = gpu.device.pinned((staging,), np.uint8)
        stack.callback(pinned.close)
        stream = gpu.device.stream()
        stack.callback(stream.close)
        copies = Staging(gpu.device, stream, pinned)
        stack.callback(copies.close)
        uploads = Uploads(gpu, copies)
        stack.callback(uploads.close)
        stack.callback(stream.synchronize)
        yield uploads
