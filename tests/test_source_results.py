"""Models by nnU-Net's names: `-d DATASET -c CONFIG -tr -p` below `nnUNet_results`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from source_models import MODEL, write_model

from trtbuild.errors import ModelError
from trtbuild.source import ExportedModel, ModelName, SourceConfig, export_model
from trtbuild.source.names import folder_from_results

DATASET = "Dataset042_Tiny"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two datasets; the first has one model of other plans and trainer beside the default one."""
    folder = write_model(tmp_path / DATASET)
    for name in ("nnUNetTrainer_5epochs__nnUNetPlans__3d_fullres", "nnUNetTrainer__nnUNetResEncUNetMPlans__2d"):
        (tmp_path / DATASET / name).mkdir()
    (tmp_path / DATASET / "inference_information.json").touch()
    (tmp_path / DATASET / "ensembles").mkdir()
    (tmp_path / "Dataset420_Other" / MODEL).mkdir(parents=True)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    assert folder == tmp_path / DATASET / MODEL
    return tmp_path


def export(**name: Any) -> ExportedModel:
    return export_model(SourceConfig(name=ModelName(**name)))


@pytest.mark.parametrize("dataset", ["42", "042", "0042", DATASET])
def test_a_dataset_is_known_by_its_number_and_its_name(results: Path, dataset: str) -> None:
    model = export(dataset=dataset, configuration="3d_fullres")
    assert model.where == results / DATASET / MODEL
    assert len(list(model.networks)) == 1


def test_trainer_and_plans_default_to_nnunets_and_can_be_named(results: Path) -> None:
    found = folder_from_results(ModelName(dataset="42", configuration="3d_fullres", trainer="nnUNetTrainer_5epochs"))
    assert found.name == "nnUNetTrainer_5epochs__nnUNetPlans__3d_fullres"
    found = folder_from_results(ModelName(dataset="42", configuration="2d", plans="nnUNetResEncUNetMPlans"))
    assert found.name == "nnUNetTrainer__nnUNetResEncUNetMPlans__2d"


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ({"dataset": "42", "configuration": "2d"}, "nnUNetTrainer__nnUNetResEncUNetMPlans__2d"),
        ({"dataset": "42", "configuration": "3d_fullres", "trainer": "Mine"}, MODEL),
        ({"dataset": "7", "configuration": "2d"}, "Dataset042_Tiny, Dataset420_Other"),
        ({"dataset": "4", "configuration": "2d"}, "Dataset042_Tiny"),
        ({"dataset": "Dataset042", "configuration": "2d"}, "Dataset042_Tiny"),
        ({"dataset": "../Dataset042_Tiny", "configuration": "2d"}, "Dataset042_Tiny"),
    ],
)
def test_what_is_not_there_is_answered_with_what_is(results: Path, name: dict[str, str], listed: str) -> None:
    with pytest.raises(ModelError) as caught:
        folder_from_results(ModelName(**name))
    assert listed in str(caught.value)


def test_two_datasets_of_one_number_are_not_guessed_between(results: Path) -> None:
    (results / "Dataset042_Copy").mkdir()
    with pytest.raises(ModelError, match="more than one dataset 42") as caught:
        folder_from_results(ModelName(dataset="42", configuration="2d"))
    assert "Dataset042_Copy, Dataset042_Tiny" in str(caught.value)
    assert folder_from_results(ModelName(dataset=DATASET, configuration="3d_fullres")).name == MODEL


def test_without_the_variable_or_its_folder_nothing_is_looked_up(
    results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_results", str(results / "nowhere"))
    with pytest.raises(ModelError, match="cannot be read"):
        export(dataset="42", configuration="2d")
    monkeypatch.delenv("nnUNet_results")
    with pytest.raises(ModelError, match="nnUNet_results is not set"):
        export(dataset="42", configuration="2d")


@pytest.mark.parametrize("name", [{}, {"dataset": "42"}, {"configuration": "2d"}])
def test_a_model_needs_a_folder_or_dataset_and_configuration(name: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="-d DATASET -c CONFIGURATION"):
        SourceConfig(name=ModelName(**name))


def test_a_folder_leaves_nothing_to_choose(results: Path) -> None:
    with pytest.raises(ModelError, match="nothing to choose"):
        export_model(SourceConfig(folder=results / DATASET / MODEL, name=ModelName(configuration="3d_fullres")))


def test_a_renamed_folder_does_not_pass_for_another_configuration(results: Path) -> None:
    (results / DATASET / MODEL).rename(results / DATASET / "nnUNetTrainer__nnUNetPlans__3d_lowres")
    with pytest.raises(ModelError, match="another configuration") as caught:
        export(dataset="42", configuration="3d_lowres")
    assert "3d_fullres" in str(caught.value)
