"""CUDA graphs: what an engine's call launches is captured once, and then launched again and again as one thing.

The same kernels with the same arguments, in the same order; only the host has less to do. pycuda knows no graphs, so
that the driver is asked through NVIDIA's own bindings, on pycuda's stream.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtbuild.errors import EngineError, MissingExtra, OutOfMemory

if TYPE_CHECKING:
    from trtbuild.runtime.device import Device
    from trtbuild.runtime.gpu.parts import Stream

REPLAYS = 16
"""Launches from which on a graph is made. To capture a call costs the host as much as the call, to make a graph of it
and to bring that to the GPU maybe three times as much, and each launch saves most of a call: four would do, and where
the kernels are long and launching is not what takes the time, 16 make the cost small. Reasoned, not yet measured."""
NO_ROOM = "close other programs that use the GPU"

Work = Callable[[], None]
"""Begins work on a stream, and does nothing else with the GPU: it neither waits nor allocates."""


@dataclass(frozen=True, kw_only=True)
class Call:
    """What a graph is of: an engine's runner, by its id, the addresses of its input and output, and the batch."""

    runner: int
    source: int
    target: int
    batch: int


class Graph:
    """What `work` begins on a stream: captured, not begun. Memory and contexts that it uses outlive it."""

    def __init__(self, device: Device, stream: Stream, work: Work) -> None:
        self._device, self._stream, self._driver = device, stream.handle, _driver()
        with device.current(), _no_collection():
            self._graphs = [_captured(self._driver, self._stream, work)]

    def launch(self) -> None:
        """Begin the work, behind what was begun on the stream before.

        Raises:
            OutOfMemory: the GPU has no room for the graph itself.
            EngineError: closed, or the driver refused.
        """
        if not self._graphs:
            raise EngineError("This CUDA graph was given back.", where=self._device.name)
        driver = self._driver
        with self._device.current():
            _value(driver, driver.cuGraphLaunch(self._graphs[0], driver.CUstream(self._stream)))

    def close(self) -> None:
        """What is under way goes on to its end."""
        if self._graphs:
            with self._device.current():
                _value(self._driver, self._driver.cuGraphExecDestroy(self._graphs.pop()))
            self._device.forget(self)


class Graphs:
    """The graphs of a case on one stream. Its buffers have addresses of their own, so that none lives longer.

    Where a capture fails, calls are launched as ever from then on, and `notes` say so once.
    """

    def __init__(self, device: Device, stream: Stream) -> None:
        self._device, self._stream = device, stream
        self._graphs: dict[Call, Graph] = {}
        self._called: set[Call] = set()
        self._failed = False
        self._notes: list[str] = []

    def run(self, call: Call, work: Work, calls: int) -> None:
        """Begin `work`, by its graph where there is one.

        Args:
            call: what the work is.
            work: as `Work`. The first time it is run as it is: TensorRT then sets up what no graph may hold.
            calls: how many times the case makes this call.

        Raises:
            EngineError, OutOfMemory: of the work itself, or a graph could not be launched.
        """
        if call in self._called and call not in self._graphs and calls > REPLAYS and not self._failed:
            self._capture(call, work)
        if call in self._graphs:
            self._graphs[call].launch()
        else:
            work()
            self._called.add(call)

    def clear(self) -> None:
        """The case's memory goes."""
        self._called.clear()
        while self._graphs:
            self._graphs.popitem()[1].close()

    def notes(self) -> list[str]:
        """What a user is to be told since the last time."""
        notes, self._notes = self._notes, []
        return notes

    def _capture(self, call: Call, work: Work) -> None:
        try:
            self._graphs[call] = self._device.graph(self._stream, work)
        except (EngineError, MissingExtra) as error:
            self._failed = True
            text = " ".join(str(error).split())
            self._notes.append(f"No CUDA graph was made of the network's calls, which may take longer without: {text}")


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ModuleNotFoundError as error:
        raise MissingExtra("cuda-bindings", "gpu", "capture CUDA graphs") from error
    except (ImportError, OSError) as error:
        raise EngineError("cuda-bindings cannot be loaded.", got=error, hint="pip install 'trtbuild[gpu]'") from error
    return driver


def _captured(driver: Any, stream: int, work: Work) -> Any:
    """A graph that can be launched. Whatever happens, the stream is as it was, and what is left is destroyed.

    Only this thread must not do meanwhile what a capture forbids: others may prepare their cases.
    """
    handle = driver.CUstream(stream)
    mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
    with _missing_functions():
        _value(driver, driver.cuStreamBeginCapture(handle, mode))
    try:
        work()
    except BaseException:
        with suppress(EngineError):  # a capture that broke has no graph
            _value(driver, driver.cuGraphDestroy(_value(driver, driver.cuStreamEndCapture(handle))))
        raise
    with _missing_functions():
        graph = _value(driver, driver.cuStreamEndCapture(handle))
        try:
            return _value(driver, driver.cuGraphInstantiate(graph, 0))
        finally:
            _value(driver, driver.cuGraphDestroy(graph))


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage may hold device memory (`DeviceLabels`), and to free that in the capturing thread breaks a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _missing_functions() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what cuda-bindings raises where the driver lacks a function
        raise EngineError("The NVIDIA driver cannot capture CUDA graphs.", got=error) from error


def _value(driver: Any, answer: tuple[Any, ...]) -> Any:
    """What a call of the driver's returned behind its result, if anything.

    Raises:
        OutOfMemory, EngineError: the result is an error.
    """
    result, *values = answer
    if result == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemory("The GPU has no memory left for a CUDA graph.", got=result.name, hint=NO_ROOM)
    if result != driver.CUresult.CUDA_SUCCESS:
        raise EngineError("A CUDA graph failed.", got=result.name)
    return values[0] if values else None
