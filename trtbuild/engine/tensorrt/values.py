"""What a TensorRT build gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trtbuild.spec import TensorSpec


@dataclass(frozen=True, kw_only=True)
class LayerTensor:
    """An input or output of an engine's layer: shape (-1 where it is free), "Float", "Half", "Int8", …"""

    name: str
    shape: tuple[int, ...]
    dtype: str
    format: str


@dataclass(frozen=True, kw_only=True)
class EngineLayer:
    """One kernel of an engine.

    `kind` is TensorRT's LayerType (correlation, deconv, kgen, …), `tactic` the kernel's name, `nodes` the ONNX nodes
    that were fused into it.
    """

    name: str
    kind: str
    tactic: str
    inputs: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class EngineTable:
    """All kernels of an engine in their order, and the bytes that it takes on a device.

    `activation_memory` is that of one execution context at the profile's largest batch. None: TensorRT did not say.
    """

    layers: tuple[EngineLayer, ...]
    activation_memory: int | None
    weights_memory: int | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A built engine: the plan's bytes as TensorRT serialised them, and what is known of it.

    `table` is None where nothing tells the layers (a flavour that logs no table, and no GPU to inspect the plan on).
    `timing_cache` is the cache after the build where the flavour has one.
    """

    content: bytes = field(repr=False)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    table: EngineTable | None
    warnings: tuple[str, ...]
    seconds: float
    timing_cache: bytes | None = field(default=None, repr=False)


Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]
"""Smallest, usual and largest shape by input name: one optimisation profile."""
