"""The twin of TensorRT's bindings (tests/bindings.py): it takes and refuses what the real binding does."""

from __future__ import annotations

import ctypes
import importlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from bindings import Twin
from bindings_facts import FOLDER, VERSIONS, facts_of
from bindings_members import WrongCall
from stub_library import NVINFER, write_stubs

EVERY = (*VERSIONS, "rtx")


@pytest.fixture(params=EVERY)
def twin(request: pytest.FixtureRequest) -> Twin:
    return Twin(facts_of(request.param))


def objects(trt: Any) -> SimpleNamespace:
    """What a build begins with, of a binding or its twin."""

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            pass

    class Forgetful(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            pass

        def log(self, severity: Any, msg: str) -> None:
            pass

    logger = Logger()
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    return SimpleNamespace(
        trt=trt, logger=logger, forgetful=Forgetful, builder=builder, network=network,
        config=builder.create_builder_config(), profile=builder.create_optimization_profile(),
        parser=trt.OnnxParser(network, logger), runtime=trt.Runtime(logger),
    )  # fmt: skip


def outcome(action: Callable[[Any], Any], on: Any) -> str:
    """ "taken", or the kind of error that is raised."""
    try:
        action(on)
    except (AttributeError, TypeError) as error:
        return next(kind.__name__ for kind in (AttributeError, TypeError) if isinstance(error, kind))
    return "taken"


def put(name: str, value: Callable[[Any], Any], on: str = "config") -> Callable[[Any], None]:
    return lambda o: setattr(getattr(o, on), name, value(o))


ACTIONS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "a flag": ("taken", lambda o: o.config.set_flag(o.trt.BuilderFlag.TF32)),
    "a flag by keyword": ("taken", lambda o: o.config.clear_flag(flag=o.trt.BuilderFlag.TF32)),
    "a flag by another keyword": ("TypeError", lambda o: o.config.clear_flag(flags=o.trt.BuilderFlag.TF32)),
    "a number for a flag": ("TypeError", lambda o: o.config.set_flag(3)),
    "a flag of another enum": ("TypeError", lambda o: o.config.set_flag(o.trt.OnnxParserFlag.NATIVE_INSTANCENORM)),
    "a flag that is missing": ("AttributeError", lambda o: o.config.set_flag(o.trt.BuilderFlag.FP99)),
    "no flag": ("TypeError", lambda o: o.config.set_flag()),
    "two flags": ("TypeError", lambda o: o.config.set_flag(o.trt.BuilderFlag.TF32, o.trt.BuilderFlag.REFIT)),
    "the parser's flag": ("taken", lambda o: o.parser.set_flag(o.trt.OnnxParserFlag.NATIVE_INSTANCENORM)),
    "an enum that is missing": ("AttributeError", lambda o: o.trt.NoSuchEnum),
    "a method that is missing": ("AttributeError", lambda o: o.builder.build_cuda_engine(o.network)),
    "a property": ("taken", put("builder_optimization_level", lambda o: 2)),
    "a property with a text": ("TypeError", put("builder_optimization_level", lambda o: "2")),
    "a property with a float": ("TypeError", put("builder_optimization_level", lambda o: 2.0)),
    "a property with NumPy's number": ("taken", put("builder_optimization_level", lambda o: np.int64(2))),
    "a property with an enum": ("taken", put("profiling_verbosity", lambda o: o.trt.ProfilingVerbosity.DETAILED)),
    "a property with a number for an enum": ("TypeError", put("profiling_verbosity", lambda o: 1)),
    "a property that is missing": ("AttributeError", put("max_workspace_size", lambda o: 1 << 20)),
    "a property that is read-only": ("AttributeError", put("num_optimization_profiles", lambda o: 1)),
    "a property that is write-only": ("AttributeError", lambda o: o.builder.gpu_allocator),
    "a limit": ("taken", lambda o: o.config.set_memory_pool_limit(o.trt.MemoryPoolType.WORKSPACE, 1 << 26)),
    "an enum as a number": (
        "taken",
        lambda o: o.builder.create_network(o.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
    ),
    "shapes as tuples": ("taken", lambda o: o.profile.set_shape("x", (1, 2), (1, 2), (4, 2))),
    "shapes as lists": ("taken", lambda o: o.profile.set_shape("x", [1, 2], [1, 2], [4, 2])),
    "shapes as Dims": ("taken", lambda o: o.profile.set_shape("x", *[o.trt.Dims((1, 2))] * 3)),
    "shapes of floats": ("TypeError", lambda o: o.profile.set_shape("x", (1.0, 2), (1, 2), (4, 2))),
    "a number for a shape": ("TypeError", lambda o: o.profile.set_shape("x", 1, 1, 1)),
    "two shapes": ("TypeError", lambda o: o.profile.set_shape("x", (1, 2), (4, 2))),
    "bytes for a graph": ("taken", lambda o: o.parser.parse(b"not onnx")),
    "a view of a graph": ("taken", lambda o: o.parser.parse(memoryview(b"not onnx"))),
    "a graph and no path": ("taken", lambda o: o.parser.parse(b"not onnx", None)),
    "a text for a graph": ("TypeError", lambda o: o.parser.parse("not onnx")),
    "the profile": ("taken", lambda o: o.config.add_optimization_profile(o.profile)),
    "another object for the profile": ("TypeError", lambda o: o.config.add_optimization_profile(o.config)),
    "no logger": ("TypeError", lambda o: o.trt.Builder()),
    "another object for the logger": ("TypeError", lambda o: o.trt.Builder(o.config)),
    "a logger without its base's __init__": ("TypeError", lambda o: o.trt.Builder(o.forgetful())),
    "TensorRT's own logger": ("taken", lambda o: o.trt.Builder(o.trt.Logger(o.trt.Logger.ERROR))),
    "its severity by number": ("TypeError", lambda o: o.trt.Logger(1)),
    "an object that only TensorRT makes": ("TypeError", lambda o: o.trt.ICudaEngine()),
    "an attribute of a class of one's own": ("taken", put("rows", lambda o: [], on="logger")),
    "an item of a plan": ("TypeError", lambda o: memory(o)[0]),
    "the length of a plan": ("TypeError", lambda o: len(memory(o))),
    "a method of bytes": ("AttributeError", lambda o: memory(o).hex()),
    "a plan as bytes": ("taken", lambda o: (bytes(memory(o)), memoryview(memory(o)))),
    "the size of a plan": ("taken", lambda o: memory(o).nbytes + 1),
    "the size of a type": ("taken", lambda o: 1 // o.trt.DataType.HALF.itemsize),
    "a flag shifted without int()": ("TypeError", lambda o: 1 << o.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
    "flags of an enum joined": ("TypeError", lambda o: o.trt.BuilderFlag.TF32 | o.trt.BuilderFlag.REFIT),
    "an enum's order": ("taken", lambda o: o.trt.Logger.ERROR < o.trt.Logger.INFO),
    "an enum that has no order": ("TypeError", lambda o: o.trt.DataType.FLOAT < o.trt.DataType.HALF),
    "an enum of a number": ("taken", lambda o: o.trt.DataType(0)),
    "the members of an enum": ("taken", lambda o: o.trt.DataType.__members__["HALF"].name.lower()),
}


def memory(o: Any) -> Any:
    """An IHostMemory: what the builder's tactic cache is serialised to."""
    return o.config.create_timing_cache(b"").serialize()


@pytest.fixture(scope="module")
def real() -> SimpleNamespace:
    """The objects of the real TensorRT-RTX."""
    return objects(importlib.import_module("tensorrt_rtx"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the timing cache, which TensorRT-RTX has no use for
@pytest.mark.parametrize("action", ACTIONS)
def test_the_twin_of_rtx_says_what_rtx_says(action: str, real: SimpleNamespace) -> None:
    expected, run = ACTIONS[action]
    assert outcome(run, real) == expected
    assert outcome(run, objects(Twin(facts_of("rtx")))) == expected


@pytest.mark.parametrize("action", [key for key, (expected, _) in ACTIONS.items() if expected != "taken"])
def test_the_twins_of_10_and_11_refuse_the_same(action: str) -> None:
    expected, run = ACTIONS[action]
    for version in VERSIONS:
        assert outcome(run, objects(Twin(facts_of(version)))) == expected


def test_a_refusal_names_what_is_wrong(twin: Twin) -> None:
    o = objects(twin)
    for action, words in {
        "a method that is missing": "no Builder.build_cuda_engine",
        "a flag that is missing": "'BuilderFlag' has no attribute 'FP99'",
        "a property that is missing": "no IBuilderConfig.max_workspace_size",
        "a property that is read-only": "IBuilderConfig.num_optimization_profiles cannot be set",
        "two flags": "IBuilderConfig.set_flag: too many positional arguments",
        "a flag by another keyword": "IBuilderConfig.clear_flag: missing a required argument: 'flag'",
        "a number for a flag": r"IBuilderConfig.set_flag: flag: BuilderFlag expected, got 3 \(int\)",
        "two shapes": "IOptimizationProfile.set_shape: missing a required argument: 'max'",
    }.items():
        with pytest.raises((AttributeError, TypeError), match=words):
            ACTIONS[action][1](o)


def test_a_name_that_was_asked_for_in_vain_is_kept(twin: Twin) -> None:
    o = objects(twin)
    assert not hasattr(twin, "ISomething")
    assert not hasattr(o.builder, "something")
    assert twin.missing == ["ISomething", "Builder.something"]


def test_calls_are_kept_with_their_arguments_and_defaults(twin: Twin) -> None:
    o = objects(twin)
    o.config.set_memory_pool_limit(pool_size=3, pool=twin.MemoryPoolType.WORKSPACE)
    o.config.builder_optimization_level = 4
    o.builder.create_network()
    o.parser.parse(b"x")
    assert twin.of("IBuilderConfig.set_memory_pool_limit") == [{"pool": twin.MemoryPoolType.WORKSPACE, "pool_size": 3}]
    assert twin.of("IBuilderConfig.builder_optimization_level") == [{"value": 4}]
    assert twin.of("Builder.create_network")[-1] == {"flags": 0}
    assert twin.of("OnnxParser.parse") == [{"model": b"x", "path": None}]
    assert o.config.builder_optimization_level == 4
    assert twin.of("Builder")[0]["logger"] is o.logger


def test_a_context_manager_is_deprecated_as_in_tensorrt(twin: Twin, real: SimpleNamespace) -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        objects(twin).builder.__enter__()
    with pytest.warns(DeprecationWarning, match="deprecated"):
        real.builder.__enter__()


def test_an_answer_that_the_binding_never_gives_is_refused(twin: Twin) -> None:
    twin.answers["OnnxParser.num_errors"] = "none"
    with pytest.raises(NotImplementedError, match=r"OnnxParser.num_errors with 'none', but it gives int"):
        _ = objects(twin).parser.num_errors


def test_a_subclass_has_to_bring_what_tensorrt_calls(twin: Twin) -> None:
    with pytest.raises(WrongCall, match=r"Misspelt lacks ILogger.log"):
        type("Misspelt", (twin.ILogger,), {"write": lambda self, severity, msg: None})
    with pytest.raises(WrongCall, match=r"Short.log does not take what ILogger.log gets"):
        type("Short", (twin.ILogger,), {"log": lambda self, msg: None})
    three = {"phase_start": lambda self, name, parent, steps: None, "step_complete": lambda self, name, step: True}
    with pytest.raises(WrongCall, match=r"Endless lacks IProgressMonitor.phase_finish"):
        type("Endless", (twin.IProgressMonitor,), three)
    type("Whole", (twin.IProgressMonitor,), {**three, "phase_finish": lambda self, name: None})


def test_the_facts_are_those_of_the_versions(real: SimpleNamespace) -> None:
    """The differences between 10 and 11 that NVIDIA's migration guide names."""
    ten, eleven, rtx = (facts_of(version) for version in EVERY)
    assert [ten["version"], eleven["version"], rtx["version"]] == [*VERSIONS, real.trt.__version__]
    assert {"FP16", "INT8", "TF32"} <= set(ten["enums"]["BuilderFlag"])
    assert {"FP16", "INT8", "TF32"} & set(eleven["enums"]["BuilderFlag"]) == {"TF32"}
    assert "IInt8EntropyCalibrator2" in ten["classes"]
    assert "IInt8EntropyCalibrator2" not in eleven["classes"]
    assert "ComputeCapability" in rtx["enums"]
    assert "ComputeCapability" not in {**ten["enums"], **eleven["enums"]}


def test_every_public_name_of_rtx_is_in_its_twin(real: SimpleNamespace) -> None:
    twin = Twin(facts_of("rtx"))
    for name, value in vars(real.trt).items():
        if name.startswith("_") or isinstance(value, (type(sys), str)):
            continue  # modules, and the variable of a loop that NVIDIA's file leaves behind
        assert hasattr(twin, name), name
        for member in vars(value) if isinstance(value, type) else ():
            assert member.startswith("_") or hasattr(getattr(twin, name), member), f"{name}.{member}"


def test_a_stub_library_needs_no_compiler_and_gives_0(tmp_path: Path) -> None:
    paths = write_stubs(tmp_path, "99")
    assert [path.name for path in paths] == ["libnvinfer.so.99", "libnvinfer_plugin.so.99", "libnvonnxparser.so.99"]
    for path in paths:
        library = ctypes.CDLL(str(path))
        assert [getattr(library, name)() for name in NVINFER] == [0] * len(NVINFER)
        assert not hasattr(library, "somethingElse")


@pytest.mark.parametrize("version", VERSIONS)
def test_the_real_base_classes_take_trtbuilds_logger_and_monitor(version: str, tmp_path: Path) -> None:
    """The real ILogger and IProgressMonitor of TensorRT 10 and 11 can be made without the libraries; a Builder cannot,
    and trtbuild says so."""
    code = f"""
import ctypes, sys
sys.path.insert(0, {str(Path(__file__).parent)!r}); sys.path.insert(0, {str(FOLDER / version)!r})
from pathlib import Path
from stub_library import write_stubs
for path in write_stubs(Path({str(tmp_path)!r}), {version.partition(".")[0]!r}):
    ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
import tensorrt_bindings
sys.modules["tensorrt"] = tensorrt_bindings
from trtbuild.engine.tensorrt.logger import Rows, new_logger
from trtbuild.engine.tensorrt.parse import unsupported
from trtbuild.engine.tensorrt.progress import Stop, new_monitor
from trtbuild.errors import EngineError
from trtbuild.nvinfer import nvinfer
flavour, rows, told = nvinfer("tensorrt"), Rows(), []
logger = new_logger(flavour.module, rows, verbose=False)
assert isinstance(logger, tensorrt_bindings.ILogger)
logger.log(tensorrt_bindings.ILogger.ERROR, "an error")
assert rows.errors() == ("an error",)
monitor = new_monitor(flavour.module, lambda phase, fraction: told.append(phase), Stop())
assert isinstance(monitor, tensorrt_bindings.IProgressMonitor)
monitor.phase_start("phase", None, 2)
assert monitor.step_complete("phase", 0) is True and "phase" in told
try:
    unsupported(b"", flavour)
except EngineError as error:
    print(flavour.flavour, flavour.version, str(error).splitlines()[0])
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert told.stderr == ""
    major = version.partition(".")[0]
    assert told.stdout.startswith(f"tensorrt-{major} {version} TensorRT cannot start to build")
