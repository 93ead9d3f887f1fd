"""A GPU: its context in every thread, streams, memory on both sides, copies, kernels, and errors mapped once.

The one file that imports pycuda. TensorRT, CUDA's runtime and torch work in the device's primary context, so that is
the one taken here (pycuda.autoinit makes another, in which their addresses mean nothing). pycuda frees an object only
in a thread where its context is current: everything here is made, used and closed inside `Device.current`.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from trtbuild.errors import EngineError, MissingExtra, OutOfMemory
from trtbuild.nvinfer import no_driver
from trtbuild.runtime.gpu.event import Event
from trtbuild.runtime.gpu.graph import Graph, Work
from trtbuild.runtime.gpu.parts import Buffer, Closable, Kernel, Module, Pinned, Stream

__all__ = ["Buffer", "Device", "Event", "Kernel", "Module", "Pinned", "Stream", "check_device_usable", "opened_device"]

NO_ROOM = "close other programs that use the GPU, or compile with a smaller --max-batch"

Resource = TypeVar("Resource", bound=Closable)


class Device:
    """An opened GPU. `index` is its number, `capability` is "8.6", `memory` in bytes, `driver` the newest CUDA that its
    driver knows, "13.0".

    Streams and memory are closed by whoever made them; what is left is closed with the device, the newest first.
    """

    def __init__(self, cuda: Any, index: int) -> None:
        with _cuda_errors(cuda, f"GPU {index}"):
            device, self._context = _primary_context(cuda, index)
            major, minor = device.compute_capability()
            version = int(cuda.get_driver_version())
            self.name, self.memory = str(device.name()), int(device.total_memory())
        self.index = index
        self.capability, self.driver = f"{major}.{minor}", f"{version // 1000}.{version % 1000 // 10}"
        self.cuda = cuda
        self._open: list[Closable] = []

    @contextmanager
    def current(self) -> Iterator[None]:
        """The device is the calling thread's in this block, and CUDA's errors are ours.

        Raises:
            OutOfMemory: the device, or page-locked host memory, has none left.
            EngineError: any other error of CUDA's. It may be one of earlier work: kernels run in the background.
        """
        with _cuda_errors(self.cuda, self.name):
            self._context.push()
            try:
                yield
            finally:
                self._context.pop()

    def stream(self) -> Stream:
        """A new stream."""
        return self._owned(Stream(self))

    def event(self) -> Event:
        """A new event, which has no place yet."""
        return self._owned(Event(self))

    def buffer(self, nbytes: int) -> Buffer:
        """Device memory of `nbytes`, with whatever lies there."""
        return self._owned(Buffer(self, nbytes))

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike = np.float32) -> Pinned:
        """An array in page-locked host memory, which the device copies from and to in the background."""
        return self._owned(Pinned(self, shape, dtype))

    def module(self, cubin: bytes) -> Module:
        """Kernels that were compiled for this device.

        Raises:
            EngineError: they were compiled for another one, or are no cubin.
        """
        return self._owned(Module(self, cubin))

    def graph(self, stream: Stream, work: Work) -> Graph:
        """What `work` begins on the stream, captured as one thing to launch; it is not begun.

        Raises:
            EngineError: the work or the capture failed. The stream is as it was.
            OutOfMemory: there is no memory for the graph.
            MissingExtra: cuda-bindings is not installed.
        """
        return self._owned(Graph(self, stream, work))

    def free_memory(self) -> int:
        """Bytes that are free now; other programs may take them at any time."""
        with self.current():
            free, _ = self.cuda.mem_get_info()
        return int(free)

    def forget(self, resource: Closable) -> None:
        """The resource closed itself."""
        self._open.remove(resource)

    def close(self) -> None:
        """Close what is still open, the newest first, even where one of them fails."""
        with ExitStack() as stack:
            for resource in self._open:
                stack.callback(resource.close)

    def _owned(self, resource: Resource) -> Resource:
        self._open.append(resource)
        return resource


@contextmanager
def opened_device(index: int = 0) -> Iterator[Device]:
    """A GPU by its number; what is still open of it is closed with the block.

    Raises:
        EngineError: no NVIDIA driver, no such GPU, or pycuda cannot be loaded.
        MissingExtra: pycuda is not installed.
    """
    device = Device(_driver(), index)
    try:
        yield device
    finally:
        device.close()


def check_device_usable() -> None:
    """Raises as `opened_device` does where there is no driver or no pycuda; touches no device and loads nothing."""
    reason = no_driver()
    if reason is not None:
        raise EngineError(f"GPU engines cannot run here: {reason}.")
    if find_spec("pycuda") is None:
        raise MissingExtra("pycuda", "gpu", "run engines on a GPU")


def _driver() -> Any:
    check_device_usable()
    try:
        import pycuda.driver as cuda
    except (ImportError, OSError) as error:
        raise EngineError("pycuda cannot be loaded.", got=error, hint="pip install 'trtbuild[gpu]'") from error
    with _cuda_errors(cuda, "CUDA"):
        cuda.init()
    return cuda


@cache
def _primary_context(cuda: Any, index: int) -> tuple[Any, Any]:
    """A device and its primary context, held until the process ends.

    CUDA's runtime, and so TensorRT, holds it as long anyway. Given back earlier, pycuda would leave it current in the
    thread (cuDevicePrimaryCtxRelease pops nothing), and who comes next could find a context that is destroyed.
    """
    atexit.register(_primary_context.cache_clear)
    device = cuda.Device(index)
    return device, device.retain_primary_context()


@contextmanager
def _cuda_errors(cuda: Any, where: str) -> Iterator[None]:
    try:
        yield
    except cuda.MemoryError as error:
        raise OutOfMemory("The GPU has no memory left.", got=error, where=where, hint=NO_ROOM) from error
    except cuda.Error as error:
        raise EngineError("The GPU failed.", got=error, where=where) from error
