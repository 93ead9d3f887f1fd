"""Exported networks: equal to nnU-Net's in ONNX Runtime, for any batch, and refused where they are not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from source_models import architecture, make_dataset, make_plans, nnunet_network, replaced, tiny_network, write_model
from specs import make_spec

from trtbuild.errors import GraphError, MissingExtra, ModelError, Untrusted
from trtbuild.source import ExportedNetwork, SourceConfig, export, export_model
from trtbuild.source.exact_norm import with_exact_instance_norm
from trtbuild.source.patch import realistic_patch
from trtbuild.spec import CT, Labels, NoNormalization, RescaleTo01, RGBTo01, ZScore

DEMO = Path(__file__).parents[1] / "benchmarks/demo/model/nnUNetTrainer__nnUNetPlans__3d_fullres"


def only_network(folder: Path, **config: Any) -> ExportedNetwork:
    (network,) = export_model(SourceConfig(folder=folder, **config)).networks
    return network


def run(model: bytes, image: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    logits: NDArray[np.float32] = session.run(["logits"], {"image": image})[0]
    return logits


def relative_error(got: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    return float(np.abs(got - reference).max() / np.abs(reference).max())


# --- equality with nnU-Net ---


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("kind", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_the_exported_network_is_nnunets_for_every_batch(tmp_path: Path, kind: str, dimensions: int) -> None:
    reference = nnunet_network(architecture(dimensions, kind), channels=2, heads=3)
    folder = write_model(tmp_path, make_plans(dimensions, 2, kind), make_dataset(2), network=reference)
    exported = only_network(folder)
    patch = [16, 24, 8][:dimensions]
    rng = np.random.default_rng(7)
    for batch in (1, 2, 5):
        image = rng.normal(size=(batch, 2, *patch)).astype(np.float32)
        with torch.inference_mode():
            expected = reference(torch.from_numpy(image)).numpy()
        # 2e-5: ten times what float32 in another order of operations makes of so small a network
        assert relative_error(run(exported.model, image), expected) < 2e-5
    with torch.inference_mode():
        golden = reference(torch.from_numpy(exported.golden_input)).numpy()
    assert np.array_equal(exported.golden_logits, golden)
    assert exported.golden_input.shape == (1, 2, *patch)
    assert exported.golden_input.dtype == exported.golden_logits.dtype == np.float32
    assert exported.max_error < 2e-5


def test_the_file_is_whole_of_opset_20_with_a_free_batch_and_the_documented_names(tmp_path: Path) -> None:
    exported = only_network(write_model(tmp_path))
    model = onnx.load_from_string(exported.model)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 20)]
    shapes = {value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
              for value in (*model.graph.input, *model.graph.output)}  # fmt: skip
    assert shapes == {"image": ["batch", 1, 16, 24, 8], "logits": ["batch", 3, 16, 24, 8]}
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in model.graph.initializer)
    elements = sum(int(np.prod(tensor.dims)) for tensor in model.graph.initializer)
    assert elements * 4 < len(exported.model) < elements * 4 + 100_000
    assert b"site-packages" not in exported.model


def test_exporting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    networks = export_model(SourceConfig(folder=write_model(tmp_path))).networks
    first, second = (next(iter(networks)) for _ in range(2))
    assert first.model == second.model
    assert np.array_equal(first.golden_logits, second.golden_logits)


def test_folds_are_exported_one_after_the_other_with_their_own_weights(tmp_path: Path) -> None:
    lines: list[str] = []
    model = export_model(SourceConfig(folder=write_model(tmp_path, folds=(0, 1))), lines.append)
    assert [line for line in lines if "export" in line] == []
    iterator = iter(model.networks)
    first = next(iterator)
    assert [line for line in lines if "export" in line] == ["fold 0: exporting to ONNX and comparing with torch"]
    second = next(iterator)
    assert [first.fold, second.fold] == ["0", "1"]
    for fold, exported in enumerate((first, second)):
        with torch.inference_mode():
            expected = tiny_network(fold)(torch.from_numpy(exported.golden_input)).numpy()
        assert np.array_equal(exported.golden_logits, expected)


def test_the_second_stage_of_a_cascade_is_exported_with_its_label_channels(tmp_path: Path) -> None:
    network = nnunet_network(architecture(), channels=3, heads=3)
    folder = write_model(tmp_path, make_plans(previous_stage="3d_lowres"), network=network)
    exported = only_network(folder)
    assert exported.golden_input.shape == (1, 3, 16, 24, 8)
    assert set(np.unique(exported.golden_input[:, 1:])) == {0.0, 1.0}


def test_exporting_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        only_network(write_model(tmp_path))
    assert capfd.readouterr() == ("", "")


# --- what is refused ---


def test_a_network_that_differs_from_torch_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = export.onnx_from_network

    def wrong(network: torch.nn.Module, patch: NDArray[np.float32]) -> bytes:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(1.01)
        return honest(network, patch)

    monkeypatch.setattr(export, "onnx_from_network", wrong)
    with pytest.raises(GraphError, match="differs from torch"):
        only_network(write_model(tmp_path))


CUSTOM = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, input_channels, num_classes, deep_supervision, **ignored):
        super().__init__()
        self.conv = nn.Conv3d(input_channels, num_classes, 1)

class FixedBatch(Net):
    def forward(self, x):
        return self.conv(x).reshape(int(x.shape[0]), 3, 16, 24, 8)  # traced as a constant

class FixedOnFirst(Net):
    def forward(self, x):
        return self.conv(x) * (2.0 if float(x.abs().max()) > 1e3 else 3.0)  # a branch on the data, traced one way

class TwoOutputs(Net):
    def forward(self, x):
        return [self.conv(x), self.conv(x)]

class HalfSize(Net):
    def forward(self, x):
        return self.conv(x)[..., ::2]

class NotFinite(Net):
    def forward(self, x):
        return self.conv(x) / 0

class Refuses(Net):
    def forward(self, x):
        raise ValueError("patch must be divisible by 32")

class NoOperator(Net):
    def forward(self, x):
        return self.conv(x) + torch.linalg.eigvals(x[0, 0, 0, :8, :8]).real.sum()

class Plain(Net):
    def forward(self, x):
        return self.conv(x)
"""


@pytest.fixture
def custom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "trtbuild_custom_net.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)

    def write(name: str) -> Path:
        plans = make_plans(channels=3)
        entry = ("configurations", "3d_fullres", "architecture", "network_class_name")
        torch.manual_seed(0)
        return write_model(tmp_path / name, replaced(plans, entry, f"trtbuild_custom_net.{name}"), make_dataset(3),
                           network=_Convolution())  # fmt: skip

    return write


class _Convolution(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv3d(3, 3, 1)


@pytest.mark.parametrize(
    ("name", "error", "named"),
    [
        ("FixedBatch", GraphError, "batch 2"),
        ("FixedOnFirst", GraphError, "differs from torch"),
        ("TwoOutputs", ModelError, "not one array"),
        ("HalfSize", ModelError, "(1, 3, 16, 24, 8)"),
        ("NotFinite", ModelError, "NaN or infinity"),
        ("Refuses", ModelError, "patch must be divisible by 32"),
        ("NoOperator", ModelError, "cannot be exported to ONNX"),
    ],
)
def test_a_network_that_cannot_be_exported_faithfully_is_refused(
    custom: Any, monkeypatch: pytest.MonkeyPatch, name: str, error: type[Exception], named: str
) -> None:
    if name == "FixedOnFirst":  # make the two patches differ in what the branch asks for
        honest = export.realistic_patch
        monkeypatch.setattr(export, "realistic_patch", lambda spec, seed: honest(spec, seed) * np.float32(1e4**seed))
    with pytest.raises(error) as caught:
        only_network(custom(name), trust_checkpoint=True)
    assert named in str(caught.value)
    assert "fold 0" in str(caught.value) or name == "NoOperator"


def test_a_network_class_of_somebody_else_is_exported_when_trusted_only(custom: Any) -> None:
    folder = custom("Plain")
    with pytest.raises(Untrusted, match=r"trtbuild_custom_net\.Plain"):
        only_network(folder)
    exported = only_network(folder, trust_checkpoint=True)
    assert exported.max_error < 2e-5


def test_an_assumed_architecture_is_announced(tmp_path: Path) -> None:
    folder = write_model(tmp_path, trainer_name="nnUNetTrainerMine")
    with pytest.raises(ModelError, match="--assume-plans-architecture"):
        export_model(SourceConfig(folder=folder))
    model = export_model(SourceConfig(folder=folder, assume_plans_architecture=True))
    assert any("nnUNetTrainerMine" in note and "assumed" in note for note in model.notes)
    assert export_model(SourceConfig(folder=write_model(tmp_path / "known"))).notes == ()


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    import sys

    folder = write_model(tmp_path)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtra, match=r"pip install 'trtbuild\[export\]'"):
        only_network(folder)


# --- the judge: InstanceNormalization by its definition ---


@pytest.mark.parametrize("shape", [(2, 3, 40, 50), (1, 2, 33, 40, 48)])
def test_exact_instance_norm_is_instance_norm(shape: tuple[int, ...]) -> None:
    dimensions = len(shape) - 2
    norm = torch.nn.InstanceNorm3d if dimensions == 3 else torch.nn.InstanceNorm2d
    network = norm(shape[1], eps=1e-2, affine=True).eval()
    torch.nn.init.normal_(network.weight)
    torch.nn.init.normal_(network.bias)
    image = (np.random.default_rng(0).normal(size=shape) + 5).astype(np.float32)
    model = export.onnx_from_network(network, image)
    exact = with_exact_instance_norm(model, dimensions)
    operators = {node.op_type for node in onnx.load_from_string(exact).graph.node}
    assert "InstanceNormalization" not in operators
    assert "InstanceNormalization" in {node.op_type for node in onnx.load_from_string(model).graph.node}
    wide, axes = image.astype(np.float64), tuple(range(2, len(shape)))
    column = (-1, *[1] * dimensions)
    scale, bias = (p.detach().numpy().astype(np.float64).reshape(column) for p in (network.weight, network.bias))
    centred = wide - wide.mean(axes, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(axes, keepdims=True) + 1e-2) * scale + bias
    assert relative_error(run(exact, image), expected) < 1e-6


# --- the patch ---


def test_a_patch_is_seeded_and_of_the_networks_shape() -> None:
    spec = make_spec(channels=("A", "B"), normalization=(ZScore(masked=False), NoNormalization()), patch=(12, 20, 9))
    first, again, other = realistic_patch(spec, 0), realistic_patch(spec, 0), realistic_patch(spec, 1)
    assert (first.shape, first.dtype) == ((2, 12, 20, 9), np.float32)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


@pytest.mark.parametrize("patch", [(64, 64, 64), (32, 96, 80), (128, 160), (1, 1, 1), (2, 3)])
@pytest.mark.parametrize("scheme", [CT(lower=-100.0, upper=300.0, mean=80.0, std=40.0), ZScore(masked=True),
                                    ZScore(masked=False), NoNormalization(), RescaleTo01(), RGBTo01()])  # fmt: skip
def test_a_patch_is_normalised_as_the_model_normalises(scheme: Any, patch: tuple[int, ...]) -> None:
    image = realistic_patch(make_spec(normalization=(scheme,), patch=patch, spacing=(1.0,) * len(patch)), 3)[0]
    assert np.isfinite(image).all()
    if image.size < 100:
        return
    if isinstance(scheme, CT):
        assert (image.min(), image.max()) == (pytest.approx(-4.5), pytest.approx(5.5))  # both percentiles clip
    elif isinstance(scheme, RescaleTo01 | RGBTo01):
        assert (image.min(), image.max()) == (0.0, 1.0)
    else:
        values = image[image != 0] if isinstance(scheme, ZScore) and scheme.masked else image
        assert 0.2 * image.size < values.size
        assert values.size < image.size or not (isinstance(scheme, ZScore) and scheme.masked)
        assert (values.mean(), values.std()) == (pytest.approx(0, abs=1e-3), pytest.approx(1, abs=1e-3))


def test_a_patch_is_smooth_where_white_noise_is_not() -> None:
    image = realistic_patch(make_spec(normalization=(ZScore(masked=False),), patch=(48, 48, 48)), 0)[0]
    neighbours = np.corrcoef(image[:, :, 1:].ravel(), image[:, :, :-1].ravel())[0, 1]
    assert 0.8 < neighbours < 0.999


def test_label_channels_of_a_previous_stage_exclude_each_other_and_all_occur() -> None:
    labels = Labels(decision="argmax", values=(0, 1, 2, 3), names={}, foreground=(1, 2, 3), ignore=None)
    patch = realistic_patch(make_spec(previous_stage="3d_lowres", labels=labels, patch=(40, 40, 40)), 0)
    assert patch.shape[0] == 4
    assert set(np.unique(patch[1:].sum(0))) == {0.0, 1.0}
    assert (patch[1:].reshape(3, -1).sum(1) > 0).all()


# --- the real thing ---


@pytest.mark.skipif(not (DEMO / "fold_0/checkpoint_final.pth").is_file(), reason="the demo model is not there")
def test_the_demo_model_is_exported() -> None:
    model = export_model(SourceConfig(folder=DEMO))
    assert (model.spec.patch, model.spec.spacing, model.mirror_axes) == ((64, 64, 64), (1.5, 1.5, 1.5), (0, 1, 2))
    (exported,) = model.networks
    # 5e-7 measured; ONNX Runtime's own instance norm would make 7e-5 of it, and the tolerance is 2e-4
    assert exported.max_error < 5e-6
    labels = exported.golden_logits[0].argmax(0)
    assert all((labels == label).mean() > 0.02 for label in model.spec.labels.values)  # a golden that says something
    assert relative_error(run(exported.model, exported.golden_input), exported.golden_logits) < 2e-4


def compiled(network: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(network)


def compiled_inside(network: torch.nn.Module) -> torch.nn.Module:
    network.encoder = torch.compile(network.encoder)
    network.decoder.stages[0] = torch.compile(network.decoder.stages[0])
    return network


def distributed(network: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.parallel.DistributedDataParallel(network)


def compiled_and_distributed(network: torch.nn.Module) -> torch.nn.Module:
    return torch.compile(distributed(network))


def distributed_and_compiled(network: torch.nn.Module) -> torch.nn.Module:
    return distributed(torch.compile(network))


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    "wrapped", [compiled, compiled_inside, distributed, compiled_and_distributed, distributed_and_compiled]
)
def test_a_checkpoint_of_a_wrapped_network_gives_the_plain_networks_logits(
    tmp_path: Path, wrapped: Callable[[torch.nn.Module], torch.nn.Module], process_group: None
) -> None:
    reference = tiny_network(seed=3)
    folder = write_model(tmp_path, network=wrapped(tiny_network(seed=3)))
    saved = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
    assert set(saved) != set(reference.state_dict())  # or the test says nothing
    (network,) = export_model(SourceConfig(folder=folder)).networks
    with torch.inference_mode():
        expected = reference(torch.from_numpy(network.golden_input)).numpy()
    np.testing.assert_array_equal(network.golden_logits, expected)


OWN_ARCHITECTURE = """
import torch


class Net(torch.nn.Module):
    def __init__(self, input_channels, num_classes, width, nonlin, deep_supervision):
        super().__init__()
        self.module = torch.nn.Sequential(
            torch.nn.Conv3d(input_channels, width, 3, padding=1), nonlin(), torch.nn.Conv3d(width, num_classes, 1))

    def forward(self, image):
        return self.module(image)
"""


def test_an_architecture_of_the_users_own_package_is_exported_when_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights' names all begin with `module.`, as those of a distributed network do."""
    (tmp_path / "own_networks.py").write_text(OWN_ARCHITECTURE)
    monkeypatch.syspath_prepend(str(tmp_path))
    entry = {"network_class_name": "own_networks.Net", "arch_kwargs": {"width": 4, "nonlin": "torch.nn.SiLU"},
             "_kw_requires_import": ["nonlin"]}  # fmt: skip
    from own_networks import Net

    reference = Net(1, 3, 4, torch.nn.SiLU, False).eval()
    folder = write_model(tmp_path / "model", make_plans(architecture=entry), network=reference)
    with pytest.raises(Untrusted, match="--trust-checkpoint"):
        list(export_model(SourceConfig(folder=folder)).networks)
    (network,) = export_model(SourceConfig(folder=folder, trust_checkpoint=True)).networks
    with torch.inference_mode():
        expected = reference(torch.from_numpy(network.golden_input)).numpy()
    np.testing.assert_array_equal(network.golden_logits, expected)
