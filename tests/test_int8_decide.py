"""The contest and the roll-back on a U-Net of 23 Convs whose scales are spoiled on purpose.

nnU-Net's plain U-Net of six stages, trained for 30 steps on the demo's cases: with random weights the labels have no
margin, and quantisation alone moves a fifth of them. There are no labels, so that the gate asks for Dice against FP32's
output, with its own limit of 0.985.
"""

from __future__ import annotations

import contextlib
import functools
import io
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from calibration_samples import DEMO_CASES
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from make_trained import Recipe, training_losses
from onnx import numpy_helper
from reference import quiet, threads
from runner_samples import make_network
from specs import make_spec

from trtbuild.accuracy.gate import Limits, verdict
from trtbuild.accuracy.rollback import GIVE_BACK
from trtbuild.config import CalibrationConfig, GateConfig
from trtbuild.engine import plain_record
from trtbuild.graph import clean, model_from_bytes
from trtbuild.graph.precision import weighted_layers
from trtbuild.spec import TensorSpec
from trtbuild.steps.precision import gate as gate_room
from trtbuild.steps.precision.calibrate import Calibration, calibrated
from trtbuild.steps.precision.data import StageData
from trtbuild.steps.precision.decide import KEPT, ROLLED_BACK, Decision, Int8Job, decide
from trtbuild.steps.precision.gate import Gate, open_gate
from trtbuild.steps.precision.network import ObservedNetwork
from trtbuild_calibration import METHODS, PatchSequence, ScaleTable, cases_from_folder, open_case, sample_places

PATCH = (32, 32, 32)
CONVS = 23
SPEC = make_spec(patch=PATCH)
BROKEN = "decoder.stages.4.convs.0.conv"
MILD = ("encoder.stages.0.0.convs.1.conv", "decoder.stages.4.convs.1.conv")
"""Layers at full resolution, where the 95th percentile is 0.1 to 0.25 of the maximum. Deeper in, clipping there does
not show in the labels of a network that was trained so little."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A network in INT8 that passes its gate, and the 95th percentile of |x| of every target."""

    job: Int8Job
    gate: Gate
    percentile: Mapping[str, float]

    def activation(self, layer: str) -> str:
        return next(one.activation for one in weighted_layers(self.job.model) if one.name == layer)

    def planted(self, amax: Mapping[str, float], method: str = "minmax") -> ScaleTable:
        """The table with other thresholds, by layer."""
        entries = dict(self.job.table.entries)
        for layer, threshold in amax.items():
            name = self.activation(layer)
            entries[name] = replace(entries[name], amax={**entries[name].amax, method: threshold})
        return replace(self.job.table, entries=entries)

    def spoiled(self) -> dict[str, float]:
        """One scale 100 times too small, and two thresholds at the 95th percentile."""
        whole = self.job.table.amax("minmax")[self.activation(BROKEN)]
        return {BROKEN: whole / 100, **{layer: self.percentile[self.activation(layer)] for layer in MILD}}

    def dice(self, table: ScaleTable) -> float:
        """Of the worst class against FP32's output, all layers in INT8."""
        job = replace(self.job, table=table)
        found = job.agreement(self.gate, job.quantized("minmax", ()), lambda line: None)
        return min(one.between.dice for one in found.classes if one.foreground)


def trained_network() -> torch.nn.Module:
    settings: dict[str, Any] = {
        "input_channels": 1, "n_stages": 6, "features_per_stage": (8, 8, 16, 16, 16, 16), "conv_op": torch.nn.Conv3d,
        "kernel_sizes": 3, "strides": (1, 2, 2, 2, 2, 1), "n_conv_per_stage": (2,) * 6, "num_classes": 3,
        "n_conv_per_stage_decoder": (2,) * 5, "conv_bias": True, "norm_op": torch.nn.InstanceNorm3d,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True}, "nonlin": torch.nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True}, "deep_supervision": False,
    }  # fmt: skip
    recipe = Recipe(
        configuration="3d_fullres", plans="nnUNetPlans", architecture="PlainConvUNet", patch=PATCH, features=(),
        encoder={}, decoder_convs=2, batch=2, iterations=30, seed=5,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), threads(1):
        torch.manual_seed(0)
        network = PlainConvUNet(**settings)
        list(training_losses(network, recipe, recipe.iterations))
    network.eval()
    return network


def exported(network: torch.nn.Module) -> onnx.ModelProto:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(2, 1, *PATCH),), buffer, dynamo=False, opset_version=20, input_names=["image"],
            output_names=["logits"], dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        )  # fmt: skip
    return model_from_bytes(buffer.getvalue())


@functools.cache
def sample() -> Sample:
    raw = exported(trained_network())
    written, joined = (
        clean(raw, rewrite_conv_transpose=False, split_instance_norm=flag).model for flag in (True, False)
    )
    sources = [open_case(case, channels=1) for case in cases_from_folder(DEMO_CASES)]
    calibration = Calibration(
        spec=SPEC, sources=sources[:2], threads=2, config=CalibrationConfig(data=DEMO_CASES, patches=6),
        data=StageData(sources={}, digest=str, splits=None),
    )  # fmt: skip
    table = calibrated("fold_0_fp32", written, calibration, lambda progress: None)
    folder = tempfile.TemporaryDirectory(prefix="trtbuild-tests-")
    kept.append(folder)
    scratch = Path(folder.name)
    file = scratch / "reference.onnx"
    file.write_bytes(written.SerializeToString())
    io_specs = tuple(TensorSpec(name=name, dtype="float32", shape=("batch", heads, *PATCH))
                     for name, heads in (("image", 1), ("logits", 3)))  # fmt: skip
    reference, typed = (
        plain_record(make_network(id=name, precision=precision, zero_point=point, io=io_specs), backend="openvino",
                     inference_precision="f32", threads=2)
        for name, precision, point in (("fold_0_fp32", "fp32", "none"), ("fold_0_int8", "int8", "u8"))
    )  # fmt: skip
    gate = open_gate(
        [replace(sources[2], segmentation=None)], SPEC, GateConfig(patches=4), seed=0, reference=(reference, file),
        scratch=scratch, say=lambda line: None,
    )  # fmt: skip
    job = Int8Job(model=joined, table=table, methods=("minmax",), kept={}, record=typed, gate=gate, scratch=scratch)
    return Sample(job=job, gate=gate, percentile=percentiles(written, sources[:2]))


kept: list[tempfile.TemporaryDirectory[str]] = []


def percentiles(model: onnx.ModelProto, sources: Any) -> dict[str, float]:
    """The 95th percentile of |x| of each target, by NumPy on the values themselves."""
    network = ObservedNetwork(model=model, patch=(1, *PATCH), threads=2)
    places = sample_places(sources, patch=PATCH, count=2, seed=3).places
    patches = PatchSequence(sources={source.name: source for source in sources}, places=places, patch=PATCH)
    names = sorted({source for target in network.targets() for source in target.sources})
    with network.outputs(names) as run:
        shown = [{name: np.abs(values).ravel() for name, values in run(patch).items()} for patch in patches]
    return {
        target.name: float(np.percentile(np.concatenate([one[s] for one in shown for s in target.sources]), 95))
        for target in network.targets()
    }


@contextlib.contextmanager
def counted_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Notes how many layers are in INT8 in each engine that the gate opens."""
    opened: list[int] = []
    original = gate_room.open_runner

    def noting(record: Any, model: Path, **options: Any) -> Any:
        opened.append(record.options.get("quantized_layers", 0))
        return original(record, model, **options)

    with monkeypatch.context() as patched:
        patched.setattr(gate_room, "open_runner", noting)
        yield opened


def decided(job: Int8Job) -> Decision:
    return decide(job, lambda line: None)


def test_the_network_has_23_convs_and_passes_with_all_of_them_in_int8() -> None:
    result = decided(sample().job)
    assert len(result.network.quantized) == CONVS
    assert result.passed
    assert result.facts["roll_back"] is None
    assert sample().dice(sample().job.table) > Limits().agreement


def test_a_broken_layer_and_two_mildly_bad_ones_are_found_rolled_back_and_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    who = sample()
    spoiled = who.spoiled()
    for layer, threshold in spoiled.items():  # one alone fails the gate, so that no two of them would do
        assert who.dice(who.planted({layer: threshold})) < Limits().agreement, layer
    job = replace(who.job, table=who.planted(spoiled))
    with counted_runs(monkeypatch) as runs:
        result = decided(job)
    facts = result.facts["roll_back"]
    assert result.passed
    assert set(facts["layers"]) == set(spoiled), "these three and no other"
    assert {one["layer"] for one in facts["sensitivities"][:3]} == set(spoiled)
    assert facts["sensitivities"][0]["layer"] == BROKEN
    assert set(result.network.quantized) == {one["layer"] for one in facts["sensitivities"]} - set(spoiled)
    assert {line for line in result.left if line.endswith(ROLLED_BACK)} == {
        f"{layer}: rolled back by the gate" for layer in spoiled
    }
    # 23 layers: 23 sensitivities; 1 with all rolled back, ceil(log2 23) = 5 of the bisection, k - 1 = 2 given back
    assert facts["sensitivity_runs"] == CONVS
    assert facts["gate_runs"] <= 1 + 5 + 2 <= 1 + 5 + GIVE_BACK
    assert len(runs) == 1 + facts["sensitivity_runs"] + facts["gate_runs"], "the contest, and what is stated"
    assert runs.count(1) >= CONVS, "alone"
    assert runs[0] == CONVS
    again = job.agreement(who.gate, result.network, lambda line: None)
    assert result.verdict is not None
    assert verdict(again, who.gate.limits) == result.verdict, "what is reported is what comes out"


def test_without_roll_back_a_network_that_fails_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    who = sample()
    job = replace(who.job, table=who.planted(who.spoiled()), gate=replace(who.gate, roll_back=False))
    with counted_runs(monkeypatch) as runs:
        result = decided(job)
    assert not result.passed
    assert len(result.network.quantized) == CONVS
    assert runs == [CONVS]
    assert any("Dice against FP32's output" in reason for reason in result.facts["verdict"]["reasons"])


def test_the_contest_takes_the_method_that_holds_and_shows_them_all() -> None:
    who = sample()
    table = who.job.table
    for method in ("entropy", "percentile"):
        whole = table.amax("minmax")[who.activation(BROKEN)]
        table = replace(who, job=replace(who.job, table=table)).planted({BROKEN: whole / 100}, method)
    result = decided(replace(who.job, table=table, methods=METHODS))
    assert result.method == "minmax"
    assert result.passed
    contest = {one["method"]: one for one in result.facts["contest"]}
    assert set(contest) == set(METHODS)
    assert [contest[method]["verdict"]["passed"] for method in METHODS] == [m == "minmax" for m in METHODS]
    assert result.facts["agreement"] == contest["minmax"]["agreement"]


def test_what_cannot_pass_is_said_after_two_runs_and_keeps_nothing_in_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    who = sample()
    other = model_from_bytes(who.job.model.SerializeToString())
    head = next(node for node in other.graph.node if node.op_type == "Conv" and node.name.endswith("seg_layers.4"))
    bias = next(tensor for tensor in other.graph.initializer if tensor.name == head.input[2])
    bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + np.float32([2, 0, 0]), bias.name))
    with counted_runs(monkeypatch) as runs:
        result = decided(replace(who.job, model=other))
    assert runs == [CONVS, 0]
    assert not result.passed
    assert result.network.quantized == ()
    assert result.facts["roll_back"]["sensitivities"] == []
    assert not result.facts["roll_back"]["passed"]


def test_layers_that_are_kept_are_never_quantised_nor_rolled_back() -> None:
    who = sample()
    job = replace(who.job, table=who.planted(who.spoiled()), kept=dict.fromkeys(who.spoiled(), KEPT))
    result = decided(job)
    assert result.passed
    assert result.facts["roll_back"] is None
    assert len(result.network.quantized) == CONVS - 3
    assert {line for line in result.left if line.endswith(": --keep")} == {f"{name}: --keep" for name in who.spoiled()}
    assert not [line for line in result.left if "as asked" in line]


def test_without_a_gate_the_method_that_was_asked_for_is_taken() -> None:
    result = decided(replace(sample().job, gate=None, methods=("percentile",)))
    assert (result.method, result.verdict, result.passed) == ("percentile", None, True)
