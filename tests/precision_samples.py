"""Networks, ranges and an independent judge for the tests of trtbuild.graph.precision.

`evaluate` computes a float graph in float64 with torch and quantises what it is told to by itself: it never sees the
Q/DQ nodes that the tests are about.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from graph_samples import run
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from trtbuild.graph import clean
from trtbuild.graph.precision import targets, with_maxima

PATCHES = {"plain3d": (16, 16, 16), "plain2d": (48, 32), "residual3d": (16, 16, 16), "residual2d": (32, 32)}


def network(name: str) -> torch.nn.Module:
    """A small U-Net as nnU-Net builds it, with seeded weights and norms as if trained (no two alike)."""
    dimensions = int(name[-2])
    features = [8, 16, 16]
    settings: dict[str, Any] = {
        "input_channels": 1,
        "n_stages": 3,
        "features_per_stage": features,
        "conv_op": getattr(torch.nn, f"Conv{dimensions}d"),
        "kernel_sizes": [[3] * dimensions] * 3,
        "strides": [[1] * dimensions, *[[2] * dimensions] * 2],
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
        net = PlainConvUNet(**settings, n_conv_per_stage=[1, 2, 1], n_conv_per_stage_decoder=[1, 1])
    else:
        net = ResidualEncoderUNet(**settings, n_blocks_per_stage=[1, 2, 1], n_conv_per_stage_decoder=[1, 1])
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    return net.eval()


@cache
def _exported(name: str, split: bool) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network(name), (torch.zeros(2, 1, *PATCHES[name]),), buffer, dynamo=False, opset_version=20,
            input_names=["x"], output_names=["y"], dynamic_axes={"x": {0: "b"}, "y": {0: "b"}},
        )  # fmt: skip
    model = onnx.ModelProto.FromString(buffer.getvalue())
    result = clean(model, rewrite_conv_transpose=False, split_instance_norm=split).model
    return result.SerializeToString(deterministic=True)


def network_model(name: str, *, split: bool = False) -> onnx.ModelProto:
    """The clean ONNX of `network(name)`; `split` writes its norms out, as bundles hold them."""
    return onnx.ModelProto.FromString(_exported(name, split))


def patch_of(name: str, seed: int = 7) -> NDArray[np.float32]:
    """One smooth random patch: noise alone would let every voxel be a border case of rounding."""
    noise = np.random.default_rng(seed).standard_normal((1, 1, *PATCHES[name]))
    for axis in range(2, noise.ndim):
        noise = noise + np.roll(noise, 1, axis) + np.roll(noise, 2, axis)
    return np.ascontiguousarray(noise / noise.std(), np.float32)


def amax_of(model: onnx.ModelProto, x: NDArray[np.float32]) -> dict[str, float]:
    """Largest |x| of every target for one patch; through a Concat's inputs, as calibration does it."""
    pairs = targets(model)
    sources = list(dict.fromkeys(source for _, many in pairs for source in many))
    shown, names = with_maxima(model, sources)
    seen = dict(zip(names, map(float, run(shown, x)), strict=True))
    return {target: max(seen[source] for source in many) for target, many in pairs}


def all_ranges(model: onnx.ModelProto, x: NDArray[np.float32]) -> dict[str, float]:
    """Largest |x| of all that `with_maxima` shows."""
    shown, names = with_maxima(model, None)
    return dict(zip(names, map(float, run(shown, x)), strict=True))


def run_openvino(model: onnx.ModelProto, *arrays: NDArray[Any]) -> list[NDArray[Any]]:
    """The outputs by OpenVINO on the CPU, with float32 for what is not quantised.

    The batch is fixed, as trtbuild.runtime fixes it: with a free one OpenVINO 2026.4.1 computes wrongly what follows a
    quantised Conv without bias whose norm is written out.
    """
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2}
    network = core.read_model(model.SerializeToString())
    network.reshape({port: array.shape for port, array in zip(network.inputs, arrays, strict=True)})
    compiled = core.compile_model(network, "CPU", options)
    return list(compiled(dict(enumerate(arrays))).values())


def fake_quantized(x: torch.Tensor, amax: float) -> torch.Tensor:
    """Float64 values on the grid of amax / 127, from -128 to 127 steps; the scale is a float32 number."""
    scale = float(np.float32(amax / 127)) or 1.0
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


def fake_quantized_weight(w: torch.Tensor) -> torch.Tensor:
    """Each output channel on its own grid of max|w| / 127."""
    return torch.stack([fake_quantized(channel, float(channel.abs().max())) for channel in w])


def evaluate(
    model: onnx.ModelProto,
    x: NDArray[np.float32],
    amax: Mapping[str, float] | None = None,
    quantized: Collection[str] = (),
    jitter: float = 0.0,
) -> NDArray[np.float64]:
    """The network's output in float64, with the inputs and weights of the Convs in `quantized` on their grids.

    `jitter` is the relative rounding noise put on what is quantised, to see what float32 can do to the result.
    """
    values: dict[str, torch.Tensor] = {
        tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).astype(np.float64))
        for tensor in model.graph.initializer
    }
    values[model.graph.input[0].name] = torch.from_numpy(x.astype(np.float64))
    generator = torch.Generator().manual_seed(0)
    for node in model.graph.node:
        inputs = [values[name] for name in node.input]
        if node.name in quantized:
            assert amax is not None
            noise = 1 + jitter * (2 * torch.rand(inputs[0].shape, generator=generator, dtype=torch.float64) - 1)
            inputs[0] = fake_quantized(inputs[0] * noise, amax[node.input[0]])
            inputs[1] = fake_quantized_weight(inputs[1])
        attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        values[node.output[0]] = _computed(node.op_type, inputs, attributes)
    return values[model.graph.output[0].name].numpy()


def _computed(operator: str, inputs: list[torch.Tensor], attributes: Mapping[str, Any]) -> torch.Tensor:
    functional = torch.nn.functional
    rank = inputs[0].ndim - 2
    if operator in ("Conv", "ConvTranspose"):
        name = ("conv_transpose" if operator == "ConvTranspose" else "conv") + f"{rank}d"
        padding = attributes.get("pads", [0] * rank * 2)[:rank]
        return getattr(functional, name)(*inputs, stride=attributes.get("strides", 1), padding=padding)
    if operator == "InstanceNormalization":
        return functional.instance_norm(inputs[0], weight=inputs[1], bias=inputs[2], eps=attributes["epsilon"])
    if operator == "LeakyRelu":
        return functional.leaky_relu(inputs[0], attributes["alpha"])
    if operator == "Concat":
        return torch.cat(inputs, attributes["axis"])
    if operator == "Add":
        return inputs[0] + inputs[1]
    if operator == "AveragePool":
        return getattr(functional, f"avg_pool{rank}d")(inputs[0], attributes["kernel_shape"], attributes["strides"])
    raise NotImplementedError(operator)


def relative_rms(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Root mean square of the difference, in units of the standard deviation of `other`."""
    return float(np.sqrt(np.mean((one.astype(np.float64) - other) ** 2)) / np.std(other))
