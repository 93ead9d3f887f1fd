"""What a GPU gives: streams, memory on both sides, and kernels. Each is made by a `Device`, and used inside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import DTypeLike, NDArray

from trtbuild.errors import EngineError

if TYPE_CHECKING:
    from trtbuild.runtime.device import Device
    from trtbuild.runtime.gpu.event import Event

Triple = tuple[int, int, int]


class Closable(Protocol):
    """Something of a device that is given back once; closing it twice is allowed."""

    def close(self) -> None: ...


class Stream:
    """Work that the device does in order, beside that of other streams. `handle` is CUDA's, as a number."""

    def __init__(self, device: Device) -> None:
        self._device = device
        with device.current():
            self._streams = [device.cuda.Stream()]
        self.handle = int(self._streams[0].handle)

    def made(self) -> Any:
        """pycuda's, inside `Device.current`, which nobody may keep."""
        return self._streams[0]

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
        types = "".join(argument.dtype.char for argument in arguments)
        with self._device.current():
            function = kernel.module.function(kernel.name, types)
            function.prepared_async_call(grid, block, self._streams[0], *arguments)

    def mark(self, event: Event) -> None:
        """Put an event behind all that was begun.

        Raises:
            EngineError: the event is closed.
        """
        with self._device.current():
            event.made().record(self._streams[0])

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
        self._functions: dict[tuple[str, str], Any] = {}

    def kernel(self, name: str) -> Kernel:
        """What `Stream.launch` runs.

        Raises:
            EngineError: there is none of this name, or the module is closed.
        """
        with self._device.current():
            self.function(name, "")
        return Kernel(module=self, name=name)

    def function(self, name: str, types: str) -> Any:
        """Of pycuda, prepared for arguments of these types (characters of NumPy), inside `Device.current`.

        It keeps the module loaded, so nobody but the module may keep it. Prepared, because some versions of pycuda keep
        what else is packed for every call, forever, and take an int32 for an int64 of the same value there.
        """
        if not self._modules:
            raise EngineError("These kernels were given back.", where=name)
        if (name, types) not in self._functions:
            self._functions[name, types] = self._modules[0].get_function(name).prepare(types)
        return self._functions[name, types]

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


def _check_fits(offset: int, nbytes: int, buffer: Buffer) -> None:
    if buffer.closed:
        raise EngineError("This device memory was given back.", where=f"{buffer.nbytes} bytes")
    if offset < 0 or offset + nbytes > buffer.nbytes:
        raise EngineError("A copy is larger than its device memory.", expected=f"<= {buffer.nbytes} bytes",
                          got=f"{nbytes} bytes from byte {offset}")  # fmt: skip
