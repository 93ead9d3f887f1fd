"""A cascade in one bundle, its second stage alone, post-processing, and the ways in which a model can be named."""

from __future__ import annotations

import functools
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from models import root, zoo_model
from reference import nnunet_predictor, quiet
from source_models import make_dataset, make_plans, write_model

import trtbuild
from trtbuild.bundle import Bundle, open_bundle
from trtbuild.cli import run
from trtbuild.errors import ModelError, TrtbuildError
from trtbuild.spec import KeepLargestComponent

QUICK: dict[str, Any] = {"backends": ("onnxruntime",), "tune": False}


@functools.cache
def cascade() -> Bundle:
    path = root() / "both.trtb"
    full, low = zoo_model("cascade3d").folder, zoo_model("lowres3d").folder
    return trtbuild.compile(full, path, previous_stage=low, backends=("onnxruntime", "openvino"), tune=False)


def golden_case(bundle: Bundle) -> tuple[np.ndarray, tuple[float, ...], np.ndarray]:
    golden = next(g for g in bundle.manifest.goldens if g.kind == "case")
    image, labels = (np.load(bundle.file(name), allow_pickle=False) for name in (golden.input, golden.output))
    assert golden.spacing is not None
    return image, golden.spacing, labels


def test_both_stages_have_networks_engines_and_goldens_of_their_own() -> None:
    manifest = open_bundle(cascade().path).manifest
    assert [stage.spec.configuration for stage in manifest.stages] == ["3d_lowres", "3d_cascade_fullres"]
    assert [stage.mirror_axes for stage in manifest.stages] == [(0, 1, 2), (0, 2)]
    names = [network.id for stage in manifest.stages for network in stage.networks]
    assert names == ["stage_0_fold_0_fp32", "stage_1_fold_0_fp32"]
    assert [n.io[0].shape[1] for stage in manifest.stages for n in stage.networks] == [1, 4]
    assert {(e.network, e.backend) for e in manifest.engines} == {
        (name, backend) for name in names for backend in ("onnxruntime", "openvino")
    }
    assert [g.network for g in manifest.goldens if g.kind == "patch"] == names
    sources = manifest.provenance.sources
    assert "fold_0/checkpoint_final.pth" in sources
    assert sources["previous_stage/fold_0/checkpoint_final.pth"] != sources["fold_0/checkpoint_final.pth"]


@pytest.mark.parity
def test_the_golden_case_of_a_cascade_is_what_nnunet_makes_of_it_stage_after_stage() -> None:
    image, spacing, labels = golden_case(cascade())
    previous = None
    for name in ("lowres3d", "cascade3d"):
        model = zoo_model(name)
        predictor = nnunet_predictor(model.folder, model.folds, mirroring=False)
        # float32 as from nnU-Net's reader: it writes -1 into the array, and dies of that in its own uint8
        previous_4d = None if previous is None else previous[None].astype(np.float32)
        with quiet():
            previous = predictor.predict_single_npy_array(image, {"spacing": list(spacing)}, previous_4d)
    assert previous is not None
    assert len(np.unique(labels)) == 4
    assert np.count_nonzero(labels != previous) <= 2


def test_a_cascade_is_recompiled_for_another_backend_and_keeps_what_it_is(tmp_path: Path) -> None:
    other = trtbuild.compile(cascade().path, tmp_path / "other.trtb", **QUICK)
    assert other.manifest.stages == cascade().manifest.stages
    assert {engine.backend for engine in other.manifest.engines} == {"onnxruntime"}
    assert other.manifest.goldens == cascade().manifest.goldens
    np.testing.assert_array_equal(golden_case(other)[2], golden_case(cascade())[2])


def test_a_second_stage_alone_becomes_a_bundle_that_says_what_it_needs(tmp_path: Path) -> None:
    lines: list[str] = []
    path = tmp_path / "alone.trtb"
    bundle = trtbuild.compile(zoo_model("cascade3d").folder, path, report=lines.append, **QUICK)
    (stage,) = open_bundle(bundle.path).manifest.stages
    assert stage.spec.previous_stage == "3d_lowres"
    assert [golden.kind for golden in bundle.manifest.goldens] == ["patch"]
    assert any("needs the segmentations of 3d_lowres" in line for line in lines)
    again = trtbuild.compile(path, tmp_path / "again.trtb", **QUICK)
    assert again.manifest.stages == bundle.manifest.stages


def changed_copy(name: str, target: Path, **facts: Any) -> Path:
    """A zoo model whose dataset.json or plans.json says something else."""
    shutil.copytree(zoo_model(name).folder, target)
    for file in ("plans.json", "dataset.json"):
        content = json.loads((target / file).read_text())
        content |= {key: value for key, value in facts.items() if key in content}
        (target / file).write_text(json.dumps(content))
    return target


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"dataset_name": "Dataset009_Other"}, "dataset"),
        ({"channel_names": {"0": "T2"}}, "channels"),
        ({"image_reader_writer": "NibabelIO"}, "reader"),
        ({"file_ending": ".nrrd"}, "file ending"),
        ({"labels": {"background": 0, "one": 1, "three": 2, "two": 3}}, "labels"),
    ],
)
def test_a_first_stage_of_another_dataset_is_refused_by_what_differs(
    tmp_path: Path, facts: dict[str, Any], named: str
) -> None:
    other = changed_copy("lowres3d", tmp_path / "lowres", **facts)
    with pytest.raises(ModelError, match=f"differ in {named}"):
        trtbuild.compile(zoo_model("cascade3d").folder, tmp_path / "b.trtb", previous_stage=other, **QUICK)
    assert not (tmp_path / "b.trtb").exists()


def test_stages_that_do_not_follow_each_other_are_refused(tmp_path: Path) -> None:
    low, full = zoo_model("lowres3d").folder, zoo_model("cascade3d").folder
    with pytest.raises(ModelError, match="not the previous stage") as caught:
        trtbuild.compile(full, tmp_path / "b.trtb", previous_stage=full, **QUICK)
    assert "3d_lowres" in str(caught.value)
    with pytest.raises(ModelError, match="no second stage"):
        trtbuild.compile(low, tmp_path / "b.trtb", previous_stage=low, **QUICK)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("previous_stage", "x"), ("network", "a:b"), ("dataset", "1"), ("configuration", "2d"), ("trainer", "T"),
        ("plans", "P"),
    ],
)  # fmt: skip
def test_a_bundle_is_not_asked_for_another_model(tmp_path: Path, option: str, value: str) -> None:
    with pytest.raises(ModelError, match="this is a bundle"):
        trtbuild.compile(cascade().path, tmp_path / "b.trtb", **{option: value}, **QUICK)


# --- post-processing ---


def postprocessing(path: Path, *labels: int) -> Path:
    arguments = [{"labels_or_regions": list(labels)}]
    content = {
        "postprocessing_fns": ["remove_all_but_largest_component_from_segmentation"],
        "postprocessing_kwargs": arguments,
    }
    path.write_text(json.dumps(content))
    return path


def test_postprocessing_goes_into_the_bundle_and_into_its_golden_case(tmp_path: Path) -> None:
    from scipy.ndimage import label

    folder = zoo_model("ignore3d").folder
    plain = trtbuild.compile(folder, tmp_path / "plain.trtb", **QUICK)
    steps = (KeepLargestComponent(labels=(1,)),)
    file = postprocessing(tmp_path / "postprocessing.json", 1)
    bundle = trtbuild.compile(folder, tmp_path / "b.trtb", postprocessing=file, **QUICK)
    assert open_bundle(bundle.path).manifest.postprocessing == steps
    before, after = golden_case(plain)[2], golden_case(bundle)[2]
    components = [label(labels == 1, np.ones((3, 3, 3)))[1] for labels in (before, after)]
    assert components[0] > components[1] == 1
    with trtbuild.open(bundle.path) as predictor:
        image, spacing, expected = golden_case(bundle)
        predicted = predictor.predict_array(image, spacing, mirroring=False)
    np.testing.assert_array_equal(predicted.segmentation, expected)

    again = trtbuild.compile(bundle.path, tmp_path / "again.trtb", **QUICK)
    assert again.manifest.postprocessing == steps
    np.testing.assert_array_equal(golden_case(again)[2], after)
    added = trtbuild.compile(plain.path, tmp_path / "added.trtb", postprocessing=file, **QUICK)
    assert added.manifest.postprocessing == steps
    np.testing.assert_array_equal(golden_case(added)[2], after)


def test_postprocessing_of_another_model_is_refused_before_the_work(tmp_path: Path) -> None:
    file = postprocessing(tmp_path / "postprocessing.json", 7)
    for model in (zoo_model("ignore3d").folder, cascade().path):
        lines: list[str] = []
        with pytest.raises(ModelError, match="of another model") as caught:
            trtbuild.compile(model, tmp_path / "b.trtb", postprocessing=file, report=lines.append, **QUICK)
        assert str(file) in str(caught.value)
        assert not [line for line in lines if "exporting" in line]


# --- how a model is named ---


def test_a_model_without_a_name_or_with_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TrtbuildError, match="-d DATASET -c CONFIGURATION"):
        trtbuild.compile(None, tmp_path / "b.trtb", **QUICK)
    folder = write_model(tmp_path / "m")
    with pytest.raises(ModelError, match="nothing to choose"):
        trtbuild.compile(folder, tmp_path / "b.trtb", configuration="3d_fullres", **QUICK)


def test_the_command_line_takes_nnunets_short_form_and_zips(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    folder = write_model(results / "Dataset042_Tiny", make_plans(), make_dataset())
    archive = tmp_path / "model.zip"
    with zipfile.ZipFile(archive, "w") as target:
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            target.write(path, path.relative_to(results))
    monkeypatch.setenv("nnUNet_results", str(results))
    rest = ["--no-tune", "--backend", "onnxruntime", "--json"]
    names = ["-d", "42", "-c", "3d_fullres", "-tr", "nnUNetTrainer", "-p", "nnUNetPlans"]
    for number, words in enumerate((names, names[:4], [str(archive)], [str(archive), *names])):
        assert run(["compile", *words, "-o", str(tmp_path / f"{number}.trtb"), *rest]) == 0, capsys.readouterr().err
    capsys.readouterr()
    digests = {open_bundle(tmp_path / f"{n}.trtb").manifest.files["networks/fold_0_fp32.onnx"].sha256 for n in range(4)}
    assert len(digests) == 1
    assert run(["export", *names[:4], "-o", str(tmp_path / "onnx")]) == 0
    assert (tmp_path / "onnx" / "fold_0.onnx").is_file()
    assert run(["compile", "-d", "42", "-o", str(tmp_path / "none.trtb")]) == 1
    assert "-c CONFIGURATION" in capsys.readouterr().err


def test_both_stages_of_a_cascade_come_out_of_one_zip(tmp_path: Path) -> None:
    archive = tmp_path / "cascade.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
        for name in ("lowres3d", "cascade3d"):
            folder = zoo_model(name).folder
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                target.write(path, f"Dataset701_Cascade/{folder.name}/{path.relative_to(folder)}")
    bundle = trtbuild.compile(
        archive, tmp_path / "zip.trtb", configuration="3d_cascade_fullres", previous_stage=archive, **QUICK
    )
    assert bundle.manifest.stages == cascade().manifest.stages
    assert bundle.manifest.provenance.sources == cascade().manifest.provenance.sources


def test_a_factory_given_on_the_command_line_is_noted_in_the_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_factory.py").write_text(
        "from source_models import architecture, nnunet_network\n"
        "def build(num_input_channels, num_output_channels):\n"
        "    return nnunet_network(architecture(), num_input_channels, num_output_channels, seed=9)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    folder = write_model(tmp_path / "m", trainer_name="MyTrainer")
    words = ["compile", str(folder), "-o", str(tmp_path / "b.trtb"), "--no-tune", "--backend", "onnxruntime"]
    assert run(words) == 1
    assert "--network" in capsys.readouterr().err
    assert run([*words, "--network", "my_factory:build"]) == 0
    assert any("my_factory:build" in note for note in open_bundle(tmp_path / "b.trtb").manifest.provenance.notes)
