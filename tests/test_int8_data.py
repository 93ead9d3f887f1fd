"""Where calibration patches come from, through compile: preprocessed folders, raw images, cascades, and all that can be
wrong with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calibration_samples import write_blosc, write_case
from int8_samples import KINDS, LENIENT, cascade_data, compiled, data_identifier, nnunet_case, read_json
from models import root, subject, zoo_model

from trtbuild.bundle import Bundle, open_bundle
from trtbuild.config import CalibrationConfig, GateConfig
from trtbuild.errors import InputError, TrtbuildError
from trtbuild.spec import ModelSpec
from trtbuild.steps.precision.data import StageData, stage_data
from trtbuild.steps.precision.data import data_identifier as identifier_from_plans
from trtbuild_calibration import ArraySource, read_table

FULL = ("stage_0_fold_0_fp32", "stage_1_fold_0_fp32")
LOW = "fold_0_fp32"
Spoil = Callable[[Path], None]


def low_bundle() -> Path:
    """The cascade's first stage alone, in FP32."""
    return subject("lowres3d").bundle


def typed(model: Path, output: Path, calibration: CalibrationConfig, **options: Any) -> Bundle:
    given: dict[str, Any] = {"precision": "int8", "gate": LENIENT, "method": "minmax"}
    return compiled(model, output, calibration=calibration, **(given | options))


def dataset_copy(target: Path, *, seg: bool = True) -> Path:
    shutil.copytree(cascade_data().dataset, target)
    if not seg:
        for file in target.rglob("*_seg.b2nd"):
            file.unlink()
    return target


def cases_of(bundle: Bundle, network: str) -> tuple[set[str], set[str]]:
    """Names of the calibration's cases and of the gate's."""
    calibration = next(c for c in bundle.manifest.calibrations if c["network"] == network)
    gate = next(g for g in bundle.manifest.gates if g["network"] == network.replace("fp32", "int8"))
    return set(calibration["cases"]), set(gate["cases"])


# --- cascades, raw images ---


def test_both_stages_of_a_cascade_are_calibrated_the_second_with_the_first_ones_labels(tmp_path: Path) -> None:
    data = cascade_data()
    calibration = CalibrationConfig(data=data.dataset, previous=data.next_stage, patches=4)
    bundle = typed(subject("cascade3d").bundle, tmp_path / "b.trtb", calibration)
    manifest = open_bundle(bundle.path).manifest
    for number, (stage, name) in enumerate(zip(manifest.stages, FULL, strict=True)):
        assert [network.id for network in stage.networks] == [name, f"stage_{number}_fold_0_int8"]
        calibrating, judging = cases_of(bundle, name)
        assert not calibrating & judging
        assert calibrating | judging <= set(KINDS)
        layers = next(c for c in manifest.calibrations if c["network"] == name)["layers"]
        assert len(layers["int8"]) == manifest.engines[number].options["quantized_layers"] > 5
    # the second stage sees the image, and one channel of zeros and ones per label
    model, image = zoo_model("cascade3d"), cascade_data().images / "main_0000.nii.gz"
    before = nnunet_case(model, image, data.previous / "main.nii.gz")[1][0]
    source = opened(manifest.stages[1].spec, calibration, bundle.path, tmp_path).sources["main"]
    box = tuple((0, length) for length in source.shape[1:])
    seen = source.read(box)
    np.testing.assert_array_equal(seen[1:], np.stack([before == label for label in (1, 2, 3)]))
    in_int8, in_fp32 = (open_predicted(path, image) for path in (bundle.path, subject("cascade3d").bundle))
    assert 0.6 < np.mean(in_int8 == in_fp32) < 1  # random weights: labels without a margin


def open_predicted(path: Path, image: Path) -> np.ndarray:
    import trtbuild

    with trtbuild.open(path, backend="openvino", threads=2) as predictor:
        return predictor.predict([image], mirroring=False).segmentation


def opened(spec: ModelSpec, config: CalibrationConfig, bundle: Path, scratch: Path) -> StageData:
    plans, dataset = ((bundle / name).read_bytes() for name in ("plans.json", "dataset.json"))
    folder = scratch / f"{spec.configuration}_{config.images is None}"
    folder.mkdir()
    return stage_data(config, spec, plans=plans, dataset=dataset, scratch=folder, report=lambda line: None)


@pytest.mark.parametrize("stage", [0, 1])
def test_raw_images_become_what_nnunet_preprocessed(stage: int, tmp_path: Path) -> None:
    data, bundle = cascade_data(), subject("cascade3d").bundle
    spec = open_bundle(bundle).manifest.stages[stage].spec
    ready = opened(spec, CalibrationConfig(data=data.dataset, previous=data.next_stage), bundle, tmp_path)
    raw = CalibrationConfig(images=data.images, labels=data.labels, previous=data.previous)
    made = opened(spec, raw, bundle, tmp_path)
    assert set(made.sources) == set(ready.sources) == set(KINDS)
    for name, theirs in ready.sources.items():
        ours, box = made.sources[name], tuple((0, length) for length in theirs.shape[1:])
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours.read(box), theirs.read(box), atol=5e-6)
        expected, labels = theirs.read_labels(box), ours.read_labels(box)
        assert expected is not None
        assert labels is not None
        np.testing.assert_array_equal(labels, expected)


def test_raw_images_without_labels_calibrate_as_preprocessed_ones_and_are_judged_against_fp32(tmp_path: Path) -> None:
    data = cascade_data()
    scales = []
    for name, source in (
        ("raw", {"images": data.images, "previous": data.previous}),
        ("ready", {"data": dataset_copy(tmp_path / "dataset", seg=False), "previous": data.next_stage}),
    ):
        folder = tmp_path / name
        calibration = CalibrationConfig(**source, patches=3, scales=folder)
        gate = replace(LENIENT, agreement=0.3)
        bundle = typed(subject("cascade3d").bundle, tmp_path / f"{name}.trtb", calibration, gate=gate)
        for facts in bundle.manifest.gates:
            assert not facts["agreement"]["labelled"]
            assert facts["agreement"]["classes"][1]["dice_fp32"] is None
            assert facts["agreement"]["classes"][1]["dice_between"] > 0.3
        scales.append([read_table(folder / f"{network}.json") for network in FULL])
    for ours, theirs in zip(*scales, strict=True):
        assert ours.fingerprint.cases.keys() == theirs.fingerprint.cases.keys()
        assert ours.fingerprint.cases != theirs.fingerprint.cases, "digests are of the files"
        assert ours.coverage.patches == theirs.coverage.patches
        for name, entry in theirs.entries.items():
            assert ours.entries[name].maximum == pytest.approx(entry.maximum, rel=1e-4)


@pytest.mark.parametrize("raw", [False, True])
def test_a_second_stage_without_the_first_ones_labels_is_refused(raw: bool, tmp_path: Path) -> None:
    data = cascade_data()
    source = {"images": data.images} if raw else {"data": data.dataset}
    with pytest.raises(InputError, match="calibrated with the first one's predictions") as caught:
        typed(subject("cascade3d").bundle, tmp_path / "b.trtb", CalibrationConfig(**source, patches=2), gate=None)
    assert "--calibration-previous" in str(caught.value)
    assert not (tmp_path / "b.trtb").exists()


def test_first_stage_labels_for_a_model_that_takes_none_are_refused(tmp_path: Path) -> None:
    data = cascade_data()
    with pytest.raises(InputError, match="for the second stage of a cascade") as caught:
        typed(low_bundle(), tmp_path / "b.trtb",
              CalibrationConfig(data=data.dataset, previous=data.next_stage, patches=2))  # fmt: skip
    assert "3d_lowres" in str(caught.value)


def test_a_case_that_the_first_stage_did_not_predict_is_named(tmp_path: Path) -> None:
    data = cascade_data()
    previous = shutil.copytree(data.next_stage, tmp_path / "previous")
    (previous / "small.b2nd").unlink()
    with pytest.raises(InputError, match="has not predicted a case") as caught:
        typed(subject("cascade3d").bundle, tmp_path / "b.trtb",
              CalibrationConfig(data=data.dataset, previous=previous, patches=2))  # fmt: skip
    assert "small.b2nd" in str(caught.value)


# --- which cases calibrate, which judge ---


def test_the_gate_judges_by_the_folds_validation_cases(tmp_path: Path) -> None:
    judged = []
    for held_out in KINDS:
        dataset = dataset_copy(tmp_path / held_out)
        other = {"train": [held_out, "elsewhere"], "val": [kind for kind in KINDS if kind != held_out]}
        own = {"train": [kind for kind in KINDS if kind != held_out], "val": [held_out, "elsewhere"]}
        (dataset / "splits_final.json").write_text(json.dumps([own, other]))
        bundle = typed(low_bundle(), tmp_path / f"{held_out}.trtb", CalibrationConfig(data=dataset, patches=2))
        calibrating, judging = cases_of(bundle, LOW)
        assert held_out not in calibrating
        judged.append(judging)
    assert judged == [{kind} for kind in KINDS]


@pytest.mark.parametrize(
    ("splits", "fold", "expected"),
    [
        (True, "0", "validation cases of fold 0 (splits_final.json)"),
        (True, "1", "validation cases of fold 1 (splits_final.json)"),
        (True, "all", "drawn by the seed: FP32 may have been trained on them"),
        (False, "0", "drawn by the seed: FP32 may have been trained on them"),
    ],
)
def test_it_is_said_whether_fp32_may_have_seen_the_gates_cases(
    splits: bool, fold: str, expected: str, tmp_path: Path
) -> None:
    file = tmp_path / "splits_final.json"
    validation = [["b", "e"], ["c", "d"]]
    file.write_text(json.dumps([{"train": [n for n in "abcde" if n not in val], "val": val} for val in validation]))
    sources = {name: ArraySource(name=name, data=np.zeros((1, 2, 2, 2), np.float32)) for name in "abcde"}
    data = StageData(sources=sources, digest=str, splits=file if splits else None)
    assert data.held_out_by(fold) == expected
    gate = {source.name for source in data.split(fold, 0, gated=True)[1]}
    if "validation" in expected:
        assert gate == set(validation[int(fold)])
    else:
        assert len(gate) == 1


def test_splits_that_are_damaged_stop_it(tmp_path: Path) -> None:
    dataset = dataset_copy(tmp_path / "dataset")
    (dataset / "splits_final.json").write_text('[{"train": ["main"]')
    with pytest.raises(InputError, match="list of folds is not nnU-Net's") as caught:
        typed(low_bundle(), tmp_path / "b.trtb", CalibrationConfig(data=dataset, patches=2))
    assert "splits_final.json" in str(caught.value)


# --- bad input ---


def no_cases(dataset: Path) -> None:
    for file in (dataset / "nnUNetPlans_3d_lowres").iterdir():
        file.unlink()


def no_folder(dataset: Path) -> None:
    shutil.rmtree(dataset)


def two_channels(dataset: Path) -> None:
    write_blosc(dataset / "nnUNetPlans_3d_lowres" / "small.b2nd", np.zeros((2, 11, 13, 11), np.float32))


def no_configuration(dataset: Path) -> None:
    shutil.rmtree(dataset / "nnUNetPlans_3d_lowres")


def other_labels(dataset: Path) -> None:
    facts = read_json(dataset / "dataset.json")
    facts["labels"] = {"background": 0, "liver": 1}
    (dataset / "dataset.json").write_text(json.dumps(facts))


def other_channels(dataset: Path) -> None:
    facts = read_json(dataset / "dataset.json")
    facts["channel_names"] = {"0": "CT"}
    (dataset / "dataset.json").write_text(json.dumps(facts))


def no_json(dataset: Path) -> None:
    (dataset / "dataset.json").write_text("{")


def nan_patch(dataset: Path) -> None:
    for kind in KINDS:
        write_case(dataset / "nnUNetPlans_3d_lowres", kind, "b2nd", np.full((1, 22, 22, 21), np.nan, np.float32), None)
        (dataset / "nnUNetPlans_3d_lowres" / f"{kind}_seg.b2nd").unlink()


def one_case(dataset: Path) -> None:
    for kind in KINDS[1:]:
        for file in (dataset / "nnUNetPlans_3d_lowres").glob(f"{kind}*"):
            file.unlink()


def cut_file(dataset: Path) -> None:
    file = dataset / "nnUNetPlans_3d_lowres" / "main.b2nd"
    file.write_bytes(file.read_bytes()[:200])


def strange_label(dataset: Path) -> None:
    for file in (dataset / "nnUNetPlans_3d_lowres").glob("*_seg.b2nd"):
        import blosc2

        write_blosc(file, np.full(blosc2.open(str(file)).shape, 9, np.int8))


def some_labels(dataset: Path) -> None:
    (dataset / "splits_final.json").write_text(json.dumps([{"train": ["main"], "val": ["small", "turned"]}]))
    (dataset / "nnUNetPlans_3d_lowres" / "turned_seg.b2nd").unlink()


BAD: dict[str, tuple[Spoil, str, str]] = {
    "empty folder": (no_cases, "holds no preprocessed cases", "an empty folder"),
    "no folder": (no_folder, "There is no such folder", "nnUNet_preprocessed"),
    "wrong channels": (two_channels, "another number of channels", "small.b2nd"),
    "configuration missing": (no_configuration, "not preprocessed for the model's configuration", "3d_fullres"),
    "other labels": (other_labels, "of another dataset", "liver"),
    "other channel names": (other_channels, "of another dataset", "CT"),
    "damaged dataset.json": (no_json, "dataset.json beside the cases cannot be read", "dataset.json"),
    "NaN": (nan_patch, "A patch holds NaN or infinity", "case "),
    "one case": (one_case, "no cases left for the gate", "--no-gate"),
    "cut file": (cut_file, "A file of a preprocessed case is damaged", "main.b2nd"),
    "strange label": (strange_label, "a value that the model does not know", "case "),
    "some labels": (some_labels, "gate's cases have labels and some have none", "turned"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_cases_stop_it_with_a_message_of_their_own_and_leave_no_bundle(name: str, tmp_path: Path) -> None:
    spoil, what, detail = BAD[name]
    dataset = dataset_copy(tmp_path / "dataset")
    spoil(dataset)
    with pytest.raises(InputError, match=what) as caught:
        typed(low_bundle(), tmp_path / "b.trtb", CalibrationConfig(data=dataset, patches=2))
    assert detail in str(caught.value)
    assert list(tmp_path.glob("*.trtb")) == []


def test_every_bad_case_has_another_message() -> None:
    whats = [what for name, (_, what, _) in BAD.items() if name != "other channel names"]
    assert len(set(whats)) == len(whats)


def test_the_folder_of_another_configuration_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = cascade_data().dataset / "nnUNetPlans_3d_fullres"
    with pytest.raises(InputError, match="preprocessed for another configuration") as caught:
        typed(low_bundle(), tmp_path / "b.trtb", CalibrationConfig(data=folder, patches=2))
    for text in ("nnUNetPlans_3d_lowres", "nnUNetPlans_3d_fullres"):
        assert text in str(caught.value)


def test_the_folder_of_the_configuration_itself_is_taken(tmp_path: Path) -> None:
    folder = cascade_data().dataset / data_identifier(zoo_model("lowres3d"))
    plans = (low_bundle() / "plans.json").read_bytes()
    assert folder.name == identifier_from_plans(plans, "3d_lowres") == "nnUNetPlans_3d_lowres"
    assert identifier_from_plans(plans, "3d_cascade_fullres") == "nnUNetPlans_3d_fullres"
    bundle = typed(low_bundle(), tmp_path / "b.trtb", CalibrationConfig(data=folder, patches=2), gate=None)
    assert set(bundle.manifest.calibrations[0]["cases"]) <= set(KINDS)
    assert bundle.manifest.gates == ()


@pytest.mark.parametrize("labels", [False, True])
def test_a_folder_without_images_or_labels_for_them_is_refused(labels: bool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    folders = {"images": tmp_path / "empty"}
    if labels:
        folders = {"images": cascade_data().images, "labels": tmp_path / "empty"}
    with pytest.raises(InputError) as caught:
        typed(low_bundle(), tmp_path / "b.trtb", CalibrationConfig(**folders, patches=2))
    assert str(tmp_path / "empty") in str(caught.value)
    assert not (tmp_path / "b.trtb").exists()


# --- the folder of scales ---


def calibrating(scales: Path, **changes: Any) -> CalibrationConfig:
    return CalibrationConfig(data=cascade_data().dataset, patches=3, scales=scales, **changes)


def scale_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_scales_are_kept_used_again_and_byte_for_byte_those_of_the_bundle(tmp_path: Path) -> None:
    lines: list[str] = []
    first = typed(low_bundle(), tmp_path / "1.trtb", calibrating(tmp_path / "scales"))
    kept = scale_files(tmp_path / "scales")
    assert set(kept) == {f"{LOW}.json", f"{LOW}.cache"}
    for name, content in kept.items():
        assert first.file(f"calibrations/{name}").read_bytes() == content
    second = typed_saying(tmp_path / "2.trtb", calibrating(tmp_path / "scales"), lines.append)
    assert not [line for line in lines if line.startswith("calibrating, ")]
    assert scale_files(tmp_path / "scales") == kept
    assert second.manifest.files == first.manifest.files


def typed_saying(output: Path, calibration: CalibrationConfig, say: Callable[[str], None]) -> Bundle:
    from int8_samples import QUICK

    from trtbuild.config import CompileConfig
    from trtbuild.steps.compilation.compile import compile_bundle

    config = CompileConfig(
        model=low_bundle(), output=output, precision="int8", method="minmax", gate=LENIENT, calibration=calibration,
        **QUICK,
    )  # fmt: skip
    return compile_bundle(config, say=say)


@pytest.mark.parametrize("after", [2, 4], ids=["maxima", "histograms"])
def test_an_interrupted_calibration_goes_on_to_the_same_bytes(after: int, tmp_path: Path) -> None:
    done: list[str] = []

    def interrupted(line: str) -> None:
        if line.startswith("calibrating, "):
            done.append(line)
            if len(done) == after:
                raise KeyboardInterrupt

    whole: list[str] = []
    typed_saying(tmp_path / "whole.trtb", calibrating(tmp_path / "whole"), whole.append)
    passes = len([line for line in whole if line.startswith("calibrating, ")])
    with pytest.raises(KeyboardInterrupt):
        typed_saying(tmp_path / "b.trtb", calibrating(tmp_path / "scales"), interrupted)
    assert [path.name for path in (tmp_path / "scales").iterdir()] == [f"{LOW}.partial.npz"]
    assert not (tmp_path / "b.trtb").exists()
    rest: list[str] = []
    bundle = typed_saying(tmp_path / "b.trtb", calibrating(tmp_path / "scales"), rest.append)
    assert len([line for line in rest if line.startswith("calibrating, ")]) == passes - after
    assert scale_files(tmp_path / "scales") == scale_files(tmp_path / "whole")
    assert bundle.manifest.files == open_bundle(tmp_path / "whole.trtb").manifest.files


@pytest.fixture(scope="module")
def kept_scales() -> Path:
    folder = root() / "kept_scales"
    typed(low_bundle(), folder.with_suffix(".trtb"), calibrating(folder))
    return folder


def cut_scales(folder: Path) -> None:
    file = folder / f"{LOW}.json"
    file.write_bytes(file.read_bytes()[:-100])


def foreign_scales(folder: Path) -> None:
    facts = read_json(folder / f"{LOW}.json")
    facts["fingerprint"]["network"] = "0" * 64
    (folder / f"{LOW}.json").write_text(json.dumps(facts))


def negative_scale(folder: Path) -> None:
    facts = read_json(folder / f"{LOW}.json")
    next(iter(facts["entries"].values()))["amax"]["entropy"] = -1.0
    (folder / f"{LOW}.json").write_text(json.dumps(facts))


def cut_state(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / f"{LOW}.partial.npz").write_bytes(b"PK\3\4 cut")


@pytest.mark.parametrize(
    ("spoil", "what", "detail"),
    [
        (cut_scales, "JSON|cannot be read|damaged", f"{LOW}.json"),
        (foreign_scales, "scales of another calibration", "network"),
        (negative_scale, "entropy", "-1"),
        (cut_state, "state of an observation is damaged", f"{LOW}.partial.npz"),
    ],
)
def test_scales_that_are_damaged_or_foreign_are_not_believed(
    spoil: Spoil, what: str, detail: str, kept_scales: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(kept_scales, tmp_path / "scales")
    spoil(folder)
    before = scale_files(folder)
    with pytest.raises(TrtbuildError, match=what) as caught:
        typed(low_bundle(), tmp_path / "b.trtb", calibrating(folder))
    assert isinstance(caught.value, InputError)
    assert detail in str(caught.value)
    assert scale_files(folder) == before
    assert not (tmp_path / "b.trtb").exists()


@pytest.mark.parametrize("changes", [{"seed": 1}, {"patches": 4}])
def test_scales_of_other_settings_are_refused_by_what_differs(
    changes: dict[str, Any], kept_scales: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="scales of another calibration"):
        typed(low_bundle(), tmp_path / "b.trtb", replace(calibrating(kept_scales), **changes))


def test_scales_that_cannot_be_kept_are_said_before_the_calibration(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrtbuildError) as caught:
        typed(low_bundle(), tmp_path / "b.trtb", calibrating(tmp_path / "file" / "scales"))
    assert "scales" in str(caught.value)


def test_a_gate_of_more_patches_than_there_are_voxels_is_no_problem(tmp_path: Path) -> None:
    """Patches are drawn with replacement, and padded where the image is smaller."""
    gate = GateConfig(patches=5, mean_loss=1, class_loss=1)
    bundle = typed(low_bundle(), tmp_path / "b.trtb", calibrating(tmp_path / "scales"), gate=gate)
    assert bundle.manifest.gates[0]["patches"] == 5
