"""kernels.cu compiled for the host: the same source, grid and block as loops, called on memory of the host.

Each launch runs as on a device: by name, with packed arguments. `Memory` stands for a device's memory: arrays between
guard zones, which tell when a kernel reads or writes beside them.
"""

from __future__ import annotations

import ctypes
import hashlib
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.runtime.nvrtc import kernels_source
from trtbuild.stitch.launches import KERNELS, Launch
from trtbuild.stitch.preparation_launches import PREPARATION_KERNELS

HERE = Path(__file__).parent
FLAGS = ("-std=c++17", "-O1", "-g0", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wno-parentheses", "-Werror")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1")
GUARD = 1 << 14
"""Bytes on either side of an array: more than a slice of the tests' images, so that an index off by one meets it."""
FILL = 0xFF
"""What the guards hold: NaN for float32 and float16, -1 for integers."""


class _Index(ctypes.Structure):
    _fields_ = tuple((axis, ctypes.c_uint) for axis in "xyz")


class _Geometry(ctypes.Structure):
    _fields_ = (("grid", _Index), ("block", _Index), ("backwards", ctypes.c_int))


def _program(source: str) -> str:
    """The kernels, and behind them one function that launches any of them by its name."""
    launches = "\n".join(
        f'    if (!std::strcmp(name, "{k}")) return launch({k}, geometry, arguments), 0;'
        for k in (*KERNELS, *PREPARATION_KERNELS)
    )
    sizes = "\n".join(
        f'    if (!std::strcmp(name, "{k}")) return sizes_of({k}, sizes);' for k in (*KERNELS, *PREPARATION_KERNELS)
    )
    return f"""#include "host_shim.h"
{source}
extern "C" int host_launch(const char *name, const Geometry &geometry, void **arguments) {{
{launches}
    return 1;
}}
extern "C" int host_sizes(const char *name, int *sizes) {{
{sizes}
    return -1;
}}
"""


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="trtbuild-host-kernels-")  # it goes with the process


@cache
def host_library(source: str, flags: tuple[str, ...] = FLAGS) -> Path:
    """The shared library of a kernel source; compiled once per session."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise RuntimeError("g++ is needed to test the kernels on the host; install it (Debian: apt-get install g++).")
    program = _program(source)
    name = hashlib.sha256(f"{program}{flags}".encode()).hexdigest()[:16]
    text, library = (Path(_folder().name) / f"{name}.{ending}" for ending in ("cpp", "so"))
    text.write_text(program)
    command = [compiler, *flags, "-I", str(HERE), "-o", str(library), str(text)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"g++ refuses the kernels:\n{done.stderr[:4000]}")
    return library


class HostKernels:
    """The kernels of a source, callable as a device's are."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))

    def sizes(self, kernel: str) -> tuple[int, ...]:
        """Bytes of each argument, negative for a pointer."""
        sizes = (ctypes.c_int * 64)()
        count = self._library.host_sizes(kernel.encode(), sizes)
        if count < 0:
            raise AssertionError(f"no kernel {kernel}")
        return tuple(sizes[:count])

    def run(self, launch: Launch, *, backwards: bool = False) -> None:
        """Runs a launch whose addresses are the host's. `backwards` runs the last thread first."""
        given = tuple(-a.nbytes if isinstance(a, np.uint64) else a.nbytes for a in launch.arguments)
        if given != self.sizes(launch.kernel):
            raise AssertionError(f"{launch.kernel} takes {self.sizes(launch.kernel)}, not {given}")
        values = [np.array(a) for a in launch.arguments]  # each at an address of its own
        arguments = (ctypes.c_void_p * len(values))(*(v.ctypes.data for v in values))
        geometry = _Geometry(_Index(*launch.grid), _Index(*launch.block), int(backwards))
        if self._library.host_launch(launch.kernel.encode(), ctypes.byref(geometry), arguments):
            raise AssertionError(f"no kernel {launch.kernel}")


@cache
def host_kernels() -> HostKernels:
    """The kernels as they are."""
    return HostKernels(host_library(kernels_source()))


class Memory:
    """Arrays as a device would hold them, each between two guard zones of bytes `FILL`.

    `blocks` are the bytes and the width of their guards. `exact` leaves the guards away, so that each array is as large
    as what malloc gave, for AddressSanitizer to watch.
    """

    def __init__(self, *, exact: bool = False) -> None:
        self._exact = exact
        self.blocks: list[tuple[NDArray[np.uint8], int]] = []

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        """A C-contiguous copy in this memory."""
        guard = 0 if self._exact else GUARD
        block = np.full(array.nbytes + 2 * guard, FILL, dtype=np.uint8)
        self.blocks.append((block, guard))
        inside = block[guard : guard + array.nbytes].view(array.dtype).reshape(array.shape)
        inside[...] = array
        return inside

    def check(self) -> None:
        """Raises AssertionError where a guard was written to."""
        for block, guard in self.blocks:
            if guard and not ((block[:guard] == FILL).all() and (block[-guard:] == FILL).all()):
                raise AssertionError("a kernel wrote beside an array")


def address(array: NDArray[Any]) -> int:
    """Where an array begins."""
    return int(array.ctypes.data)
