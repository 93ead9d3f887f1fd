"""Bundles for TensorRT-RTX, whole: real engines, what is said of them, who judges them, what comes of a failure."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from int8_samples import DATASET
from models import root, subject
from onnx import numpy_helper
from test_int8_compile import HAS_BF16, IN_INT8

import trtbuild
from trtbuild.bundle import Bundle, open_bundle
from trtbuild.cli import run
from trtbuild.config import CalibrationConfig, CompileConfig, GateConfig, TensorRTConfig
from trtbuild.errors import EngineError, GateFailed, MissingExtra, OutputError, TrtbuildError
from trtbuild.graph import load_onnx
from trtbuild.nvinfer import no_driver
from trtbuild.steps.compilation.compile import compile_bundle

RTX = ("tensorrt-rtx",)
GATE = GateConfig(patches=3)
PRECISIONS = ("fp32", "fp16", "bf16", "int8")
COMPUTED = {"fp32": "f32", "fp16": "f16", "bf16": "bf16", "int8": "f16"}
TYPES = {"fp32": onnx.TensorProto.FLOAT, "fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}
UPSAMPLED = [f"decoder.transpconvs.{n}" for n in range(3)]
"""The demo model's ConvTransposes, which TensorRT gets as Convs."""

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Engines are kept in a folder of this session's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRTBUILD_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@functools.cache
def calibration() -> CalibrationConfig:
    """Whose scales are kept, so that a network is calibrated once."""
    return CalibrationConfig(data=DATASET, patches=4, scales=root() / "demo_rtx_scales")


def compiled(path: Path, precision: str, *, report: Any = lambda line: None, **options: Any) -> Bundle:
    given: dict[str, Any] = {"backends": RTX, "tune": False, "threads": 2, "precision": precision}
    if precision == "int8":
        given |= {"calibration": calibration(), "gate": GATE}
    return compile_bundle(CompileConfig(model=subject("demo").bundle, output=path, **(given | options)), report)


@functools.cache
def built(precision: str) -> Bundle:
    return compiled(root() / f"demo_rtx_{precision}.trtb", precision)


def the_engine(bundle: Bundle) -> trtbuild.spec.BuildRecord:
    (engine,) = open_bundle(bundle.path).manifest.engines
    return engine


# --- what the bundle holds ---


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_bundle_holds_a_raw_plan_and_says_what_it_is(precision: str) -> None:
    bundle, engine = built(precision), the_engine(built(precision))
    (stage,) = bundle.manifest.stages
    plain, typed = stage.networks
    assert (plain.id, plain.parent) == ("fold_0_fp32", None)
    assert (typed.id, typed.parent) == (f"fold_0_{precision}_tensorrt", "fold_0_fp32")
    assert (typed.precision, typed.zero_point) == (precision, "s8" if precision == "int8" else "none")
    assert (engine.network, engine.backend, engine.precision) == (typed.id, "tensorrt-rtx", precision)
    assert engine.inference_precision == COMPUTED[precision]
    assert (engine.profile.min, engine.profile.max) == ((1, 1, 64, 64, 64), (4, 1, 64, 64, 64))
    plan = bundle.file(str(engine.file)).read_bytes()
    assert plan[:4] == b"vtrt", "nothing stands before the plan, so that other tools read it"
    assert engine.options["sha256"] == hashlib.sha256(plan).hexdigest()
    assert engine.memory.device_per_batch["4"] > 0
    assert engine.device == {"capabilities": "all"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_network_is_strongly_typed_with_no_conv_transpose_left(precision: str) -> None:
    bundle = built(precision)
    network = bundle.manifest.stages[0].networks[1]
    model = onnx.shape_inference.infer_shapes(load_onnx(bundle.file(network.file)))
    onnx.checker.check_model(model, full_check=True)
    kinds = [node.op_type for node in model.graph.node]
    assert "ConvTranspose" not in kinds
    assert "InstanceNormalization" in kinds
    assert [v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)] == [TYPES["fp32"]] * 2
    assert model.opset_import[0].version == network.opset == (22 if precision == "bf16" else network.opset)
    types = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    convs = [node for node in model.graph.node if node.op_type == "Conv"]
    wanted = TYPES["fp16" if precision == "int8" else precision]
    assert {types.get(node.output[0], wanted) for node in convs} == {wanted}


def test_int8_reads_int8_in_every_conv_but_the_first_and_the_last() -> None:
    bundle = built("int8")
    model = load_onnx(bundle.file(bundle.manifest.stages[0].networks[1].file))
    made = {name: node for node in model.graph.node for name in node.output}
    points = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
    quantized = []
    for node in (node for node in model.graph.node if node.op_type == "Conv"):
        sources = [made.get(name) for name in node.input[:2]]
        if all(source is not None and source.op_type == "DequantizeLinear" for source in sources):
            quantized.append(node.name)
            zero = points[sources[0].input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
    (calibration,) = bundle.manifest.calibrations
    assert len(quantized) == len(IN_INT8) + len(UPSAMPLED)
    assert sorted(calibration["layers"]["int8"]) == sorted(quantized)
    kernels = json.loads(bundle.file(str(the_engine(bundle).options["layers"])).read_bytes())
    assert "deconv" not in json.dumps(kernels)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_golden_is_what_another_engine_computes_with_the_same_graph(precision: str) -> None:
    """Float32 is PyTorch's to 1e-3 (ONNX Runtime's own norm), lower precisions lie as far off as they round."""
    bundle = built(precision)
    golden = {entry.network: entry for entry in bundle.manifest.goldens}
    exact, typed = (np.load(bundle.file(golden[f"fold_0_{name}"].output)) for name in ("fp32", f"{precision}_tensorrt"))
    error = np.sqrt(np.mean((typed - exact) ** 2)) / exact.std()
    least, most = {"fp32": (0, 1e-6), "bf16": (0, 2e-3), "fp16": (1e-6, 5e-3), "int8": (1e-2, 0.2)}[precision]
    assert least <= error <= most


def test_int8_is_judged_on_a_cpu_that_computes_the_same_grid() -> None:
    (gate,) = built("int8").manifest.gates
    assert (gate["network"], gate["backend"], gate["passed"]) == ("fold_0_int8_tensorrt", "openvino", True)
    assert {entry["method"] for entry in gate["contest"]} == {"entropy", "percentile", "minmax"}


@pytest.mark.parametrize("precision", ["fp16", *(["bf16"] if HAS_BF16 else [])])
def test_half_precision_is_judged_where_cases_are_given(precision: str, tmp_path: Path) -> None:
    """FP16 as it is, with its weights rounded; BF16 as OpenVINO computes the same graph in it."""
    data = calibration() if precision == "fp16" else replace(calibration(), scales=None)
    bundle = compiled(tmp_path / "b.trtb", precision, calibration=data, gate=GATE)
    (gate,) = bundle.manifest.gates
    assert (gate["network"], gate["passed"]) == (f"fold_0_{precision}_tensorrt", True)
    assert gate["inference_precision"] == {"fp16": "f32", "bf16": "bf16"}[precision]
    assert 0 < gate["agreement"]["error_rms"] < 0.5
    assert len(bundle.manifest.calibrations) == (precision == "fp16")


@pytest.mark.skipif(no_driver() is None, reason="there is a GPU, which would run the engine")
def test_a_machine_without_a_gpu_says_so_in_one_message(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no NVIDIA driver"), trtbuild.open(built("fp16").path):
        pass
    both = compiled(tmp_path / "both.trtb", "fp32", backends=(*RTX, "openvino"))
    with trtbuild.open(both.path) as predictor:
        assert predictor.describe().backend == "openvino"
        assert "no NVIDIA driver" in dict(predictor.models[0].refused)["tensorrt-rtx"]
    with pytest.raises(EngineError, match="no NVIDIA driver"), trtbuild.open(both.path, backend="tensorrt-rtx"):
        pass


def test_one_bundle_for_a_cpu_and_for_tensorrt(tmp_path: Path) -> None:
    """Calibrated once, decided for each graph: uint8 for the CPU, int8 with its ConvTransposes for TensorRT."""
    bundle = compiled(tmp_path / "b.trtb", "int8", backends=("openvino", *RTX))
    ids = [network.id for network in bundle.manifest.stages[0].networks]
    assert ids == ["fold_0_fp32", "fold_0_int8", "fold_0_int8_tensorrt"]
    assert [engine.backend for engine in bundle.manifest.engines] == ["tensorrt-rtx", "openvino"]
    assert [gate["network"] for gate in bundle.manifest.gates] == ["fold_0_int8", "fold_0_int8_tensorrt"]
    layers = [set(entry["layers"]["int8"]) for entry in bundle.manifest.calibrations]
    assert len(layers[1] - layers[0]) == len(UPSAMPLED)
    files = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    name = "calibrations/fold_0_fp32.json"
    assert files[name] == built("int8").manifest.files[name].sha256


# --- gates, reuse, options ---


def test_a_gate_that_does_not_pass_leaves_fp32_engines(tmp_path: Path) -> None:
    strict = replace(GATE, mean_loss=0, class_loss=0, roll_back=False)
    path = tmp_path / "b.trtb"
    with pytest.raises(GateFailed):
        compiled(path, "int8", gate=strict, method="entropy")
    bundle = open_bundle(path)
    assert [engine.network for engine in bundle.manifest.engines] == ["fold_0_fp32_tensorrt"]
    assert {network.precision for network in bundle.manifest.stages[0].networks} == {"fp32"}
    assert not bundle.manifest.gates[0]["passed"]


def test_an_unchanged_compile_reuses_the_engine_and_a_changed_field_is_named(tmp_path: Path) -> None:
    lines: list[str] = []
    first = built("fp16")
    again = compiled(tmp_path / "a.trtb", "fp16", report=lines.append)
    assert any("reus" in line for line in lines)
    assert the_engine(again).options["sha256"] == the_engine(first).options["sha256"]
    lines.clear()
    config = TensorRTConfig(workspace=4096)
    changed = compiled(tmp_path / "b.trtb", "fp16", tensorrt=config, report=lines.append)
    assert any("workspace" in line for line in lines)
    assert the_engine(changed).options["key"] != the_engine(first).options["key"]


def test_the_script_names_the_bundles_own_network(tmp_path: Path) -> None:
    bundle = compiled(tmp_path / "b.trtb", "fp16", emit_script=tmp_path / "build.sh")
    script = (tmp_path / "build.sh").read_text()
    (network,) = (network for network in bundle.manifest.stages[0].networks if network.parent)
    assert f"b.trtb/{network.file}" in script
    assert "polygraphy" in script
    assert (tmp_path / "b.trtb" / network.file).is_file()


def test_the_script_replaces_nothing_that_is_not_its_own(tmp_path: Path) -> None:
    there = tmp_path / "notes.txt"
    there.write_text("kept")
    for script in (there, tmp_path / "b.trtb", tmp_path / "no" / "x.sh", subject("demo").bundle / "bundle.json"):
        with pytest.raises(OutputError):
            compiled(tmp_path / "b.trtb", "fp16", emit_script=script)
    assert there.read_text() == "kept"
    assert not (tmp_path / "b.trtb").exists()


def test_a_rest_in_bf16_and_in_fp32(tmp_path: Path) -> None:
    for rest, computed in (("bf16", "bf16"), ("fp32", "f32")):
        bundle = compiled(tmp_path / f"{rest}.trtb", "int8", rest=rest, gate=None, method="percentile")
        assert the_engine(bundle).inference_precision == computed


WRONG: Mapping[str, tuple[dict[str, Any], type[TrtbuildError], str]] = {
    "two flavours": ({"backends": ("tensorrt", *RTX)}, EngineError, "one process"),
    "not installed": ({"backends": ("tensorrt",)}, MissingExtra, r"trtbuild\[tensorrt\]"),
    "FP16 on a CPU": ({"backends": (*RTX, "openvino"), "precision": "fp16"}, EngineError, "--calibration"),
    "no such GPU": ({"tensorrt": TensorRTConfig(compute_capabilities=("90",))}, EngineError, "90"),
    "its GPU is not here": ({"tensorrt": TensorRTConfig(compute_capabilities=("current",))}, EngineError, "GPU"),
    "Turing": ({"tensorrt": TensorRTConfig(compute_capabilities=("75",))}, EngineError, "75"),
    "another flavour's": (
        {"tensorrt": TensorRTConfig(hardware_compatibility="ampere+")},
        EngineError,
        "--hardwareCompatibilityLevel",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_an_error_and_leaves_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, kind, words = WRONG[name]
    if name == "not installed":  # as in a process of its own, where the other flavour is not loaded yet
        monkeypatch.delitem(sys.modules, "tensorrt_rtx", raising=False)
    with pytest.raises(kind, match=words):
        compiled(tmp_path / "b.trtb", **({"precision": "fp32"} | options))
    assert not list(tmp_path.iterdir())


def test_a_cpu_has_no_rest_in_fp16(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no FP16 rest"):
        compiled(tmp_path / "b.trtb", "int8", backends=("openvino",), rest="fp16")


def test_the_command_line_builds_and_says_what_was_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.trtb"
    words = ["--backend", "tensorrt-rtx", "--precision", "fp16", "--compute-capability", "86,89", "--max-batch", "2"]
    assert run(["compile", str(subject("demo").bundle), *words, "-o", str(path)]) == 0
    said = "".join(capsys.readouterr())
    engine = the_engine(open_bundle(path))
    assert engine.device == {"capabilities": "86,89"}
    assert engine.profile.max[0] == 2
    if no_driver() is not None:
        assert "not run here" in said
    assert run(["compile", str(subject("demo").bundle), "--workspace", "64", "-o", str(tmp_path / "c.trtb")]) == 2
    assert "tensorrt-rtx" in "".join(capsys.readouterr())


def test_compiling_for_a_cpu_loads_no_tensorrt(tmp_path: Path) -> None:
    code = (
        "import sys; from trtbuild.cli import run; "
        f"run(['compile', {str(subject('demo').bundle)!r}, '--no-tune', '-o', {str(tmp_path / 'b.trtb')!r}]); "
        "sys.exit('tensorrt_rtx' in sys.modules or 'tensorrt' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


# --- nothing is built that is not what was exported ---


def test_the_network_for_tensorrt_is_held_to_pytorch(tmp_path: Path) -> None:
    lines: list[str] = []
    compiled(tmp_path / "b.trtb", "fp16", report=lines.append)
    assert any("differ from PyTorch's by" in line for line in lines)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_graph_that_computes_something_else_is_refused(
    precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtbuild.steps.precision import device

    original = device.tensorrt_form

    def broken(model: onnx.ModelProto) -> onnx.ModelProto:
        result = original(model)
        name = next(node for node in result.graph.node if node.op_type == "Conv").input[1]
        weight = next(tensor for tensor in result.graph.initializer if tensor.name == name)
        weight.CopyFrom(numpy_helper.from_array(1.5 * np.roll(numpy_helper.to_array(weight), 1, axis=0), name))
        return result

    monkeypatch.setattr(device, "tensorrt_form", broken)
    with pytest.raises(EngineError, match="does not compute what was exported"):
        compiled(tmp_path / "b.trtb", precision)
    assert not list(tmp_path.iterdir())


def test_weights_below_fp16_are_said_and_refused_where_they_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head whose weights are 1e-7 of the trained ones segments alike in FP32 and is nothing in FP16."""
    from trtbuild.steps.compilation import compile as room

    original, lines = room._networks, list[str]()

    def small(config: CompileConfig, report: Any) -> Any:
        networks = original(config, report)
        (network,) = networks.stages[0].networks
        model = load_onnx(networks.files[network.file])
        head = [node for node in model.graph.node if node.op_type == "Conv"][-1]
        for tensor in (t for t in model.graph.initializer if t.name in head.input):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1e-7), tensor.name))
        patch, logits = networks.goldens[network.id]
        files = {**networks.files, network.file: model.SerializeToString()}
        return replace(networks, files=files, goldens={network.id: (patch, logits * np.float32(1e-7))})

    monkeypatch.setattr(room, "_networks", small)
    with pytest.raises(EngineError, match="FP16 does not compute what was exported"):
        compiled(tmp_path / "b.trtb", "fp16", report=lines.append)
    assert any("weights too small for FP16" in line for line in lines)


class _Wrong:
    """A GPU's runner, as far as compile looks at it, that computes zeros."""

    def __enter__(self) -> _Wrong:
        return self

    def __exit__(self, *_: object) -> None: ...

    def infer(self, batch: Any) -> Any:
        return np.zeros((len(batch), 3, 64, 64, 64), np.float32)


def test_where_there_is_a_gpu_the_engine_is_run_and_held_to_its_golden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtbuild.runtime import select
    from trtbuild.steps.compilation import device

    original = select.open_runner

    def opened(record: Any, model: Path, **options: Any) -> Any:
        return _Wrong() if record.backend == "tensorrt-rtx" else original(record, model, **options)

    monkeypatch.setattr(device, "no_driver", lambda: None)
    lines: list[str] = []
    compiled(tmp_path / "a.trtb", "fp16", report=lines.append)
    assert any("not run here" in line for line in lines), "an engine that does not open here is said"
    monkeypatch.setattr(select, "open_runner", opened)
    with pytest.raises(EngineError, match="An engine does not compute"):
        compiled(tmp_path / "b.trtb", "fp16")


def test_the_bundle_says_that_its_engine_was_not_run_and_what_stayed_in_float32() -> None:
    facts = open_bundle(built("fp16").path).manifest.extensions["tensorrt"]["fold_0_fp16_tensorrt"]
    if no_driver() is not None:
        assert "no NVIDIA driver" in facts["unrun"]
    assert any("norms stay float32" in line for line in facts["kept"])


def test_int8_with_a_bf16_rest_is_judged_in_bf16(tmp_path: Path) -> None:
    if not HAS_BF16:
        with pytest.raises(EngineError, match="does not compute in this precision"):
            compiled(tmp_path / "b.trtb", "int8", rest="bf16")
        return
    bundle = compiled(tmp_path / "b.trtb", "int8", rest="bf16", method="percentile")
    assert bundle.manifest.gates[0]["inference_precision"] == "bf16"


def test_turing_gets_no_fp32_engine_where_the_gate_does_not_pass(tmp_path: Path) -> None:
    path = tmp_path / "b.trtb"
    strict = replace(GATE, mean_loss=0, class_loss=0, roll_back=False)
    turing = TensorRTConfig(compute_capabilities=("75", "86"))
    with pytest.raises(GateFailed):
        compiled(path, "int8", gate=strict, method="entropy", tensorrt=turing)
    assert the_engine(open_bundle(path)).device == {"capabilities": "86"}


def test_what_is_cheap_to_find_out_is_found_out_before_the_calibration(tmp_path: Path) -> None:
    lines: list[str] = []
    with pytest.raises(EngineError, match="versionCompatible"):
        compiled(tmp_path / "b.trtb", "int8", tensorrt=TensorRTConfig(version_compatible=True), report=lines.append)
    assert not any("calibrating" in line or "taking over" in line for line in lines)
