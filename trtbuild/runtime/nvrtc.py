"""The kernels compiled for one architecture of GPU, with NVIDIA's run-time compiler from its wheel; no GPU, no nvcc.

Compiled straight to machine code (a cubin): PTX of a newer compiler than the driver's is refused by the driver. What
was compiled is kept in the user's cache folder, under a name made of all that it depends on.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

from trtbuild.cachefolder import Damaged, bound, cache_folder, read_kept, write_kept
from trtbuild.errors import EngineError, MissingExtra, OutputError

SOURCES = ("kernels.cu", "preparation.cu")
PART, ENDING = "kernels", ".cubin"
LIMIT = 64 << 20
"""Bytes that the folder may hold; the kernels for one GPU have 0.4 MB."""
OPTIONS = (
    "--std=c++17",
    "--fmad=false",  # a product and a sum are rounded each, as on a CPU
)
NEWER = "pip install --upgrade 'trtbuild[gpu]', or use a GPU that the installed compiler knows"


def kernels_source() -> str:
    """All kernels: one source, in which an error's line is that of its file."""
    folder = resources.files("trtbuild.stitch")
    return "".join(f'#line 1 "{name}"\n{folder.joinpath(name).read_text(encoding="utf-8")}' for name in SOURCES)


def kernels_cubin(capability: str) -> bytes:
    """The kernels for GPUs of a compute capability, "8.6": from the cache, else compiled (two seconds) and kept.

    Raises:
        MissingExtra: NVRTC is not installed.
        EngineError: it cannot be loaded, does not know such GPUs, or refuses the source (with its log).
    """
    nvrtc, source = _nvrtc(), kernels_source()
    architecture = f"sm_{capability.replace('.', '')}"
    path = _kept_path(nvrtc, source, architecture)
    found = None if path is None else _kept(path)
    if found is not None:
        return found
    cubin = _compiled(nvrtc, source, architecture)
    if path is not None:
        _keep(path, cubin, architecture)
    return cubin


def cubin_from_source(source: str, architecture: str) -> bytes:
    """Machine code of a CUDA source for an architecture, "sm_86"; errors as `kernels_cubin`."""
    return _compiled(_nvrtc(), source, architecture)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc
    except ModuleNotFoundError as error:
        raise MissingExtra("cuda-bindings", "gpu", "compile kernels for a GPU") from error
    except (ImportError, OSError) as error:
        raise EngineError("cuda-bindings cannot be loaded.", got=error, hint="pip install 'trtbuild[gpu]'") from error
    return nvrtc


def _version(nvrtc: Any) -> str:
    try:
        major, minor = _value(nvrtc, nvrtc.nvrtcVersion(), "version")
    except RuntimeError as error:  # what cuda-bindings raises where it finds no library
        raise EngineError("NVRTC cannot be loaded.", got=error, hint="pip install 'trtbuild[gpu]'") from error
    return f"{major}.{minor}"


def _kept_path(nvrtc: Any, source: str, architecture: str) -> Path | None:
    key = json.dumps([source, OPTIONS, _version(nvrtc), architecture])
    try:
        return cache_folder(PART) / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}{ENDING}"
    except OutputError as error:
        warnings.warn(f"Compiled kernels are not kept: {error}", RuntimeWarning, stacklevel=3)
        return None


def _kept(path: Path) -> bytes | None:
    try:
        return read_kept(path)[1]
    except FileNotFoundError:
        return None
    except Damaged as error:
        warnings.warn(
            f"Kept kernels cannot be used and are compiled again: {error} ({path})", RuntimeWarning, stacklevel=3
        )
        return None


def _keep(path: Path, cubin: bytes, architecture: str) -> None:
    try:
        write_kept(path, {"architecture": architecture}, cubin)
        bound(path.parent, (ENDING,), newest=path, limit=LIMIT)
    except OutputError as error:
        warnings.warn(f"Compiled kernels are not kept: {error}", RuntimeWarning, stacklevel=3)


def _compiled(nvrtc: Any, source: str, architecture: str) -> bytes:
    _check_known(nvrtc, architecture)
    program = _value(nvrtc, nvrtc.nvrtcCreateProgram(source.encode(), b"kernels.cu", 0, [], []), architecture)
    try:
        options = [o.encode() for o in (f"--gpu-architecture={architecture}", *OPTIONS)]
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            raise EngineError(
                "The kernels cannot be compiled.", got=f"{result.name}\n{_log(nvrtc, program)}", where=architecture
            )
        cubin = bytearray(_value(nvrtc, nvrtc.nvrtcGetCUBINSize(program), architecture))
        _value(nvrtc, nvrtc.nvrtcGetCUBIN(program, cubin), architecture)
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return bytes(cubin)


def _check_known(nvrtc: Any, architecture: str) -> None:
    version = _version(nvrtc)
    known = [f"sm_{number}" for number in _value(nvrtc, nvrtc.nvrtcGetSupportedArchs(), architecture)]
    if architecture not in known:
        raise EngineError(
            f"NVRTC {version} does not compile for this GPU.",
            expected=", ".join(known),
            got=architecture,
            hint=NEWER,
        )


def _log(nvrtc: Any, program: Any) -> str:
    log = bytearray(_value(nvrtc, nvrtc.nvrtcGetProgramLogSize(program), "log"))
    _value(nvrtc, nvrtc.nvrtcGetProgramLog(program, log), "log")
    return log.rstrip(b"\0").decode(errors="replace").strip()


def _value(nvrtc: Any, answer: tuple[Any, ...], where: str) -> Any:
    """What a call of NVRTC's returned behind its result: nothing, a value, or several.

    Raises:
        EngineError: the result is an error.
    """
    result, *values = answer
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise EngineError("NVRTC failed.", got=result.name, where=where)
    return values[0] if len(values) == 1 else tuple(values)
