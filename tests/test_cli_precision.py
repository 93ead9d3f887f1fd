"""calibrate, quantize and compile's precision from the outside: words, exit codes, files, messages."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_samples import operators, weights_of
from graph_samples import run as run_onnx
from models import DEMO, subject

import trtbuild
from trtbuild import show
from trtbuild.bundle import open_bundle
from trtbuild.cli import run
from trtbuild.config import CalibrationConfig, CompileConfig, GateConfig, QuantizeConfig
from trtbuild.errors import GateFailed, TrtbuildError
from trtbuild.steps.compilation.compile import INSTEAD, compile_bundle
from trtbuild.steps.precision.decide import kept_layers
from trtbuild.steps.precision.gate import Gate
from trtbuild.steps.prediction.predictor import open_predictor
from trtbuild_calibration import cache_from_scales, read_cache, read_table, write_cache

DATA = DEMO / "preprocessed" / "Dataset501_MNI152Tissue"
FEW = ["--calibration-patches", "3", "--gate-patches", "2"]


@pytest.fixture(scope="module")
def scales(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo network's, of three patches."""
    folder = tmp_path_factory.mktemp("scales") / "of the demo"
    arguments = ["calibrate", str(subject("demo").bundle), "--calibration", str(DATA), "-o", str(folder)]
    assert run([*arguments, "--calibration-patches", "3"]) == 0
    return folder


@pytest.fixture(scope="module")
def network() -> Path:
    bundle = open_bundle(subject("demo").bundle)
    return bundle.network_file(bundle.manifest.stages[0].networks[0].id)


@pytest.fixture(scope="module")
def ungated(scales: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in INT8, judged by no gate."""
    path = tmp_path_factory.mktemp("ungated") / "b.trtb"
    words = ["--precision", "int8", "--calibration", str(DATA), "--calibration-patches", "3", "--scales", str(scales)]
    words += ["--no-gate", "--method", "percentile", "--no-tune"]
    assert run(["compile", str(subject("demo").bundle), *words, "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def trained_with_qdq(scales: Path, network: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that comes with Q/DQ, in the form for CPUs."""
    path = tmp_path_factory.mktemp("qdq") / "u8.onnx"
    assert run(["quantize", str(network), "--scales", str(scales / "fold_0_fp32.json"), "-o", str(path)]) == 0
    return path


def test_calibrate_leaves_a_table_and_a_cache_that_agree(scales: Path) -> None:
    assert sorted(path.name for path in scales.iterdir()) == ["fold_0_fp32.cache", "fold_0_fp32.json"]
    table, cache = read_table(scales / "fold_0_fp32.json"), read_cache(scales / "fold_0_fp32.cache")
    assert table.fingerprint.patches_used == 3
    assert list(cache.scales) == list(table.entries)
    for name, scale in table.scales("entropy").items():
        assert cache.scales[name] == pytest.approx(scale, rel=1e-7)


def test_the_ranges_are_those_of_the_patches(scales: Path, network: Path) -> None:
    """ONNX Runtime in place of OpenVINO, all patches again: the maxima are the same to within rounding."""
    from trtbuild_calibration import PatchSequence, cases_from_folder, open_case, sample_places, split_cases

    table = read_table(scales / "fold_0_fp32.json")
    cases = cases_from_folder(DATA / "nnUNetPlans_3d_fullres")
    kept, _ = split_cases([case.name for case in cases], 0)
    sources = {case.name: open_case(case, channels=1) for case in cases if case.name in kept}
    places = sample_places(list(sources.values()), patch=(64, 64, 64), count=3, seed=0, classes=(1, 2)).places
    patches = PatchSequence(sources=sources, places=places, patch=(64, 64, 64))
    model = onnx.load(network)
    names = ["encoder.stages.1.0.convs.0.conv/input", *list(table.entries)[4:6]]
    names = [name for name in names if name in table.ranges]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    found = np.zeros(len(names))
    for index in range(3):
        outputs = run_onnx(model, patches[index][None])[1:]
        found = np.maximum(found, [np.abs(values).max() for values in outputs])
    assert names
    np.testing.assert_allclose(found, [table.ranges[name] for name in names], rtol=1e-3)


def test_a_second_calibration_of_the_same_kind_is_free(
    scales: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trtbuild.steps.precision.calibrate.observe", lambda *a, **k: 1 / 0)
    arguments = ["calibrate", str(subject("demo").bundle), "--calibration", str(DATA), "-o", str(scales)]
    assert run([*arguments, "--calibration-patches", "3", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["calibrations"][0]["patches"] == 3
    assert run([*arguments, "--calibration-patches", "3"]) == 0
    shown = capsys.readouterr()
    assert f"fold_0_fp32: its scales are there, in {scales}" in shown.err
    assert "calibrating" not in shown.err
    assert "3 patches of 2 cases" in shown.out


def test_scales_of_another_calibration_are_refused(scales: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["calibrate", str(subject("demo").bundle), "--calibration", str(DATA), "-o", str(scales)]
    assert run([*arguments, "--calibration-patches", "4"]) == 1
    error = capsys.readouterr().err
    assert "another calibration" in error
    assert "patches_asked 4" in error


@pytest.mark.parametrize(
    ("backend", "kind", "zero"), [("openvino", onnx.TensorProto.UINT8, 128), ("tensorrt", onnx.TensorProto.INT8, 0)]
)
def test_quantize_writes_the_form_of_the_backend(
    backend: str, kind: int, zero: int, scales: Path, network: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.onnx"
    table = scales / "fold_0_fp32.json"
    assert run(["quantize", str(network), "--scales", str(table), "--backend", backend, "-o", str(output)]) == 0
    model = onnx.load(output)
    onnx.checker.check_model(model, full_check=True)
    points = [t for t in model.graph.initializer if (t.data_type == kind and t.dims == []) or list(t.dims) == []]
    points = [t for t in points if t.data_type == kind]
    assert points
    assert {int(onnx.numpy_helper.to_array(t)) for t in points} == {zero}
    assert ("ConvTranspose" in operators(model)) == (backend != "tensorrt")
    quantizers = operators(model).count("QuantizeLinear")
    assert quantizers == (13 if backend != "tensorrt" else 16)  # the three rewritten ConvTransposes, too


@pytest.mark.parametrize(("rest", "dtype"), [("fp16", np.float16), ("bf16", None)])
def test_the_rest_for_tensorrt_is_in_half_precision(
    rest: str, dtype: type | None, scales: Path, network: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.onnx"
    words = ["--scales", str(scales / "fold_0_fp32.json"), "--backend", "tensorrt", "--rest", rest]
    assert run(["quantize", str(network), *words, "-o", str(output)]) == 0
    model = onnx.load(output)
    onnx.checker.check_model(model, full_check=True)
    half = onnx.TensorProto.FLOAT16 if rest == "fp16" else onnx.TensorProto.BFLOAT16
    assert any(tensor.data_type == half for tensor in model.graph.initializer)
    assert model.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    if dtype is not None:
        assert any(values.dtype == dtype for values in weights_of(model).values())


def test_a_cache_of_tensorrt_gives_the_same_graph_as_the_table(scales: Path, network: Path, tmp_path: Path) -> None:
    for name, words in (("table", ["--method", "entropy"]), ("cache", [])):
        source = scales / ("fold_0_fp32.json" if name == "table" else "fold_0_fp32.cache")
        assert run(["quantize", str(network), "--scales", str(source), *words, "-o", str(tmp_path / name)]) == 0
    first, second = (weights_of(onnx.load(tmp_path / name)) for name in ("table", "cache"))
    assert list(first) == list(second)
    for name, values in first.items():
        np.testing.assert_allclose(values, second[name], rtol=1e-6)


def _other(folder: Path) -> Path:
    write_cache(folder / "x.cache", cache_from_scales({"other": 1.0}, version=8400, kind="EntropyCalibration2"))
    return folder / "x.cache"


def _cut(folder: Path) -> Path:
    (folder / "x.cache").write_text("TRT-8400-EntropyCalibration2\nimage: 3c0")
    return folder / "x.cache"


def _no_table(folder: Path) -> Path:
    (folder / "x.json").write_text("{}")
    return folder / "x.json"


@pytest.mark.parametrize(
    ("made", "words"),
    [(_other, "not of this network"), (_cut, "cut"), (_no_table, "format"), (lambda f: f / "no.json", "no.json")],
)
def test_scales_that_do_not_fit_say_why(
    made: Callable[[Path], Path], words: str, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.onnx"
    assert run(["quantize", str(network), "--scales", str(made(tmp_path)), "-o", str(output)]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not output.exists()


def test_fp16_from_a_cache_lacks_ranges(
    scales: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--scales", str(scales / "fold_0_fp32.cache"), "--backend", "tensorrt", "--rest", "fp16"]
    assert run(["quantize", str(network), *words, "-o", str(tmp_path / "out.onnx")]) == 1
    assert "trtbuild calibrate" in capsys.readouterr().err


def test_compile_uses_the_scales_and_shows_layers_and_gate(
    scales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "b.trtb"
    words = ["--precision", "int8", "--calibration", str(DATA), *FEW, "--scales", str(scales), "--no-tune"]
    kept = ["--keep", r"stages\.3\."]
    assert run(["compile", str(subject("demo").bundle), *words, *kept, "-o", str(bundle)]) == 0
    capsys.readouterr()
    assert run(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    for text in ("int8, rest f32", "percentile", "grey_matter", "passed on 2 patches", "encoder.stages.3.0.convs.0"):
        assert text in shown
    assert run(["inspect", str(bundle), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    (calibration,), (gate,) = facts["calibrations"], facts["gates"]
    assert not [name for name in calibration["layers"]["int8"] if "stages.3." in name]
    assert {trial["method"] for trial in gate["contest"]} == {"entropy", "percentile", "minmax"}
    assert facts["engines"][0]["options"]["quantized_layers"] == len(calibration["layers"]["int8"])


def test_a_gate_that_fails_ends_with_3_and_fp32_engines(
    scales: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "b.trtb"
    words = ["--precision", "int8", "--calibration", str(DATA), *FEW, "--scales", str(scales), "--no-tune"]
    limits = ["--method", "entropy", "--max-mean-loss", "0", "--max-class-loss", "0", "--no-roll-back"]
    assert run(["compile", str(subject("demo").bundle), *words, *limits, "-o", str(bundle)]) == 3
    error = capsys.readouterr().err
    assert "INT8 is not good enough" in error
    assert "try --precision bf16 or fp16, more --calibration-patches, or other limits" in error
    manifest = open_bundle(bundle).manifest
    assert {engine.precision for engine in manifest.engines} == {"fp32"}
    assert {network.precision for network in manifest.stages[0].networks} == {"fp32"}
    assert [gate["passed"] for gate in manifest.gates] == [False]
    assert run(["inspect", str(bundle)]) == 0
    shown = capsys.readouterr().out
    assert "gate of fold_0_int8 in int8, openvino: NOT PASSED on 2 patches of" in shown
    assert "13 layers would be in INT8 (the gate did not pass: engines are FP32), thresholds by entropy:" in shown
    assert "rolled back" not in shown
    assert "no gate" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--precision", "int8"], "INT8 needs patches"),
        (["--precision", "fp16"], "FP16 needs patches"),
        (["--precision", "fp32", "--calibration", "x"], "FP32 needs no calibration"),
        (["--rest", "bf16"], "--rest is for INT8"),
        (["--precision", "bf16", "--keep", "a"], "--keep is for INT8"),
        (["--precision", "int8", "--calibration", "x", "--keep", "("], "no regular expression"),
        (["--precision", "int8", "--calibration", "x", "--no-gate"], "nothing decides"),
        (["--precision", "int8", "--calibration", "x", "--calibration-images", "y"], "one place"),
        (["--precision", "int8", "--calibration", "x", "--calibration-labels", "y"], "Labels belong to raw images"),
        (["--precision", "int8", "--calibration", "no such folder"], "no such folder"),
        (["--precision", "bf16", "--gate"], "--gate needs cases"),
        (["--precision", "bf16", "--max-mean-loss", "0.005"], "--max-mean-loss needs cases"),
        (["--precision", "bf16", "--seed", "0"], "--seed needs cases"),
        (["--precision", "bf16", "--calibration", "x", "--calibration-patches", "3"], "--calibration-patches is for"),
        (["--precision", "bf16", "--calibration", "x", "--scales", "y"], "BF16 needs no scales"),
        (["--gate"], "--gate is for a --precision below fp32"),
        (["--precision", "fp32", "--gate-patches", "16"], "--gate-patches is for a --precision below fp32"),
        (["--calibration-patches", "32"], "--calibration-patches is for a --precision below fp32"),
        (["--no-roll-back"], "--no-roll-back is for a --precision below fp32"),
        (["--precision", "fp16", "--calibration", "x", "--no-roll-back"], "--no-roll-back is for int8"),
        (
            ["--precision", "int8", "--calibration", "x", "--method", "minmax", "--no-gate", "--max-mean-loss", "0"],
            "--max-mean-loss is for the gate",
        ),
        (
            ["--precision", "int8", "--calibration", "x", "--method", "minmax", "--no-gate", "--no-roll-back"],
            "--no-roll-back is for the gate",
        ),
    ],
)
def test_options_that_do_not_fit_say_what_would(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", str(subject("demo").bundle), *words, "-o", str(tmp_path / "b.trtb")]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_scales_without_cases_are_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", "M", "--scales", "s", "-o", str(tmp_path / "b.trtb")]) == 2
    assert "--calibration" in capsys.readouterr().err


def test_python_takes_a_path_or_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[CompileConfig] = []
    monkeypatch.setattr("trtbuild.steps.compilation.compile.compile_bundle", lambda config, *_: seen.append(config))
    trtbuild.compile("m", "b.trtb", precision="int8", calibration="data")
    trtbuild.compile("m", "b.trtb", precision="int8", calibration=CalibrationConfig(images=Path("i"), patches=4))
    assert [config.calibration for config in seen] == [
        CalibrationConfig(data=Path("data")),
        CalibrationConfig(images=Path("i"), patches=4),
    ]
    with pytest.raises(TrtbuildError):
        trtbuild.compile("m", "b.trtb", precision="int8")


def test_scales_of_another_fold_with_the_same_names_are_refused(
    scales: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = onnx.load(network)
    weight = next(tensor for tensor in other.graph.initializer if tensor.raw_data and len(tensor.dims) == 5)
    weight.raw_data = (onnx.numpy_helper.to_array(weight) * np.float32(1.001)).tobytes()
    onnx.save(other, tmp_path / "fold_1.onnx")
    words = ["--scales", str(scales / "fold_0_fp32.json"), "-o", str(tmp_path / "out.onnx")]
    assert run(["quantize", str(tmp_path / "fold_1.onnx"), *words]) == 1
    assert "not of this network" in capsys.readouterr().err
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize("words", [[], ["--split-instance-norm"]])
def test_scales_fit_their_network_however_its_norms_are_written(
    words: list[str], scales: Path, network: Path, tmp_path: Path
) -> None:
    assert run(["clean", str(network), *words, "-o", str(tmp_path / "clean.onnx")]) == 0
    table = ["--scales", str(scales / "fold_0_fp32.json")]
    for name, source in (("a", network), ("b", tmp_path / "clean.onnx")):
        assert run(["quantize", str(source), *table, "-o", str(tmp_path / name)]) == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("backend", ["openvino", "onnxruntime", "tensorrt"])
def test_a_network_with_qdq_of_its_own_is_brought_into_the_backends_form(
    backend: str, trained_with_qdq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.onnx"
    assert run(["quantize", str(trained_with_qdq), "--backend", backend, "-o", str(output), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert len(facts["int8"]) == 13
    before, after = onnx.load(trained_with_qdq), onnx.load(output)
    onnx.checker.check_model(after, full_check=True)
    assert ("ConvTranspose" in operators(after)) == (backend != "tensorrt")
    assert operators(after).count("QuantizeLinear") == operators(before).count("QuantizeLinear")
    points = [
        (tensor.data_type, int(onnx.numpy_helper.to_array(tensor)))
        for tensor in after.graph.initializer
        if tensor.name in {node.input[2] for node in after.graph.node if node.op_type == "QuantizeLinear"}
    ]
    expected = (onnx.TensorProto.INT8, 0) if backend == "tensorrt" else (onnx.TensorProto.UINT8, 128)
    assert set(points) == {expected}
    if backend != "tensorrt":
        assert after.graph == before.graph
        return
    image = np.random.default_rng(0).normal(size=(1, 1, 64, 64, 64)).astype(np.float32)
    (wanted,), (found,) = run_onnx(before, image), run_onnx(after, image)
    np.testing.assert_allclose(found, wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scales", "any.json"], "needs none"),
        (["--method", "entropy"], "--method"),
        (["--keep", "decoder"], "--keep"),
        (["--quantize-ends"], "--quantize-ends"),
        (["--backend", "tensorrt", "--rest", "fp16"], "ranges"),
    ],
)
def test_a_network_with_qdq_of_its_own_takes_no_choice_of_layers_or_scales(
    words: list[str], said: str, trained_with_qdq: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(trained_with_qdq), *words, "-o", str(tmp_path / "out.onnx")]) == 1
    error = capsys.readouterr().err
    assert said in error
    assert "Q/DQ of its own" in error


def test_a_network_without_qdq_needs_scales(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(network), "-o", str(tmp_path / "out.onnx")]) == 1
    assert "trtbuild calibrate" in capsys.readouterr().err


@pytest.mark.parametrize(("kind", "held"), [("EntropyCalibration2", "entropy"), ("MinMaxCalibration", "minmax")])
def test_a_cache_holds_one_method(
    kind: Any, held: str, scales: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = read_cache(scales / "fold_0_fp32.cache").scales
    write_cache(tmp_path / "x.cache", cache_from_scales(known, version=8400, kind=kind))
    words = ["quantize", str(network), "--scales", str(tmp_path / "x.cache")]
    for method in ("entropy", "percentile", "minmax"):
        code = run([*words, "--method", method, "-o", str(tmp_path / f"{method}.onnx")])
        assert code == (method != held)
        assert (f"--method {held}" in capsys.readouterr().err) == (method != held)
    assert run([*words, "-o", str(tmp_path / "any.onnx")]) == 0


def test_the_ends_are_quantised_where_asked(
    scales: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["quantize", str(network), "--scales", str(scales / "fold_0_fp32.json"), "--json"]
    assert run([*words, "-o", str(tmp_path / "a.onnx")]) == 0
    usual = json.loads(capsys.readouterr().out)
    assert run([*words, "--quantize-ends", "-o", str(tmp_path / "b.onnx")]) == 0
    all_of_them = json.loads(capsys.readouterr().out)
    ends = set(all_of_them["int8"]) - set(usual["int8"])
    assert {name for name in ends if "encoder.stages.0.0.convs.0" in name or "seg_layers" in name} == ends
    assert len(ends) == 2
    assert {line for line in usual["left"] if line.endswith(": first or last layer")} == {
        f"{name}: first or last layer" for name in ends
    }
    assert run([*words, "--keep", "bottleneck|stages.3", "-o", str(tmp_path / "c.onnx")]) == 0
    left = json.loads(capsys.readouterr().out)["left"]
    assert {line.split(": ")[1] for line in left if "stages.3." in line and "encoder" in line} == {"--keep"}
    assert not [line for line in (*usual["left"], *left) if "as asked" in line]


def test_norms_are_in_fp16_only_where_asked(scales: Path, network: Path, tmp_path: Path) -> None:
    words = ["--scales", str(scales / "fold_0_fp32.json"), "--backend", "tensorrt", "--rest", "fp16"]
    kinds = []
    for name, more in (("a", []), ("b", ["--fp16-norms"])):
        assert run(["quantize", str(network), *words, *more, "-o", str(tmp_path / name)]) == 0
        model = onnx.load(tmp_path / name)
        stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
        norms = [node for node in model.graph.node if node.op_type == "InstanceNormalization"]
        kinds.append({stored[node.input[1]] for node in norms})
    assert kinds == [{onnx.TensorProto.FLOAT}, {onnx.TensorProto.FLOAT16}]


def test_keeping_every_layer_is_refused_at_once(
    scales: Path, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--scales", str(scales / "fold_0_fp32.json"), "--keep", ".*", "-o", str(tmp_path / "out.onnx")]
    assert run(["quantize", str(network), *words]) == 1
    assert "nothing is left to quantise" in capsys.readouterr().err
    model = onnx.load(network)
    with pytest.raises(TrtbuildError, match="nothing is left to quantise"):
        kept_layers(model, (".*",), ends=False)
    with pytest.raises(TrtbuildError, match="nothing is left to quantise"):
        kept_layers(model, (r"\.conv$",), ends=True)
    assert set(kept_layers(model, (r"stages\.0",), ends=False).values()) == {"--keep"}


def test_what_predicts_is_said_to_be_in_int8(ungated: Path) -> None:
    with open_predictor([ungated]) as predictor:
        (line,) = [line for line in show._started_lines(1, predictor) if "openvino" in line]
    assert " in int8, rest f32 on " in line
    with open_predictor([subject("demo").bundle]) as predictor:
        lines = show._started_lines(1, predictor)
    assert " in f32 on " in lines[-1]
    assert "int8" not in lines[-1]


def test_a_run_names_the_precision_of_its_network(
    ungated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("trtbuild.steps.folder_run.cases.run_cases", lambda cases, run: None)
    words = ["-i", str(DEMO / "input"), "-o", str(tmp_path / "out"), "--json"]
    for bundle, precision in ((ungated, "int8"), (subject("demo").bundle, "fp32")):
        assert run(["predict", str(bundle), *words]) == 0
        engine = json.loads(capsys.readouterr().out)["engine"]
        assert (engine["network_precision"], engine["precision"]) == (precision, "f32")


def test_a_bundle_that_no_gate_judged_says_so(ungated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(ungated)]) == 0
    shown = capsys.readouterr().out
    assert "no gate judged this bundle" in shown
    assert "13 layers in INT8, thresholds by percentile:" in shown
    assert ": first or last layer" in shown
    assert run(["inspect", str(subject("demo").bundle)]) == 0
    assert "no gate" not in capsys.readouterr().out


def test_without_labels_the_agreement_is_what_the_gate_asks_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / DATA.name
    shutil.copytree(DATA, data, ignore=shutil.ignore_patterns("*_seg.b2nd"))
    words = ["--precision", "int8", "--calibration", str(data), "--method", "minmax", "--no-tune"]
    words += ["--calibration-patches", "1", "--gate-patches", "1"]
    words += ["--min-agreement", "1", "--no-roll-back", "-o", str(tmp_path / "b.trtb")]
    assert run(["compile", str(subject("demo").bundle), *words]) == 3
    shown = capsys.readouterr().err
    assert "Dice against FP32's output is" in shown
    assert "the limit is 1." in shown
    (gate,) = open_bundle(tmp_path / "b.trtb").manifest.gates
    assert gate["roll_back"] is None
    assert gate["verdict"]["limits"]["agreement"] == 1


def test_the_options_of_the_gate_reach_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[CompileConfig] = []

    def noting(config: CompileConfig, *_: object) -> object:
        seen.append(config)
        return open_bundle(subject("demo").bundle)

    monkeypatch.setattr("trtbuild.steps.compilation.compile.compile_bundle", noting)
    words = ["--precision", "int8", "--calibration", str(DATA), "--quantize-ends", "--gate", "--seed", "3"]
    limits = ["--gate-patches", "5", "--max-mean-loss", "0.1", "--max-class-loss", "0.2", "--min-agreement", "0.3"]
    assert run(["compile", "M", *words, *limits, "--no-roll-back", "-o", str(tmp_path / "b.trtb")]) == 0
    assert run(["compile", "M", *words, "-o", str(tmp_path / "b.trtb")]) == 0
    assert seen[0].gate == GateConfig(patches=5, mean_loss=0.1, class_loss=0.2, agreement=0.3, roll_back=False)
    assert seen[1].gate == GateConfig()
    assert seen[0].quantize_ends
    assert seen[0].calibration == CalibrationConfig(data=DATA, seed=3)


@pytest.mark.parametrize("words", [["--no-gate"], ["--precision", "bf16", "--no-gate"], ["--precision", "bf16"]])
def test_defaults_and_a_gate_that_is_declined_need_nothing_more(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "trtbuild.steps.compilation.compile.compile_bundle", lambda *_: open_bundle(subject("demo").bundle)
    )
    assert run(["compile", "M", *words, "-o", str(tmp_path / "b.trtb")]) == 0


@pytest.mark.parametrize("precision", ["int8", "fp16", "bf16"])
def test_the_hint_of_a_failed_gate_names_other_precisions(precision: str) -> None:
    assert f"--precision {precision}" not in INSTEAD[precision]  # type: ignore[index]
    assert "--precision" in INSTEAD[precision]  # type: ignore[index]


@pytest.mark.slow
def test_a_failed_gate_of_fp16_does_not_advise_fp16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Gate.agreement
    monkeypatch.setattr(Gate, "agreement", lambda *arguments: replace(original(*arguments), nonfinite=1))
    with pytest.raises(GateFailed, match="try --precision bf16, more --calibration-patches, or other limits"):
        compile_bundle(
            CompileConfig(
                model=subject("demo").bundle, output=tmp_path / "b.trtb", precision="fp16", tune=False,
                calibration=CalibrationConfig(data=DATA, patches=1), gate=GateConfig(patches=1),
            )
        )  # fmt: skip


HERE = Path("x")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: CompileConfig(output=HERE, keep="decoder"), "tuple of texts"),
        (lambda: CompileConfig(output=HERE, keep=("a", 1)), "tuple of texts"),
        (lambda: QuantizeConfig(source=HERE, output=HERE, keep="decoder"), "tuple of texts"),
        (lambda: CompileConfig(output=HERE, gate={"patches": 3}), "GateConfig"),
        (lambda: CompileConfig(output=HERE, gate=True), "GateConfig"),
        (lambda: CompileConfig(output=HERE, precision="int8", calibration=HERE), "CalibrationConfig"),
        (lambda: CompileConfig(output=HERE, precision=["int8"]), "no such precision"),
        (lambda: CompileConfig(output=HERE, gate=GateConfig(patches=3)), "no cases"),
        (lambda: CompileConfig(output=HERE, precision="bf16", gate=GateConfig(mean_loss=0)), "no cases"),
        (lambda: CalibrationConfig(data="data"), "pathlib.Path"),
        (lambda: CalibrationConfig(data=HERE, scales="scales"), "pathlib.Path"),
        (lambda: CalibrationConfig(data=HERE, patches=2.0), "whole number"),
        (lambda: CalibrationConfig(data=HERE, patches=True), "whole number"),
        (lambda: CalibrationConfig(data=HERE, seed="0"), "--seed"),
        (lambda: GateConfig(patches=1.5), "whole number"),
        (lambda: GateConfig(mean_loss=float("nan")), "limit"),
        (lambda: GateConfig(roll_back=1), "True or False"),
        (lambda: QuantizeConfig(source="x", output=HERE), "pathlib.Path"),
        (lambda: QuantizeConfig(source=HERE, output=HERE, scales="s"), "pathlib.Path"),
        (lambda: QuantizeConfig(source=HERE, output=HERE, method="auto"), "no such method"),
        (lambda: QuantizeConfig(source=HERE, output=HERE, backend="cuda"), "no such backend"),
        (lambda: QuantizeConfig(source=HERE, output=HERE, backend="tensorrt", rest="f16"), "no such rest"),
    ],
)
def test_a_configuration_of_wrong_types_cannot_be_built(make: Callable[[], object], said: str) -> None:
    with pytest.raises(TrtbuildError, match=said):
        make()
