"""Arrays in the fake GPU's memory, shared as other libraries share theirs: NumPy makes the capsules."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fake_cuda import Cuda
from numpy.typing import NDArray

from trtbuild.runtime.gpu import dlpack
from trtbuild.runtime.gpu.shared import Gpu


@contextmanager
def on_gpu(values: NDArray[Any], gpu: Gpu) -> Iterator[NDArray[Any]]:
    """A copy in device memory, as an array that NumPy can read there."""
    buffer = gpu.device.buffer(max(1, values.nbytes))
    gpu.upload(buffer, np.ascontiguousarray(values))
    cuda: Cuda = gpu.device.cuda
    try:
        yield cuda.live[buffer.address].content[: values.nbytes].view(values.dtype).reshape(values.shape)
    finally:
        buffer.close()


def tensor_in(capsule: Any) -> Any:
    """The structure behind a capsule that nobody has used."""
    for name, structure in dlpack.STRUCTURES.items():
        if dlpack._is_valid(id(capsule), name):
            return structure.from_address(dlpack._pointer(id(capsule), name))
    raise AssertionError(capsule)


@dataclass(kw_only=True)
class Shared:
    """An array with DLPack's protocol. `changes` are made to the structure in NumPy's capsule; `streams` are those that
    were asked for; without `versions` it knows none."""

    array: NDArray[Any]
    device: tuple[int, int] = (dlpack.CUDA, 0)
    versions: bool = True
    changes: dict[str, Any] = field(default_factory=dict)
    streams: list[Any] = field(default_factory=list)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **arguments: Any) -> Any:
        self.streams.append(arguments.pop("stream"))
        if not self.versions and arguments:
            raise TypeError("unexpected keyword argument 'max_version'")
        capsule = self.array.__dlpack__(**arguments)
        managed = tensor_in(capsule)
        managed.tensor.device.kind, managed.tensor.device.index = self.device
        for name, value in self.changes.items():
            owner, *rest = name.split(".")
            target = managed if owner in ("major", "deleter") else managed.tensor
            if rest:
                target, owner = getattr(target, owner), rest[0]
            setattr(target, owner, value)
        return capsule


@dataclass(frozen=True, kw_only=True)
class Interface:
    """An array with CUDA's array interface; `changes` replace some of its entries, None leaves them out."""

    array: NDArray[Any]
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        entries = {
            "shape": self.array.shape, "typestr": self.array.dtype.str, "version": 3,
            "data": (self.array.ctypes.data, not self.array.flags.writeable), "strides": self.array.strides,
        }  # fmt: skip
        return {name: value for name, value in (entries | self.changes).items() if value is not ...}


@dataclass(frozen=True, kw_only=True)
class OnCpu:
    """What is on the fake GPU, told to be on a CPU: NumPy can take it then."""

    shared: Any

    def __dlpack_device__(self) -> tuple[int, int]:
        return dlpack.CPU, 0

    def __dlpack__(self, *, max_version: tuple[int, int] | None = None, **_: Any) -> Any:
        capsule = self.shared.__dlpack__(max_version=max_version)
        device = tensor_in(capsule).tensor.device
        device.kind, device.index = dlpack.CPU, 0
        return capsule


def holders(array: NDArray[Any]) -> int:
    """References to an array; a capsule that nobody released is one."""
    return sys.getrefcount(array)


no_deleter = dlpack.Deleter()
