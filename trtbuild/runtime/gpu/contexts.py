"""One memory for the activations of all engines of a GPU, which run one after the other on its one stream."""

from __future__ import annotations

from trtbuild.runtime.device import Buffer, Device, Stream
from trtbuild.runtime.gpu.graph import Graphs


class ContextMemory:
    """As large as the engine that wants most of it; taken at the first call, given back with the GPU.

    Five folds take as much as one. Nobody else may use it while a call is under way.
    """

    def __init__(self, device: Device, stream: Stream, graphs: Graphs) -> None:
        self._device, self._stream, self._graphs = device, stream, graphs
        self._wanted = 0
        self._held: Buffer | None = None

    def reserve(self, nbytes: int) -> None:
        """An engine was opened that computes in `nbytes` of it. Nothing is allocated yet."""
        self._wanted = max(self._wanted, nbytes)

    @property
    def wanted(self) -> int:
        """Bytes of it that an engine computes in at most, taken or not."""
        return self._wanted

    @property
    def missing(self) -> int:
        """Bytes that the next call takes from the device's free memory."""
        return max(0, self._wanted - (0 if self._held is None else self._held.nbytes))

    def room(self) -> Buffer:
        """The memory, large enough for every engine that was opened; it may be another one after each `reserve`.

        Raises:
            OutOfMemory: there is none; the next call tries again.
            EngineError: earlier work failed, which has to end before the memory may grow.
        """
        if self._held is None or self.missing:
            self._stream.synchronize()
            self.close()
            self._held = self._device.buffer(max(1, self._wanted))  # CUDA allocates no 0 bytes
        return self._held

    def close(self) -> None:
        """To be called when nothing is under way."""
        self._graphs.clear()  # they hold its address
        held, self._held = self._held, None
        if held is not None:
            held.close()
