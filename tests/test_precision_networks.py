"""INT8 networks in ONNX Runtime and OpenVINO against fake quantisation in float64.

`evaluate` quantises by itself, so these tests hold the nodes, scales, axes, zero points and the backends to it.

The bound: float32 can put a value that lies on the border between two steps on the other side, and later layers carry
that on. Quantisation moves *every* value by up to half a step; a backend may differ from float64 by the rms of that at
the output, which is 0.012 to 0.02 of the logits' standard deviation here. Seen: 3e-7 to 0.012. Computed wrongly
(OpenVINO's int8 behind a Concat) logits are off by 0.18 to 0.25, ten times the bound.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import blosc2
import numpy as np
import onnx
import pytest
import torch
from graph_samples import run
from numpy.typing import NDArray
from precision_samples import (
    PATCHES,
    all_ranges,
    amax_of,
    evaluate,
    fake_quantized,
    network_model,
    patch_of,
    relative_rms,
    run_openvino,
)

from trtbuild.graph import clean, model_from_bytes
from trtbuild.graph.precision import (
    cast,
    fp16_sensitive,
    keep_ends,
    quantize,
    targets,
    tensorrt_form,
    weighted_layers,
    with_outputs,
)
from trtbuild.source import SourceConfig, export_model

DEMO = Path(__file__).resolve().parent.parent / "benchmarks" / "demo"


@pytest.mark.parametrize("keep", [keep_ends, ()], ids=["ends kept", "all quantised"])
@pytest.mark.parametrize("name", PATCHES)
def test_all_forms_and_backends_agree_with_float64_fake_quantisation(name: str, keep: object) -> None:
    model, x = network_model(name), patch_of(name)
    ranges = amax_of(model, x)
    signed, unsigned = (quantize(model, ranges, keep=keep, zero_point=form) for form in ("s8", "u8"))
    wanted = evaluate(model, x, ranges, signed.quantized)
    bound = relative_rms(wanted, evaluate(model, x))
    assert 0.002 < bound < 0.04
    convs = [layer.name for layer in weighted_layers(model) if layer.operator == "Conv"]
    assert len(signed.quantized) == len(convs) - (2 if keep else 0)
    results = {
        "ONNX Runtime s8": run(signed.model, x)[0],
        "ONNX Runtime u8": run(unsigned.model, x)[0],
        "ONNX Runtime u8 optimised": run(unsigned.model, x, plain=False)[0],
        "OpenVINO u8": run_openvino(unsigned.model, x)[0],
    }
    np.testing.assert_array_equal(results["ONNX Runtime s8"], results["ONNX Runtime u8"])
    for what, logits in results.items():
        assert relative_rms(logits, wanted) < bound, what


@pytest.mark.parametrize("name", ["plain2d", "residual3d"])
def test_norms_written_out_change_nothing_but_rounding(name: str) -> None:
    """As bundles hold them for the CPU backends."""
    joined, split = (network_model(name, split=flag) for flag in (False, True))
    x = patch_of(name)
    ranges = amax_of(joined, x)
    typed = quantize(split, ranges, keep=keep_ends, zero_point="u8")
    wanted = evaluate(joined, x, ranges, typed.quantized)
    bound = relative_rms(wanted, evaluate(joined, x))
    for logits in (run(typed.model, x)[0], run_openvino(typed.model, x)[0]):
        assert relative_rms(logits, wanted) < bound


@pytest.mark.parametrize("name", PATCHES)
def test_the_form_for_tensorrt_quantises_the_rewritten_layers_too(name: str) -> None:
    model, x = network_model(name, split=True), patch_of(name)
    ranges = amax_of(model, x)
    typed = quantize(tensorrt_form(model), ranges, keep=keep_ends, zero_point="s8")
    layers = weighted_layers(model)
    assert set(typed.quantized) == {layer.name for layer in layers if layer.role == "body"}
    assert sum(layer.operator == "ConvTranspose" for layer in layers) == 2
    zeros = {tensor.data_type for tensor in typed.model.graph.initializer if tensor.name.endswith("/zero_point")}
    assert zeros == {onnx.TensorProto.INT8}
    plain = evaluate(network_model(name), x)
    assert relative_rms(run(typed.model, x)[0], plain) < 0.03  # with only the Convs quantised it is 0.012 to 0.018


@pytest.mark.parametrize("name", PATCHES)
def test_each_quantised_conv_reads_exactly_the_grid_of_what_it_read_before(name: str) -> None:
    """Layer by layer, so that no rounding is carried on: what Q/DQ make of the tensor that ONNX Runtime has there."""
    model, x = network_model(name), patch_of(name)
    ranges = amax_of(model, x)
    typed = quantize(model, ranges, keep=keep_ends, zero_point="u8")
    tensors = list(dict.fromkeys(layer.activation for layer in weighted_layers(model) if layer.name in typed.quantized))
    shown = run(with_outputs(typed.model, [*tensors, *(f"{tensor}/dequantized" for tensor in tensors)]), x)
    for tensor, before, after in zip(tensors, shown[: len(tensors)], shown[len(tensors) :], strict=True):
        scale = np.float32(ranges[tensor] / 127)
        np.testing.assert_array_equal(after, np.clip(np.rint(before / scale), -128, 127) * scale, err_msg=tensor)
        wanted = fake_quantized(torch.from_numpy(before.astype(np.float64)), ranges[tensor]).numpy()
        steps = np.abs(after.astype(np.float64) - wanted) / scale
        assert np.mean(steps > 0.5) < 1e-3, tensor  # only where float32 division meets a tie


class TestOpenvinoBehindAConcat:
    """The reason for uint8: OpenVINO 2025.4.1 and 2026.4.1 compute int8 with zero point 0 wrongly behind a Concat."""

    @pytest.mark.parametrize("name", PATCHES)
    def test_u8_is_right_where_s8_is_off_by_a_fifth_of_the_logits(
        self, name: str, record_property: pytest.RecordProperty
    ) -> None:
        """0.18 to 0.25 of the logits' standard deviation was seen for s8, 0.0002 to 0.007 for u8. A repaired OpenVINO
        passes: only u8 is held to the bound; what s8 does is recorded."""
        model, x = network_model(name), patch_of(name)
        ranges = amax_of(model, x)
        signed, unsigned = (quantize(model, ranges, keep=keep_ends, zero_point=form) for form in ("s8", "u8"))
        wanted = evaluate(model, x, ranges, signed.quantized)
        right = relative_rms(run_openvino(unsigned.model, x)[0], wanted)
        record_property("rms of OpenVINO s8", relative_rms(run_openvino(signed.model, x)[0], wanted))
        record_property("rms of OpenVINO u8", right)
        assert right < relative_rms(wanted, evaluate(model, x))

    def test_without_a_concat_both_are_right(self) -> None:
        """The encoder alone: up to the first Conv of the third stage there is no Concat."""
        name = "plain3d"
        model, x = network_model(name), patch_of(name)
        ranges = amax_of(model, x)
        last = "encoder.stages.2.0.convs.0.conv_output_0"
        logits = {}
        for form in ("s8", "u8"):
            typed = quantize(model, ranges, keep=keep_ends, zero_point=form).model
            logits[form] = run_openvino(with_outputs(typed, [last]), x)[0]
        assert relative_rms(logits["s8"], logits["u8"]) < 0.005


@pytest.fixture(scope="module")
def demo() -> onnx.ModelProto:
    """The trained demo model's network as bundles hold it for the CPU backends."""
    (network,) = export_model(SourceConfig(folder=DEMO / "model/nnUNetTrainer__nnUNetPlans__3d_fullres")).networks
    return clean(model_from_bytes(network.model), rewrite_conv_transpose=False, split_instance_norm=True).model


@pytest.fixture(scope="module")
def demo_patch() -> NDArray[np.float32]:
    """The middle of the first preprocessed training case."""
    case = blosc2.open(DEMO / "preprocessed/Dataset501_MNI152Tissue/nnUNetPlans_3d_fullres/copy0.b2nd", mode="r")
    return np.ascontiguousarray(case[:, 16:80, 25:89, 18:82][None], np.float32)


@pytest.fixture(scope="module")
def demo_logits(demo: onnx.ModelProto, demo_patch: NDArray[np.float32]) -> NDArray[np.float32]:
    return run(demo, demo_patch, plain=False)[0]


@pytest.fixture(scope="module")
def demo_ranges(demo: onnx.ModelProto, demo_patch: NDArray[np.float32]) -> dict[str, float]:
    return all_ranges(demo, demo_patch)


def target_ranges(model: onnx.ModelProto, ranges: Mapping[str, float]) -> dict[str, float]:
    return {target: max(ranges[source] for source in sources) for target, sources in targets(model)}


def test_the_trained_network_keeps_its_labels_in_int8_on_both_cpu_backends(
    demo: onnx.ModelProto,
    demo_patch: NDArray[np.float32],
    demo_logits: NDArray[np.float32],
    demo_ranges: dict[str, float],
) -> None:
    """98 % of the argmax: min-max ranges of one patch; logits off by 2 % of their standard deviation were seen."""
    typed = quantize(demo, target_ranges(demo, demo_ranges), keep=keep_ends, zero_point="u8")
    assert len(typed.quantized) == 13
    assert len(typed.left) == 5
    wanted, got = run(typed.model, demo_patch, plain=False)[0], run_openvino(typed.model, demo_patch)[0]
    assert relative_rms(wanted, demo_logits) < 0.05
    assert relative_rms(got, wanted) < relative_rms(wanted, demo_logits)
    for logits in (wanted, got):
        assert np.mean(logits.argmax(1) == demo_logits.argmax(1)) > 0.98


def test_the_trained_network_for_tensorrt_keeps_its_labels_in_int8_with_fp16(
    demo: onnx.ModelProto,
    demo_patch: NDArray[np.float32],
    demo_logits: NDArray[np.float32],
    demo_ranges: dict[str, float],
) -> None:
    typed = quantize(tensorrt_form(demo), target_ranges(demo, demo_ranges), keep=keep_ends, zero_point="s8")
    assert len(typed.quantized) == 16
    sensitive = fp16_sensitive(typed.model, demo_ranges)
    assert set(sensitive.values()) == {"norms stay float32"}
    half = cast(typed.model, "fp16", keep=sensitive)
    assert len(half.left) == len(sensitive) == 14
    (logits,) = run(half.model, demo_patch, plain=False)
    assert relative_rms(logits, demo_logits) < 0.05
    assert np.mean(logits.argmax(1) == demo_logits.argmax(1)) > 0.98


def test_the_trained_network_with_the_weights_of_fp16_keeps_its_labels(
    demo: onnx.ModelProto,
    demo_patch: NDArray[np.float32],
    demo_logits: NDArray[np.float32],
    demo_ranges: dict[str, float],
) -> None:
    """ONNX Runtime computes FP16 graphs in float32 on a CPU; what it shows is the rounding of the weights."""
    sensitive = fp16_sensitive(tensorrt_form(demo), demo_ranges)
    (logits,) = run(cast(tensorrt_form(demo), "fp16", keep=sensitive).model, demo_patch, plain=False)
    assert relative_rms(logits, demo_logits) < 0.002
    assert np.mean(logits.argmax(1) == demo_logits.argmax(1)) > 0.999
