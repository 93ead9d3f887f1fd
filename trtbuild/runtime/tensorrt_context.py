"""An execution context of a TensorRT engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtbuild.runtime.device import Buffer
from trtbuild.runtime.gpu.contexts import ContextMemory

if TYPE_CHECKING:
    from trtbuild.runtime.tensorrt_engine import LoadedEngine


class Context:
    """An execution context with its own activations, or with those of `memory`, made and closed inside
    `Device.current`.

    What fails here keeps this object in its traceback, and never TensorRT's own, which would then outlive its engine.
    """

    def __init__(self, engine: LoadedEngine, memory: ContextMemory | None = None) -> None:
        self._engine, self._memory = engine, memory
        self._given: Buffer | None = None
        self._made = [engine.made_context(own_memory=memory is None)]

    def run(self, stream: int, shape: tuple[int, ...], addresses: dict[str, int], name: str) -> None:
        """Begin to compute: `name` is the input, `addresses` are those of the input and the output."""
        if self._memory is not None:
            self._compute_in(self._memory.room())
        done = all(self._made[0].set_tensor_address(tensor, address) for tensor, address in addresses.items())
        if not (done and self._made[0].set_input_shape(name, shape) and self._made[0].execute_async_v3(stream)):
            raise self._engine.failure("TensorRT failed.")

    def close(self) -> None:
        self._made.clear()

    def _compute_in(self, room: Buffer) -> None:
        if room is not self._given:
            self._made[0].set_device_memory(room.address, room.nbytes)
            self._given = room
