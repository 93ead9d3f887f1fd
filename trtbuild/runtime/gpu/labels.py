"""Labels that stay on the GPU, for programs that go on with them there."""

from __future__ import annotations

from typing import Any
from weakref import finalize

import numpy as np

from trtbuild.errors import EngineError
from trtbuild.runtime.device import Buffer
from trtbuild.runtime.gpu.dlpack import CUDA, exported, is_exported


class DeviceLabels:
    """Labels (Z, Y, X), uint8 or uint16 in C order, on the image's own grid in memory of GPU `index`.

    Whatever takes `__dlpack__` or `__cuda_array_interface__` reads them without a copy: `torch.from_dlpack(labels)`,
    `cupy.asarray(labels)`. They are all there. The memory is given back with `close`, with this object when nobody
    holds it or what was made of it by DLPack, and at the latest with the device.
    """

    def __init__(self, buffer: Buffer, shape: tuple[int, ...], dtype: np.dtype[Any], index: int) -> None:
        self.shape, self.dtype, self.index = shape, dtype, index
        self._buffer = buffer
        self._finalizer = finalize(self, buffer.close)

    @property
    def address(self) -> int:
        """Of the first label, as a device pointer.

        Raises:
            EngineError: they were given back.
        """
        if self._buffer.closed:
            raise EngineError("These labels were given back.", hint="keep their predictor open while you use them")
        return self._buffer.address

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3,
            "strides": None, "stream": None,
        }  # fmt: skip

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, self.index

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """A capsule, as the array API standard has it. No stream needs to wait.

        Raises:
            BufferError: a copy is asked for, or another device (which the standard wants to be this error).
            EngineError: they were given back.
        """
        if copy or dl_device not in (None, self.__dlpack_device__()):
            raise BufferError("The labels are shared where they are, without a copy.")
        versioned = max_version is not None and max_version[0] >= 1
        return exported(self, self.address, self.shape, self.dtype, self.__dlpack_device__(), versioned=versioned)

    def close(self) -> None:
        """Give the memory back.

        Raises:
            EngineError: an array that was made of it by DLPack is still in use.
        """
        if is_exported(self):
            raise EngineError("The labels are still in use.", hint="drop the arrays that were made of them first")
        self._finalizer()
