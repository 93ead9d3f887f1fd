"""Arrays that other programs hold on a GPU (torch, CuPy, Numba, JAX ...), read where they are.

By DLPack, which waits on our stream for the work that makes the array, or by `__cuda_array_interface__`.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from trtbuild.errors import InputError
from trtbuild.runtime.gpu.dlpack import CPU, CUDA, CUDA_MANAGED, Tensor, taken
from trtbuild.runtime.gpu.shared import Gpu

TYPES = {
    (code, 8 * size): np.dtype(f"{kind}{size}")
    for code, kind, sizes in ((0, "i", (1, 2, 4, 8)), (1, "u", (1, 2, 4, 8)), (2, "f", (2, 4, 8)), (6, "b", (1,)))
    for size in sizes
}
"""NumPy's by DLPack's code and number of bits."""
ON_GPU = "hand over an array on the GPU that the model runs on, or one on the host to predict_array"


@dataclass(frozen=True, kw_only=True, eq=False)
class SharedArray:
    """An array in device memory: where its first element is, and how many elements lie between neighbours."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: np.dtype[Any]


@contextmanager
def shared_array(array: Any, gpu: Gpu) -> Iterator[SharedArray]:
    """The array of another program. Work on the stream of `gpu` may read it in this block, at whose end it is done.

    Raises:
        InputError: it shares no memory of this GPU's, or in a way that cannot be read.
    """
    with ExitStack() as stack:
        with _foreign():
            shares = hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")
            interface = None if shares else getattr(array, "__cuda_array_interface__", None)
        if shares:
            found = _from_dlpack(array, gpu, stack)
        elif interface is not None:
            found = _from_interface(interface, gpu)
        else:
            raise InputError(
                "The image is no array on a GPU.", expected="__dlpack__ or __cuda_array_interface__",
                got=type(array).__name__, hint=ON_GPU,
            )  # fmt: skip
        _check_address(found)
        stack.callback(gpu.stream.synchronize)  # before it is released
        yield found


def _from_dlpack(array: Any, gpu: Gpu, stack: ExitStack) -> SharedArray:
    with _foreign():
        kind, index = (int(number) for number in array.__dlpack_device__())
    if kind not in (CUDA, CUDA_MANAGED) or (kind == CUDA and index != gpu.device.index):
        where = "the host" if kind == CPU else f"GPU {index}" if kind == CUDA else f"DLPack's device ({kind}, {index})"
        raise InputError("The image is not on the model's GPU.", expected=f"GPU {gpu.device.index}", got=where,
                         hint=ON_GPU)  # fmt: skip
    held = taken(_capsule(array, gpu))
    stack.callback(held.release)
    return _from_tensor(held.tensor)


def _capsule(array: Any, gpu: Gpu) -> object:
    """What the array hands over; work on our stream waits for whatever still writes to it."""
    stream = gpu.stream.handle
    with gpu.device.current(), _foreign():
        try:
            return array.__dlpack__(stream=stream, max_version=(1, 0))
        except TypeError:  # made before there were versions
            return array.__dlpack__(stream=stream)


@contextmanager
def _foreign() -> Iterator[None]:
    """Whatever another library raises when it is asked for its array."""
    try:
        yield
    except Exception as error:
        raise InputError("The image cannot be shared.", got=repr(error), hint="torch: array.detach()") from error


def _from_tensor(tensor: Tensor) -> SharedArray:
    code, bits, lanes = tensor.dtype.code, tensor.dtype.bits, tensor.dtype.lanes
    if (code, bits) not in TYPES or lanes != 1:
        raise InputError("The image holds no real numbers.", expected="integers or floats",
                         got=f"DLPack's type {code} of {lanes} x {bits} bits")  # fmt: skip
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    # no strides: C order
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else _c_order(shape)
    address = (tensor.data or 0) + tensor.byte_offset
    return SharedArray(address=address, shape=shape, strides=strides, dtype=TYPES[code, bits])


def _from_interface(interface: Any, gpu: Gpu) -> SharedArray:
    """Version 3 of the interface, and those before it.

    Raises:
        InputError: it lacks something, has a mask, or strides that are no whole elements.
    """
    try:
        dtype, shape = np.dtype(interface["typestr"]), tuple(int(n) for n in interface["shape"])
        address, _ = interface["data"]
        given = interface.get("strides")
        steps = None if given is None else tuple(int(n) for n in given)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError("The image's __cuda_array_interface__ cannot be read.", got=repr(error)) from error
    if dtype.kind not in "biuf":
        raise InputError("The image holds no real numbers.", expected="integers or floats", got=dtype.str)
    if interface.get("mask") is not None:
        raise InputError("The image is a masked array.", expected="a plain array", got="a mask")
    if steps is not None and (len(steps) != len(shape) or any(step % dtype.itemsize for step in steps)):
        raise InputError("The image's strides are no whole elements.", got=steps, expected=f"bytes of {dtype}")
    if interface.get("version", 0) < 3 or interface.get("stream") is not None:
        with gpu.device.current():  # whatever stream it is written on, it is one of this context
            gpu.device.cuda.Context.synchronize()
    strides = _c_order(shape) if steps is None else tuple(step // dtype.itemsize for step in steps)
    return SharedArray(address=int(address or 0), shape=shape, strides=strides, dtype=dtype)


def _check_address(found: SharedArray) -> None:
    if math.prod(found.shape) and (not found.address or found.address % found.dtype.itemsize):
        raise InputError("The image's address is not usable.", expected=f"a multiple of {found.dtype.itemsize}",
                         got=ctypes.c_void_p(found.address).value)  # fmt: skip


def _c_order(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
