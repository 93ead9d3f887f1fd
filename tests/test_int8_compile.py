"""Bundles in lower precision, whole: what is in them, how well they segment the held-out brain, and what comes of a
gate that does not pass."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import SimpleITK as sitk
from calibration_samples import write_case
from int8_samples import DATASET, LENIENT, QUICK, cascade_data, compiled, data_identifier
from make_trained import OUTPUT, RECIPES
from models import DEMO, root, subject, zoo_model
from numpy.typing import NDArray

import trtbuild
from trtbuild.bundle import Bundle, open_bundle
from trtbuild.config import CalibrationConfig, CompileConfig, GateConfig
from trtbuild.errors import EngineError, GateFailed, TrtbuildError
from trtbuild.graph import load_onnx
from trtbuild.runtime.openvino import openvino_module
from trtbuild.steps.compilation.compile import compile_bundle
from trtbuild_calibration import METHODS, read_cache, read_table

BRAIN = DEMO / "input" / "mni152_0000.nii.gz"
TRUTH = DEMO / "labels" / "mni152.nii.gz"
TISSUES = {"grey matter": 1, "white matter": 2}
INT8_LOSS, INT8_AGREEMENT, HALF_LOSS = 0.003, 0.985, 0.0005
BOTH = ("openvino", "onnxruntime")
CALIBRATION = CalibrationConfig(data=DATASET, patches=6)
GATE = GateConfig(patches=4)
IN_INT8 = [
    *(f"encoder.stages.{s}.0.convs.{c}.conv" for s in range(4) for c in range(2) if (s, c) != (0, 0)),
    *(f"decoder.stages.{s}.convs.{c}.conv" for s in range(3) for c in range(2)),
]
"""All Convs of the demo model but the first and the last."""


HAS_BF16 = "BF16" in openvino_module().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
CHANGES = [("int8", "fp16"), ("fp16", "int8"), *([("bf16", "int8"), ("int8", "bf16")] if HAS_BF16 else [])]
SLOWER = [pytest.param(*change, marks=pytest.mark.slow) for change in CHANGES[1:]]


def predicted(bundle: Path, backend: str = "openvino") -> NDArray[Any]:
    """The held-out brain, (Z, Y, X), without mirroring."""
    with trtbuild.open(bundle, backend=backend, threads=2) as predictor:
        return predictor.predict([BRAIN], mirroring=False).segmentation


def dice(a: NDArray[Any], b: NDArray[Any]) -> dict[str, float]:
    """2 |A and B| / (|A| + |B|) of each tissue."""
    return {
        name: 2.0
        * np.count_nonzero((a == label) & (b == label))
        / (np.count_nonzero(a == label) + np.count_nonzero(b == label))
        for name, label in TISSUES.items()
    }


def mean_loss(candidate: NDArray[Any], reference: NDArray[Any]) -> float:
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(TRUTH)))
    before, after = (np.mean(list(dice(one, truth).values())) for one in (reference, candidate))
    return float(before - after)


@functools.cache
def in_fp32() -> NDArray[Any]:
    return predicted(subject("demo").bundle)


@functools.cache
def in_int8() -> Bundle:
    path = root() / "demo_int8.trtb"
    return compiled(subject("demo").bundle, path, backends=BOTH, precision="int8", calibration=CALIBRATION, gate=GATE)


def content(bundle: Bundle, *prefixes: str) -> Mapping[str, str]:
    """SHA-256 of the files below these folders."""
    return {name: entry.sha256 for name, entry in bundle.manifest.files.items() if name.startswith(prefixes)}


# --- what the bundle holds ---


def test_the_bundle_holds_both_networks_and_engines_of_the_int8_one() -> None:
    manifest = open_bundle(in_int8().path).manifest
    (stage,) = manifest.stages
    float_network, network = stage.networks
    assert (float_network.id, float_network.precision, float_network.parent) == ("fold_0_fp32", "fp32", None)
    assert (network.id, network.precision, network.parent) == ("fold_0_int8", "int8", "fold_0_fp32")
    assert (float_network.zero_point, network.zero_point) == ("none", "u8")
    assert [engine.backend for engine in manifest.engines] == list(BOTH)
    for engine in manifest.engines:
        assert (engine.network, engine.precision, engine.inference_precision) == ("fold_0_int8", "int8", "f32")
        assert engine.options["quantized_layers"] == len(IN_INT8)
    model = load_onnx(in_int8().file(network.file))
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert model.opset_import[0].version == network.opset
    assert kinds.count("QuantizeLinear") <= len(IN_INT8)
    assert kinds.count("DequantizeLinear") == kinds.count("QuantizeLinear") + len(IN_INT8)
    points = {i.data_type for i in model.graph.initializer if i.name.endswith("zero_point") and "/" in i.name}
    assert onnx.TensorProto.UINT8 in points


def test_calibration_and_gate_are_written_down_whole() -> None:
    bundle = in_int8()
    manifest = open_bundle(bundle.path).manifest
    (calibration,) = manifest.calibrations
    assert calibration["network"] == "fold_0_fp32"
    assert calibration["method"] in METHODS
    assert sorted(calibration["layers"]["int8"]) == sorted(IN_INT8)
    table = read_table(bundle.file(calibration["file"]))
    assert table.fingerprint.patches_used == calibration["patches"] == CALIBRATION.patches
    assert set(calibration["coverage"]["classes"]) == {"1", "2"}
    assert all(entry["voxels"] > 0 for entry in calibration["coverage"]["classes"].values())
    scales = read_cache(bundle.file(calibration["cache"])).scales
    for name, scale in table.scales("entropy").items():
        assert np.float32(scales[name]) == np.float32(scale)
    first, second = manifest.gates
    assert (first["backend"], second["backend"]) == BOTH
    for gate in (first, second):
        assert gate["network"] == "fold_0_int8"
        assert gate["passed"]
        assert gate["patches"] == GATE.patches
        assert gate["verdict"]["limits"]["mean_loss"] == 0.005
        assert gate["agreement"]["labelled"]
        assert {c["name"] for c in gate["agreement"]["classes"]} == {"background", "grey_matter", "white_matter"}
        assert not set(gate["cases"]) & set(calibration["cases"])
    assert {one["method"] for one in first["contest"]} == set(METHODS)
    assert first["method"] == calibration["method"]


def test_the_scales_in_the_network_are_those_of_the_table() -> None:
    from onnx import numpy_helper

    bundle = in_int8()
    (calibration,) = bundle.manifest.calibrations
    amax = read_table(bundle.file(calibration["file"])).amax(calibration["method"])
    model = load_onnx(bundle.file("networks/fold_0_int8.onnx"))
    values = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    seen = 0
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear":
            assert values[node.input[1]] == np.float32(amax[node.input[0]] / 127)
            assert (values[node.input[2]], values[node.input[2]].dtype) == (128, np.uint8)
            seen += 1
    assert seen > 10


def test_every_file_is_listed_and_the_int8_network_has_a_golden_of_its_own() -> None:
    bundle = in_int8()
    there = {str(p.relative_to(bundle.path)) for p in bundle.path.rglob("*") if p.is_file()} - {"bundle.json"}
    assert there == set(bundle.manifest.files)
    for name in ("networks/fold_0_int8.onnx", "calibrations/fold_0_fp32.json", "calibrations/fold_0_fp32.cache"):
        assert name in there
    goldens = {golden.network: golden for golden in bundle.manifest.goldens if golden.kind == "patch"}
    assert set(goldens) == {"fold_0_fp32", "fold_0_int8"}
    ours, theirs = (np.load(bundle.file(goldens[name].output)) for name in ("fold_0_int8", "fold_0_fp32"))
    error = np.sqrt(np.mean((ours - theirs) ** 2)) / theirs.std()
    assert 1e-3 < error < 0.3, "another network than FP32, and about the same even where the input is noise"


# --- how good it is ---


@pytest.mark.parametrize("backend", ["openvino", pytest.param("onnxruntime", marks=pytest.mark.slow)])
def test_int8_segments_the_held_out_brain_as_fp32_does(backend: str) -> None:
    reference, candidate = in_fp32(), predicted(in_int8().path, backend)
    assert np.mean(candidate != reference) > 1e-5, "it is INT8 that ran"
    assert mean_loss(candidate, reference) <= INT8_LOSS
    for tissue, agreement in dice(candidate, reference).items():
        assert agreement >= INT8_AGREEMENT, tissue


@pytest.mark.slow
@pytest.mark.parametrize("rest", ["fp32", "bf16"])
def test_int8_with_the_default_number_of_patches(rest: str, tmp_path: Path) -> None:
    calibration = CalibrationConfig(data=DATASET)
    compiled(subject("demo").bundle, tmp_path / "b.trtb", precision="int8", rest=rest, calibration=calibration)
    candidate = predicted(tmp_path / "b.trtb")
    assert mean_loss(candidate, in_fp32()) <= INT8_LOSS
    assert min(dice(candidate, in_fp32()).values()) >= INT8_AGREEMENT


@pytest.mark.slow
def test_fp16_segments_the_held_out_brain_as_fp32_does(tmp_path: Path) -> None:
    compiled(subject("demo").bundle, tmp_path / "b.trtb", precision="fp16", calibration=CALIBRATION, gate=GATE)
    manifest = open_bundle(tmp_path / "b.trtb").manifest
    assert [n.id for n in manifest.stages[0].networks] == ["fold_0_fp32", "fold_0_fp16"]
    assert manifest.gates[0]["passed"]
    assert abs(mean_loss(predicted(tmp_path / "b.trtb"), in_fp32())) <= HALF_LOSS


@pytest.mark.slow
@pytest.mark.parametrize("gated", [False, True])
def test_bf16_segments_the_held_out_brain_as_fp32_does_where_the_cpu_has_it(gated: bool, tmp_path: Path) -> None:
    options: dict[str, Any] = {"calibration": CALIBRATION, "gate": GATE} if gated else {}
    if not HAS_BF16:
        with pytest.raises(EngineError, match="does not compute in this precision"):
            compiled(subject("demo").bundle, tmp_path / "b.trtb", precision="bf16", **options)
        return
    compiled(subject("demo").bundle, tmp_path / "b.trtb", precision="bf16", **options)
    manifest = open_bundle(tmp_path / "b.trtb").manifest
    assert {engine.inference_precision for engine in manifest.engines} == {"bf16"}
    assert [gate["passed"] for gate in manifest.gates] == [True] * gated
    assert abs(mean_loss(predicted(tmp_path / "b.trtb"), in_fp32())) <= HALF_LOSS


def folder_of_cases(name: str, folder: Path) -> Path:
    """The demo's cases, which are at both models' spacing, in a folder by the name that the model's plans ask for."""
    target = folder / f"nnUNetPlans_{RECIPES[name].configuration}"
    return shutil.copytree(DATASET / "nnUNetPlans_3d_fullres", target)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_other_trained_models_are_as_good_in_lower_precision(name: str, tmp_path: Path) -> None:
    fp32 = tmp_path / "fp32.trtb"
    compiled(OUTPUT / name / RECIPES[name].folder, fp32)
    reference = predicted(fp32)
    calibration = CalibrationConfig(data=folder_of_cases(name, tmp_path))
    limits = {"int8": INT8_LOSS, "fp16": HALF_LOSS} | ({"bf16": HALF_LOSS} if HAS_BF16 else {})
    for precision, most in limits.items():
        bundle = compiled(fp32, tmp_path / f"{precision}.trtb", precision=precision, calibration=calibration)
        candidate = predicted(bundle.path)
        loss = mean_loss(candidate, reference)
        assert (loss if precision == "int8" else abs(loss)) <= most, precision
        for tissue, agreement in dice(candidate, reference).items():
            assert agreement >= INT8_AGREEMENT, (precision, tissue)


# --- the same again, and back ---


def low_int8(path: Path, model: Path | None = None, **options: Any) -> Bundle:
    """The cascade's small first stage, whose compilation takes a second."""
    calibration = CalibrationConfig(data=cascade_data().dataset, patches=3)
    given: dict[str, Any] = {"precision": "int8", "calibration": calibration, "gate": LENIENT}
    return compiled(model or subject("lowres3d").bundle, path, **(given | options))


@pytest.mark.slow
def test_the_same_command_gives_the_same_networks_and_scales(tmp_path: Path) -> None:
    first, second = (low_int8(tmp_path / f"{name}.trtb") for name in ("a", "b"))
    assert content(first, "networks/", "calibrations/") == content(second, "networks/", "calibrations/")
    assert first.manifest.gates == second.manifest.gates
    other = low_int8(tmp_path / "c.trtb", calibration=CalibrationConfig(data=cascade_data().dataset, patches=3, seed=1))
    assert content(first, "calibrations/") != content(other, "calibrations/")


def test_an_int8_bundle_goes_to_fp32_and_back_to_the_same_bytes(tmp_path: Path) -> None:
    image = cascade_data().images / "main_0000.nii.gz"
    original = open_bundle(subject("lowres3d").bundle)
    first = low_int8(tmp_path / "first.trtb")
    back = compiled(first.path, tmp_path / "back.trtb")
    assert content(back, "networks/") == content(original, "networks/")
    assert not content(back, "calibrations/")
    assert back.manifest.stages == original.manifest.stages
    assert (back.manifest.calibrations, back.manifest.gates) == ((), ())
    for again in (low_int8(tmp_path / "again.trtb", back.path), low_int8(tmp_path / "straight.trtb", first.path)):
        assert content(again, "networks/", "calibrations/", "goldens/") == content(
            first, "networks/", "calibrations/", "goldens/"
        )
        assert again.manifest.stages == first.manifest.stages
        assert again.manifest.gates == first.manifest.gates
    results = {}
    for name in ("first", "back", "again"):
        with trtbuild.open(tmp_path / f"{name}.trtb", threads=2) as predictor:
            results[name] = predictor.predict([image], mirroring=False).segmentation
    with trtbuild.open(original.path, backend="openvino", threads=2) as predictor:
        expected = predictor.predict([image], mirroring=False).segmentation
    np.testing.assert_array_equal(results["back"], expected)
    np.testing.assert_array_equal(results["again"], results["first"])
    assert (results["first"] != expected).any()


@pytest.mark.parametrize(("start", "end"), [CHANGES[0], *SLOWER])
def test_any_precision_follows_any_other(start: str, end: str, tmp_path: Path) -> None:
    direct = low_int8(tmp_path / "direct.trtb", precision=end)
    between = low_int8(tmp_path / "between.trtb", precision=start)
    after = low_int8(tmp_path / "after.trtb", between.path, precision=end)
    assert content(after, "networks/", "calibrations/") == content(direct, "networks/", "calibrations/")
    assert [(e.network, e.precision, e.inference_precision) for e in after.manifest.engines] == [
        (e.network, e.precision, e.inference_precision) for e in direct.manifest.engines
    ]


def test_layers_are_kept_by_regular_expression_and_the_ends_quantised_on_demand(tmp_path: Path) -> None:
    bundle = low_int8(
        tmp_path / "b.trtb", keep=(r"^encoder\.stages\.1", "convs.1"), quantize_ends=True, method="minmax"
    )
    layers = bundle.manifest.calibrations[0]["layers"]
    assert "encoder.stages.0.0.convs.0.conv" in layers["int8"]
    assert "decoder.seg_layers.1" in layers["int8"]
    assert not [name for name in layers["int8"] if name.startswith("encoder.stages.1") or "convs.1" in name]
    assert any(line.startswith("encoder.stages.1.0.convs.0.conv: ") for line in layers["kept"])
    assert bundle.manifest.engines[0].options["quantized_layers"] == len(layers["int8"])


def test_without_a_gate_nothing_is_judged_and_the_scales_are_the_same(tmp_path: Path) -> None:
    gated = low_int8(tmp_path / "gated.trtb", method="percentile")
    bundle = low_int8(tmp_path / "b.trtb", gate=None, method="percentile")
    assert bundle.manifest.gates == ()
    assert bundle.manifest.calibrations[0]["method"] == "percentile"
    assert content(bundle, "networks/", "calibrations/") == content(gated, "networks/", "calibrations/")


def test_every_fold_is_calibrated_and_gated_by_itself(tmp_path: Path) -> None:
    """A bundle of two folds, the second of which is the first under another name."""
    folder = shutil.copytree(zoo_model("lowres3d").folder, tmp_path / zoo_model("lowres3d").folder.name)
    shutil.copytree(folder / "fold_0", folder / "fold_1")
    bundle = low_int8(tmp_path / "b.trtb", folder, method="minmax")
    names = [f"fold_{fold}_{precision}" for fold in (0, 1) for precision in ("fp32", "int8")]
    assert sorted(n.id for n in bundle.manifest.stages[0].networks) == names
    assert [c["network"] for c in bundle.manifest.calibrations] == ["fold_0_fp32", "fold_1_fp32"]
    assert [g["network"] for g in bundle.manifest.gates] == ["fold_0_int8", "fold_1_int8"]
    files = content(bundle, "networks/")
    assert files["networks/fold_0_int8.onnx"] == files["networks/fold_1_int8.onnx"]
    assert len(bundle.manifest.engines) == 2


def random_dataset(name: str, folder: Path) -> Path:
    """Smooth noise and blocks of labels for a model of the zoo, in `.npz` files."""
    from scipy.ndimage import zoom

    model, (stage,) = zoo_model(name), open_bundle(subject(name).bundle).manifest.stages
    rng, dataset = np.random.default_rng(0), folder / "Dataset"
    dataset.mkdir()
    shutil.copy(model.folder / "dataset.json", dataset)
    values = sorted({value for several in stage.spec.labels.names.values() for value in several})
    for case in "abc":
        image = zoom(rng.standard_normal((len(stage.spec.channels), 8, 8, 8)), (1, 5, 5, 5), order=1)
        labels = zoom(rng.choice(values, (1, 8, 8, 8)), (1, 5, 5, 5), order=0)
        write_case(dataset / data_identifier(model), case, "npz", image.astype(np.float32), labels.astype(np.int8))
    return dataset


@pytest.mark.slow
@pytest.mark.parametrize("backends", [("openvino",), ("onnxruntime",), BOTH[::-1]])
@pytest.mark.parametrize(("name", "judged"), [
    ("regions4", ["whole tumor", "tumor core", "enhancing tumor"]), ("slices2d", ["left", "right"]),
    ("rgb_png", ["road", "house"]),
])  # fmt: skip
def test_regions_slices_and_ignore_labels_are_judged_by_their_own_names(
    name: str, judged: list[str], backends: tuple[str, ...], tmp_path: Path
) -> None:
    """In 3-D and 2-D, with several channels, with an ignore label, and without one."""
    calibration = CalibrationConfig(data=random_dataset(name, tmp_path), patches=3)
    bundle = low_int8(tmp_path / "b.trtb", subject(name).bundle, calibration=calibration, backends=backends)
    assert [gate["backend"] for gate in bundle.manifest.gates] == list(backends)
    assert [gate["verdict"]["judged"] for gate in bundle.manifest.gates] == [judged] * len(backends)
    assert "contest" in bundle.manifest.gates[0], "the first backend decides"
    assert {engine.options["quantized_layers"] for engine in bundle.manifest.engines} == {
        len(bundle.manifest.calibrations[0]["layers"]["int8"])
    }


# --- a gate that does not pass ---


def cannot_pass(path: Path, **options: Any) -> GateFailed:
    with pytest.raises(GateFailed) as caught:
        low_int8(path, gate=GateConfig(patches=2, mean_loss=0, class_loss=0), method="minmax", **options)
    return caught.value


@pytest.fixture
def nothing_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate that is broken whatever is rolled back: its head gives everything to the last label."""
    from trtbuild.steps.precision import cpu as room

    original = room.clean

    def broken(model: Any, **options: Any) -> Any:
        result = original(model, **options)
        if not options["split_instance_norm"]:
            head = [node for node in result.model.graph.node if node.op_type == "Conv"][-1]
            bias = next(tensor for tensor in result.model.graph.initializer if tensor.name == head.input[2])
            values = onnx.numpy_helper.to_array(bias).copy()
            values[-1] += 100
            bias.CopyFrom(onnx.numpy_helper.from_array(values, bias.name))
        return result

    monkeypatch.setattr(room, "clean", broken)


@pytest.mark.usefixtures("nothing_helps")
def test_a_gate_that_cannot_pass_leaves_fp32_engines_and_says_why(tmp_path: Path) -> None:
    error = cannot_pass(tmp_path / "b.trtb")
    assert error.exit_code == 3
    assert "fold_0_int8, openvino: Mean Dice" in str(error)
    assert str(tmp_path / "b.trtb") in str(error)
    bundle = open_bundle(tmp_path / "b.trtb")
    assert [(e.network, e.precision) for e in bundle.manifest.engines] == [("fold_0_fp32", "fp32")]
    assert [n.id for n in bundle.manifest.stages[0].networks] == ["fold_0_fp32"]
    assert not [path for path in bundle.path.rglob("*") if "int8" in path.name]
    assert [golden.network for golden in bundle.manifest.goldens if golden.kind == "patch"] == ["fold_0_fp32"]
    (gate,) = bundle.manifest.gates
    assert not gate["passed"]
    assert gate["verdict"]["reasons"]
    assert gate["contest"][0]["method"] == "minmax"
    assert gate["roll_back"]["gate_runs"] == 1
    assert content(bundle, "networks/") == content(open_bundle(subject("lowres3d").bundle), "networks/")
    image = cascade_data().images / "main_0000.nii.gz"
    results = []
    for path in (bundle.path, subject("lowres3d").bundle):
        with trtbuild.open(path, backend="openvino", threads=2) as predictor:
            results.append(predictor.predict([image], mirroring=False).segmentation)
    np.testing.assert_array_equal(*results)
    again = low_int8(tmp_path / "again.trtb", bundle.path, gate=None, method="minmax")
    assert [e.precision for e in again.manifest.engines] == ["int8"], "its networks serve as before"


@pytest.mark.usefixtures("nothing_helps")
def test_the_command_ends_with_3_where_the_gate_does_not_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trtbuild.cli import run

    words = [
        "compile", str(subject("lowres3d").bundle), "-o", str(tmp_path / "b.trtb"), "--no-tune",
        "--backend", "openvino", "--precision", "int8", "--calibration", str(cascade_data().dataset),
        "--calibration-patches", "2", "--gate-patches", "2", "--threads", "2",
    ]  # fmt: skip
    assert run(words) == 3
    assert "INT8 is not good enough" in capsys.readouterr().err
    assert (tmp_path / "b.trtb" / "bundle.json").is_file()


def test_limits_of_zero_end_in_a_network_that_meets_them_or_in_none(tmp_path: Path) -> None:
    try:
        bundle = low_int8(tmp_path / "b.trtb", gate=GateConfig(patches=2, mean_loss=0, class_loss=0), method="minmax")
    except GateFailed:
        bundle = open_bundle(tmp_path / "b.trtb")
        assert {e.precision for e in bundle.manifest.engines} == {"fp32"}
        assert not bundle.manifest.gates[0]["passed"]
    else:
        judged = bundle.manifest.gates[0]["agreement"]["classes"][1:]
        assert all(c["dice_candidate"] >= c["dice_fp32"] for c in judged)
        assert bundle.manifest.engines[0].options["quantized_layers"] > 0


@pytest.mark.parametrize("precision", ["fp16", *(["bf16"] if HAS_BF16 else [])])
def test_the_other_precisions_are_gated_as_well(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtbuild.steps.precision.gate import Gate

    original = Gate.agreement
    monkeypatch.setattr(Gate, "agreement", lambda *arguments: replace(original(*arguments), nonfinite=1))
    with pytest.raises(GateFailed, match=f"{precision.upper()} is not good enough") as caught:
        low_int8(tmp_path / "b.trtb", precision=precision)
    assert "NaN or infinity in 1 value" in str(caught.value)
    bundle = open_bundle(tmp_path / "b.trtb")
    assert [(e.network, e.precision, e.inference_precision) for e in bundle.manifest.engines] == [
        ("fold_0_fp32", "fp32", "f32")
    ]
    assert content(bundle, "networks/") == content(open_bundle(subject("lowres3d").bundle), "networks/")
    assert [gate["passed"] for gate in bundle.manifest.gates] == [False]


@pytest.mark.parametrize("gate", [None, LENIENT])
def test_a_network_of_which_every_layer_is_kept_has_no_int8(gate: GateConfig | None, tmp_path: Path) -> None:
    with pytest.raises(TrtbuildError, match="nothing is left to quantise"):
        low_int8(tmp_path / "b.trtb", gate=gate, method="minmax", keep=(".",))
    assert not (tmp_path / "b.trtb").exists()


def test_a_backend_that_does_not_pass_takes_int8_from_all_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first backend decides, the second one is judged with what was decided."""
    from trtbuild.steps.precision.gate import Gate

    original = Gate.agreement

    def bad_second(self: Gate, record: Any, model: Path, say: Any) -> Any:
        found = original(self, record, model, say)
        return replace(found, nonfinite=7) if record.backend == "onnxruntime" else found

    monkeypatch.setattr(Gate, "agreement", bad_second)
    with pytest.raises(GateFailed, match="onnxruntime: The candidate returned NaN"):
        low_int8(tmp_path / "b.trtb", backends=BOTH, method="minmax")
    bundle = open_bundle(tmp_path / "b.trtb")
    assert {(e.backend, e.precision) for e in bundle.manifest.engines} == {(name, "fp32") for name in BOTH}
    assert [(gate["backend"], gate["passed"]) for gate in bundle.manifest.gates] == [
        ("openvino", True), ("onnxruntime", False),
    ]  # fmt: skip


def test_nothing_is_written_where_the_target_exists(tmp_path: Path) -> None:
    from trtbuild.errors import OutputError

    shutil.copytree(subject("lowres3d").bundle, tmp_path / "b.trtb")
    lines: list[str] = []
    config = CompileConfig(
        model=subject("lowres3d").bundle, output=tmp_path / "b.trtb", precision="int8",
        calibration=CalibrationConfig(data=cascade_data().dataset), **QUICK,
    )  # fmt: skip
    with pytest.raises(OutputError):
        compile_bundle(config, lines.append)
    assert lines == [], "before the calibration"
