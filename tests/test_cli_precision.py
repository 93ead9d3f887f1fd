"""calibrate, quantize and compile's precision from the outside: words, exit codes, files, messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph_samples import operators, weights_of
from graph_samples import run as run_onnx
from models import DEMO, subject

import trtbuild
from trtbuild.bundle import open_bundle
from trtbuild.cli import run
from trtbuild.config import CalibrationConfig, CompileConfig
from trtbuild.errors import TrtbuildError
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
    manifest = open_bundle(bundle).manifest
    assert {engine.precision for engine in manifest.engines} == {"fp32"}
    assert {network.precision for network in manifest.stages[0].networks} == {"fp32"}
    assert [gate["passed"] for gate in manifest.gates] == [False]
    assert run(["inspect", str(bundle)]) == 0
    assert "NOT PASSED" in capsys.readouterr().out


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
