"""Preprocessed folders as nnU-Net leaves them, and quick configurations, for the tests of lower precision."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from calibration_samples import write_case
from models import DEMO, root, zoo_model
from numpy.typing import NDArray
from reference import nnunet_predict, nnunet_predictor, quiet
from zoo import ZooModel

from trtbuild.bundle import Bundle
from trtbuild.config import CompileConfig, GateConfig
from trtbuild.steps.compilation.compile import compile_bundle

DATASET = DEMO / "preprocessed" / "Dataset501_MNI152Tissue"
QUICK: dict[str, Any] = {"backends": ("openvino",), "tune": False, "threads": 2}
"""Of a CompileConfig."""
LENIENT = GateConfig(patches=2, mean_loss=1, class_loss=1)
"""For networks with random weights, whose logits have no margin between labels."""
KINDS = ("main", "small", "turned")
"""Cases of the zoo, and "main" turned by 180 degrees."""


@dataclass(frozen=True, kw_only=True)
class CascadeData:
    """Three cases for both stages of the zoo's cascade.

    Attributes:
        dataset: nnUNet_preprocessed/DatasetX.
        next_stage: what the first stage predicted, on the second one's grid.
        images, labels, previous: the same cases as files: raw images, labels, and the first stage's segmentations.
    """

    dataset: Path
    next_stage: Path
    images: Path
    labels: Path
    previous: Path


@functools.cache
def cascade_data() -> CascadeData:
    """Made by nnU-Net's own predictor and preprocessor. The labels are what the first stage finds where the image is
    not 0: nnU-Net's normalisation of a training case takes labels outside of it into its mask, a prediction cannot.
    The first stage's segmentations have the same classes under other names."""
    low, full = zoo_model("lowres3d"), zoo_model("cascade3d")
    folder = root() / "cascade_data"
    data = CascadeData(
        dataset=folder / "Dataset701", next_stage=folder / "next_stage", images=folder / "images",
        labels=folder / "labels", previous=folder / "previous",
    )  # fmt: skip
    for made in (data.dataset, data.next_stage, data.images, data.labels, data.previous):
        made.mkdir(parents=True)
    shutil.copy(full.folder / "dataset.json", data.dataset)
    predictor = nnunet_predictor(low.folder, low.folds, mirroring=False)
    for kind in KINDS:
        image = _raw_image(low, kind, data.images)
        segmentation = nnunet_predict(predictor, [image], folder / "out" / kind)
        _write_inside(segmentation, image, data.labels / segmentation.name, (0, 1, 2, 3))
        _write_inside(segmentation, image, data.previous / segmentation.name, (0, 2, 3, 1))
        for model in (low, full):
            values, labels = nnunet_case(model, image, data.labels / segmentation.name)
            write_case(data.dataset / data_identifier(model), kind, "b2nd", values, labels)
        before = nnunet_case(full, image, data.previous / segmentation.name)[1][0]
        write_case(data.next_stage, kind, "b2nd", np.maximum(before, 0).astype(np.uint8), None)
    return data


def _raw_image(model: ZooModel, kind: str, folder: Path) -> Path:
    (file,) = model.cases["main" if kind == "turned" else kind]
    image = sitk.ReadImage(str(file))
    turned = sitk.GetImageFromArray(sitk.GetArrayFromImage(image)[::-1, ::-1]) if kind == "turned" else image
    turned.CopyInformation(image)
    target = folder / f"{kind}_0000.nii.gz"
    sitk.WriteImage(turned, str(target))
    return target


def _write_inside(segmentation: Path, image: Path, target: Path, names: tuple[int, ...]) -> None:
    """The labels, under other names, where the image is not 0."""
    values = sitk.GetArrayFromImage(sitk.ReadImage(str(image)))
    whole = sitk.ReadImage(str(segmentation))
    inside = sitk.GetImageFromArray(
        np.where(values != 0, np.array(names)[sitk.GetArrayFromImage(whole)], 0).astype(np.uint8)
    )
    inside.CopyInformation(whole)
    sitk.WriteImage(inside, str(target))


def nnunet_case(model: ZooModel, image: Path, labels: Path) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """Image (C, Z, Y, X) and labels (1, Z, Y, X) of a training case, by nnU-Net's preprocessor."""
    predictor = nnunet_predictor(model.folder, model.folds, mirroring=False)
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    with quiet():
        values, seg, _ = preprocessor.run_case(
            [str(image)], str(labels), predictor.plans_manager, predictor.configuration_manager, predictor.dataset_json
        )
    return values, seg


def compiled(model: Path, output: Path, **options: Any) -> Bundle:
    return compile_bundle(CompileConfig(model=model, output=output, **(QUICK | options)))


def data_identifier(model: ZooModel) -> str:
    """The name of the folder below DatasetX in which nnU-Net looks for the model's cases."""
    configurations = read_json(model.folder / "plans.json")["configurations"]
    entry = configurations[model.folder.name.split("__")[-1]]
    return str((configurations.get(entry.get("inherits_from"), {}) | entry)["data_identifier"])


def read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text())
    return content
