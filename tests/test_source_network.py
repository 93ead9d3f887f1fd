"""Trainers, architectures and weights: the network is nnU-Net's, and code of the model's maker does not run unasked."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import nnunetv2
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.network_architecture.nnUNetTrainerBN import nnUNetTrainerBN
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from source_models import architecture, legacy_configuration, make_dataset, make_plans, nnunet_network, replaced

from trtbuild.errors import MissingExtra, ModelError, Untrusted
from trtbuild.source import primus, spec_from_plans
from trtbuild.source.architecture import Architecture, architecture_from_plans
from trtbuild.source.network import load_weights, network_from_architecture
from trtbuild.source.trainers import (
    BATCH_NORM,
    NOT_SUPPORTED,
    PLANS_ARCHITECTURE,
    architecture_of_trainer,
    is_known,
)
from trtbuild.spec import ModelSpec

ENTRY = ("configurations", "3d_fullres", "architecture")


def parsed(plans: dict[str, Any], dataset: dict[str, Any] | None = None) -> tuple[Architecture, ModelSpec]:
    spec = spec_from_plans(plans, dataset or make_dataset(), configuration="3d_fullres", trainer="nnUNetTrainer")
    return architecture_from_plans(plans, "3d_fullres"), spec


def build(plans: dict[str, Any], dataset: dict[str, Any] | None = None, trust: bool = False) -> torch.nn.Module:
    return network_from_architecture(*parsed(plans, dataset), trust=trust)


# --- trainers ---


def _trainer_classes() -> dict[str, tuple[list[str], bool]]:
    """Every class of nnunetv2's trainers, its bases, and whether it defines how the network is built.

    Read from the source, because importing all of them needs packages that have nothing to do with the question.
    """
    classes = {}
    for path in (Path(nnunetv2.__file__).parent / "training" / "nnUNetTrainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                defines = any(getattr(item, "name", "") == "build_network_architecture" for item in node.body)
                classes[node.name] = ([base.id for base in node.bases if isinstance(base, ast.Name)], defines)
    return classes


def _builder(name: str, classes: dict[str, tuple[list[str], bool]]) -> str:
    """The class whose build_network_architecture a trainer uses; of several bases the first that overrides it."""
    bases, defines = classes[name]
    builders = [_builder(base, classes) for base in bases if base in classes]
    return name if defines else next((b for b in builders if b != "nnUNetTrainer"), "nnUNetTrainer")


def test_the_tables_name_every_trainer_of_nnunet_and_what_builds_its_network() -> None:
    classes = _trainer_classes()
    builders = {name: _builder(name, classes) for name in classes}
    assert len(builders) > 60
    assert {name for name, builder in builders.items() if builder == "nnUNetTrainer"} == PLANS_ARCHITECTURE
    assert {name for name, builder in builders.items() if builder == "nnUNetTrainerBN"} == BATCH_NORM
    assert set(builders) - PLANS_ARCHITECTURE - BATCH_NORM - set(primus.TRAINERS) == NOT_SUPPORTED
    assert all(is_known(name) for name in classes)


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("trainer", [nnUNetTrainer, nnUNetTrainerBN])
def test_a_known_trainers_network_is_the_one_that_it_builds(trainer: Any, dimensions: int) -> None:
    plans, dataset = make_plans(dimensions, channels=2), make_dataset(channels=2)
    manager = PlansManager(plans)
    reference = trainer.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 2, 3, False).eval()
    found, spec = parsed(plans, dataset)
    network = network_from_architecture(
        architecture_of_trainer(found, trainer.__name__, assume_plans=False), spec, trust=False
    )
    load_weights(network, reference.state_dict(), spec, "checkpoint")
    image = torch.randn(1, 2, *spec.patch)
    with torch.inference_mode():
        assert torch.equal(network(image), reference(image))
    assert repr(network) == repr(reference)


def test_an_unknown_trainer_is_refused_with_the_danger_and_the_flag() -> None:
    found, _ = parsed(make_plans())
    with pytest.raises(ModelError) as caught:
        architecture_of_trainer(found, "nnUNetTrainerGELU", assume_plans=False)
    message = str(caught.value)
    assert "nnUNetTrainerGELU" in message
    assert "--assume-plans-architecture" in message
    assert "nonlinearity" in message
    assert architecture_of_trainer(found, "nnUNetTrainerGELU", assume_plans=True) == found


@pytest.mark.parametrize("assume", [True, False])
def test_a_trainer_that_is_abstract_is_refused_whatever_the_user_says(assume: bool) -> None:
    with pytest.raises(ModelError, match="builds no network"):
        architecture_of_trainer(parsed(make_plans())[0], "AbstractPrimus", assume_plans=assume)


FITTING_TORCHVISION = """
import torch
# a torchvision built for another torch dies of its missing operators when it is imported; none of them is used here
library = torch.library.Library("torchvision", "FRAGMENT")
for name in ("nms", "qnms"):
    try:
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        pass
"""
PRIMUS = (
    FITTING_TORCHVISION
    + """
import sys
sys.path.insert(0, sys.argv[1])
from nnunetv2.training.nnUNetTrainer.primus import primus_trainers
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from source_models import make_dataset, make_plans
from trtbuild.source import primus, spec_from_plans
from trtbuild.source.architecture import architecture_from_plans
from trtbuild.source.network import load_weights, network_from_architecture
from trtbuild.source.primus import TRAINERS
from trtbuild.source.trainers import architecture_of_trainer

plans, dataset = make_plans(channels=2, patch_size=[16, 24, 8]), make_dataset(channels=2)
manager = PlansManager(plans)
for name in TRAINERS:
    spec = spec_from_plans(plans, dataset, configuration="3d_fullres", trainer=name)
    found = architecture_of_trainer(architecture_from_plans(plans, "3d_fullres"), name, assume_plans=False)
    small = name == "nnUNet_Primus_S_Trainer"
    with torch.device("cpu" if small else "meta"):
        reference = getattr(primus_trainers, name).build_network_architecture(
            manager, manager.get_configuration("3d_fullres"), 2, 3, False).eval()
        network = network_from_architecture(found, spec, trust=False)
    assert repr(network) == repr(reference), name
    shapes = [{key: tuple(value.shape) for key, value in net.state_dict().items()} for net in (network, reference)]
    assert shapes[0] == shapes[1], name
    if small:
        load_weights(network, reference.state_dict(), spec, "checkpoint")
        image = torch.randn(1, 2, *spec.patch)
        with torch.inference_mode():
            assert torch.equal(network(image), reference(image))
print("equal", len(TRAINERS))
"""
)


@pytest.mark.slow
def test_the_transformers_of_the_primus_trainers_are_those_that_nnunet_builds() -> None:
    run = subprocess.run([sys.executable, "-c", PRIMUS, str(Path(__file__).parent)], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["equal 18"], run.stderr


EXPORT = (
    FITTING_TORCHVISION
    + """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
import trtbuild
from source_models import make_dataset, make_plans, write_model
from trtbuild.source import SourceConfig, export_model, spec_from_plans
from trtbuild.source.network import network_from_architecture
from trtbuild.source.primus import primus_of_trainer

plans = make_plans(patch_size=[8, 16, 8])
spec = spec_from_plans(plans, make_dataset(), configuration="3d_fullres", trainer="nnUNet_Primus_S_Trainer")
network = network_from_architecture(primus_of_trainer(spec.trainer, ""), spec, trust=False)
with torch.no_grad():
    torch.manual_seed(0)
    for parameter in network.parameters():
        parameter.add_(0.02 * torch.randn_like(parameter))
folder = write_model(Path(sys.argv[2]), plans, network=network, trainer_name=spec.trainer)
lines = []
trtbuild.compile(folder, Path(sys.argv[2]) / "primus.trtb", backends=("onnxruntime", "openvino"), tune=False,
                 report=lines.append)
print(lines)
print("compiled")
"""
)


@pytest.mark.slow
def test_a_primus_transformer_is_compiled_and_equals_torch(tmp_path: Path) -> None:
    arguments = [str(Path(__file__).parent), str(tmp_path)]
    run = subprocess.run([sys.executable, "-c", EXPORT, *arguments], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["compiled"], run.stdout + run.stderr


def test_batch_norm_is_not_forced_into_an_architecture_without_a_norm() -> None:
    plans = replaced(make_plans(), (*ENTRY, "arch_kwargs", "norm_op"), ...)
    plans = replaced(plans, (*ENTRY, "_kw_requires_import"), ["conv_op"])
    with pytest.raises(ModelError, match="norm_op"):
        architecture_of_trainer(parsed(plans)[0], "nnUNetTrainerBN", assume_plans=False)


# --- architectures ---


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_old_plans_build_the_network_that_nnunet_builds_from_them(kind: str, dimensions: int) -> None:
    plans = make_plans(dimensions, **legacy_configuration(dimensions, kind))
    network = build(plans)
    with pytest.warns(UserWarning, match="old nnU-Net plans"):
        settings = PlansManager(plans).get_configuration("3d_fullres")
    entry = settings.configuration["architecture"]
    entry["network_class_name"] = entry["network_class_name"].replace("residual_unet", "unet")
    assert repr(network) == repr(nnunet_network(entry, channels=1, heads=3))


ESCAPES = [
    "os.system",
    "builtins.eval",
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer.nnUNetTrainer",
    "dynamic_network_architectures",
    "dynamic_network_architectures_evil.UNet",
    "torch.nn",
    "torch.hub.load",
    "torch.nn.modules.module.functools.partial",  # leaves torch.nn through a module that it imports
    "torch.nn.parallel.distributed.os.system",
    "torch.nn.functional.conv3d",  # a function, not a layer
    "torch.nn.modules.module.torch.jit.ScriptModule",  # a Module, but not of torch.nn
    "dynamic_network_architectures.architectures.unet.test_submodules_loadable",
]


@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("place", [("network_class_name",), ("arch_kwargs", "nonlin"), ("arch_kwargs", "conv_op")])
def test_names_outside_the_two_packages_are_not_called_without_trust(name: str, place: tuple[str, ...]) -> None:
    with pytest.raises(Untrusted) as caught:
        build(replaced(make_plans(), (*ENTRY, *place), name))
    message = str(caught.value)
    assert name in message
    assert "--trust-checkpoint" in message
    assert ".".join(("architecture", *place)) in message


def test_a_module_outside_the_two_packages_is_not_even_imported_without_trust(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "trtbuild_evil_net.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    plans = replaced(make_plans(), (*ENTRY, "network_class_name"), "trtbuild_evil_net.UNet")
    with pytest.raises(Untrusted):
        build(plans)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(ModelError, match="does not exist"):
        build(plans, trust=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("place", "value", "named"),
    [
        (("network_class_name",), "dynamic_network_architectures.architectures.unet.NoNet", "does not exist"),
        (("network_class_name",), "dynamic_network_architectures.nothing.here.NoNet", "does not exist"),
        (("arch_kwargs", "conv_op"), "torch.nn.Conv9d", "does not exist"),
        (("arch_kwargs", "conv_op"), "torch.nn..Conv3d", "does not exist"),
        (("arch_kwargs", "n_conv_per_stage"), [1], "cannot be built"),
        (("arch_kwargs", "surprise"), 1, "cannot be built"),
        (("arch_kwargs", "features_per_stage"), "many", "cannot be built"),
        (("arch_kwargs", "nonlin"), 3, "nonlin"),
        (("_kw_requires_import",), ["absent"], "absent"),
        (("network_class_name",), ..., "network_class_name"),
    ],
)
def test_an_architecture_that_cannot_be_built_is_refused(place: tuple[str, ...], value: Any, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        build(replaced(make_plans(), (*ENTRY, *place), value))


def test_a_package_that_fails_inside_is_reported_as_such(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "trtbuild_needy_net.py").write_text("import package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    plans = replaced(make_plans(), (*ENTRY, "network_class_name"), "trtbuild_needy_net.UNet")
    with pytest.raises(ModelError, match="package_that_is_not_there"):
        build(plans, trust=True)


def test_without_the_architectures_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dynamic_network_architectures", None)
    with pytest.raises(MissingExtra, match=r"trtbuild\[export\]"):
        build(make_plans())


# --- weights ---


def test_weights_of_another_number_of_input_channels_are_named_so() -> None:
    network = build(make_plans(channels=2), make_dataset(channels=2))
    weights = nnunet_network(architecture(), channels=1, heads=3).state_dict()
    with pytest.raises(ModelError, match=r"takes 1 input channels.* make it 2"):
        load_weights(network, weights, parsed(make_plans(channels=2), make_dataset(channels=2))[1], "fold_0")


def test_weights_of_another_number_of_heads_are_named_so() -> None:
    weights = nnunet_network(architecture(), channels=1, heads=5).state_dict()
    with pytest.raises(ModelError, match=r"has 5 heads.* make it 3"):
        load_weights(build(make_plans()), weights, parsed(make_plans())[1], "fold_0")


def test_weights_of_another_network_are_refused_by_name() -> None:
    network, spec = build(make_plans()), parsed(make_plans())[1]
    weights = network.state_dict()
    first = next(iter(weights))
    with pytest.raises(ModelError, match=first):
        load_weights(network, {key: value for key, value in weights.items() if key != first}, spec, "fold_0")
    with pytest.raises(ModelError, match=r"extra\.weight"):
        load_weights(network, {**weights, "extra.weight": torch.zeros(1)}, spec, "fold_0")
    with pytest.raises(ModelError, match=first):
        load_weights(network, {**weights, first: torch.zeros(7, 7)}, spec, "fold_0")


def test_the_second_stage_of_a_cascade_takes_one_more_channel_per_foreground_label() -> None:
    plans = make_plans(previous_stage="3d_lowres")
    network = build(plans)
    assert parsed(plans)[1].network_channels == 3
    assert network(torch.zeros(1, 3, 16, 24, 8)).shape == (1, 3, 16, 24, 8)
