"""A trained-model folder: which folds and checkpoints are taken, and what is said when they cannot be."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from source_models import MODEL, make_checkpoint, make_dataset, make_plans, tiny_network, write_model

from trtbuild.errors import ModelError
from trtbuild.source import ExportedModel, SourceConfig, export_model


def export(folder: Path, **config: Any) -> ExportedModel:
    return export_model(SourceConfig(folder=folder, **config))


@pytest.fixture(scope="module")
def five_folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("five"), folds=(0, 1, 2, 10, "all"), network=tiny_network())


def folds(model: ExportedModel) -> list[str]:
    return list(model.networks.checkpoints)


def test_by_default_all_numbered_folds_are_taken_in_the_order_of_their_numbers(five_folds: Path) -> None:
    model = export(five_folds)
    assert (folds(model), len(model.networks), model.notes) == (["0", "1", "2", "10"], 4, ())


@pytest.mark.parametrize("chosen", [("2", "0"), ("all",), ("1",)])
def test_named_folds_are_taken_as_named(five_folds: Path, chosen: tuple[str, ...]) -> None:
    assert folds(export(five_folds, folds=chosen)) == list(chosen)


def test_fold_all_is_taken_and_announced_where_there_is_no_numbered_fold(tmp_path: Path) -> None:
    model = export(write_model(tmp_path, folds=("all",)))
    assert folds(model) == ["all"]
    assert any("fold_all" in note for note in model.notes)


def test_numbered_folds_without_the_checkpoint_are_left_out_and_announced(tmp_path: Path) -> None:
    folder = write_model(tmp_path, folds=(0, 1))
    (folder / "fold_0" / "checkpoint_final.pth").rename(folder / "fold_0" / "checkpoint_best.pth")
    model = export(folder)
    assert folds(model) == ["1"]
    assert any("fold_0" in note and "left out" in note for note in model.notes)
    assert folds(export(folder, checkpoint="checkpoint_best.pth")) == ["0"]


def test_other_folders_are_not_taken_for_folds(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    for name in ("fold_0_old", "fold_", "fold_01", "fold_-1", "folds", "crossval_results_folds_0_1"):
        (folder / name).mkdir()
        (folder / name / "checkpoint_final.pth").touch()
    assert folds(export(folder)) == ["0"]


def test_a_missing_fold_is_answered_with_what_there_is(five_folds: Path) -> None:
    with pytest.raises(ModelError) as caught:
        export(five_folds, folds=("0", "3"))
    assert "no fold 3" in str(caught.value)
    assert "fold_0/checkpoint_final.pth, fold_1/checkpoint_final.pth" in str(caught.value)


def test_a_missing_checkpoint_is_answered_with_what_there_is(five_folds: Path) -> None:
    for config in ({"folds": ("0",)}, {}):
        with pytest.raises(ModelError, match=r"checkpoint_best\.pth") as caught:
            export(five_folds, checkpoint="checkpoint_best.pth", **config)
        assert "fold_0/checkpoint_final.pth" in str(caught.value)
        assert "-chk" in str(caught.value)


@pytest.mark.parametrize("missing", ["plans.json", "dataset.json"])
def test_a_folder_without_the_json_files_is_no_model_folder(tmp_path: Path, missing: str) -> None:
    folder = write_model(tmp_path)
    (folder / missing).unlink()
    with pytest.raises(ModelError) as caught:
        export(folder)
    message = str(caught.value)
    assert missing in message
    assert "<Trainer>__<Plans>__<configuration>/" in message
    assert "fold_0" in message  # what there is


def test_the_model_folder_one_level_off_is_suggested(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    for near in (tmp_path, folder / "fold_0"):
        with pytest.raises(ModelError, match=f"did you mean .*{MODEL}"):
            export(near)


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_what_is_no_folder_at_all_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    if kind == "empty":
        path.mkdir()
    with pytest.raises(ModelError, match="no trained nnU-Net v2 model folder"):
        export(path)


@pytest.mark.parametrize("chosen", [(), ("0", "0"), ("-1",), ("01",), ("fold_0",), ("ALL",), ("0,1",), ("../x",)])
def test_folds_that_cannot_be_read_are_refused(tmp_path: Path, chosen: tuple[str, ...]) -> None:
    with pytest.raises(ModelError, match="-f"):
        SourceConfig(folder=tmp_path, folds=chosen)


@pytest.mark.parametrize("name", ["", "../checkpoint_final.pth", "fold_0/checkpoint_final.pth", "/etc/passwd"])
def test_a_checkpoint_is_named_without_a_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match="-chk"):
        SourceConfig(folder=tmp_path, checkpoint=name)


@pytest.mark.parametrize(
    ("fact", "changes"),
    [
        ("trainer", {"trainer_name": "nnUNetTrainerNoMirroring"}),
        ("configuration", {"init_args": {"configuration": "3d_lowres", "fold": 1}}),
        ("mirror_axes", {"inference_allowed_mirroring_axes": (0,)}),
    ],
)
def test_folds_of_different_trainings_are_refused(tmp_path: Path, fact: str, changes: dict[str, Any]) -> None:
    import torch

    folder = write_model(tmp_path, folds=(0, 1))
    torch.save(make_checkpoint(tiny_network().state_dict(), 1, **changes), folder / "fold_1" / "checkpoint_final.pth")
    with pytest.raises(ModelError, match=f"0 and 1 differ in {fact}"):
        export(folder)
    assert folds(export(folder, folds=("0",))) == ["0"]


def test_a_fold_folder_with_the_checkpoint_of_another_fold_is_announced(tmp_path: Path) -> None:
    folder = write_model(tmp_path, folds=(0,))
    (folder / "fold_0").rename(folder / "fold_3")
    assert any("fold_3 holds a checkpoint of fold 0" in note for note in export(folder).notes)


def test_a_mirror_axis_that_a_2d_patch_lacks_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path, make_plans(2), inference_allowed_mirroring_axes=(0, 2))
    with pytest.raises(ModelError, match="mirror axis"):
        export(folder)


def test_the_configuration_comes_from_the_checkpoint_and_not_from_the_folder_name(tmp_path: Path) -> None:
    plans = make_plans()
    plans["configurations"]["2d_like"] = {"inherits_from": "3d_fullres", "patch_size": [8, 8, 8]}
    folder = write_model(tmp_path, plans, init_args={"configuration": "2d_like", "fold": 0})
    assert "3d_fullres" in folder.name
    model = export(folder)
    assert (model.spec.configuration, model.spec.patch) == ("2d_like", (8, 8, 8))


def test_files_are_handed_on_as_they_are_with_their_hashes(five_folds: Path) -> None:
    model = export(five_folds, folds=("0", "all"))
    assert model.plans == (five_folds / "plans.json").read_bytes()
    assert model.dataset == (five_folds / "dataset.json").read_bytes()
    names = ["plans.json", "dataset.json", "fold_0/checkpoint_final.pth", "fold_all/checkpoint_final.pth"]
    assert list(model.sources) == names
    for name, digest in model.sources.items():
        assert digest == hashlib.sha256((five_folds / name).read_bytes()).hexdigest()


def test_broken_json_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_model(tmp_path, make_plans(), make_dataset())
    (folder / "dataset.json").write_text("{'labels': 0}")
    with pytest.raises(ModelError, match=r"dataset\.json is not JSON"):
        export(folder)


def test_importing_the_room_loads_no_heavy_package() -> None:
    heavy = ["torch", "onnx", "onnxruntime", "dynamic_network_architectures", "nnunetv2", "scipy", "numba", "openvino"]
    code = f"import sys, trtbuild.source; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
