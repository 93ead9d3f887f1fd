"""DLPack: how libraries share arrays in memory of any device, as capsules around C structures (dlpack.h).

A capsule's array belongs to who takes it, who renames the capsule and calls the array's deleter once; where nobody
does, the capsule does when it goes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np

from trtbuild.errors import InputError

CPU, CUDA, CUDA_MANAGED = 1, 2, 13
"""Kinds of devices."""
PLAIN, VERSIONED = b"dltensor", b"dltensor_versioned"
USED = {PLAIN: b"used_dltensor", VERSIONED: b"used_dltensor_versioned"}
MAJOR = 1
"""Of the structures behind a versioned capsule."""
Deleter = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)
"""Called with Python's lock held, as NumPy does."""


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device", _Device), ("ndim", ctypes.c_int32), ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


class Managed(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", Tensor), ("context", ctypes.c_void_p), ("deleter", Deleter))


class ManagedVersioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("context", ctypes.c_void_p), ("deleter", Deleter),
        ("flags", ctypes.c_uint64), ("tensor", Tensor),
    )  # fmt: skip


STRUCTURES: dict[bytes, type[Any]] = {PLAIN: Managed, VERSIONED: ManagedVersioned}
_POINTER, _NAME = ctypes.c_void_p, ctypes.c_char_p
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, _POINTER, _NAME)(("PyCapsule_IsValid", ctypes.pythonapi))
_pointer = ctypes.PYFUNCTYPE(_POINTER, _POINTER, _NAME)(("PyCapsule_GetPointer", ctypes.pythonapi))
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, _POINTER, _NAME)(("PyCapsule_SetName", ctypes.pythonapi))


@dataclass(frozen=True, kw_only=True, eq=False)
class Taken:
    """An array that was taken out of a capsule. `release` is to be called once, when nobody uses it any more."""

    tensor: Tensor
    release: Callable[[], None]


def taken(capsule: object) -> Taken:
    """The array in a capsule, which is used up.

    Raises:
        InputError: it is no capsule of DLPack's, was used already, or is of a version that this does not know; then the
            array is released.
    """
    managed = _structure(capsule)
    name = VERSIONED if isinstance(managed, ManagedVersioned) else PLAIN
    _rename(id(capsule), USED[name])

    def release() -> None:
        if managed.deleter:
            managed.deleter(ctypes.addressof(managed))

    if name == VERSIONED and managed.major != MAJOR:
        version = f"{managed.major}.{managed.minor}"
        release()
        raise InputError("The array comes in another version of DLPack.", expected=f"{MAJOR}.x", got=version)
    return Taken(tensor=managed.tensor, release=release)


def _structure(capsule: object) -> Any:
    """What is behind a capsule that nobody has used.

    Raises:
        InputError: it is none.
    """
    name = next((n for n in STRUCTURES if _is_valid(id(capsule), n)), None)
    if name is None:
        raise InputError("This is no DLPack capsule, or one that was used.", got=repr(capsule))
    return STRUCTURES[name].from_address(_pointer(id(capsule), name))


class _Lent:
    """Memory of an owner, as NumPy takes it for an array's, which lives until nobody has it. NumPy does not read it."""

    def __init__(self, owner: object, address: int, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
        self.owner = owner
        self.__array_interface__ = {
            "shape": tuple(shape), "typestr": dtype.str, "data": (address, False), "version": 3
        }  # fmt: skip


_lent: WeakSet[_Lent] = WeakSet()


def exported(
    owner: object, address: int, shape: Sequence[int], dtype: np.dtype[Any], device: tuple[int, int], *,
    versioned: bool,
) -> Any:  # fmt: skip
    """A capsule with an array in C order; `owner` lives until the array is released.

    NumPy makes it. Nothing of Python's may run when a capsule goes: it may do so while an error is on its way, which
    would be lost; and its taker may release the array in a thread without Python's lock.

    Args:
        owner: of its memory.
        address: of its first element.
        shape: of it, not empty.
        dtype: of its elements.
        device: kind and number.
        versioned: whether the taker knows version 1.
    """
    lent = _Lent(owner, address, shape, dtype)
    array = np.asarray(lent)
    try:
        capsule: Any = array.__dlpack__(max_version=(MAJOR, 0)) if versioned else array.__dlpack__()
    except TypeError:  # a NumPy that knows no versions; takers know what was before them
        capsule = array.__dlpack__()
    tensor = _structure(capsule).tensor
    tensor.device.kind, tensor.device.index = device
    _lent.add(lent)
    return capsule


def is_exported(owner: object) -> bool:
    """Whether somebody holds an array of this owner's."""
    return any(lent.owner is owner for lent in tuple(_lent))
