"""The options of `compile` that are TensorRT's; their names follow trtexec."""

from __future__ import annotations

from typing import Any, get_args

import click

from trtbuild.commands.given import options_given
from trtbuild.commands.shared import FOLDER
from trtbuild.config import Compatibility, TensorRTConfig
from trtbuild.nvinfer import MODULES

TENSORRT = (
    click.option(
        "--min-batch",
        type=click.IntRange(1),
        default=TensorRTConfig.min_batch,
        show_default=True,
        help="TensorRT, onnxruntime-cuda: least patches per call of the engine.",
    ),
    click.option(
        "--opt-batch",
        type=click.IntRange(1),
        default=TensorRTConfig.opt_batch,
        show_default=True,
        help="TensorRT: patches per call that its kernels are chosen for.",
    ),
    click.option(
        "--max-batch",
        type=click.IntRange(1),
        default=TensorRTConfig.max_batch,
        show_default=True,
        help="TensorRT, onnxruntime-cuda: most patches per call; device memory grows with it.",
    ),
    click.option(
        "--workspace",
        type=click.IntRange(1),
        metavar="MiB",
        help="TensorRT: memory that kernels may take besides activations. Default: all that the device has.",
    ),
    click.option(
        "--builderOptimizationLevel",
        "optimization_level",
        type=click.IntRange(0, 5),
        default=TensorRTConfig.optimization_level,
        show_default=True,
        help="TensorRT: how long it searches for fast kernels.",
    ),
    click.option(
        "--tf32/--noTF32",
        default=TensorRTConfig.tf32,
        show_default=True,
        help="TensorRT: let float32 Convs round their inputs to TF32 (10 bits of mantissa): faster, and not FP32.",
    ),
    click.option("--sparsity", is_flag=True, help="TensorRT: use kernels for 2:4 sparse weights where weights are so."),
    click.option(
        "--compute-capability",
        "compute_capabilities",
        metavar="CC,CC",
        default="",
        help="TensorRT-RTX: GPUs to build for, such as 86,89,120, or current. Default: all that it knows. 75 (Turing) "
        "has no float32 3-D convolution: build FP16 or INT8 for it.",
    ),
    click.option(
        "--hardwareCompatibilityLevel",
        "hardware_compatibility",
        type=click.Choice(get_args(Compatibility)),
        default=TensorRTConfig.hardware_compatibility,
        show_default=True,
        help="TensorRT: run on other GPUs than this one, at some cost in speed.",
    ),
    click.option(
        "--versionCompatible",
        "version_compatible",
        is_flag=True,
        help="TensorRT: run in later versions, too. Such an engine holds code, which is run where it is loaded.",
    ),
    click.option(
        "--allowWeightStreaming",
        "weight_streaming",
        is_flag=True,
        help="TensorRT: weights may stay on the host, for networks that are larger than the device.",
    ),
    click.option(
        "--stripWeights",
        "strip_plan",
        is_flag=True,
        help="TensorRT: leave the weights out of the plan. Needs a GPU at build time.",
    ),
    click.option(
        "--refit",
        is_flag=True,
        help="TensorRT: the same weights can be put in again later. Needs a GPU at build time.",
    ),
    click.option(
        "--noTimingCache",
        "timing_cache",
        is_flag=True,
        flag_value=False,
        default=True,
        help="TensorRT: measure every kernel anew, and keep nothing for the next build.",
    ),
    click.option(
        "--fp16-norms",
        is_flag=True,
        help="FP16 on GPUs: norms compute in FP16, too. TensorRT-RTX keeps their sums in float32 by itself.",
    ),
    click.option("--verbose", is_flag=True, help="TensorRT: print all that its builder says."),
    click.option(
        "--emit-script",
        "emit_script",
        type=FOLDER,
        metavar="FILE",
        help="TensorRT: also write the commands of trtexec and Polygraphy that build the same engines.",
    ),
)
NAMES = (
    "min_batch", "opt_batch", "max_batch", "workspace", "optimization_level", "tf32", "sparsity",
    "compute_capabilities", "hardware_compatibility", "version_compatible", "weight_streaming", "strip_plan", "refit",
    "verbose",
)  # fmt: skip

ON_CUDA = ("min_batch", "opt_batch", "max_batch", "fp16_norms")
"""Those that ONNX Runtime's CUDA provider has a use for, too."""


def tensorrt_from(given: dict[str, Any], *, is_onnx: bool) -> TensorRTConfig:
    """Takes TensorRT's options out of `given`; one that nothing would come of is a usage error.

    Args:
        given: values by parameter.
        is_onnx: an ONNX file is compiled, which is for TensorRT whatever `given["backends"]` says.
    """
    on_cuda = "onnxruntime-cuda" in given["backends"]
    names = (*NAMES, "timing_cache", "fp16_norms", "emit_script")
    wanted = options_given(*(name for name in names if not (on_cuda and name in ON_CUDA)))
    if wanted and not is_onnx and not any(name in MODULES for name in given["backends"]):
        raise click.UsageError(f"{wanted[0]} is for TensorRT: add --backend tensorrt-rtx or tensorrt.")
    values = {name: given.pop(name) for name in NAMES}
    text = values.pop("compute_capabilities")
    capabilities = tuple(part.strip() for part in text.split(",")) if options_given("compute_capabilities") else ()
    return TensorRTConfig(**values, compute_capabilities=capabilities, timing_cache=given.pop("timing_cache"))
