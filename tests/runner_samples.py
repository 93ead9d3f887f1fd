"""Small networks as ONNX files, the same networks in float64 NumPy and SciPy, and records that open them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper
from scipy import ndimage

from trtbuild.spec import BuildRecord, Memory, NetworkRecord, Profile, TensorSpec

CHANNELS, HIDDEN, HEADS = 2, 4, 3
PATCHES = {2: (12, 8), 3: (8, 6, 10)}
SLOPE = 0.01

Weights = Mapping[str, NDArray[np.float32]]


def weights(dimensions: int) -> Weights:
    """Seeded weights of an encoder level, a strided level, and the way back up."""
    rng = np.random.default_rng(dimensions)
    k = (3,) * dimensions

    def normal(*shape: int) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    return {
        "w1": normal(HIDDEN, CHANNELS, *k), "b1": normal(HIDDEN, 1)[:, 0],
        "scale": 1 + normal(HIDDEN, 1)[:, 0] / 4, "shift": normal(HIDDEN, 1)[:, 0],
        "w2": normal(HIDDEN, HIDDEN, *k), "b2": normal(HIDDEN, 1)[:, 0],
        "w3": normal(HIDDEN, HIDDEN, *(2,) * dimensions), "b3": normal(HIDDEN, 1)[:, 0],
        "w4": normal(HEADS, 2 * HIDDEN, *(1,) * dimensions), "b4": normal(HEADS, 1)[:, 0],
    }  # fmt: skip


def small_unet(dimensions: int, patch: tuple[int, ...] | None = None, batch: int | str = "batch") -> onnx.ModelProto:
    """Conv, InstanceNorm, LeakyRelu; strided Conv, LeakyRelu; ConvTranspose; concatenation; 1x1 Conv."""
    patch = patch or PATCHES[dimensions]
    pads = [1] * (2 * dimensions)
    nodes = [
        helper.make_node("Conv", ["input", "w1", "b1"], ["c1"], pads=pads),
        helper.make_node("InstanceNormalization", ["c1", "scale", "shift"], ["n1"], epsilon=1e-5),
        helper.make_node("LeakyRelu", ["n1"], ["skip"], alpha=SLOPE),
        helper.make_node("Conv", ["skip", "w2", "b2"], ["c2"], pads=pads, strides=[2] * dimensions),
        helper.make_node("LeakyRelu", ["c2"], ["low"], alpha=SLOPE),
        helper.make_node("ConvTranspose", ["low", "w3", "b3"], ["up"], strides=[2] * dimensions),
        helper.make_node("Concat", ["up", "skip"], ["both"], axis=1),
        helper.make_node("Conv", ["both", "w4", "b4"], ["logits"]),
    ]
    return model_from_nodes(nodes, (batch, CHANNELS, *patch), (batch, HEADS, *patch), weights(dimensions))


def model_from_nodes(
    nodes: list[Any], shape: tuple[int | str, ...], out: tuple[int | str, ...], initializers: Weights, kind: int = 1
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes, "sample", [helper.make_tensor_value_info("input", kind, shape)],
        [helper.make_tensor_value_info("logits", kind, out)],
        [onnx.numpy_helper.from_array(value, name) for name, value in initializers.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    if kind == TensorProto.FLOAT:
        onnx.checker.check_model(model, full_check=True)
    return model


def reference_logits(batch: NDArray[np.float32]) -> NDArray[np.float64]:
    """What `small_unet` computes, in float64, written from the operators' definitions."""
    w = {name: value.astype(np.float64) for name, value in weights(batch.ndim - 2).items()}
    return np.stack([_reference_patch(patch.astype(np.float64), w) for patch in batch])


def _reference_patch(x: NDArray[np.float64], w: Mapping[str, NDArray[np.float64]]) -> NDArray[np.float64]:
    axes = tuple(range(1, x.ndim))
    c1 = _conv(x, w["w1"], w["b1"])
    normal = (c1 - c1.mean(axes, keepdims=True)) / np.sqrt(c1.var(axes, keepdims=True) + 1e-5)
    skip = _leaky(normal * _column(w["scale"], x) + _column(w["shift"], x))
    low = _leaky(_conv(skip, w["w2"], w["b2"])[(slice(None), *[slice(None, None, 2)] * (x.ndim - 1))])
    up = np.stack([sum(np.kron(low[i], w["w3"][i, o]) for i in range(HIDDEN)) + w["b3"][o] for o in range(HIDDEN)])
    return _conv(np.concatenate([up, skip]), w["w4"], w["b4"])


def _conv(x: NDArray[np.float64], w: NDArray[np.float64], b: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.stack([
        sum(ndimage.correlate(x[i], w[o, i], mode="constant") for i in range(len(x))) + b[o] for o in range(len(w))
    ])  # fmt: skip


def _leaky(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(x > 0, x, SLOPE * x)


def _column(values: NDArray[np.float64], x: NDArray[np.float64]) -> NDArray[np.float64]:
    return values.reshape(-1, *[1] * (x.ndim - 1))


def write_model(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def make_record(backend: str, dimensions: int = 3, precision: str = "f32", **options: Any) -> BuildRecord:
    """A record for `small_unet`: two threads, one stream, batch 2, unless `options` say otherwise."""
    values = {"threads": 2, "streams": 1, "batch": 2, "heads": HEADS, **options}
    shape = (values["batch"] if isinstance(values["batch"], int) else 2, CHANNELS, *PATCHES[dimensions])
    return BuildRecord(
        network="fold_0_fp32", backend=backend, flavour="cpu", version="0", file=None, precision="fp32",
        inference_precision=precision, profile=Profile(min=(1, *shape[1:]), opt=shape, max=shape), device={},
        options={key: value for key, value in values.items() if value is not None},
        memory=Memory(host=None, device_per_batch={}, measured=False),
    )  # fmt: skip


def with_profile(record: BuildRecord, shape: tuple[int, ...]) -> BuildRecord:
    return replace(record, profile=Profile(min=(1, *shape[1:]), opt=shape, max=shape))


def make_network(dimensions: int = 3, patch: tuple[int | str, ...] | None = None, **changes: Any) -> NetworkRecord:
    patch = patch or PATCHES[dimensions]
    io = tuple(TensorSpec(name=name, dtype="float32", shape=("batch", count, *patch))
               for name, count in (("input", CHANNELS), ("logits", HEADS)))  # fmt: skip
    values: dict[str, Any] = {
        "id": "fold_0_fp32", "fold": "0", "file": "networks/fold_0_fp32.onnx", "precision": "fp32",
        "zero_point": "none", "opset": 20, "io": io, "parent": None,
    }  # fmt: skip
    return NetworkRecord(**(values | changes))


def patches(count: int, dimensions: int, seed: int = 0) -> NDArray[np.float32]:
    """(count, CHANNELS, *patch), standard normal."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, CHANNELS, *PATCHES[dimensions]), dtype=np.float32)
