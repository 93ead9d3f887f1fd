"""A small bundle in memory: a 2-D network with two folds, an engine, goldens. Files hold arbitrary bytes."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from trtbuild.bundle import Bundle, Contents, Golden, Provenance, Stage, write_bundle
from trtbuild.spec import (
    BuildRecord,
    Labels,
    Memory,
    ModelSpec,
    NetworkRecord,
    Profile,
    Resampling,
    TensorSpec,
    ZScore,
)

IMAGES = Resampling(
    method="spline", is_segmentation=False, order=3, order_z=0, separate_z="auto", anisotropy_threshold=3.0
)
SPEC = ModelSpec(
    dataset="Dataset001_Sample",
    plans="nnUNetPlans",
    configuration="2d",
    trainer="nnUNetTrainer",
    channels=("T1",),
    previous_stage=None,
    patch=(8, 8),
    spacing=(1.0, 1.5),
    transpose_forward=(0, 1, 2),
    transpose_backward=(0, 1, 2),
    normalization=(ZScore(masked=False),),
    resample_data=IMAGES,
    resample_segmentation=replace(IMAGES, is_segmentation=True, order=1),
    resample_probabilities=replace(IMAGES, order=1),
    labels=Labels(
        decision="argmax",
        values=(0, 1),
        names={"background": (0,), "brain": (1,)},
        foreground=(1,),
        ignore=None,
    ),
    reader="SimpleITKIO",
    file_ending=".nii.gz",
)


def network(fold: str, precision: Any = "fp32", parent: str | None = None, spec: ModelSpec = SPEC) -> NetworkRecord:
    return NetworkRecord(
        id=f"fold_{fold}_{precision}",
        fold=fold,
        file=f"networks/fold_{fold}_{precision}.onnx",
        precision=precision,
        zero_point="s8" if precision == "int8" else "none",
        opset=20,
        io=(
            TensorSpec(name="input", dtype="float32", shape=("batch", spec.network_channels, *spec.patch)),
            TensorSpec(name="logits", dtype="float32", shape=("batch", spec.labels.heads, *spec.patch)),
        ),
        parent=parent,
    )


STAGE = Stage(spec=SPEC, mirror_axes=(0, 1), networks=(network("0"), network("0", "int8", parent="fold_0_fp32")))
ENGINE = BuildRecord(
    network="fold_0_int8",
    backend="tensorrt",
    flavour="rtx",
    version="1.2.0",
    file="engines/fold_0_int8.engine",
    precision="int8",
    inference_precision="int8",
    profile=Profile(min=(1, 1, 8, 8), opt=(4, 1, 8, 8), max=(8, 1, 8, 8)),
    device={"name": "a GPU"},
    options={"streams": 2, "share": 0.5, "refit": False, "mode": "latency"},
    memory=Memory(host=None, device_per_batch={"1": 1000, "8": 8000}, measured=True),
)
CONTENTS = Contents(
    stages=(STAGE,),
    engines=(replace(ENGINE), replace(ENGINE, network="fold_0_fp32", backend="openvino", flavour="cpu", file=None)),
    calibrations=({"network": "fold_0_int8", "patches": 32},),
    gates=(),
    goldens=(
        Golden(kind="patch", network="fold_0_fp32", input="goldens/patch.npy", output="goldens/logits.npy"),
        Golden(
            kind="case",
            network=None,
            input="goldens/image.npy",
            output="goldens/labels.npy",
            spacing=(2.0, 1.0, 1.5),
        ),
    ),
    postprocessing=(),
    provenance=Provenance(
        trtbuild="0.1.0",
        created="2026-01-31T12:00:00Z",
        model="nnUNetTrainer__nnUNetPlans__2d",
        plans="nnUNetPlans",
        trainer="nnUNetTrainer",
        checkpoint="checkpoint_final.pth",
        sources={"fold_0/checkpoint_final.pth": "0" * 64},
        versions={"torch": "2.13.0"},
    ),
    extensions={"org.example": {"note": "anything, Ünïcode too", "numbers": [1, 2.5, None, True]}},
)


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


FILES: dict[str, Path | bytes] = {
    "networks/fold_0_fp32.onnx": b"ONNX" * 300,
    "networks/fold_0_int8.onnx": b"onnx" * 100,
    "engines/fold_0_int8.engine": bytes(range(256)),
    "goldens/patch.npy": npy(np.zeros((1, 1, 8, 8), np.float32)),
    "goldens/logits.npy": npy(np.ones((1, 2, 8, 8), np.float32)),
    "goldens/image.npy": npy(np.zeros((1, 2, 9, 9), np.float32)),
    "goldens/labels.npy": npy(np.ones((2, 9, 9), np.uint8)),
    "plans.json": b"{}",
    "empty.txt": b"",
}


def write_sample(folder: Path, name: str = "sample.trtb", *, overwrite: bool = False, **changes: Any) -> Bundle:
    """The sample bundle as `folder/name`, with `changes` to its contents."""
    return write_bundle(folder / name, replace(CONTENTS, **changes), FILES, overwrite=overwrite)


def read_json(bundle: Path) -> Any:
    return json.loads((bundle / "bundle.json").read_text(encoding="utf-8"))


def write_json(bundle: Path, data: Any) -> None:
    (bundle / "bundle.json").write_text(json.dumps(data), encoding="utf-8")


def hidden(folder: Path) -> list[str]:
    """Temporaries and locks left in a folder."""
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
