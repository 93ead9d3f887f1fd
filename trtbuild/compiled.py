"""Loops that Numba compiles: without the GIL, and kept on disk where that is possible. A leaf; import it late.

Numba notices a change of the file that a loop stands in, not of the files whose functions went into it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from llvmlite import ir as ir
from numba import njit
from numba import types as types
from numba.extending import intrinsic

NO_CACHE = "cannot cache function"  # how Numba's RuntimeError begins where it finds no folder that it may write to


def compiled(function: Callable[..., Any]) -> Any:
    """The function, compiled at its first call; later processes load it from Numba's cache.

    A read-only installation without a writable home has no place for a cache. Then every process compiles anew, and a
    RuntimeWarning says so once.
    """
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError as error:
        if not str(error).startswith(NO_CACHE):
            raise
        warnings.warn(
            "Numba has no folder for its cache, so every run compiles its loops again. "
            "Set NUMBA_CACHE_DIR to a folder that you may write to.",
            RuntimeWarning,
            stacklevel=1,  # one place for all functions: Python then shows the warning once
        )
        return njit(nogil=True)(function)


def llvm(function: Callable[..., Any]) -> Any:
    """A function for compiled loops to call, which gives its types and writes its own LLVM code with `ir`."""
    return intrinsic(function)
