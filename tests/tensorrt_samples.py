"""nnU-Net's default networks in every precision for TensorRT, and builds in a process of their own.

As a program it builds one ONNX file and writes what it found; torch and onnx are not loaded then, so that the peak of
its memory is that of a build.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt import EngineTable, plan_from_onnx
from trtbuild.nvinfer import nvinfer

if TYPE_CHECKING:
    import onnx

PATCHES = {2: (512, 512), 3: (128, 128, 128)}
FEATURES = {2: (32, 64, 128, 256, 512, 512, 512, 512), 3: (32, 64, 128, 256, 320, 320)}
BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6)
"""Of a ResidualEncoderUNet M, as many as there are stages."""
NETWORKS = ("plain2d", "plain3d", "residual2d", "residual3d")
PRECISIONS = ("fp32", "fp16", "bf16", "int8+fp16", "int8+bf16")
BATCHES = (1, 2, 4)


def default_network(name: str) -> onnx.ModelProto:
    """One of NETWORKS as nnU-Net's planner makes it by default, clean, with random weights and a free batch.

    Traced on a smaller patch, which stands nowhere in the graph but in the input's shape: that is set afterwards.
    """
    import contextlib
    import io
    import os
    import warnings

    import onnx
    import torch

    from trtbuild.graph import clean

    net, dimensions = _torch_network(name), int(name[-2])
    axes = {0: "batch", **{axis: f"n{axis}" for axis in range(2, 2 + dimensions)}}
    small = (256, 256) if dimensions == 2 else (64, 64, 64)  # the deepest norm needs more than one voxel
    buffer = io.BytesIO()
    with warnings.catch_warnings(), open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net, (torch.zeros(1, 1, *small),), buffer, dynamo=False, opset_version=20,
            input_names=["image"], output_names=["logits"], dynamic_axes={"image": axes, "logits": axes},
        )  # fmt: skip
    model = onnx.ModelProto.FromString(buffer.getvalue())
    for tensor in (*model.graph.input, *model.graph.output):
        for dim, size in zip(tensor.type.tensor_type.shape.dim[2:], PATCHES[dimensions], strict=True):
            dim.dim_value = size
    return clean(model, rewrite_conv_transpose=False, split_instance_norm=False).model


def _torch_network(name: str) -> Any:
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet

    dimensions = int(name[-2])
    features = FEATURES[dimensions]
    stages = len(features)
    settings: dict[str, Any] = {
        "input_channels": 1,
        "n_stages": stages,
        "features_per_stage": features,
        "conv_op": getattr(torch.nn, f"Conv{dimensions}d"),
        "kernel_sizes": [[3] * dimensions] * stages,
        "strides": [[1] * dimensions, *[[2] * dimensions] * (stages - 1)],
        "num_classes": 3,
        "conv_bias": True,
        "norm_op": getattr(torch.nn, f"InstanceNorm{dimensions}d"),
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": torch.nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": False,
    }
    torch.manual_seed(1)
    if name.startswith("plain"):
        return PlainConvUNet(**settings, n_conv_per_stage=2, n_conv_per_stage_decoder=2).eval()
    return ResidualEncoderUNet(**settings, n_blocks_per_stage=BLOCKS[:stages], n_conv_per_stage_decoder=1).eval()


@dataclass(frozen=True, kw_only=True)
class Typed:
    """A network in one precision, and the names of its layers that compute in INT8."""

    model: onnx.ModelProto
    quantized: tuple[str, ...]


def typed(model: onnx.ModelProto, precision: str) -> Typed:
    """One of PRECISIONS written into a network as `trtbuild compile` does it; every range is 6."""
    from trtbuild.graph.precision import cast, keep_ends, quantize, targets, tensorrt_form

    result, quantized = tensorrt_form(model), ()
    if precision.startswith("int8"):
        amax = {target: 6.0 for target, _ in targets(model)}
        written = quantize(result, amax, keep=keep_ends, zero_point="s8")
        result, quantized = written.model, written.quantized
    rest = precision.rpartition("+")[2]
    if rest != "fp32":
        result = cast(result, rest, keep=()).model
    return Typed(model=result, quantized=quantized)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A build in a process of its own: wall seconds, peak of its resident memory, and what came out."""

    seconds: float
    peak: int
    size: int
    warnings: tuple[str, ...]
    table: EngineTable | None


def built_apart(model: Path) -> Measured:
    """Build an ONNX file with TensorRT-RTX in a fresh process; batches as in BATCHES."""
    result = subprocess.run([sys.executable, __file__, str(model)], capture_output=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr.decode()
    seconds, peak, size, warnings, table = pickle.loads(result.stdout)
    return Measured(seconds=seconds, peak=peak, size=size, warnings=warnings, table=table)


def peak_of_this_process() -> int:
    """Bytes. The kernel's high-water mark of this program; `ru_maxrss` would also hold that of who started it."""
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def _main(path: Path) -> None:
    dimensions = (512, 512) if "2d" in path.name else (128, 128, 128)
    shapes = {"image": tuple((batch, 1, *dimensions) for batch in BATCHES)}
    flavour = nvinfer("tensorrt-rtx")
    start = time.perf_counter()
    plan = plan_from_onnx(path, nvinfer=flavour, config=TensorRTConfig(), shapes=shapes)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    facts = (seconds, peak_of_this_process(), len(plan.content), plan.warnings, plan.table)
    sys.stdout.buffer.write(pickle.dumps(facts))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
