"""A TensorRTConfig -> TensorRT's IBuilderConfig, in no other way than it says."""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.values import Shapes
from trtbuild.errors import EngineError
from trtbuild.nvinfer import Nvinfer

CURRENT = "current"
COMPATIBILITY = {"ampere+": "AMPERE_PLUS", "sameComputeCapability": "SAME_COMPUTE_CAPABILITY"}
MIB = 1 << 20


def check_config(config: TensorRTConfig, nvinfer: Nvinfer) -> None:
    """Whether a flavour has what a configuration asks for; nothing is left out silently.

    Raises:
        EngineError: it does not.
    """
    _check_capabilities(config.compute_capabilities, nvinfer)
    if nvinfer.features.hardware_compatibility:
        return
    for asked, option in ((config.hardware_compatibility != "none", "--hardwareCompatibilityLevel"),
                          (config.version_compatible, "--versionCompatible")):  # fmt: skip
        if asked:  # TensorRT-RTX ignores the first, and looks for a lean runtime that it lacks for the second
            raise EngineError(f"{nvinfer.backend} has no {option}.", got=option, where=nvinfer.flavour,
                              expected="--compute-capability, which says on which GPUs its engines run",
                              hint=f"leave {option} out, or use --backend tensorrt")  # fmt: skip


def _check_capabilities(asked: tuple[str, ...], nvinfer: Nvinfer) -> None:
    known = nvinfer.features.capabilities
    if asked and not known:
        raise EngineError(f"{nvinfer.backend} builds for the GPU of this machine only.", got=", ".join(asked),
                          expected="no --compute-capability", where=nvinfer.flavour,
                          hint="leave --compute-capability out, or use --backend tensorrt-rtx")  # fmt: skip
    for capability in asked:
        if capability not in (*known, CURRENT):
            close = get_close_matches(capability.replace(".", ""), (*known, CURRENT), n=1)
            raise EngineError("There is no such compute capability in this TensorRT-RTX.", got=capability,
                              expected=", ".join((*known, CURRENT)), where="--compute-capability",
                              hint=f"Did you mean {close[0]}?" if close else None)  # fmt: skip
    if CURRENT in asked and len(asked) > 1:
        raise EngineError('"current" stands alone.', expected="the GPU of this machine, or a list of others",
                          got=", ".join(asked), where="--compute-capability")  # fmt: skip


def new_config(builder: Any, nvinfer: Nvinfer, config: TensorRTConfig, shapes: Shapes) -> Any:
    """The builder's configuration with one optimisation profile.

    There is no flag for precision: the network is strongly typed. Details for the layer table are always asked for.

    Raises:
        EngineError: TensorRT does not take a setting.
    """
    trt, result = nvinfer.module, builder.create_builder_config()
    result.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    result.builder_optimization_level = config.optimization_level
    if config.workspace is not None:
        result.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, config.workspace * MIB)
    _set_flags(result, nvinfer, config)
    if config.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, COMPATIBILITY[config.hardware_compatibility])
        result.hardware_compatibility_level = level
    _set_capabilities(result, trt, config.compute_capabilities)
    profile = builder.create_optimization_profile()
    for name, (smallest, usual, largest) in shapes.items():
        profile.set_shape(name, smallest, usual, largest)
    if result.add_optimization_profile(profile) < 0:
        raise EngineError("TensorRT does not take the optimisation profile.", got=dict(shapes))
    return result


def _set_flags(result: Any, nvinfer: Nvinfer, config: TensorRTConfig) -> None:
    """Each flag is set or cleared: TF32 is set by itself, which would make FP32 another precision."""
    wanted = {
        "TF32": config.tf32,
        "SPARSE_WEIGHTS": config.sparsity,
        "WEIGHT_STREAMING": config.weight_streaming,
        "STRIP_PLAN": config.strip_plan,
        "REFIT_IDENTICAL": config.refit,  # after REFIT numbers may be wrong, refitted or not ("Refitting an Engine")
        "VERSION_COMPATIBLE": config.version_compatible,
    }
    if nvinfer.features.timing_cache:
        wanted["DISABLE_TIMING_CACHE"] = not config.timing_cache
    for name, value in wanted.items():
        flag = getattr(nvinfer.module.BuilderFlag, name)
        (result.set_flag if value else result.clear_flag)(flag)


def _set_capabilities(result: Any, trt: Any, asked: tuple[str, ...]) -> None:
    if not asked:
        return
    result.num_compute_capabilities = len(asked)
    for index, name in enumerate(asked):
        member = "CURRENT" if name == CURRENT else f"SM{name}"
        if not result.set_compute_capability(getattr(trt.ComputeCapability, member), index):
            raise EngineError("TensorRT does not take a compute capability.", got=name, where="--compute-capability")
