"""A GPU: its context in every thread, streams, memory on both sides, copies, kernels, and errors mapped once.

The one file that imports pycuda. TensorRT, CUDA's runtime and torch work in the device's primary context, so that is
the one taken here (pycuda.autoinit makes another, in which their addresses mean nothing). pycuda frees an object only
in a thread where its context is current: everything here is made, used and closed inside `Device.current`.
"""

from __future__ import annotations

import atexit
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtbuild.errors import EngineError, MissingExtra, OutOfMemory
from trtbuild.nvinfer import no_driver

NO_ROOM = "close other programs that use the GPU, or compile with a smaller --max-batch"


class Closable(Protocol):
    """Something of a device that is given back once; closing it twice is allowed."""

    def close(self) -> None: ...


Triple = tuple[int, int, int]
Resource = TypeVar("Resource", bound=Closable)


class Device:
    """An opened GPU. `capability` is "8.6", `memory` in bytes, `driver` the newest CUDA that its driver knows, "13.0".

    Streams and memory are closed by whoever made them; what is left is closed with the device, the newest first.
    """

    def __init__(self, cuda: Any, index: int) -> None:
        with _cuda_errors(cuda, f"GPU {index}"):
            device, self._context = _primary_context(cuda, index)
            major, minor = device.compute_capability()
            version = int(cuda.get_driver_version())
            self.name, self.memory = str(device.name()), int(device.total_memory())
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


class Stream:
    """Work that the device does in order, beside that of other streams. `handle` is CUDA's, as a number."""

    def __init__(self, device: Device) -> None:
        self._device = device
        with device.current():
            self._streams = [device.cuda.Stream()]
        self.handle = int(self._streams[0].handle)

    def copy_in(self, target: Buffer, source: NDArray[Any], offset: int = 0) -> None:
        """Begin to copy a page-locked array (C order) to a buffer, `offset` bytes from its start.

        Neither may change before the end.

        Raises:
            EngineError: the array does not fit, or the buffer is closed.
        """
        _check_fits(offset, source.nbytes, target)
        with self._device.current():
            self._device.cuda.memcpy_htod_async(target.address + offset, source, self._streams[0])

    def copy_out(self, target: NDArray[Any], source: Buffer, offset: int = 0) -> None:
        """Begin to fill a page-locked array (C order) from a buffer, `offset` bytes from its start; as `copy_in`."""
        _check_fits(offset, target.nbytes, source)
        with self._device.current():
            self._device.cuda.memcpy_dtoh_async(target, source.address + offset, self._streams[0])

    def zero(self, buffer: Buffer, nbytes: int) -> None:
        """Begin to set the first `nbytes` bytes of a buffer to 0.

        Raises:
            EngineError: there are not so many, or the buffer is closed.
        """
        _check_fits(0, nbytes, buffer)
        with self._device.current():
            self._device.cuda.memset_d8_async(buffer.address, 0, nbytes, self._streams[0])

    def launch(self, kernel: Kernel, grid: Triple, block: Triple, arguments: Sequence[np.number[Any]]) -> None:
        """Begin to run a kernel; its module must stay open until the end.

        Args:
            kernel: what to run.
            grid: blocks along (x, y, z).
            block: threads of a block along (x, y, z).
            arguments: in the kernel's order and with its very types, device pointers as np.uint64.
        """
        with self._device.current():
            kernel.module.function(kernel.name)(*arguments, grid=grid, block=block, stream=self._streams[0])

    def synchronize(self) -> None:
        """Wait until everything that was begun is done; a closed stream has nothing under way.

        Raises:
            EngineError: the work failed.
        """
        with self._device.current():
            if self._streams:  # without a name of its own here, which an error's traceback would keep alive
                self._streams[0].synchronize()

    def close(self) -> None:
        if not self._streams:
            return
        try:
            self.synchronize()
        finally:
            with self._device.current():
                self._streams.clear()  # pycuda destroys a stream with its last reference, and in no other way
            self._device.forget(self)


class Buffer:
    """Device memory. `address` is a device pointer, as a number."""

    def __init__(self, device: Device, nbytes: int) -> None:
        self._device, self.nbytes = device, nbytes
        with device.current():
            self._allocations = [device.cuda.mem_alloc(nbytes)]
        self.address = int(self._allocations[0])

    @property
    def closed(self) -> bool:
        """Whether the memory was given back; its address means nothing then."""
        return not self._allocations

    def close(self) -> None:
        if self._allocations:
            with self._device.current():
                self._allocations.pop().free()
            self._device.forget(self)


class Pinned:
    """Page-locked host memory as an array, which must not be used any more after `close`."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._device = device
        with device.current():
            self.array: NDArray[Any] = device.cuda.pagelocked_empty(shape, dtype)
        self._allocations = [self.array.base]

    def close(self) -> None:
        if self._allocations:
            allocation: Any = self._allocations.pop()
            del self.array  # an AttributeError is better than what a freed page gives
            with self._device.current():
                allocation.free()
            self._device.forget(self)


class Module:
    """Compiled kernels on the device. To be closed when none of them is under way."""

    def __init__(self, device: Device, cubin: bytes) -> None:
        self._device = device
        with device.current():
            self._modules = [device.cuda.module_from_buffer(cubin)]
        self._functions: dict[str, Any] = {}

    def kernel(self, name: str) -> Kernel:
        """What `Stream.launch` runs.

        Raises:
            EngineError: there is none of this name, or the module is closed.
        """
        with self._device.current():
            self.function(name)
        return Kernel(module=self, name=name)

    def function(self, name: str) -> Any:
        """Of pycuda, inside `Device.current`. It keeps the module loaded, so nobody but the module may keep it."""
        if not self._modules:
            raise EngineError("These kernels were given back.", where=name)
        if name not in self._functions:
            self._functions[name] = self._modules[0].get_function(name)
        return self._functions[name]

    def close(self) -> None:
        if self._modules:
            with self._device.current():
                self._functions.clear()
                self._modules.clear()  # pycuda unloads a module with its last reference, and in no other way
            self._device.forget(self)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel by its name."""

    module: Module
    name: str


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
        raise EngineError(f"TensorRT engines cannot run here: {reason}.")
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


def _check_fits(offset: int, nbytes: int, buffer: Buffer) -> None:
    if buffer.closed:
        raise EngineError("This device memory was given back.", where=f"{buffer.nbytes} bytes")
    if offset < 0 or offset + nbytes > buffer.nbytes:
        raise EngineError("A copy is larger than its device memory.", expected=f"<= {buffer.nbytes} bytes",
                          got=f"{nbytes} bytes from byte {offset}")  # fmt: skip


@contextmanager
def _cuda_errors(cuda: Any, where: str) -> Iterator[None]:
    try:
        yield
    except cuda.MemoryError as error:
        raise OutOfMemory("The GPU has no memory left.", got=error, where=where, hint=NO_ROOM) from error
    except cuda.Error as error:
        raise EngineError("The GPU failed.", got=error, where=where) from error
