"""The BuildRecord of a TensorRT engine: what it is for, how it was built, what it takes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.key import WITHOUT_EFFECT, EngineKey
from trtbuild.engine.tensorrt.settings import CURRENT
from trtbuild.engine.tensorrt.values import Plan, Shapes
from trtbuild.nvinfer import Nvinfer, gpu_description
from trtbuild.spec import BuildRecord, Memory, Precision, Profile

COMPUTED: Mapping[Precision, str] = {"fp32": "f32", "fp16": "f16", "bf16": "bf16"}
"""`inference_precision`: what an engine computes in besides INT8. A float32 Conv with TF32 switched on is "tf32"."""
OPTIONS = ("minShapes", "optShapes", "maxShapes")


def target_device(config: TensorRTConfig, nvinfer: Nvinfer) -> Mapping[str, str]:
    """What an engine is for: compute capabilities, this machine's GPU, or both where they are "current".

    Raises:
        EngineError: it is for the GPU of this machine, and there is none.
    """
    if not nvinfer.features.capabilities:
        return gpu_description()
    asked = config.compute_capabilities
    return {"capabilities": ",".join(asked) or "all", **(gpu_description() if CURRENT in asked else {})}


def record_from_plan(
    plan: Plan,
    *,
    network: str,
    file: str,
    precision: Precision,
    rest: Precision,
    nvinfer: Nvinfer,
    config: TensorRTConfig,
    shapes: Shapes,
    device: Mapping[str, str],
    key: EngineKey,
) -> BuildRecord:
    """The record of a plan.

    Args:
        plan: the engine.
        network: id of the network that it is of.
        file: where it is.
        precision, rest: of the network, and what everything but INT8 layers computes in.
        nvinfer, config, shapes, device: what it was built by, how, and for what.
        key: of its reuse.

    Returns:
        `profile` holds the shapes of the first input, `options` those of all in trtexec's form.
    """
    smallest, usual, largest = next(iter(shapes.values()), ((), (), ()))
    computed = COMPUTED[rest]
    return BuildRecord(
        network=network,
        backend=nvinfer.backend,
        flavour=nvinfer.flavour,
        version=nvinfer.version,
        file=file,
        precision=precision,
        inference_precision="tf32" if config.tf32 and computed == "f32" else computed,
        profile=Profile(min=smallest, opt=usual, max=largest),
        device=device,
        options={
            **_settings(config, nvinfer, shapes),
            "key": key.digest,
            "sha256": hashlib.sha256(plan.content).hexdigest(),
        },
        memory=_memory(plan, largest),
    )


def _settings(config: TensorRTConfig, nvinfer: Nvinfer, shapes: Shapes) -> dict[str, str | int | float | bool]:
    """What has an effect on the engine, and the shapes. What is not set stays out, a list becomes text."""
    values: dict[str, Any] = {name: v for name, v in asdict(config).items() if name not in WITHOUT_EFFECT}
    values["compute_capabilities"] = ",".join(config.compute_capabilities)
    if not nvinfer.features.hardware_compatibility:
        del values["hardware_compatibility"], values["version_compatible"]
    if not nvinfer.features.capabilities:
        del values["compute_capabilities"]
    for number, option in enumerate(OPTIONS):
        values[option] = ",".join(f"{name}:{'x'.join(map(str, three[number]))}" for name, three in shapes.items())
    return {name: value for name, value in values.items() if value is not None}


def _memory(plan: Plan, largest: tuple[int, ...]) -> Memory:
    activations = None if plan.table is None else plan.table.activation_memory
    needed = {} if activations is None or not largest else {str(largest[0]): activations}
    return Memory(host=None, device_per_batch=needed, measured=False)
