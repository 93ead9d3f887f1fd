"""The models of the end-to-end tests: the zoo and the demo model, each with a bundle and nnU-Net's own results."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from reference import nnunet_predict, nnunet_predictor, quiet, threads
from zoo import ALL_RECIPES, MODELS, ZooModel, make_model

import trtbuild

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "benchmarks" / "demo"
NAMES = (*MODELS, "demo")
BACKENDS = ("onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its bundle (engines for every backend) and a place for nnU-Net's results.

    A cascade's second stage (`previous` is the first one's model) has a bundle of both stages.
    """

    model: ZooModel
    bundle: Path
    work: Path
    previous: ZooModel | None = None
    expected: dict[tuple[str, bool], Path] = field(default_factory=dict)

    def reference(self, kind: str, *, mirroring: bool = True) -> Path:
        """nnU-Net's segmentation of one case, with probabilities beside it; predicted at the first call."""
        key = (kind, mirroring)
        if key not in self.expected:
            predictor = nnunet_predictor(self.model.folder, self.model.folds, mirroring=mirroring)
            target = self.work / "nnunet" / str(mirroring) / kind
            if self.previous is not None:
                self._predict_second_stage(predictor, kind, target, mirroring=mirroring)
            elif (recipe := ALL_RECIPES.get(self.model.name)) is not None and recipe.one_file:
                _predict_4d(predictor, self.model.cases[kind], target)
            else:
                nnunet_predict(predictor, self.model.cases[kind], target, probabilities=True)
            self.expected[key] = target.with_name(kind + self.model.file_ending)
        return self.expected[key]

    def first_stage(self, kind: str, *, mirroring: bool = True) -> Path:
        """nnU-Net's segmentation of one case by the first stage of a cascade."""
        if self.previous is None:
            raise ValueError(f"{self.model.name} is no second stage")
        target = self.work / "nnunet_first" / str(mirroring) / kind
        written = target.with_name(kind + self.model.file_ending)
        if not written.exists():
            predictor = nnunet_predictor(self.previous.folder, self.previous.folds, mirroring=mirroring)
            nnunet_predict(predictor, self.previous.cases[kind], target)
        return written

    def _predict_second_stage(self, predictor: nnUNetPredictor, kind: str, target: Path, *, mirroring: bool) -> None:
        first = self.first_stage(kind, mirroring=mirroring)
        target.parent.mkdir(parents=True, exist_ok=True)
        with quiet(), threads(1):
            predictor.predict_from_files_sequential(
                [[str(f) for f in self.model.cases[kind]]], [str(target)], True,
                folder_with_segs_from_prev_stage=str(first.parent),
            )  # fmt: skip


def _predict_4d(predictor: nnUNetPredictor, files: tuple[Path, ...], target: Path) -> None:
    """nnU-Net cannot write what it predicts for a 4-D file: its result as an array, written as a 3-D image in the place
    of the 4-D one, with the probabilities beside it."""
    array, properties = predictor.plans_manager.image_reader_writer_class().read_images([str(f) for f in files])
    with quiet(), threads(1):
        labels, probabilities = predictor.predict_single_npy_array(array, properties, None, None, True)
    source = sitk.ReadImage(str(files[0]))
    image = sitk.GetImageFromArray(labels.astype(np.uint8 if labels.max() < 255 else np.uint16))
    image.SetSpacing(source.GetSpacing()[:3])
    image.SetOrigin(source.GetOrigin()[:3])
    image.SetDirection(np.reshape(source.GetDirection(), (4, 4))[:3, :3].ravel().tolist())
    target.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(image, str(target.with_name(target.name + predictor.dataset_json["file_ending"])), True)
    np.savez_compressed(target.with_name(target.name + ".npz"), probabilities=probabilities.astype(np.float32))


@functools.cache
def root() -> Path:
    """A folder for this test session; removed when the interpreter ends."""
    folder = tempfile.TemporaryDirectory(prefix="trtbuild-tests-")
    _kept.append(folder)
    return Path(folder.name)


_kept: list[tempfile.TemporaryDirectory[str]] = []


def demo_model() -> ZooModel:
    """The trained demo model as a member of the zoo."""
    cases: Mapping[str, tuple[Path, ...]] = {"main": (DEMO / "input" / "mni152_0000.nii.gz",)}
    return ZooModel(
        name="demo",
        folder=DEMO / "model" / "nnUNetTrainer__nnUNetPlans__3d_fullres",
        folds=("0",),
        images=DEMO / "input",
        cases=cases,
        file_ending=".nii.gz",
        mirror_axes=(0, 1, 2),
        heads=3,
        labels=(0, 1, 2),
    )


@functools.cache
def zoo_model(name: str) -> ZooModel:
    """The model of this name, made at the first call of the session."""
    return demo_model() if name == "demo" else make_model(name, root())


@functools.cache
def subject(name: str) -> Subject:
    """The subject of this name, made and compiled at the first call of the session."""
    model, bundle = zoo_model(name), root() / f"{name}.trtb"
    previous = _first_stage_of(name)
    trtbuild.compile(
        model.folder,
        bundle,
        backends=BACKENDS,
        tune=False,
        previous_stage=None if previous is None else previous.folder,
    )
    return Subject(model=model, bundle=bundle, work=root() / "results" / name, previous=previous)


def _first_stage_of(name: str) -> ZooModel | None:
    recipe = ALL_RECIPES.get(name)
    if recipe is None or recipe.previous_stage is None:
        return None
    return next(
        zoo_model(other.name)
        for other in ALL_RECIPES.values()
        if other.dataset == recipe.dataset and other.configuration == recipe.previous_stage
    )
