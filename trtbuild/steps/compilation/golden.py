"""The golden case of a bundle: a small made-up image and the segmentation that belongs to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.bundle import Stage
from trtbuild.spec import CT, KeepLargestComponent, ModelSpec, RGBTo01

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner

SEED = 20140905


@dataclass(frozen=True, kw_only=True)
class GoldenCase:
    """`image` (C, Z, Y, X) float32, its `spacing` (z, y, x) in mm; `labels` (Z, Y, X), predicted without mirroring."""

    image: NDArray[np.float32]
    spacing: tuple[float, float, float]
    labels: NDArray[Any]


def golden_image(spec: ModelSpec) -> tuple[NDArray[np.float32], tuple[float, float, float]]:
    """A small image (C, Z, Y, X) float32 in the image's own axis order, and its spacing (z, y, x) in mm.

    Smooth blobs with a rim of zeros, so that crop, normalisation, both resamplings and the paste back all do
    something; about one patch large, so that it is quick.
    """
    patch = spec.patch if spec.dimensions == 3 else (3, *spec.patch)
    spacing = spec.spacing if spec.dimensions == 3 else (max(spec.spacing) * 2, *spec.spacing)
    factors = (1.1, 0.9, 1.15)
    shape = tuple(max(3, round(0.9 * p / f)) if p > 3 else p for p, f in zip(patch, factors, strict=True))
    grid = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij", sparse=True)
    radius = sum(np.asarray(axis) ** 2 for axis in grid)
    rng = np.random.default_rng(SEED)
    low, high = _range(spec)
    channels = []
    for _ in spec.channels:
        wave = sum(np.cos(rng.uniform(1, 5) * np.pi * np.asarray(axis) + rng.uniform(0, 6)) for axis in grid)
        noise = rng.normal(0, 0.15, shape)
        body = np.clip(0.5 + wave / 8 + noise, 0.02, 1) * (high - low) + low
        channels.append(np.where(radius < 1.6, body, 0))
    back = spec.transpose_backward
    image = np.stack(channels).astype(np.float32).transpose(0, *(axis + 1 for axis in back))
    turned = tuple(s * f for s, f in zip(spacing, factors, strict=True))
    return np.ascontiguousarray(image), (turned[back[0]], turned[back[1]], turned[back[2]])


def _range(spec: ModelSpec) -> tuple[float, float]:
    scheme = spec.normalization[0]
    if isinstance(scheme, CT):
        return scheme.lower, scheme.upper
    return (0.0, 255.0) if isinstance(scheme, RGBTo01) else (0.0, 1000.0)


def golden_case(
    stages: Sequence[Stage],
    models: Mapping[str, Path],
    postprocessing: tuple[KeepLargestComponent, ...],
    scratch: Path,
) -> GoldenCase | None:
    """The made-up image and its segmentation by ONNX Runtime in float32, whatever engines the bundle gets.

    None for a second stage alone: its segmentation also needs that of another bundle.

    Args:
        stages: one model, or the two of a cascade.
        models: ONNX file of every network by its id.
        postprocessing: what the bundle does to a segmentation.
        scratch: a folder for temporary files.
    """
    from trtbuild.runtime import Member, Recipe, Settings, prediction_from_models
    from trtbuild.volume import Prepared, prepared_from_array

    if stages[0].spec.previous_stage is not None:
        return None
    image, spacing = golden_image(stages[-1].spec)

    def prepare(model: int, stage: int, previous: NDArray[Any] | None) -> Prepared:
        return prepared_from_array(image, spacing, stages[stage].spec, previous)

    with ExitStack() as stack:
        members = tuple(
            Member(spec=stage.spec, runners=_runners(stage, models, scratch, stack), mirror_axes=()) for stage in stages
        )
        recipe = Recipe(weights=(1.0,), postprocessing=postprocessing)
        prediction = prediction_from_models([members], prepare, recipe, Settings(mirroring=False), None)
    return GoldenCase(image=image, spacing=spacing, labels=prediction.segmentation)


def _runners(stage: Stage, models: Mapping[str, Path], scratch: Path, stack: ExitStack) -> tuple[Runner, ...]:
    """A float32 runner of ONNX Runtime per fold, closed with the stack."""
    from trtbuild.engine import engine_from_onnx
    from trtbuild.graph import clean, load_onnx, save_onnx
    from trtbuild.runtime.select import open_runner

    runners = []
    for network in stage.networks:
        accurate = clean(load_onnx(models[network.id]), rewrite_conv_transpose=False, split_instance_norm=True)
        model = scratch / f"{network.id}_golden.onnx"
        save_onnx(accurate.model, model)
        record = engine_from_onnx(
            model, network, backend="onnxruntime", inference_precision="f32", threads=None, tune=False
        )
        runners.append(stack.enter_context(open_runner(record, model)))
    return tuple(runners)
