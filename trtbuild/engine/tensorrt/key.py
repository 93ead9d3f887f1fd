"""What an engine is built from and for, and what differs between two of these, in words."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trtbuild.cachefolder import Damaged
from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.values import Shapes
from trtbuild.nvinfer import Nvinfer
from trtbuild.spec import json_from_value, value_from_json

FORMAT = 1
"""Raised when the same key would be built into another engine, or kept in another way."""
WITHOUT_EFFECT = ("min_batch", "opt_batch", "max_batch", "timing_cache", "verbose")
"""Settings that are in the shapes, or that change how a build goes and not what it gives."""
CHUNK = 2**20  # bytes
DRIVER = "driver"
"""A device's driver may change below an engine."""
NAMES: Mapping[str, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}

Scalar = str | int | bool | None


@dataclass(frozen=True, kw_only=True)
class EngineKey:
    """What an engine is built from and for.

    Attributes:
        onnx: SHA-256 of the ONNX file.
        config: the settings that have an effect on the engine.
        shapes: smallest, usual and largest shape by input name, as "1x1x64x64".
        flavour: "tensorrt-10", "tensorrt-11" or "tensorrt-rtx-1".
        version: of TensorRT, whole.
        device: "capabilities", or "gpu" and "capability".
    """

    onnx: str
    config: Mapping[str, Scalar]
    shapes: Mapping[str, tuple[str, str, str]]
    flavour: str
    version: str
    device: Mapping[str, str]

    @property
    def facts(self) -> dict[str, Any]:
        """As plain JSON."""
        return {"format": FORMAT, **{field.name: json_from_value(getattr(self, field.name)) for field in fields(self)}}

    @property
    def digest(self) -> str:
        """64 hexadecimal digits, the same for the same key in every process."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()


def engine_key(
    model: bytes | Path, config: TensorRTConfig, nvinfer: Nvinfer, shapes: Shapes, device: Mapping[str, str]
) -> EngineKey:
    """The key of the engine that `plan_from_onnx` makes of these; `model` is the ONNX file or its bytes."""
    settings = {field.name: getattr(config, field.name) for field in fields(config) if field.name not in WITHOUT_EFFECT}
    settings["compute_capabilities"] = ",".join(sorted(config.compute_capabilities))
    return EngineKey(
        onnx=_sha256(model),
        config=settings,
        shapes={name: (_shape(least), _shape(usual), _shape(most)) for name, (least, usual, most) in shapes.items()},
        flavour=nvinfer.flavour,
        version=nvinfer.version,
        device={name: value for name, value in device.items() if name != DRIVER},
    )


def key_from_facts(facts: object) -> EngineKey:
    """The key whose `facts` these are.

    Raises:
        Damaged: they are those of no key, or of one of another FORMAT.
    """
    if not isinstance(facts, Mapping) or facts.get("format") != FORMAT:
        raise Damaged("its key is none of this version")
    try:
        return value_from_json(EngineKey, {name: value for name, value in facts.items() if name != "format"})
    except ValueError as error:  # pydantic's
        raise Damaged(f"its key is none of this version: {' '.join(str(error).split()):.200}") from error


def _sha256(model: bytes | Path) -> str:
    if isinstance(model, bytes):
        return hashlib.sha256(model).hexdigest()
    digest = hashlib.sha256()
    with model.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def changes(other: EngineKey, key: EngineKey) -> tuple[str, ...]:
    """What differs between another key and this one: "workspace: 512 -> 1024"."""
    before, now = other.facts, key.facts
    lines = ["the network (its ONNX)"] if before["onnx"] != now["onnx"] else []
    old, new = (f"{_flavour(facts['flavour'])} {facts['version']}" for facts in (before, now))
    lines += [f"{old} -> {new}"] if old != new else []
    lines += _changes(before["config"], now["config"], "{}")
    lines += _changes(_texts(before["shapes"]), _texts(now["shapes"]), "shapes of {}")
    return (*lines, *_changes(before["device"], now["device"], "{}"))


def _changes(before: Mapping[str, Any], now: Mapping[str, Any], words: str) -> list[str]:
    names = sorted(before.keys() | now.keys())
    return [
        f"{words.format(name.replace('_', ' '))}: {_text(before.get(name))} -> {_text(now.get(name))}"
        for name in names
        if before.get(name) != now.get(name)
    ]


def _text(value: object) -> str:
    words: Mapping[object, str] = {True: "on", False: "off", None: "default", "": "default"}
    return words[value] if value is None or isinstance(value, bool) or value == "" else str(value)


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _texts(shapes: Mapping[str, Any]) -> dict[str, str]:
    return {name: " ".join(profile) for name, profile in shapes.items()}


def _flavour(flavour: str) -> str:
    backend = flavour.rpartition("-")[0]
    return NAMES.get(backend, backend)
