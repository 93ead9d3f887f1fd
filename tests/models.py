"""The models of the end-to-end tests: the zoo and the demo model, each with a bundle and nnU-Net's own results."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from reference import nnunet_predict, nnunet_predictor
from zoo import MODELS, ZooModel, make_model

import trtbuild

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "benchmarks" / "demo"
NAMES = (*MODELS, "demo")
BACKENDS = ("onnxruntime", "openvino")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model with its bundle (engines for every backend) and a place for nnU-Net's results."""

    model: ZooModel
    bundle: Path
    work: Path
    expected: dict[tuple[str, bool], Path] = field(default_factory=dict)

    def reference(self, kind: str, *, mirroring: bool = True) -> Path:
        """nnU-Net's segmentation of one case, with probabilities beside it; predicted at the first call."""
        key = (kind, mirroring)
        if key not in self.expected:
            predictor = nnunet_predictor(self.model.folder, self.model.folds, mirroring=mirroring)
            target = self.work / "nnunet" / str(mirroring) / kind
            self.expected[key] = nnunet_predict(predictor, self.model.cases[kind], target, probabilities=True)
        return self.expected[key]


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
def subject(name: str) -> Subject:
    """The subject of this name, made and compiled at the first call of the session."""
    model = demo_model() if name == "demo" else make_model(name, root())
    bundle = root() / f"{name}.trtb"
    trtbuild.compile(model.folder, bundle, backends=BACKENDS, tune=False)
    return Subject(model=model, bundle=bundle, work=root() / "results" / name)
