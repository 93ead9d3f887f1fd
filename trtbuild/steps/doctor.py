"""`doctor`: what this machine has, what is missing, and the command that installs it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

import trtbuild
from trtbuild.errors import EngineError
from trtbuild.nvinfer import gpu_count, gpu_description, gpu_memory

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "base": (
        "numpy",
        "scipy",
        "numba",
        "openvino",
        "SimpleITK",
        "nibabel",
        "imageio",
        "pillow",
        "tifffile",
        "click",
        "rich",
        "pydantic",
        "threadpoolctl",
    ),
    "graph": ("onnx", "onnx-graphsurgeon", "onnxruntime"),
    "export": ("torch", "dynamic-network-architectures"),
    "calibrate": ("blosc2",),
    "tif": ("imagecodecs",),
    "dicom": ("pydicom", "highdicom", "python-gdcm"),
    "evaluate": ("surface-distance",),
    "rtx": ("tensorrt-rtx",),
    "tensorrt": ("tensorrt",),
    "gpu": ("pycuda", "cuda-bindings"),
    "compare": ("polygraphy",),
    "report": ("jinja2", "matplotlib"),
}


@dataclass(frozen=True, kw_only=True)
class Health:
    """What `doctor` found.

    `extras` hold None for a package that is not installed. `gpus` are in the order of their numbers, each with its name
    ("gpu"), "capability", "driver" (the newest CUDA that it knows) and "memory" in bytes, or with an "error".
    """

    trtbuild: str
    python: str
    system: str
    processors: int
    extras: Mapping[str, Mapping[str, str | None]]
    backends: tuple[Mapping[str, str | bool], ...]
    gpus: tuple[Mapping[str, str | int], ...]


def package_version(name: str) -> str | None:
    """The installed version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def package_versions() -> Mapping[str, str | None]:
    """Versions of everything that trtbuild can use."""
    return {name: package_version(name) for names in EXTRAS.values() for name in names}


def health() -> Health:
    """Looks at packages, backends and GPUs; opens no model, and takes no memory of a GPU."""
    from trtbuild.runtime.select import available_backends

    return Health(
        trtbuild=trtbuild.__version__,
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        extras={extra: {name: package_version(name) for name in names} for extra, names in EXTRAS.items()},
        backends=tuple(
            {"name": b.name, "available": b.available, "version": b.version or "", "reason": b.reason or ""}
            for b in available_backends()
        ),
        gpus=tuple(map(_gpu, range(gpu_count()))),
    )


def _gpu(index: int) -> Mapping[str, str | int]:
    try:
        return {**gpu_description(index), "memory": gpu_memory(index)}
    except EngineError as error:
        return {"error": " ".join(str(error).split())}
