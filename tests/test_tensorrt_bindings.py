"""trtbuild's lines for TensorRT 10, TensorRT 11 and TensorRT-RTX, run on the twins of their bindings.

No library of TensorRT 10 or 11 is needed, and nothing is built: what is proved is that every class, enum member,
property, argument list and type that the code uses is in the real bindings, and which settings it makes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bindings import Twin
from bindings_facts import VERSIONS, facts_of
from bindings_members import Call

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt import build, plan_from_onnx, unsupported
from trtbuild.engine.tensorrt.timing import combined, keep_timing_cache, timing_cache
from trtbuild.errors import EngineError, OutOfMemory
from trtbuild.nvinfer import Backend, Nvinfer, nvinfer
from trtbuild.runtime import tensorrt
from trtbuild.runtime.runner import RunnerInfo
from trtbuild.runtime.tensorrt_engine import LoadedEngine
from trtbuild.runtime.tensorrt_lanes import Slots
from trtbuild.spec import BuildRecord, Memory, Profile, TensorSpec

EVERY = (*VERSIONS, "rtx")
SHAPES = {"x": ((1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8))}
FLAGS = {
    "tf32": "TF32", "sparsity": "SPARSE_WEIGHTS", "weight_streaming": "WEIGHT_STREAMING", "strip_plan": "STRIP_PLAN",
    "refit": "REFIT_IDENTICAL", "version_compatible": "VERSION_COMPATIBLE",
}  # fmt: skip
TRTS_OWN = ("version_compatible",)
"""Flags that TensorRT-RTX has in its enum and cannot use."""
ASKED = {"ComputeCapability", "IRuntimeCache", "Runtime.get_engine_validity"}
"""What the code asks a binding for before it uses it."""
OLD_FLAGS = {"FP16", "INT8", "BF16", "FP8", "INT4", "OBEY_PRECISION_CONSTRAINTS", "PREFER_PRECISION_CONSTRAINTS"}
"""A strongly typed network takes its precision from the graph; TensorRT 11 has none of these any more."""


def tensor(twin: Twin, name: str, *shape: int) -> Any:
    """An ITensor; `answers_of_a_build` says what its properties give, most of which cannot be set in TensorRT 11."""
    made = twin.kinds.new("ITensor")
    object.__setattr__(made, "_given", (name, shape))
    return made


def answers_of_a_build(twin: Twin, **more: Any) -> dict[str, Any]:
    """A network with one input and one output, whose build speaks through logger and monitor as TensorRT does."""
    source, target = tensor(twin, "x", -1, 1, 8, 8), tensor(twin, "y", -1, 3, 8, 8)

    def built(call: Call) -> bytes:
        logger = twin.calls[twin.names().index("Builder")].arguments["logger"]
        severity = twin.ILogger.Severity
        logger.log(severity.VERBOSE, "Parsing node: conv [Conv]")
        logger.log(severity.INFO, "Total Activation Memory: 4096 bytes")
        monitor = call.arguments["config"].progress_monitor
        monitor.phase_start("Building engine", None, 2)
        for step in range(2):
            assert monitor.step_complete("Building engine", step) is True
        monitor.phase_finish("Building engine")
        return b"plan"

    return {
        "INetworkDefinition.num_inputs": 1,
        "INetworkDefinition.num_outputs": 1,
        "INetworkDefinition.get_input": source,
        "INetworkDefinition.get_output": target,
        "ITensor.name": lambda call: call.on._given[0],
        "ITensor.shape": lambda call: call.on._given[1],
        "ITensor.dtype": twin.DataType.FLOAT,
        "ITensor.get_dimension_name": "batch",
        "Builder.build_serialized_network": built,
        "ITimingCache.serialize": b"times",
        **more,
    }


@contextmanager
def loaded(version: str, **answers: Any) -> Iterator[tuple[Twin, Nvinfer]]:
    """A twin in the place of its package, and the flavour that trtbuild finds there."""
    backend: Backend = "tensorrt-rtx" if version == "rtx" else "tensorrt"
    twin = Twin(facts_of(version))
    twin.answers |= answers_of_a_build(twin) | answers
    with pytest.MonkeyPatch.context() as patch:
        for name in ("tensorrt", "tensorrt_rtx"):
            patch.delitem(sys.modules, name, raising=False)
        patch.setitem(sys.modules, "tensorrt_rtx" if version == "rtx" else "tensorrt", twin)
        flavour = nvinfer(backend)
        twin.calls.clear()
        yield twin, flavour


@pytest.fixture(params=EVERY)
def flavour(request: pytest.FixtureRequest) -> Iterator[tuple[Twin, Nvinfer]]:
    with loaded(request.param) as found:
        yield found


def flags(twin: Twin, kind: str) -> set[str]:
    """The flags that were set, or cleared, by every name they have: STRIP_PLAN is also WEIGHTLESS in TensorRT 10."""
    numbers = {arguments["flag"].value for arguments in twin.of(f"IBuilderConfig.{kind}_flag")}
    return {name for name, number in twin.facts["enums"]["BuilderFlag"].items() if number in numbers}


def test_the_flavour_is_found_by_what_the_binding_has(flavour: tuple[Twin, Nvinfer]) -> None:
    twin, found = flavour
    is_rtx = twin.__version__.startswith("1.")
    assert found.flavour == f"{'tensorrt-rtx' if is_rtx else 'tensorrt'}-{twin.__version__.partition('.')[0]}"
    assert found.features.timing_cache is found.features.hardware_compatibility is not is_rtx
    assert found.features.runtime_cache is is_rtx
    assert bool(found.features.capabilities) is is_rtx


@pytest.mark.filterwarnings("error")
def test_a_build_makes_only_calls_that_the_binding_has(flavour: tuple[Twin, Nvinfer]) -> None:
    twin, found = flavour
    told: list[tuple[str, float]] = []
    plan = plan_from_onnx(b"onnx", nvinfer=found, config=TensorRTConfig(), shapes=SHAPES, timing_cache=b"kept",
                          tell=lambda phase, fraction: told.append((phase, fraction)))  # fmt: skip
    assert plan.content == b"plan"
    assert plan.inputs == (TensorSpec(name="x", dtype="float32", shape=("batch", 1, 8, 8)),)
    assert plan.outputs == (TensorSpec(name="y", dtype="float32", shape=("batch", 3, 8, 8)),)
    assert "Building engine" in dict(told)
    assert told[-1][1] == 1.0
    strongly_typed = 1 << int(twin.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    assert twin.of("Builder.create_network") == [{"flags": strongly_typed}]
    assert twin.of("OnnxParser.parse") == [{"model": b"onnx", "path": None}]
    assert twin.of("OnnxParser.set_flag") == [{"flag": twin.OnnxParserFlag.NATIVE_INSTANCENORM}]
    assert twin.of("IOptimizationProfile.set_shape") == [
        {"input": "x", **dict(zip(("min", "opt", "max"), SHAPES["x"], strict=True))}
    ]
    assert twin.of("IBuilderConfig.profiling_verbosity") == [{"value": twin.ProfilingVerbosity.DETAILED}]
    assert twin.of("IBuilderConfig.builder_optimization_level") == [{"value": 3}]
    assert not twin.of("IBuilderConfig.set_memory_pool_limit")
    names = twin.names()
    for setting in ("add_optimization_profile", "progress_monitor"):
        assert names.index(f"IBuilderConfig.{setting}") < names.index("Builder.build_serialized_network")
    assert not flags(twin, "set") & OLD_FLAGS
    assert set(twin.missing) <= ASKED


@pytest.mark.parametrize("option", FLAGS)
@pytest.mark.parametrize("value", [False, True])
def test_each_flag_is_set_or_cleared(option: str, value: bool, flavour: tuple[Twin, Nvinfer]) -> None:
    """TF32 is on by itself, so that off has to be said."""
    twin, found = flavour
    given: dict[str, Any] = {option: value}
    config = TensorRTConfig(**given)
    if value and option in TRTS_OWN and found.backend == "tensorrt-rtx":
        with pytest.raises(EngineError, match="has no --versionCompatible"):
            plan_from_onnx(b"onnx", nvinfer=found, config=config, shapes=SHAPES)
        return
    plan_from_onnx(b"onnx", nvinfer=found, config=config, shapes=SHAPES)
    assert (FLAGS[option] in flags(twin, "set")) is value
    assert (FLAGS[option] in flags(twin, "clear")) is not value
    others = {name for key, name in FLAGS.items() if key != option}
    assert not flags(twin, "set") & others
    assert others <= flags(twin, "clear")


def test_workspace_and_level_are_passed_on(flavour: tuple[Twin, Nvinfer]) -> None:
    twin, found = flavour
    plan_from_onnx(b"onnx", nvinfer=found, config=TensorRTConfig(workspace=64, optimization_level=5), shapes=SHAPES)
    limit = {"pool": twin.MemoryPoolType.WORKSPACE, "pool_size": 64 << 20}
    assert twin.of("IBuilderConfig.set_memory_pool_limit") == [limit]
    assert twin.of("IBuilderConfig.builder_optimization_level") == [{"value": 5}]


@pytest.mark.parametrize(
    ("level", "member"), [("ampere+", "AMPERE_PLUS"), ("sameComputeCapability", "SAME_COMPUTE_CAPABILITY")]
)
def test_hardware_compatibility_is_tensorrts(level: Any, member: str, flavour: tuple[Twin, Nvinfer]) -> None:
    twin, found = flavour
    config = TensorRTConfig(hardware_compatibility=level)
    if found.backend == "tensorrt-rtx":
        with pytest.raises(EngineError, match="has no --hardwareCompatibilityLevel"):
            plan_from_onnx(b"onnx", nvinfer=found, config=config, shapes=SHAPES)
        return
    plan_from_onnx(b"onnx", nvinfer=found, config=config, shapes=SHAPES)
    value = twin.HardwareCompatibilityLevel.__members__[member]
    assert twin.of("IBuilderConfig.hardware_compatibility_level") == [{"value": value}]


def test_compute_capabilities_are_rtxs(flavour: tuple[Twin, Nvinfer]) -> None:
    twin, found = flavour
    config = TensorRTConfig(compute_capabilities=("86", "120"))
    if found.backend == "tensorrt":
        with pytest.raises(EngineError, match="for the GPU of this machine only"):
            plan_from_onnx(b"onnx", nvinfer=found, config=config, shapes=SHAPES)
        return
    plan_from_onnx(b"onnx", nvinfer=found, config=config, shapes=SHAPES)
    assert twin.of("IBuilderConfig.num_compute_capabilities") == [{"value": 2}]
    given = [tuple(arguments.values()) for arguments in twin.of("IBuilderConfig.set_compute_capability")]
    assert given == [(twin.ComputeCapability.SM86, 0), (twin.ComputeCapability.SM120, 1)]


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("kept", [b"", b"kept"])
def test_a_timing_cache_is_tensorrts(wanted: bool, kept: bytes, flavour: tuple[Twin, Nvinfer]) -> None:
    twin, found = flavour
    plan = plan_from_onnx(b"onnx", nvinfer=found, config=TensorRTConfig(timing_cache=wanted), shapes=SHAPES,
                          timing_cache=kept)  # fmt: skip
    if found.backend == "tensorrt" and wanted:
        assert plan.timing_cache == b"times"
        assert twin.of("IBuilderConfig.create_timing_cache") == [{"serialized_timing_cache": kept}]
        assert [call["ignore_mismatch"] for call in twin.of("IBuilderConfig.set_timing_cache")] == [False]
    else:
        assert plan.timing_cache is None
        assert not [name for name in twin.names() if "timing_cache" in name]
    if found.backend == "tensorrt":
        assert ("DISABLE_TIMING_CACHE" in flags(twin, "set")) is not wanted


@pytest.mark.parametrize("version", VERSIONS)
def test_a_timing_cache_that_does_not_fit_is_replaced(version: str) -> None:
    with loaded(version) as (twin, found):
        name = "IBuilderConfig.set_timing_cache"
        twin.answers[name] = lambda call: len(twin.of(name)) == 2
        plan = plan_from_onnx(b"onnx", nvinfer=found, config=TensorRTConfig(), shapes=SHAPES, timing_cache=b"other")
        given = [call["serialized_timing_cache"] for call in twin.of("IBuilderConfig.create_timing_cache")]
    assert given == [b"other", b""]
    assert plan.warnings


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("version", VERSIONS)
def test_timing_caches_are_combined(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path))
    device, config = {"gpu": "a GPU", "capability": "9.0"}, TensorRTConfig()
    with loaded(version) as (twin, found):
        assert combined(found, b"kept", b"new", pytest.fail) == b"times"
        given = [call["serialized_timing_cache"] for call in twin.of("IBuilderConfig.create_timing_cache")]
        assert sorted(given) == [b"kept", b"new"]
        assert [call["ignore_mismatch"] for call in twin.of("ITimingCache.combine")] == [False]
        plan = plan_from_onnx(b"onnx", nvinfer=found, config=config, shapes=SHAPES)
        keep_timing_cache(found, config, device, plan, b"", pytest.fail)
        assert timing_cache(found, config, device, pytest.fail) == b"times"


def test_what_the_parser_refuses_is_named(flavour: tuple[Twin, Nvinfer]) -> None:
    twin, found = flavour
    assert unsupported(b"onnx", found) == ()
    codes = next(enum for enum in twin.kinds.enums.values() if "MODEL_DESERIALIZE_FAILED" in enum.__members__)
    twin.answers |= {
        "OnnxParser.parse": False, "OnnxParser.num_errors": 1, "ParserError.code": codes.UNSUPPORTED_NODE,
        "ParserError.node_name": "odd", "ParserError.node_operator": "Loop", "ParserError.desc": "no such thing",
    }  # fmt: skip
    assert unsupported(b"onnx", found) == ("odd (Loop): no such thing",)
    with pytest.raises(EngineError, match=r"odd \(Loop\): no such thing"):
        plan_from_onnx(b"onnx", nvinfer=found, config=TensorRTConfig(), shapes=SHAPES)


def test_a_build_that_gives_nothing_tells_what_the_log_said(flavour: tuple[Twin, Nvinfer]) -> None:
    twin, found = flavour

    def failed(call: Call) -> None:
        logger = twin.calls[twin.names().index("Builder")].arguments["logger"]
        logger.log(twin.ILogger.Severity.ERROR, "Error Code 1: OutOfMemory (Requested size was 99 bytes.)")

    twin.answers["Builder.build_serialized_network"] = failed
    with pytest.raises(OutOfMemory, match="99 bytes"):
        plan_from_onnx(b"onnx", nvinfer=found, config=TensorRTConfig(workspace=1), shapes=SHAPES)


def test_a_stopped_build_is_stopped_through_the_monitor(flavour: tuple[Twin, Nvinfer]) -> None:
    twin, found = flavour
    answers: list[bool] = []

    def stopped(call: Call) -> None:
        monitor = call.arguments["config"].progress_monitor
        monitor.phase_start("Building engine", None, 9)
        answers.append(monitor.step_complete("Building engine", 0))

    def tell(phase: str, fraction: float) -> None:
        if phase == "Building engine":
            raise KeyboardInterrupt

    twin.answers["Builder.build_serialized_network"] = stopped
    with pytest.raises(KeyboardInterrupt):
        plan_from_onnx(b"onnx", nvinfer=found, config=TensorRTConfig(), shapes=SHAPES, tell=tell)
    assert answers == [False]


def test_a_plan_is_inspected_where_there_is_a_gpu(
    flavour: tuple[Twin, Nvinfer], monkeypatch: pytest.MonkeyPatch
) -> None:
    twin, found = flavour
    layer = {"Name": "conv", "LayerType": "CaskConvolution", "Inputs": [], "Outputs": []}
    twin.answers["EngineInspector.get_engine_information"] = json.dumps({"Layers": [layer]})
    monkeypatch.setattr(build, "no_driver", lambda: None)
    plan = plan_from_onnx(b"onnx", nvinfer=found, config=TensorRTConfig(), shapes=SHAPES)
    assert plan.table is not None
    assert [layer.name for layer in plan.table.layers] == ["conv"]
    assert twin.of("EngineInspector.get_engine_information") == [{"format": twin.LayerInformationFormat.JSON}]


class FakeDevice:
    """A GPU of lists: what trtbuild.runtime.device gives to the runner, without CUDA."""

    name, capability, driver = "a GPU", "8.6", "13.0"
    cuda = SimpleNamespace(Context=SimpleNamespace(synchronize=lambda: None))

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def buffer(self, nbytes: int) -> Any:
        return SimpleNamespace(address=4096, nbytes=nbytes, close=lambda: None)

    def pinned(self, shape: tuple[int, ...]) -> Any:
        return SimpleNamespace(array=np.zeros(shape, np.float32), close=lambda: None)

    def stream(self) -> Any:
        return SimpleNamespace(handle=77, copy_in=lambda *_: None, copy_out=lambda *_: None, synchronize=lambda: None,
                               close=lambda: None)  # fmt: skip


PROFILE = Profile(min=(1, 1, 8, 8), opt=(2, 1, 8, 8), max=(4, 1, 8, 8))


def record_of(found: Nvinfer, **options: str | int | float | bool) -> BuildRecord:
    return BuildRecord(
        network="fold_0", backend=found.backend, flavour=found.flavour, version=found.version,
        file=f"engines/fold_0.{found.backend}.engine", precision="fp32", inference_precision="f32", profile=PROFILE,
        device={"gpu": "a GPU", "capability": "8.6", "driver": "13.0", "capabilities": "86"},
        options={"sha256": "0" * 64, **options},
        memory=Memory(host=None, device_per_batch={"4": 4096}, measured=False),
    )  # fmt: skip


def answers_of_an_engine(twin: Twin) -> dict[str, Any]:
    names, modes = ("x", "y"), {"x": twin.TensorIOMode.INPUT, "y": twin.TensorIOMode.OUTPUT}
    shapes: Mapping[str, tuple[int, ...]] = {"x": (-1, 1, 8, 8), "y": (-1, 3, 8, 8)}
    answers: dict[str, Any] = {
        "ICudaEngine.num_io_tensors": 2,
        "ICudaEngine.get_tensor_name": lambda call: names[call.arguments["index"]],
        "ICudaEngine.get_tensor_mode": lambda call: modes[call.arguments["name"]],
        "ICudaEngine.get_tensor_shape": lambda call: shapes[call.arguments["name"]],
        "ICudaEngine.get_tensor_dtype": twin.DataType.FLOAT,
        "ICudaEngine.get_tensor_profile_shape": [PROFILE.min, PROFILE.opt, PROFILE.max],
        "ICudaEngine.device_memory_size_v2": 4096,
    }
    if hasattr(twin, "EngineValidity"):
        validity = twin.EngineValidity.__members__["VALID"], 0
        answers |= {"Runtime.get_engine_validity": validity, "IRuntimeCache.serialize": b"kernels"}
    return answers


@pytest.mark.filterwarnings("error")
def test_an_engine_is_opened_run_and_closed(
    flavour: tuple[Twin, Nvinfer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path))
    twin, found = flavour
    twin.answers |= answers_of_an_engine(twin)
    device: Any = FakeDevice()
    engine = LoadedEngine(found, device, record_of(found), b"plan", tmp_path / "plan")
    inputs, outputs = engine.ports()
    assert inputs == [TensorSpec(name="x", dtype="float32", shape=("?", 1, 8, 8))]
    assert outputs == [TensorSpec(name="y", dtype="float32", shape=("?", 3, 8, 8))]
    assert engine.profile("x") == [PROFILE.min, PROFILE.opt, PROFILE.max]
    assert engine.activation_memory == 4096
    info = RunnerInfo(backend=found.backend, version=found.version, inputs=inputs[0], outputs=outputs[0], parallel=1,
                      batch=4, inference_precision="f32", device="a GPU", details={})  # fmt: skip
    slots = Slots(device, engine, PROFILE, info)
    slot = slots.take()
    slot.start(np.ones((6, 1, 8, 8), np.float32))
    slots.enqueue(8192, 12288, 99, 3)
    slots.close()
    engine.close()
    assert twin.of("Runtime.deserialize_cuda_engine") == [{"serialized_engine": b"plan"}]
    assert [call["shape"] for call in twin.of("IExecutionContext.set_input_shape")] == [
        (4, 1, 8, 8), (2, 1, 8, 8), (3, 1, 8, 8),
    ]  # fmt: skip
    assert [call["stream_handle"] for call in twin.of("IExecutionContext.execute_async_v3")] == [77, 77, 99]
    addresses = [(call["name"], call["memory"]) for call in twin.of("IExecutionContext.set_tensor_address")]
    assert addresses == [("x", 4096), ("y", 4096)] * 2 + [("x", 8192), ("y", 12288)]
    configured = [name for name in twin.names() if name.startswith(("IRuntimeConfig.", "IRuntimeCache."))]
    if found.backend == "tensorrt-rtx":
        assert twin.of("IRuntimeConfig.cuda_graph_strategy") == [{"value": twin.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE}]
        assert {
            "IRuntimeConfig.create_runtime_cache",
            "IRuntimeConfig.set_runtime_cache",
            "IRuntimeCache.serialize",
        } <= set(configured)
    else:
        assert configured == []


@pytest.mark.filterwarnings("error")
def test_a_runner_is_opened_by_its_record(
    flavour: tuple[Twin, Nvinfer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path))
    twin, found = flavour
    twin.answers |= answers_of_an_engine(twin)
    twin.missing.clear()
    device: Any = FakeDevice()
    monkeypatch.setattr(tensorrt, "opened_device", lambda: nullcontext(device))
    plan = tmp_path / "plan.engine"
    plan.write_bytes(b"plan")
    record = record_of(found, sha256=hashlib.sha256(b"plan").hexdigest())
    runner = tensorrt.open_tensorrt(record, plan)
    assert runner.describe().version == twin.__version__
    assert runner.infer(np.ones((2, 1, 8, 8), np.float32)).shape == (2, 3, 8, 8)
    runner.close()
    assert twin.of("IExecutionContext.execute_async_v3") == [{"stream_handle": 77}]
    assert set(twin.missing) <= ASKED


@pytest.mark.parametrize("version", VERSIONS)
def test_a_version_compatible_plan_may_bring_its_runtime(version: str, tmp_path: Path) -> None:
    with loaded(version) as (twin, found):
        twin.answers |= answers_of_an_engine(twin)
        device: Any = FakeDevice()
        LoadedEngine(found, device, record_of(found), b"plan", tmp_path)
        assert not twin.of("Runtime.engine_host_code_allowed")
        LoadedEngine(found, device, record_of(found, version_compatible=True), b"plan", tmp_path)
        assert twin.of("Runtime.engine_host_code_allowed") == [{"value": True}]
        names = twin.names()
        last = len(names) - 1 - names[::-1].index("Runtime.deserialize_cuda_engine")
        assert names.index("Runtime.engine_host_code_allowed") < last


def test_a_plan_that_is_refused_tells_what_the_log_said(flavour: tuple[Twin, Nvinfer], tmp_path: Path) -> None:
    twin, found = flavour

    def refused(call: Call) -> None:
        logger = twin.of("Runtime")[0]["logger"]
        logger.log(twin.ILogger.Severity.ERROR, "Version tag does not match")

    twin.answers |= answers_of_an_engine(twin) | {"Runtime.deserialize_cuda_engine": refused}
    device: Any = FakeDevice()
    with pytest.raises(EngineError, match="Version tag does not match"):
        LoadedEngine(found, device, record_of(found), b"plan", tmp_path)


def test_rtx_judges_a_plan_by_its_header(tmp_path: Path) -> None:
    with loaded("rtx") as (twin, found):
        diagnostics = next(iter(twin.EngineInvalidityDiagnostics.__members__.values()))
        invalid = twin.EngineValidity.INVALID, int(diagnostics)
        twin.answers |= answers_of_an_engine(twin) | {"Runtime.get_engine_validity": invalid}
        device: Any = FakeDevice()
        with pytest.raises(EngineError, match="does not run this engine here"):
            LoadedEngine(found, device, record_of(found), b"plan", tmp_path)
        assert not twin.of("Runtime.deserialize_cuda_engine")


def test_a_planted_mistake_in_a_setting_would_be_found(flavour: tuple[Twin, Nvinfer]) -> None:
    """Each name that a build uses, taken out of the facts in turn: the build has to fail."""
    twin, found = flavour
    config = TensorRTConfig(workspace=1)
    plan_from_onnx(b"onnx", nvinfer=found, config=config, shapes=SHAPES)
    for name in sorted(set(twin.names())):
        cls, _, member = name.partition(".")
        if not member:
            continue
        facts = json.loads(json.dumps(twin.facts))
        facts["classes"][cls]["methods"].pop(member, None)
        facts["classes"][cls]["properties"].pop(member, None)
        lacking = Twin(facts)
        lacking.answers |= answers_of_a_build(lacking)
        with pytest.raises((AttributeError, TypeError), match=member):
            plan_from_onnx(b"onnx", nvinfer=replace(found, module=lacking), config=config, shapes=SHAPES)
