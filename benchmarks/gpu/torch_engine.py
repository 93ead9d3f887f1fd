"""nnU-Net's own network behind the engine seam: torch with autocast, on the stream of the device path.

For comparison only, where a card has no TensorRT: then both sides compute the same network, and what differs is all
that is around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, cast

from trtbuild.runtime.gpu.shared import DeviceEngine, Enqueues
from trtbuild.runtime.runner import RunnerInfo
from trtbuild.spec import ModelSpec, TensorSpec

BATCH = 2
"""Patches of a call."""
At = Callable[[int, tuple[int, ...], str], Any]
"""A tensor over device memory: (address, shape, type's name)."""
OnStream = Callable[[int], AbstractContextManager[Any]]
"""Work in the block goes to the stream of this handle."""


class TorchEngine:
    """A Runner as far as the device path uses one. Input float32, logits float16, which is what autocast computes."""

    def __init__(self, network: Any, spec: ModelSpec, at: At, on_stream: OnStream, *, device: str = "cuda") -> None:
        self._network, self._at, self._on_stream, self._device = network, at, on_stream, device
        self._shapes = [(spec.network_channels, *spec.patch), (spec.labels.heads, *spec.patch)]

    def enqueue(self, source: int, target: int, stream: int, batch: int) -> None:
        """Begin to compute logits (batch, heads, *patch) from (batch, C, *patch)."""
        import torch

        inputs, outputs = ((batch, *shape) for shape in self._shapes)
        with torch.inference_mode(), self._on_stream(stream), torch.autocast(self._device, torch.float16):
            self._at(target, outputs, "float16").copy_(self._network(self._at(source, inputs, "float32")))

    def describe(self) -> RunnerInfo:
        import torch

        ports = [
            TensorSpec(name=name, dtype=kind, shape=("batch", *shape))
            for name, kind, shape in zip(("image", "logits"), ("float32", "float16"), self._shapes, strict=True)
        ]
        return RunnerInfo(
            backend="torch", version=torch.__version__, inputs=ports[0], outputs=ports[1], parallel=1, batch=BATCH,
            inference_precision="autocast", device=self._device, details={},
        )  # fmt: skip

    def engine(self) -> DeviceEngine:
        """As the device path takes it."""
        return DeviceEngine(runner=cast(Enqueues, self), smallest=1, largest=BATCH, activations=0)


def on_gpu(network: Any, spec: ModelSpec) -> TorchEngine:
    """The network on the first GPU, with kernels chosen by timing, as nnU-Net does."""
    import torch

    torch.backends.cudnn.benchmark = True
    return TorchEngine(network.to("cuda").eval(), spec, tensor_on_gpu, stream_on_gpu)


def tensor_on_gpu(address: int, shape: tuple[int, ...], kind: str) -> Any:
    """Without a copy."""
    import numpy as np
    import torch

    class Memory:
        def __init__(self) -> None:
            self.__cuda_array_interface__ = {
                "shape": shape, "typestr": np.dtype(kind).str, "data": (address, False), "version": 3, "strides": None,
            }  # fmt: skip

    tensor = torch.as_tensor(Memory(), device="cuda")
    if tensor.data_ptr() != address or tensor.numel() != math.prod(shape):
        raise RuntimeError("torch made a copy of the device path's memory")
    return tensor


def stream_on_gpu(handle: int) -> AbstractContextManager[Any]:
    """torch's work on a stream of pycuda's: both are of the primary context."""
    import torch

    return cast(AbstractContextManager[Any], torch.cuda.stream(torch.cuda.ExternalStream(handle)))
