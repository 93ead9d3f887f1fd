"""Which backends engines are built for, and which CPU backend judges what this machine cannot run."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import cast

from trtbuild.cachefolder import cache_folder
from trtbuild.config import CompileConfig
from trtbuild.errors import EngineError, MissingExtra
from trtbuild.machine import cpu_description
from trtbuild.nvinfer import MODULES, Backend, Nvinfer, no_driver, nvinfer
from trtbuild.steps.compilation.networks import INFERENCE_PRECISION, Report

CUDA_BACKEND = "onnxruntime-cuda"
"""Runs networks as they are on a GPU; nothing is built for it."""


@dataclass(frozen=True, kw_only=True)
class Backends:
    """`cpu` backends in the order asked for, the `device`'s flavour of TensorRT, whether ONNX Runtime's `cuda` provider
    is wanted, and the CPU backends that judge.

    The judges are the CPU backends themselves; where engines are for a device alone, the first one that is installed.
    """

    cpu: tuple[str, ...]
    device: Nvinfer | None
    cuda: bool
    judges: tuple[str, ...]

    @property
    def for_gpu(self) -> bool:
        """Whether networks are made in the form for GPUs."""
        return self.device is not None or self.cuda


def chosen_backends(config: CompileConfig, report: Report) -> Backends:
    """The backends by name: those of a CPU run here and compute in the precision, TensorRT is loaded.

    Raises:
        MissingExtra: a backend's package is not installed.
        EngineError: a backend cannot be used, or not in this precision; two of them are the same, or two flavours of
            TensorRT.
    """
    names = [_chosen(asked, report) for asked in config.backends]
    if len(set(names)) != len(names):
        raise EngineError(
            "Two of the backends are the same one, and a bundle holds one engine per network and backend.",
            expected="distinct backends",
            got=", ".join(f"{a} (here {n})" if a != n else a for a, n in zip(config.backends, names, strict=True)),
            hint="leave auto out",
        )
    devices = [cast(Backend, name) for name in names if name in MODULES]
    if len(devices) > 1:
        raise EngineError(
            "TensorRT and TensorRT-RTX cannot be in one process.",
            expected="one of them",
            got=", ".join(devices),
            hint=f"compile for {devices[0]}, then the bundle for {devices[1]}",
        )
    cuda = CUDA_BACKEND in names
    if cuda:
        _check_cuda(config)
    cpu = tuple(name for name in names if name not in (*MODULES, CUDA_BACKEND))
    _check_rest(config, cpu, devices)
    judges = cpu or ((_judge(report),) if config.calibration is not None else ())
    if config.precision == "int8":
        check_saturation()
    for name in judges:
        for precision in dict.fromkeys((config.precision, config.cpu_rest)):
            check_precision(name, precision)
    device = _device(config, devices[0]) if devices else None
    return Backends(cpu=cpu, device=device, cuda=cuda, judges=judges)


def _check_cuda(config: CompileConfig) -> None:
    """Its Conv takes no 8-bit integers, and BF16 was not tried."""
    if config.precision not in ("fp32", "fp16"):
        raise EngineError(
            "ONNX Runtime's CUDA provider does not compute in this precision.",
            expected="--precision fp32 or fp16",
            got=f"--precision {config.precision}",
            where=CUDA_BACKEND,
            hint="compile for tensorrt or tensorrt-rtx",
        )


def _device(config: CompileConfig, backend: Backend) -> Nvinfer:
    """The flavour, which has all that is asked of it, a GPU that it builds for, and a folder to keep engines in."""
    from trtbuild.engine.tensorrt.build import check_wishes
    from trtbuild.engine.tensorrt.record import target_device

    flavour = nvinfer(backend)
    check_wishes(config.tensorrt, flavour)
    target_device(config.tensorrt, flavour)
    cache_folder("engines")
    return flavour


def tensorrt_flavour(asked: tuple[str, ...], report: Report) -> Backend:
    """The one flavour of TensorRT that is asked for; for "auto" the first that is installed and can build here.

    Raises:
        EngineError: another backend, several of them, or none that can build.
    """
    if len(asked) != 1 or (asked[0] != "auto" and asked[0] not in MODULES):
        raise EngineError("An ONNX file becomes an engine of TensorRT.", expected=f"auto, {', '.join(MODULES)}",
                          got=", ".join(asked), where="--backend")  # fmt: skip
    if asked[0] != "auto":
        return cast(Backend, asked[0])
    refused = []
    for name, package in MODULES.items():
        reason = None if find_spec(package) else f"{package} is not installed"
        reason = reason or (no_driver() if name == "tensorrt" else None)
        if reason is None:
            report(f"building with {name}")
            return cast(Backend, name)
        report(f"not {name}: {reason}")
        refused.append(f"{name}: {reason}")
    raise EngineError("No TensorRT can build here.", got="; ".join(refused), hint="pip install 'trtbuild[rtx]'")


def check_saturation() -> None:
    """INT8 is judged and run on CPUs that sum without saturation."""
    from trtbuild.runtime.fit import check_int8

    check_int8(cpu_description()["isa"], "--precision int8")


def _chosen(asked: str, report: Report) -> str:
    """A device's backend that is named builds without a GPU; "auto" takes what runs here."""
    from trtbuild.runtime.select import choose_backend

    if asked in (*MODULES, CUDA_BACKEND):
        return asked
    choice = choose_backend(asked)
    for name, reason in choice.refused:
        report(f"not {name}: {reason}")
    return choice.name


def _judge(report: Report) -> str:
    from trtbuild.engine.build import BACKENDS
    from trtbuild.runtime.select import choose_backend

    for name in BACKENDS:
        try:
            choose_backend(name)
        except (EngineError, MissingExtra) as error:
            report(f"not {name}: {' '.join(str(error).split())}")
        else:
            report(f"{name} judges on this CPU what the engine will compute")
            return name
    raise EngineError(
        "Nothing here can judge the lower precision.", expected=" or ".join(BACKENDS), hint="trtbuild doctor"
    )


def _check_rest(config: CompileConfig, cpu: tuple[str, ...], devices: list[Backend]) -> None:
    if config.rest == "fp16" and cpu:
        raise EngineError(
            "CPUs compute FP16 in float32, so INT8 engines have no FP16 rest there.",
            expected="--rest fp32 or bf16",
            got="--rest fp16",
            where=", ".join(cpu),
            hint="leave --rest out: TensorRT takes fp16 by itself",
        )
    if config.precision == "fp16" and config.calibration is None and cpu:
        raise EngineError(
            "FP16 on a CPU only halves the file, and needs patches to measure the network's ranges on.",
            expected="--calibration nnUNet_preprocessed/DatasetX, or --calibration-images FOLDER",
            where=", ".join(cpu),
            hint="compile with --precision bf16 or fp32",
        )


def check_precision(backend: str, precision: str) -> None:
    """Whether a CPU backend has the precision, and, where it says so, whether this CPU has it."""
    from trtbuild.engine.build import BACKENDS

    wanted, known = INFERENCE_PRECISION[precision], BACKENDS[backend].precisions
    if backend == "openvino":
        from trtbuild.runtime.openvino import PRECISIONS, openvino_module

        capable = openvino_module().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        known = tuple(name for name in known if PRECISIONS[name][0] in capable)
    if wanted not in known:
        raise EngineError(
            "The backend does not compute in this precision here.",
            expected=" or ".join(name for name, inference in INFERENCE_PRECISION.items() if inference in known),
            got=precision,
            where=backend,
            hint="compile with --precision fp32, in INT8 with --rest fp32",
        )
