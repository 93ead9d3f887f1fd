"""cuda.bindings.driver without a GPU: the part that captures CUDA graphs, on the streams of tests/fake_cuda.py.

Results, enums and handles are those of the real bindings. A graph holds the very work that was begun while it was
captured, and a launch queues it again. What a capture forbids breaks it, as on a GPU, and what would go wrong in
silence is a fault.
"""

from __future__ import annotations

import itertools
from types import ModuleType
from typing import TYPE_CHECKING, Any

from cuda.bindings import driver as real

if TYPE_CHECKING:
    from fake_cuda import Cuda

SUCCESS = real.CUresult.CUDA_SUCCESS
FUNCTIONS = ("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuGraphLaunch", "cuGraphExecDestroy",
             "cuGraphDestroy")  # fmt: skip


class Driver(ModuleType):
    """The module. A function that is named in `failing` returns that result and does nothing."""

    CUresult, CUstream, CUstreamCaptureMode = real.CUresult, real.CUstream, real.CUstreamCaptureMode

    def __init__(self, cuda: Cuda) -> None:
        super().__init__("cuda.bindings.driver")
        self.cuda = cuda
        self.failing: dict[str, Any] = {}
        self.numbers = itertools.count(1)

    def cuStreamBeginCapture(self, stream: Any, mode: Any) -> tuple[Any]:
        if (failed := self._failed("cuStreamBeginCapture")) is not None:
            return (failed,)
        if mode != real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL:
            self.cuda.fault("a capture that forbids other threads to allocate, or nothing at all")
        self._queue(stream).begin_capture()
        return (SUCCESS,)

    def cuStreamEndCapture(self, stream: Any) -> tuple[Any, Any]:
        capture = self._queue(stream).end_capture()
        if (failed := self._failed("cuStreamEndCapture")) is not None:
            return failed, None
        if capture is None:
            return real.CUresult.CUDA_ERROR_ILLEGAL_STATE, None
        if capture.broken:
            return real.CUresult.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        number = next(self.numbers)
        self.cuda.graphs[number] = capture.work
        return SUCCESS, real.CUgraph(number)

    def cuGraphInstantiate(self, graph: Any, flags: int) -> tuple[Any, Any]:
        if (failed := self._failed("cuGraphInstantiate")) is not None:
            return failed, None
        number = next(self.numbers)
        self.cuda.execs[number] = list(self.cuda.graphs[int(graph)])
        return SUCCESS, real.CUgraphExec(number)

    def cuGraphLaunch(self, graph: Any, stream: Any) -> tuple[Any]:
        if (failed := self._failed("cuGraphLaunch")) is not None:
            return (failed,)
        assert isinstance(graph, real.CUgraphExec)
        queue = self._queue(stream)
        for work in self.cuda.execs[int(graph)]:
            queue.add(*work)
        return (SUCCESS,)

    def cuGraphExecDestroy(self, graph: Any) -> tuple[Any]:
        if (failed := self._failed("cuGraphExecDestroy")) is not None:
            return (failed,)
        assert isinstance(graph, real.CUgraphExec)
        self._gone(self.cuda.execs, int(graph))
        return (SUCCESS,)

    def cuGraphDestroy(self, graph: Any) -> tuple[Any]:
        if (failed := self._failed("cuGraphDestroy")) is not None:
            return (failed,)
        assert isinstance(graph, real.CUgraph)
        self._gone(self.cuda.graphs, int(graph))
        return (SUCCESS,)

    def _failed(self, name: str) -> Any:
        self.cuda.need_context(name)
        self.cuda.graph_calls.append(name)
        return self.failing.get(name)

    def _queue(self, stream: Any) -> Any:
        assert isinstance(stream, real.CUstream)
        queue = self.cuda.streams[int(stream)]
        self.cuda.need_gpu(queue.gpu, "a stream")
        return queue

    def _gone(self, kind: dict[int, Any], number: int) -> None:
        if kind.pop(number, None) is None:
            self.cuda.fault("a graph was destroyed twice")


def bindings(driver: Driver) -> dict[str, ModuleType]:
    """What to put into sys.modules: the package too, whose attribute comes first. All else of it is the real one's."""
    import cuda.bindings

    package = ModuleType("cuda.bindings")
    package.__path__ = list(cuda.bindings.__path__)
    package.driver = driver  # type: ignore[attr-defined]
    return {"cuda.bindings": package, "cuda.bindings.driver": driver}
