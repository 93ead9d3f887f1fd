"""A pycuda.driver without a GPU. Its device memory is host memory, and work runs when somebody waits for any of it.

What would go wrong in silence on a GPU is noted in `faults`: work in a thread where no context is current, memory that
is freed while work is under way, or used after that, copies beyond the end or from memory that is not page-locked,
streams and memory that nobody gave back, memory that goes before a graph that holds its address, one GPU's streams and
memory where another one is current. Fresh and freed memory is full of NaN.
"""

from __future__ import annotations

import builtins
import ctypes
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
from fake_graphs import Driver, bindings
from numpy.typing import NDArray

NAN = 0xFF
"""A float32 of these bytes is NaN."""
CUBIN = b"a cubin for the test GPU"


class Error(Exception):
    """As in pycuda, not a RuntimeError."""


class MemoryError(Error, builtins.MemoryError):
    pass


class LogicError(Error):
    pass


class LaunchError(Error):
    pass


class Span(NamedTuple):
    """Bytes of device memory."""

    address: int
    nbytes: int


class Work(NamedTuple):
    """Something that a stream does: what it may not lose before, and who it is of (a life of tests/fake_nvinfer.py)."""

    run: Callable[[], None]
    addresses: set[int]
    array: Any = None
    owner: Any = None


class HostKernel(Protocol):
    """A kernel for the host: its memory is the host's."""

    def spans(self, arguments: Sequence[Any]) -> Sequence[Span]:
        """All that a launch reads and writes; called when it runs."""

    def addresses(self, arguments: Sequence[Any]) -> set[int]:
        """What must stay as it is until it has run."""

    def run(self, grid: Any, block: Any, arguments: Sequence[Any]) -> None: ...


class Cuda(ModuleType):
    """The module pycuda.driver, for one or more GPUs of `memory` bytes."""

    Error, MemoryError, LogicError, LaunchError = Error, MemoryError, LogicError, LaunchError

    def __init__(
        self, *, name: str = "Test GPU", capability: tuple[int, int] = (8, 6), memory: int = 1 << 30, gpus: int = 1
    ) -> None:
        super().__init__("pycuda.driver")
        self.gpus = gpus
        self.__spec__ = ModuleSpec("pycuda.driver", None)
        self.faults: list[str] = []
        self.device_name, self.capability, self.memory = name, capability, memory
        self.initialised = False
        self.live: dict[int, DeviceAllocation] = {}
        self.pinned: list[PagelockedHostAllocation] = []
        self.streams: dict[int, _Queue] = {}
        self.stacks = threading.local()
        self.fail_next: Exception | None = None
        self.lock = threading.RLock()
        self.modules = 0
        self.graphs: dict[int, list[Work]] = {}
        self.execs: dict[int, list[Work]] = {}
        """Graphs that can be launched."""
        self.graph_calls: list[str] = []
        self.kernels: Mapping[str, HostKernel] = {}
        self.allocations_left: int | None = None  # those that find memory; the next one does not
        self.recovers = False  # and whether those after it do again
        self.peak = 0
        self.Device = type("Device", (_Device,), {"cuda": self})
        self.Context = type("Context", (_Context,), {"cuda": self})
        self.Stream = type("Stream", (_Stream,), {"cuda": self})
        self.Event = type("Event", (_Event,), {"cuda": self})
        self.event_flags = type("event_flags", (), {"DISABLE_TIMING": 2})
        self.events = 0

    def init(self) -> None:
        self.initialised = True

    def get_driver_version(self) -> int:
        return 13000

    def mem_get_info(self) -> tuple[int, int]:
        self.need_context("cuMemGetInfo")
        return self.memory - self.taken(), self.memory

    def module_from_buffer(self, content: bytes) -> _Module:
        self.need_context("cuModuleLoadDataEx")
        self.need_no_capture("cuModuleLoadDataEx")
        if content != CUBIN:
            raise LogicError("cuModuleLoadDataEx failed: device kernel image is invalid")
        return _Module(self)

    def mem_alloc(self, size: int) -> DeviceAllocation:
        self.need_context("cuMemAlloc")
        self.need_no_capture("cuMemAlloc")
        if size < 1:
            raise LogicError("cuMemAlloc failed: invalid argument")
        self._count_allocation("cuMemAlloc")
        if self.taken() + size > self.memory:
            raise MemoryError("cuMemAlloc failed: out of memory")
        return DeviceAllocation(self, size)

    def pagelocked_empty(self, shape: Any, dtype: Any, order: str = "C", mem_flags: int = 0) -> NDArray[Any]:
        self.need_context("cuMemHostAlloc")
        self.need_no_capture("cuMemHostAlloc")
        self._count_allocation("cuMemHostAlloc")
        return PagelockedHostAllocation(self, tuple(shape), np.dtype(dtype)).as_array()

    def memcpy_htod_async(self, dest: int, src: NDArray[Any], stream: Any = None) -> None:
        self._check_copy(src, "htod", dest)

        def copy() -> None:
            self.at(int(dest), src.nbytes)[:] = np.frombuffer(self._page_locked(src).tobytes(), np.uint8)

        self._queue(stream).add(copy, {int(dest)}, src)

    def memcpy_dtoh_async(self, dest: NDArray[Any], src: int, stream: Any = None) -> None:
        self._check_copy(dest, "dtoh", src)

        def copy() -> None:
            self._page_locked(dest).reshape(-1).view(np.uint8)[:] = self.at(int(src), dest.nbytes)

        self._queue(stream).add(copy, {int(src)}, dest)

    def memset_d8_async(self, dest: int, data: int, count: int, stream: Any = None) -> None:
        self.need_context("cuMemsetD8Async")
        self.at(int(dest), count)

        def fill() -> None:
            self.at(int(dest), count)[:] = data

        self._queue(stream).add(fill, {int(dest)}, None)

    # --- what the fake of TensorRT and the tests use; pycuda has none of it

    def need_context(self, what: str) -> None:
        if not self.stack():
            raise LogicError(f"{what} failed: invalid device context")

    def stack(self) -> list[Any]:
        if not hasattr(self.stacks, "entries"):
            self.stacks.entries = []
        entries: list[Any] = self.stacks.entries
        return entries

    def gpu(self) -> int:
        """Whose context is current in this thread."""
        return int(self.stack()[-1].index)

    def need_gpu(self, index: int, what: str) -> None:
        if self.stack() and self.gpu() != index:
            self.fault(f"{what} of GPU {index} where GPU {self.gpu()} is current")

    def taken(self) -> int:
        """Bytes of the current GPU."""
        return sum(each.size for each in list(self.live.values()) if each.gpu == self.gpu())

    def fault(self, text: str) -> None:
        self.faults.append(text)

    def at(self, address: int, nbytes: int) -> NDArray[np.uint8]:
        """The bytes of device memory; an address that is not in live memory stops the work, as a GPU does."""
        for start, allocation in list(self.live.items()):  # other threads go on
            if start <= address and address + nbytes <= start + allocation.size:
                return allocation.content[address - start : address - start + nbytes]
        self.fault(f"an illegal address: {nbytes} bytes at {address:#x}")
        raise LaunchError("an illegal memory access was encountered")

    def run_on(self, stream: int, work: Callable[[], None], addresses: set[int], owner: Any = None) -> None:
        """Queue a kernel on a stream by its handle."""
        if stream not in self.streams:
            self.fault(f"no such stream: {stream:#x}")
            raise LogicError("invalid resource handle")
        self.need_gpu(self.streams[stream].gpu, "a stream")
        self.streams[stream].add(work, addresses, None, owner)

    def captures(self, stream: int) -> bool:
        """Whether what is begun on a stream goes into a graph."""
        return stream in self.streams and self.streams[stream].capture is not None

    def need_no_capture(self, what: str) -> None:
        """What waits for the GPU or may do so breaks the captures of its thread."""
        for queue in list(self.streams.values()):
            if queue.capture is not None and queue.capture.thread == threading.get_ident():
                queue.capture.broken = True
                raise LogicError(f"{what} failed: operation not permitted when stream is capturing")

    def held_by_graphs(self, first: int, nbytes: int) -> bool:
        works = (work for graph in self.execs.values() for work in graph)
        return any(first <= address < first + nbytes for work in works for address in work.addresses)

    def leaks(self) -> list[str]:
        left = [f"{each.size} bytes of device memory" for each in self.live.values()]
        left += [f"{each.array.nbytes} bytes of page-locked memory" for each in self.pinned]
        left += ["a module"] * self.modules + ["an event"] * self.events
        left += ["a graph"] * (len(self.graphs) + len(self.execs))
        return left + [f"stream {handle:#x}" for handle in self.streams]

    def _queue(self, stream: Any) -> _Queue:
        if stream is None:
            self.fault("the default stream is used")
            raise LogicError("no stream")
        queue: _Queue = stream.queue
        self.need_gpu(queue.gpu, "a stream")
        return queue

    def _count_allocation(self, what: str) -> None:
        """Fails where the test wants it."""
        if self.allocations_left is not None:
            self.allocations_left -= 1
            if self.allocations_left < 0:
                if self.recovers:
                    self.allocations_left = None
                raise MemoryError(f"{what} failed: out of memory")

    def _check_copy(self, array: NDArray[Any], kind: str, address: int) -> None:
        self.need_context(f"cuMemcpy {kind}")
        if not array.flags.c_contiguous:
            raise ValueError("ndarray is not contiguous")
        self._page_locked(array)
        self.at(int(address), array.nbytes)

    def _page_locked(self, array: NDArray[Any]) -> NDArray[Any]:
        first = array.ctypes.data
        if not any(each.holds(first, array.nbytes) for each in self.pinned):
            self.fault("a copy of host memory that is not page-locked, or freed")
        return array


class Capture:
    """What a stream was given since its capture began."""

    def __init__(self) -> None:
        self.work: list[Work] = []
        self.thread, self.broken = threading.get_ident(), False


class _Queue:
    """The work of a stream that has not run."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.work: list[Work] = []
        self.capture: Capture | None = None
        self.gpu = cuda.gpu()

    def add(self, run: Callable[[], None], addresses: set[int], array: Any = None, owner: Any = None) -> None:
        work = Work(run, addresses, array, owner)
        with self.cuda.lock:
            for allocation in list(self.cuda.live.values()):
                if allocation.gpu != self.gpu and any(allocation.holds(address) for address in addresses):
                    self.cuda.fault(f"memory of GPU {allocation.gpu} on a stream of GPU {self.gpu}")
            if self.capture is not None:
                self.capture.work.append(work)
                return
            captures = [queue.capture for queue in self.cuda.streams.values() if queue.capture is not None]
            if any(capture.thread == threading.get_ident() for capture in captures):
                self.cuda.fault("work on another stream than the one that is captured")
            self.work.append(work)

    def begin_capture(self) -> None:
        if self.capture is not None:
            self.cuda.fault("a capture in a capture")
        self.capture = Capture()

    def end_capture(self) -> Capture | None:
        capture, self.capture = self.capture, None
        if capture is not None and capture.thread != threading.get_ident():
            self.cuda.fault("a capture ended in another thread")
        return capture

    def run(self, until: Callable[[], bool] = lambda: False) -> None:
        """All work, or as much of it as is needed."""
        if self.capture is not None:
            self.capture.broken = True
            raise LogicError("cuStreamSynchronize failed: operation not permitted when stream is capturing")
        with self.cuda.lock:
            if self.cuda.fail_next is not None:
                error, self.cuda.fail_next = self.cuda.fail_next, None
                for work in self.work:  # it is over, and nobody has to wait for it
                    if work.owner is not None:
                        work.owner.facts["busy"].clear()
                self.work.clear()
                raise error
            while self.work and not until():
                others = [queue for queue in self.cuda.streams.values() if queue is not self]
                for queue in (*others, self):  # the others go on meanwhile, as on a GPU
                    if queue.work:
                        queue.work.pop(0).run()


class DeviceAllocation:
    def __init__(self, cuda: Cuda, size: int) -> None:
        self._cuda, self.size, self.gpu = cuda, size, cuda.gpu()
        self.content = np.full(size, NAN, dtype=np.uint8)
        self._address, self._freed = self.content.ctypes.data, False
        cuda.live[self._address] = self
        cuda.peak = max(cuda.peak, cuda.taken())

    def __int__(self) -> int:
        return self._address

    def holds(self, address: int) -> bool:
        return self._address <= address < self._address + self.size

    def free(self) -> None:
        self._cuda.need_context("cuMemFree")
        self._cuda.need_gpu(self.gpu, "memory")
        if self._freed:
            raise LogicError("device_allocation::free failed: invalid resource handle")
        self._cuda.need_no_capture("cuMemFree")
        for queue in list(self._cuda.streams.values()):
            if any(self.holds(address) for work in queue.work for address in work.addresses):
                self._cuda.fault("device memory was freed while work on it is under way")
        if self._cuda.held_by_graphs(self._address, self.size):
            self._cuda.fault("device memory was freed before a graph that holds its address")
        self._freed = True
        self.content[:] = NAN
        del self._cuda.live[self._address]

    def __del__(self) -> None:
        if not self._freed and self._address in self._cuda.live:
            self._cuda.fault("device memory was left to the garbage collector")


class PagelockedHostAllocation:
    def __init__(self, cuda: Cuda, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._cuda, self._freed = cuda, False
        self.array = np.empty(shape, dtype)
        self.array.reshape(-1).view(np.uint8)[:] = NAN
        self.__array_interface__ = self.array.__array_interface__
        cuda.pinned.append(self)

    def as_array(self) -> NDArray[Any]:
        array = np.asarray(self)
        assert array.base is self
        return array

    def holds(self, first: int, nbytes: int) -> bool:
        return self.array.ctypes.data <= first and first + nbytes <= self.array.ctypes.data + self.array.nbytes

    def free(self) -> None:
        self._cuda.need_context("cuMemFreeHost")
        if self._freed:
            raise LogicError("pagelocked_host_allocation::free failed: invalid resource handle")
        self._cuda.need_no_capture("cuMemFreeHost")
        for queue in list(self._cuda.streams.values()):
            if any(work.array is not None and self.holds(work.array.ctypes.data, 1) for work in queue.work):
                self._cuda.fault("page-locked memory was freed while a copy is under way")
        self._freed = True
        self.array.reshape(-1).view(np.uint8)[:] = NAN
        self._cuda.pinned.remove(self)


class _Module:
    """Kernels are those of `Cuda.kernels`."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        cuda.modules += 1

    def get_function(self, name: str) -> _Function:
        self.cuda.need_context("cuModuleGetFunction")
        if name not in self.cuda.kernels:
            raise LogicError("cuModuleGetFunction failed: named symbol not found")
        return _Function(self, name)

    def __del__(self) -> None:
        self.cuda.modules -= 1
        if not self.cuda.stack():
            self.cuda.fault("a module was unloaded where its context is not current")
        if any(queue.work for queue in self.cuda.streams.values()):
            self.cuda.fault("a module was unloaded with work under way")


class _Function:
    def __init__(self, module: _Module, name: str) -> None:
        self.module, self.name = module, name

    def prepare(self, arg_types: str) -> _Function:
        self.types = arg_types
        return self

    def prepared_async_call(self, grid: Any, block: Any, stream: Any, *given: Any) -> None:
        cuda = self.module.cuda
        cuda.need_context("cuLaunchKernel")
        packed = struct.pack(self.types, *given)  # as the driver gets them
        arguments = [np.dtype(t).type(v) for t, v in zip(self.types, struct.unpack(self.types, packed), strict=True)]
        threads = int(np.prod(block))
        limits = zip((*grid, *block), (2**31 - 1, 65535, 65535, 1024, 1024, 64), strict=True)
        if threads > 1024 or any(not 1 <= count <= most for count, most in limits):
            raise LogicError("cuLaunchKernel failed: invalid argument")
        kernel = cuda.kernels[self.name]
        for address in kernel.addresses(arguments):
            cuda.at(address, 1)  # while whoever launches it can be named

        def work() -> None:
            for span in kernel.spans(arguments):
                cuda.at(*span)
            kernel.run(grid, block, arguments)

        cuda._queue(stream).add(work, kernel.addresses(arguments), None)


class _Device:
    cuda: Cuda

    def __init__(self, index: int) -> None:
        if not self.cuda.initialised:
            raise LogicError("cuDeviceGet failed: initialization error")
        if not 0 <= index < self.cuda.gpus:
            raise LogicError("cuDeviceGet failed: invalid device ordinal")
        self.index = index

    @classmethod
    def count(cls) -> int:
        return cls.cuda.gpus

    def name(self) -> str:
        return self.cuda.device_name

    def compute_capability(self) -> tuple[int, int]:
        return self.cuda.capability

    def total_memory(self) -> int:
        return self.cuda.memory

    def retain_primary_context(self) -> Any:
        return self.cuda.Context(self.index)

    def make_context(self, flags: int = 0) -> Any:
        self.cuda.fault("a context that is not the primary one")
        return self.cuda.Context(self.index)


class _Context:
    cuda: Cuda

    def __init__(self, index: int = 0) -> None:
        self.index = index

    def push(self) -> None:
        self.cuda.stack().append(self)

    @classmethod
    def pop(cls) -> None:
        if not cls.cuda.stack():
            raise LogicError("context::pop failed: cannot pop non-current context")
        cls.cuda.stack().pop()

    @classmethod
    def synchronize(cls) -> None:
        cls.cuda.need_context("cuCtxSynchronize")
        cls.cuda.need_no_capture("cuCtxSynchronize")
        for queue in list(cls.cuda.streams.values()):
            if queue.gpu == cls.cuda.gpu():
                queue.run()


class _Stream:
    cuda: Cuda

    def __init__(self, flags: int = 0) -> None:
        self.cuda.need_context("cuStreamCreate")
        self.queue = _Queue(self.cuda)
        self._cell = ctypes.c_int()  # for an address of its own
        self.handle = ctypes.addressof(self._cell)
        self.cuda.streams[self.handle] = self.queue

    def synchronize(self) -> None:
        self.cuda.need_context("cuStreamSynchronize")
        queue = self.queue
        del self  # pycuda's own frames are C++, which no traceback holds
        queue.run()

    def is_done(self) -> bool:
        return not self.queue.work

    def __del__(self) -> None:
        if not self.cuda.stack():
            self.cuda.fault("a stream was destroyed where its context is not current")
        if self.queue.work:
            self.cuda.fault("a stream was destroyed with work under way")
        if self.queue.capture is not None:
            self.cuda.fault("a stream was destroyed while it is captured")
        self.cuda.streams.pop(self.handle, None)


class _Event:
    cuda: Cuda

    def __init__(self, flags: int = 0) -> None:
        self.cuda.need_context("cuEventCreate")
        self.cuda.events += 1
        self.gpu = self.cuda.gpu()
        self.places: list[_Place] = []

    def record(self, stream: Any = None) -> None:
        self.cuda.need_context("cuEventRecord")
        self.cuda.need_gpu(self.gpu, "an event")
        place = _Place(self.cuda._queue(stream))
        place.queue.add(place.reach, set())
        self.places = [place]

    def synchronize(self) -> None:
        self.cuda.need_context("cuEventSynchronize")
        self.cuda.need_no_capture("cuEventSynchronize")
        places = self.places
        del self  # as in `_Stream.synchronize`
        for place in places:
            place.queue.run(until=lambda place=place: place.reached)  # type: ignore[misc]

    def __del__(self) -> None:
        self.cuda.events -= 1
        if not self.cuda.stack():
            self.cuda.fault("an event was destroyed where its context is not current")


class _Place:
    """Where an event stands."""

    def __init__(self, queue: _Queue) -> None:
        self.queue, self.reached = queue, False

    def reach(self) -> None:
        self.reached = True


def installed(cuda: Cuda) -> dict[str, ModuleType]:
    """What to put into sys.modules."""
    package = ModuleType("pycuda")
    package.__spec__ = ModuleSpec("pycuda", None)
    package.__path__ = []
    package.driver = cuda  # type: ignore[attr-defined]
    return {"pycuda": package, "pycuda.driver": cuda, **bindings(Driver(cuda))}
