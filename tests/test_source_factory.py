"""`--network module:function`: a network built by the user's own function, its weights and its export still checked."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from source_models import architecture, make_dataset, make_plans, nnunet_network, write_model
from torch import nn

from trtbuild.errors import ModelError
from trtbuild.source import ExportedModel, SourceConfig, export_model

MODULE = '''
import torch
from torch import nn
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

calls = []


def gelu(network):
    for module in network.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.LeakyReLU):
                setattr(module, name, nn.GELU())
    return network


class Trainer(nnUNetTrainer):
    """As nnU-Net 2.8 wants it."""

    @staticmethod
    def build_network_architecture(plans_manager, configuration_manager, num_input_channels, num_output_channels,
                                   enable_deep_supervision=True):
        calls.append((plans_manager.plans["plans_name"], configuration_manager.patch_size, num_input_channels,
                      num_output_channels, enable_deep_supervision))
        return gelu(nnUNetTrainer.build_network_architecture(
            plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision))


class Trainer23(nnUNetTrainer):
    """As nnU-Net wanted it from 2.3 on."""

    @staticmethod
    def build_network_architecture(architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import,
                                   num_input_channels, num_output_channels, enable_deep_supervision=True):
        return gelu(get_network_from_plans(
            architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import, num_input_channels,
            num_output_channels, allow_init=True, deep_supervision=enable_deep_supervision))


class Trainer20(nnUNetTrainer):
    """As nnU-Net before 2.3 wanted it."""

    @staticmethod
    def build_network_architecture(plans_manager, dataset_json, configuration_manager, num_input_channels,
                                   enable_deep_supervision=True):
        heads = plans_manager.get_label_manager(dataset_json).num_segmentation_heads
        return Trainer.build_network_architecture(plans_manager, configuration_manager, num_input_channels, heads,
                                                  enable_deep_supervision)


class Own(nn.Module):
    """Nothing of nnU-Net's."""

    def __init__(self, channels, heads):
        super().__init__()
        self.first, self.second = nn.Conv3d(channels, 5, 3, padding=1), nn.Conv3d(5, heads, 1)

    def forward(self, image):
        return self.second(torch.tanh(self.first(image)))


def own(num_input_channels, num_output_channels, width=5, **others):
    return Own(num_input_channels, num_output_channels)


def broken(num_input_channels):
    raise KeyError("no such thing")


def supervised(num_input_channels, num_output_channels):
    class Two(Own):
        def forward(self, image):
            return [super().forward(image)] * 2
    return Two(num_input_channels, num_output_channels)


def wants_more(num_input_channels, fold): return None
def nothing(): return None
constant = 3
'''


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "my_trainers.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_trainers", raising=False)
    return "my_trainers"


def gelu_network() -> nn.Module:
    entry = architecture()
    entry["arch_kwargs"] |= {"nonlin": "torch.nn.GELU", "nonlin_kwargs": {}}
    return nnunet_network(entry, channels=1, heads=3)


def export(folder: Path, network: str) -> ExportedModel:
    return export_model(SourceConfig(folder=folder, network=network))


@pytest.mark.parametrize("trainer", ["Trainer", "Trainer23", "Trainer20"])
def test_a_trainers_own_method_is_handed_over_unchanged(tmp_path: Path, module: str, trainer: str) -> None:
    reference = gelu_network()
    folder = write_model(tmp_path / "model", network=reference, trainer_name="MyTrainer")
    with pytest.raises(ModelError, match="--network my_trainers:MyTrainer"):
        export_model(SourceConfig(folder=folder))
    model = export(folder, f"{module}:{trainer}.build_network_architecture")
    (network,) = model.networks
    with torch.inference_mode():
        expected = reference(torch.from_numpy(network.golden_input)).numpy()
    assert (network.golden_logits == expected).all()  # GELU, which no weight's name shows
    assert any(f"{module}:{trainer}.build_network_architecture" in note for note in model.notes)
    if trainer == "Trainer":
        assert sys.modules[module].calls == [("nnUNetPlans", [16, 24, 8], 1, 3, False)]


def test_a_network_that_has_nothing_to_do_with_the_plans_is_exported(tmp_path: Path, module: str) -> None:
    namespace: dict[str, type[nn.Module]] = {}
    exec(compile(MODULE, module, "exec"), namespace)
    reference = namespace["Own"](1, 3).eval()
    folder = write_model(tmp_path / "model", network=reference, trainer_name="MyTrainer")
    (network,) = export(folder, f"{module}:own").networks
    with torch.inference_mode():
        expected = reference(torch.from_numpy(network.golden_input)).numpy()
    assert (network.golden_logits == expected).all()


def test_the_factory_wins_over_a_known_trainer_and_weights_still_have_to_fit(tmp_path: Path, module: str) -> None:
    folder = write_model(tmp_path / "model")
    with pytest.raises(ModelError, match="weights of another network"):
        list(export(folder, f"{module}:own").networks)


def test_a_network_with_several_outputs_is_refused(tmp_path: Path, module: str) -> None:
    namespace: dict[str, type[nn.Module]] = {}
    exec(compile(MODULE, module, "exec"), namespace)
    folder = write_model(tmp_path / "model", network=namespace["Own"](1, 3))
    with pytest.raises(ModelError, match="not one array of logits"):
        list(export(folder, f"{module}:supervised").networks)


@pytest.mark.parametrize(
    ("word", "answer"),
    [
        ("my_trainers", "module:function"),
        ("my_trainers:", "module:function"),
        (":own", "module:function"),
        ("my_trainers:own()", "module:function"),
        ("no_such_module:own", "PYTHONPATH"),
        ("my_trainers:missing", "has no function missing"),
        ("my_trainers:Trainer.missing", "has no function Trainer.missing"),
        ("my_trainers:constant", "has no function constant"),
        ("my_trainers:broken", "no such thing"),
        ("my_trainers:nothing", "returned no network"),
        ("my_trainers:wants_more", "asks for 'fold'"),
        ("builtins:dict.update", "does not say which arguments"),
    ],
)
def test_a_factory_that_cannot_be_used_is_answered_with_the_reason(
    tmp_path: Path, module: str, word: str, answer: str
) -> None:
    folder = write_model(tmp_path / "model")
    with pytest.raises(ModelError) as caught:
        list(export(folder, word).networks)
    assert answer in str(caught.value)


def test_a_module_that_dies_while_it_is_imported_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModelError, match="ZeroDivisionError"):
        export(write_model(tmp_path / "model"), "dying:own")


def test_without_nnunet_only_a_factory_that_asks_for_its_objects_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "plain.py").write_text(
        "def asks(plans_manager, num_input_channels): return None\n"
        "def asks_not(arch_init_kwargs, dataset_json, num_output_channels):\n"
        "    raise ValueError(f'{arch_init_kwargs[\"n_stages\"]} {sorted(dataset_json)[0]} {num_output_channels}')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "nnunetv2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nnunetv2", None)  # importing it raises now
    folder = write_model(tmp_path / "model", make_plans(), make_dataset())
    with pytest.raises(ModelError, match="nnunetv2 cannot be imported"):
        list(export(folder, "plain:asks").networks)
    with pytest.raises(ModelError, match="2 channel_names 3"):
        list(export(folder, "plain:asks_not").networks)
