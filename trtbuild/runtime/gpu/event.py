"""Places in a stream's work that the host waits for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtbuild.errors import EngineError

if TYPE_CHECKING:
    from trtbuild.runtime.device import Device


class Event:
    """A place in a stream's work, put there by `Stream.mark`: what stands before it is waited for, and no more."""

    def __init__(self, device: Device) -> None:
        self._device = device
        with device.current():
            self._events = [device.cuda.Event(device.cuda.event_flags.DISABLE_TIMING)]

    def wait(self) -> None:
        """Until the work before the place is done; without a place there is none.

        Raises:
            EngineError: the work failed, or the event is closed.
        """
        with self._device.current():
            self.made().synchronize()

    def made(self) -> Any:
        """pycuda's, inside `Device.current`."""
        if not self._events:
            raise EngineError("This event was given back.")
        return self._events[0]

    def close(self) -> None:
        """The work goes on."""
        if self._events:
            with self._device.current():
                self._events.clear()  # pycuda destroys an event with its last reference, and in no other way
            self._device.forget(self)
