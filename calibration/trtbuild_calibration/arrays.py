"""One array in a file of nnU-Net's, read box by box: Blosc2, `.npy` mapped into memory, or a member of an `.npz`."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trtbuild_calibration.cases import damaged
from trtbuild_calibration.errors import CalibrationError

UNREADABLE = (RuntimeError, ValueError, OSError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error)
"""What Blosc2, NumPy and zipfile raise over a damaged file; NotImplementedError (a RuntimeError) over a foreign one."""

Index = tuple[slice, ...]


class LazyArray(Protocol):
    """What a file gives before its values are read."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    def __getitem__(self, index: Index, /) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class ArrayFile:
    """An array whose header is read and checked; values come when a box is asked for.

    A file in memory order is mapped, and Blosc2 decompresses the blocks that a box touches. A member of an `.npz` is
    decompressed whole for each box, and not kept: several cases at once would not fit.
    """

    path: Path
    values: LazyArray = field(repr=False)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(length) for length in self.values.shape)

    def read(self, index: Index) -> NDArray[Any]:
        """The values of a box as an array of its own.

        Raises:
            CalibrationError: the file is damaged where the box lies.
        """
        try:
            return np.array(self.values[index])
        except UNREADABLE as error:
            raise damaged(self.path, error) from error


def open_array(path: Path, key: str, *, axes: str = "CZYX") -> ArrayFile:
    """The array in `path`, under `key` where the file is an `.npz`.

    Raises:
        CalibrationError: no such file, damaged, other axes, empty, or not of real numbers.
    """
    if not path.is_file():
        raise CalibrationError("A file of a preprocessed case is missing.", expected=path.name, where=path)
    openers: dict[str, Callable[[Path], LazyArray]] = {
        ".b2nd": _open_blosc,
        ".npy": _open_npy,
        ".npz": lambda file: _Member(path=file, key=key),
    }
    if path.suffix not in openers:
        raise CalibrationError("A file has an ending that is not read.", expected=", ".join(openers), where=path)
    try:
        values: LazyArray = openers[path.suffix](path)
        shape, dtype = tuple(values.shape), np.dtype(values.dtype)
    except UNREADABLE as error:
        raise damaged(path, error) from error
    if len(shape) != len(axes) or 0 in shape:
        raise CalibrationError(
            "An array has the wrong number of axes, or no values.",
            expected=f"({', '.join(axes)})",
            got=shape,
            where=path,
        )
    if dtype.kind not in "fiu":
        raise CalibrationError("An array holds something else than numbers.", got=dtype, where=path)
    return ArrayFile(path=path, values=values)


def _open_blosc(path: Path) -> LazyArray:
    try:
        import blosc2
    except ImportError as error:
        raise CalibrationError(
            "blosc2 is needed to read preprocessed cases.", hint="pip install 'trtbuild[calibrate]'"
        ) from error
    # One thread, as nnU-Net reads them. The file may hold a program instead of numbers; since Blosc2 4 that is an
    # error unless one asks for it, and the type is checked for older ones.
    array = blosc2.open(urlpath=str(path), mode="r", dparams={"nthreads": 1})
    if not isinstance(array, blosc2.NDArray):
        raise ValueError(f"a {type(array).__name__}, not an array")
    return array  # type: ignore[no-any-return]  # blosc2 has no types


def _open_npy(path: Path) -> LazyArray:
    array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


class _Member:
    """An array in an `.npz`; its header is read at once, its values at each use."""

    def __init__(self, *, path: Path, key: str) -> None:
        self._path, self._name = path, f"{key}.npy"
        with zipfile.ZipFile(path) as archive, archive.open(self._name) as file:
            readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
            version = np.lib.format.read_magic(file)
            if version not in readers:
                raise ValueError(f"format {version} of .npy")
            self.shape, _, self.dtype = readers[version](file)
            inside = archive.getinfo(self._name).file_size - file.tell()
        if inside != math.prod(self.shape) * self.dtype.itemsize:
            raise ValueError(f"{inside} bytes of values for {self.dtype} {self.shape}")

    def __getitem__(self, index: Index) -> NDArray[Any]:
        with zipfile.ZipFile(self._path) as archive, archive.open(self._name) as file:
            values: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        return values[index]
