"""The one door to TensorRT: which of its Python packages is loaded, and what it can do.

TensorRT 10 and 11 are the package `tensorrt`, TensorRT-RTX is `tensorrt_rtx`. Their classes are the same but for a few
members, which are looked for here (never the version), so that everything behind the door is one code.
"""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from trtbuild.errors import EngineError, MissingExtra

Backend = Literal["tensorrt", "tensorrt-rtx"]
MODULES: Mapping[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Backends in the order of preference, and their packages."""
EXTRAS: Mapping[str, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR of cuda.h
DRIVER = "libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll"
_LOGGERS: list[Any] = []


@dataclass(frozen=True, kw_only=True)
class Features:
    """What a flavour of TensorRT has.

    `capabilities` are the compute capabilities that engines can be built for without such a GPU ("86", …); empty where
    an engine is for the GPU of this machine. A `timing_cache` and `hardware_compatibility` are TensorRT's, a
    `runtime_cache` of compiled kernels is TensorRT-RTX's.
    """

    capabilities: tuple[str, ...]
    timing_cache: bool
    hardware_compatibility: bool
    runtime_cache: bool


@dataclass(frozen=True, kw_only=True)
class Nvinfer:
    """A loaded flavour: "tensorrt-10", "tensorrt-11" or "tensorrt-rtx-1", with its module."""

    backend: Backend
    module: Any
    version: str
    flavour: str
    features: Features


def nvinfer(backend: Backend) -> Nvinfer:
    """Load a flavour of TensorRT.

    Raises:
        MissingExtra: its package is not installed.
        EngineError: it cannot be loaded, or the other flavour is loaded already: both bring libraries with the same
            symbols, and one process holds one of them.
    """
    for other, name in MODULES.items():
        if other != backend and name in sys.modules:
            raise EngineError("TensorRT and TensorRT-RTX cannot be in one process.", expected=f"{other}, loaded before",
                              got=backend, hint="run the other one by a command of its own")  # fmt: skip
    module = _module(backend)
    version = _version(module, backend)
    return Nvinfer(
        backend=backend,
        module=module,
        version=version,
        flavour=f"{backend}-{version.partition('.')[0]}",
        features=features_from_module(module),
    )


def features_from_module(module: Any) -> Features:
    """What a module has, by what it is made of."""
    names = getattr(getattr(module, "ComputeCapability", None), "__members__", {})
    numbered = tuple(name[2:] for name in names if name.startswith("SM"))
    return Features(
        capabilities=numbered,
        timing_cache=not numbered,  # TensorRT-RTX has the methods still; they do nothing but ask for a GPU
        hardware_compatibility=not numbered,  # likewise: "unsupported in TensorRT-RTX"
        runtime_cache=hasattr(module, "IRuntimeCache"),
    )


def kept_logger(logger: Any) -> Any:
    """Keeps an ILogger until the process ends, and gives it back.

    TensorRT makes the first logger of a process its global one, holds no reference to it, and writes to it later on
    ("the global logger is used only by standalone functions", getLogger of NvInferRuntime.h): a logger that is freed
    can crash whatever comes after. So a logger should be small, and not hold what it writes to.
    """
    _LOGGERS.append(logger)
    return logger


def nvinfer_version(backend: Backend) -> str:
    """The installed version; MissingExtra or EngineError as `nvinfer` raises them."""
    return nvinfer(backend).version


def no_driver() -> str | None:
    """Why no NVIDIA GPU can be used here, None where one can: there is no driver, or it has no device."""
    driver = _driver()
    if driver is None:
        return f"no NVIDIA driver ({DRIVER} is not there)"
    count = ctypes.c_int(0)
    status = int(driver.cuInit(0)) or int(driver.cuDeviceGetCount(ctypes.byref(count)))
    if status != 0:
        return f"no NVIDIA GPU that its driver can use (CUDA error {status})"
    return None if count.value > 0 else "no NVIDIA GPU"


def gpu_description(index: int = 0) -> dict[str, str]:
    """Name, compute capability ("9.0") and the driver's CUDA version ("13.0") of a GPU.

    Raises:
        EngineError: there is none, or the driver fails.
    """
    reason, driver = no_driver(), _driver()
    if reason is not None or driver is None:
        raise EngineError("There is no GPU here.", expected="an NVIDIA GPU and its driver", got=reason,
                          hint="trtbuild doctor shows what is there; TensorRT-RTX builds without a GPU "
                          "(--backend tensorrt-rtx)")  # fmt: skip
    device, version, name = ctypes.c_int(0), ctypes.c_int(0), ctypes.create_string_buffer(256)
    major, minor = ctypes.c_int(0), ctypes.c_int(0)
    status = (
        int(driver.cuDeviceGet(ctypes.byref(device), index))
        or int(driver.cuDeviceGetName(name, len(name), device))
        or int(driver.cuDeviceGetAttribute(ctypes.byref(major), CAPABILITY_MAJOR, device))
        or int(driver.cuDeviceGetAttribute(ctypes.byref(minor), CAPABILITY_MINOR, device))
        or int(driver.cuDriverGetVersion(ctypes.byref(version)))
    )
    if status != 0:
        raise EngineError("The driver does not describe its GPU.", got=f"CUDA error {status}", where=f"GPU {index}")
    return {
        "gpu": name.value.decode(errors="replace"),
        "capability": f"{major.value}.{minor.value}",
        "driver": f"{version.value // 1000}.{version.value % 1000 // 10}",
    }


def gpu_count() -> int:
    """How many GPUs the driver can use: 0 without one."""
    count, driver = ctypes.c_int(0), _driver()
    if driver is None or int(driver.cuInit(0)) or int(driver.cuDeviceGetCount(ctypes.byref(count))):
        return 0
    return count.value


def gpu_memory(index: int) -> int:
    """Bytes of a GPU's memory, whoever uses them.

    Raises:
        EngineError: the driver fails.
    """
    device, size, driver = ctypes.c_int(0), ctypes.c_size_t(0), _driver()
    status = -1 if driver is None else (
        int(driver.cuDeviceGet(ctypes.byref(device), index))
        or int(driver.cuDeviceTotalMem_v2(ctypes.byref(size), device))
    )  # fmt: skip
    if status != 0:
        raise EngineError("The driver does not describe its GPU.", got=f"CUDA error {status}", where=f"GPU {index}")
    return size.value


def _driver() -> Any | None:
    try:
        return ctypes.CDLL(DRIVER)
    except OSError:
        return None


def _module(backend: Backend) -> Any:
    try:
        return importlib.import_module(MODULES[backend])
    except (ImportError, OSError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == MODULES[backend]:
            raise MissingExtra(MODULES[backend], EXTRAS[backend], "build and run its engines") from error
        raise _broken(backend, error) from error


def _version(module: Any, backend: Backend) -> str:
    """A package's version; a folder that only has its name, which Python imports as well, has none."""
    version = getattr(module, "__version__", None)
    if not isinstance(version, str):
        sys.modules.pop(MODULES[backend], None)  # so that the other flavour does not find this one loaded
        raise _broken(backend, f"no version in {', '.join(getattr(module, '__path__', ()))}")
    return version


def _broken(backend: Backend, got: object) -> EngineError:
    again = f"pip install --force-reinstall 'trtbuild[{EXTRAS[backend]}]'"
    return EngineError("TensorRT cannot be loaded.", expected=f"the package {MODULES[backend]}, whole", got=got,
                       where=MODULES[backend], hint=again)  # fmt: skip
