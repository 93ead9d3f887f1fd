"""Equality with nnU-Net itself, and proof that the tests would notice if it were lost."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from models import Subject, subject
from reference import dice, differing_voxels, geometry_differences, segmentation_from_file
from zoo import ALL_RECIPES, MODELS

import trtbuild
from trtbuild.config import PredictConfig
from trtbuild.runtime import slabs
from trtbuild.steps.folder_run.cases import predict_cases
from trtbuild.stitch import gaussian, grid
from trtbuild.volume import back
from trtbuild.volume.resampling import axis as resample_axis
from trtbuild.volume.resampling import image as resample

pytestmark = pytest.mark.parity


@dataclass(frozen=True, kw_only=True)
class Limit:
    """How far a backend may be from nnU-Net with float32 accumulators: the issue's numbers."""

    voxels: int
    share: float
    probability: float


LIMITS = {
    "onnxruntime": Limit(voxels=2, share=2e-5, probability=1e-4),
    "openvino": Limit(voxels=3, share=5e-5, probability=1e-3),
}
NAMES = (*ALL_RECIPES, "demo")
DICE = 0.999  # for labels of at least DICE_VOXELS voxels
DICE_VOXELS = 200


def cases_of(name: str) -> list[str]:
    return ["main"] if name == "demo" else ["main", "small", "zero", "slice", "noresample", "thin", "thick"]


def predicted(who: Subject, kind: str, backend: str, folder: Path, *, mirroring: bool = True) -> Path:
    """Our segmentation of one case, written through the same step as the command line."""
    files = who.model.cases[kind]
    config = PredictConfig(
        bundles=(who.bundle,),
        inputs=files,
        output=folder,
        backend=backend,
        mirroring=mirroring,
        save_probabilities=True,
        preparing=0,  # planted faults are in this process
    )
    outcome = predict_cases(config).outcomes[0]
    assert outcome.error is None, outcome.error
    return Path(str(outcome.output))


def assert_equal(who: Subject, kind: str, backend: str, folder: Path, *, mirroring: bool = True) -> None:
    """The issue's limits for one case: voxels, Dice per label, probabilities, geometry and type."""
    limit = LIMITS[backend]
    expected = who.reference(kind, mirroring=mirroring)
    ours = predicted(who, kind, backend, folder, mirroring=mirroring)
    assert geometry_differences(ours, expected) == []
    labels = segmentation_from_file(expected)
    differing = differing_voxels(ours, expected)
    allowed = max(limit.voxels, limit.share * labels.size)
    assert differing <= allowed, f"{differing} of {labels.size} voxels differ, {allowed:.1f} may"
    for label in who.model.labels:
        if np.count_nonzero(labels == label) >= DICE_VOXELS:
            assert dice(ours, expected, label) >= DICE, f"Dice of label {label}"
    stem = expected.name[: -len(who.model.file_ending)]
    theirs = np.load(expected.with_name(stem + ".npz"))["probabilities"]
    mine = np.load(folder / (ours.name[: -len(who.model.file_ending)] + ".npz"))["probabilities"]
    assert mine.dtype == theirs.dtype == np.float32
    np.testing.assert_allclose(mine, theirs, atol=limit.probability, rtol=0)


CASES = [
    pytest.param(name, kind, backend, marks=[pytest.mark.slow] if (kind, backend) == ("main", "onnxruntime") else [])
    for backend in LIMITS
    for name in NAMES
    for kind in cases_of(name)
]


# the large scenes are ordinary tests with OpenVINO, and slow ones with ONNX Runtime
@pytest.mark.parametrize(("name", "kind", "backend"), CASES)
def test_segmentation_and_probabilities_equal_nnunets(name: str, kind: str, backend: str, tmp_path: Path) -> None:
    who = subject(name)
    if kind not in who.model.cases:
        assert kind != "main", "every model has a main case"
        return  # a kind that this reader cannot express; tests/test_zoo.py says which and why
    mirroring = name != "demo"  # eight passes of the demo model take a minute: see the slow test below
    assert_equal(who, kind, backend, tmp_path, mirroring=mirroring)


@pytest.mark.slow
@pytest.mark.parametrize("backend", LIMITS)
def test_the_demo_model_with_all_mirrors_equals_nnunets(backend: str, tmp_path: Path) -> None:
    assert_equal(subject("demo"), "main", backend, tmp_path)


def test_a_model_in_a_zip_equals_nnunets(tmp_path: Path) -> None:
    who = subject("regions2d")
    zipped = tmp_path / "model.zip"
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(who.model.folder.rglob("*")):
            archive.write(file, Path("Dataset785_Zoo", who.model.folder.name, file.relative_to(who.model.folder)))
    bundle = tmp_path / "zip.trtb"
    trtbuild.compile(zipped, bundle, backends=("onnxruntime",), tune=False)
    assert_equal(replace(who, bundle=bundle), "main", "onnxruntime", tmp_path / "out")


@pytest.mark.parametrize("name", ["resenc5", "rgb_png"])
def test_without_mirroring_the_result_equals_nnunets(name: str, tmp_path: Path) -> None:
    assert_equal(subject(name), "main", "onnxruntime", tmp_path, mirroring=False)


def test_another_step_size_equals_nnunets(tmp_path: Path) -> None:
    from reference import nnunet_predict, nnunet_predictor

    who = subject("iso3d")
    reference = nnunet_predictor(who.model.folder, who.model.folds, mirroring=True, step_size=0.8)
    expected = nnunet_predict(reference, who.model.cases["main"], tmp_path / "theirs" / "main")
    config = PredictConfig(
        bundles=(who.bundle,), inputs=who.model.cases["main"], output=tmp_path, step_size=0.8, backend="onnxruntime"
    )
    ours = Path(str(predict_cases(config).outcomes[0].output))
    assert differing_voxels(ours, expected) <= max(2, 2e-5 * segmentation_from_file(expected).size)
    assert differing_voxels(ours, who.reference("main")) > 10  # so the step size did something


def floor_steps(size: int, patch: int, step_size: float) -> tuple[int, ...]:
    count = math.ceil((size - patch) / (patch * step_size)) + 1
    return (0,) if count == 1 else tuple(math.floor((size - patch) / (count - 1) * i) for i in range(count))


def centred_gaussian(patch: int, sigma_scale: float) -> np.ndarray:
    distance = np.arange(patch) - (patch - 1) / 2
    return np.exp(-0.5 * (distance / (patch * sigma_scale)) ** 2)


@contextmanager
def no_clip_fault() -> Iterator[None]:
    def leave(result: Any, source: Any) -> None:
        pass

    with mock.patch.object(resample, "clip_to_range", leave), mock.patch.object(resample_axis, "clip_to_range", leave):
        yield


def clip_per_volume_fault() -> Any:
    original = resample.resize_slices

    def per_volume(volume: Any, axis: int, index: Any, kind: Any, out: Any, *, clip: bool) -> None:
        original(volume, axis, index, kind, out, clip=False)
        if clip:
            resample.clip_to_range(out, volume)

    return mock.patch.object(resample, "resize_slices", per_volume)


def padding_fault() -> Any:
    original = grid.padded_shape

    def above(shape: tuple[int, ...], patch: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[slice, ...]]:
        return original(shape, patch)[0], tuple(slice(0, n) for n in shape)

    return mock.patch.object(grid, "padded_shape", above)


def swapped_mirror_fault() -> Any:
    from trtbuild.stitch import accumulate

    original = accumulate.add_window

    def swapped(total: Any, logits: Any, gaussians: Any, start: Any, flip: Any) -> bool:
        return original(total, logits, gaussians, start, (flip[0], flip[2], flip[1]))

    return mock.patch.object(accumulate, "add_window", swapped)


def summed_folds_fault() -> Any:
    original = slabs.window_weights
    return mock.patch.object(slabs, "window_weights", lambda plan, spec, passes: original(plan, spec, len(plan.flips)))


@contextmanager
def changed_spec(change: Callable[[Any], Any]) -> Iterator[None]:
    original = back.segmentation_from_logits

    def changed(logits: Any, grid: Any, spec: Any, **rest: Any) -> Any:
        return original(logits, grid, change(spec), **rest)

    with mock.patch.object(back, "segmentation_from_logits", changed):
        yield


def reversed_regions(spec: Any) -> Any:
    return replace(spec, labels=replace(spec.labels, values=tuple(reversed(spec.labels.values))))


# fault -> (how to plant it, the parity tests (model, kind) of which at least one has to fail)
FAULTS: dict[str, tuple[Callable[[], Any], list[tuple[str, str]]]] = {
    "floor in the steps": (lambda: mock.patch.object(grid, "axis_steps", floor_steps), [(n, "main") for n in MODELS]),
    "Gaussian centred at (patch - 1) / 2": (
        lambda: mock.patch.object(gaussian, "axis_gaussian", centred_gaussian),
        [(n, "main") for n in MODELS],
    ),
    "no clip": (no_clip_fault, [(n, "main") for n in MODELS]),
    "clip per volume instead of per slice": (clip_per_volume_fault, [("ct_aniso", "main"), ("slices2d", "thick")]),
    "padding on one side": (padding_fault, [(n, "small") for n in MODELS]),
    "a mirror axis swapped": (swapped_mirror_fault, [("slices2d", "main"), ("regions4", "main"), ("iso3d", "main")]),
    "folds summed, not averaged": (summed_folds_fault, [("resenc5", "main")]),
    "wrong transpose back": (
        lambda: changed_spec(
            lambda s: replace(s, transpose_forward=s.transpose_backward, transpose_backward=s.transpose_forward)
        ),
        [("slices2d", "main")],
    ),
    "region order reversed": (lambda: changed_spec(reversed_regions), [("regions4", "main")]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails_a_parity_test(fault: str, tmp_path: Path) -> None:
    plant, candidates = FAULTS[fault]
    for name, kind in candidates:
        who = subject(name)
        who.reference(kind)  # nnU-Net's result must not see the fault
        with plant():
            try:
                assert_equal(who, kind, "onnxruntime", tmp_path / name)
            except AssertionError:
                return
    pytest.fail(f"no parity test of {candidates} noticed: {fault}")


def test_the_same_bundle_gives_byte_equal_outputs(tmp_path: Path) -> None:
    for name in ("ct_aniso", "resenc5"):
        for backend in LIMITS:
            runs = [predicted(subject(name), "main", backend, tmp_path / str(i)) for i in range(3)]
            assert len({run.read_bytes() for run in runs}) == 1
            assert len({(run.parent / "main.npz").read_bytes() for run in runs}) == 1


def test_an_array_and_its_file_give_the_same_segmentation() -> None:
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    who = subject("iso3d")
    array, properties = SimpleITKIO().read_images([str(f) for f in who.model.cases["main"]])
    with trtbuild.open(who.bundle) as predictor:
        from_files = predictor.predict(who.model.cases["main"])
        from_array = predictor.predict_array(array, properties["spacing"])
    np.testing.assert_array_equal(from_files.segmentation, from_array.segmentation)
