"""Builds with TensorRT-RTX, which needs no GPU: what comes out, what is refused, and with which words.

All failures are TensorRT's own: nothing is mocked but where a flavour is asked for that cannot be here.
"""

from __future__ import annotations

import gc
import math
import os
import re
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_samples import floats, model_of, node
from onnx import TensorProto
from precision_samples import PATCHES, network_model

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt import Plan, Shapes, plan_from_onnx, shapes_from_io, unsupported
from trtbuild.engine.tensorrt.failures import build_failure, failing_nodes
from trtbuild.engine.tensorrt.logger import Rows, new_logger, sentence
from trtbuild.engine.tensorrt.parse import new_builder, parsed
from trtbuild.engine.tensorrt.progress import Phase, Phases
from trtbuild.engine.tensorrt.settings import MIB, new_config
from trtbuild.errors import Cancelled, EngineError, OutOfMemory, TrtbuildError
from trtbuild.graph.precision import cast, tensorrt_form
from trtbuild.nvinfer import Nvinfer, no_driver, nvinfer
from trtbuild.spec import TensorSpec

NAME = "plain3d"
SHAPES: Shapes = {"image": ((1, 1, *PATCHES[NAME]), (2, 1, *PATCHES[NAME]), (4, 1, *PATCHES[NAME]))}
without_driver = pytest.mark.skipif(no_driver() is None, reason="with a GPU these builds succeed")


@pytest.fixture(scope="module")
def rtx() -> Nvinfer:
    pytest.importorskip("tensorrt_rtx")
    return nvinfer("tensorrt-rtx")


@pytest.fixture(scope="module")
def network() -> onnx.ModelProto:
    return tensorrt_form(network_model(NAME))


@pytest.fixture(scope="module")
def model(network: onnx.ModelProto) -> bytes:
    return network.SerializeToString()


@pytest.fixture(scope="module")
def told() -> list[tuple[str, float]]:
    """What `plan` told while it was built."""
    return []


@pytest.fixture(scope="module")
def plan(rtx: Nvinfer, model: bytes, told: list[tuple[str, float]]) -> Plan:
    return plan_from_onnx(
        model, nvinfer=rtx, config=TensorRTConfig(), shapes=SHAPES, tell=lambda *what: told.append(what)
    )


def build(model: bytes, rtx: Nvinfer, shapes: Shapes = SHAPES, **options: Any) -> Plan:
    return plan_from_onnx(model, nvinfer=rtx, config=TensorRTConfig(**options), shapes=shapes)


def small(*nodes: onnx.NodeProto, **weights: Any) -> bytes:
    """x (b, 2, 8, 8) -> y"""
    return model_of(nodes, {"x": ["b", 2, 8, 8]}, {"y": None}, weights).SerializeToString()


SMALL: Shapes = {"x": ((1, 2, 8, 8),) * 3}


class TestBuild:
    def test_gives_a_plan_with_its_tensors(self, plan: Plan) -> None:
        assert plan.content.startswith(b"vtrt")  # so do TensorRT-RTX's plans begin; the engine in a bundle is raw
        assert plan.inputs == (TensorSpec(name="image", dtype="float32", shape=("batch", 1, *PATCHES[NAME])),)
        assert plan.outputs == (TensorSpec(name="logits", dtype="float32", shape=("batch", 3, *PATCHES[NAME])),)
        assert plan.seconds > 0
        assert plan.timing_cache is None
        assert plan.warnings == ()

    def test_gives_the_layers(self, plan: Plan, network: onnx.ModelProto) -> None:
        assert plan.table is not None
        convs = {entry.name for entry in network.graph.node if entry.op_type == "Conv"}
        assert {name for layer in plan.table.layers if layer.kind == "correlation" for name in layer.nodes} == convs
        assert plan.table.activation_memory is not None
        voxels = math.prod(PATCHES[NAME])
        assert plan.table.activation_memory > 4 * 8 * voxels * 4  # batch 4, the first Conv's 8 channels, float32

    def test_tells_phases_and_a_fraction_that_never_falls(self, plan: Plan, told: list[tuple[str, float]]) -> None:
        fractions = [fraction for _, fraction in told]
        assert fractions == sorted(fractions)
        assert (fractions[0], fractions[-1]) == (0, 1)
        assert all(fraction < 1 for fraction in fractions[:-1])
        assert len(set(fractions)) > 20
        assert {"Reading the ONNX graph", "Building engine", "Timing graph nodes"} <= {phase for phase, _ in told}

    def test_the_profile_stands_in_the_log(
        self, model: bytes, rtx: Nvinfer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        build(model, rtx, verbose=True)
        (said,) = re.findall(r"Name: image, IOMode: Input.*", capsys.readouterr().err)
        for kind, shape in zip(("Min", "Opt", "Max"), SHAPES["image"], strict=True):
            assert f"{kind}Shape: [{','.join(map(str, shape))}]" in said

    def test_says_nothing_itself_without_verbose(
        self, model: bytes, rtx: Nvinfer, capfd: pytest.CaptureFixture[str]
    ) -> None:
        build(model, rtx)
        assert capfd.readouterr() == ("", "")

    def test_a_fixed_batch_needs_no_profile(self, rtx: Nvinfer) -> None:
        fixed = model_of([node("Relu", "x", "y", "relu")], {"x": [1, 2, 8, 8]}, {"y": None}).SerializeToString()
        assert build(fixed, rtx, {}).inputs[0].shape == (1, 2, 8, 8)

    def test_half_types_are_the_graphs_own(self, network: onnx.ModelProto, rtx: Nvinfer) -> None:
        table = build(cast(network, "fp16", keep=()).model.SerializeToString(), rtx).table
        assert table is not None
        convs = [layer for layer in table.layers if layer.kind == "correlation"]
        assert {tensor.dtype for layer in convs for tensor in layer.inputs} == {"Half"}

    def test_weights_can_be_streamed_and_sparse(self, model: bytes, rtx: Nvinfer) -> None:
        assert build(model, rtx, weight_streaming=True, sparsity=True, optimization_level=5).content

    def test_of_another_thread(self, model: bytes, rtx: Nvinfer) -> None:
        """Where no signal handler can be set."""
        results: list[Plan] = []
        thread = threading.Thread(target=lambda: results.append(build(model, rtx)))
        thread.start()
        thread.join()
        assert len(results) == 1

    @pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
    def test_gives_its_memory_back(self, rtx: Nvinfer) -> None:
        """64 MiB of weights, that TensorRT holds several times while it builds."""
        wide = small(node("Conv", "x w", "y", "wide", kernel_shape=[8, 8]), w=floats(131072, 2, 8, 8))
        build(wide, rtx, SMALL)  # its own libraries and caches
        gc.collect()
        before = resident()
        for _ in range(3):
            build(wide, rtx, SMALL)
        assert resident() - before < 48 * MIB


def resident() -> int:
    (line,) = (row for row in Path("/proc/self/status").read_text().splitlines() if row.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


@pytest.fixture(scope="module")
def settings(rtx: Nvinfer) -> Any:
    """A function that gives TensorRT's own configuration for these options."""
    rows = Rows()
    logger = new_logger(rtx.module, rows, verbose=False)
    builder = new_builder(rtx, logger, rows)
    return lambda **options: new_config(builder, rtx, TensorRTConfig(**options), SHAPES)


# The first logger of the process is dropped, its memory is filled with something else, and TensorRT writes to it.
FREED = """
import ctypes, gc, sys
import tensorrt_rtx as trt
from trtbuild.engine.tensorrt.logger import Rows, new_logger
from trtbuild.runtime.tensorrt_log import Errors, error_log

def made(what):
    owner = Rows() if what == "build" else Errors()
    return owner, trt.Runtime(new_logger(trt, owner, verbose=False) if what == "build" else error_log(trt, owner))

first, second = made(sys.argv[1]), made(sys.argv[1])
del first
gc.collect()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
for size in range(16, 200, 8):
    for _ in range(200):
        ctypes.memset(ctypes.c_void_p(libc.malloc(ctypes.c_size_t(size))), 0x41, size)
trt.get_plugin_registry().load_library("/nonexistent.so")
print("alive")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="fills memory by the C library's own malloc")
@pytest.mark.parametrize("what", ["build", "run"])
def test_tensorrt_writes_to_no_logger_that_was_freed(what: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FREED, what], capture_output=True, text=True, check=False, timeout=60
    )
    assert (result.returncode, result.stdout) == (0, "alive\n"), result.stderr


class TestSettings:
    @pytest.mark.parametrize(("option", "flag"), [
        ("tf32", "TF32"), ("sparsity", "SPARSE_WEIGHTS"), ("weight_streaming", "WEIGHT_STREAMING"),
        ("strip_plan", "STRIP_PLAN"), ("refit", "REFIT_IDENTICAL"),
    ])  # fmt: skip
    @pytest.mark.parametrize("value", [True, False])
    def test_flags_are_set_and_cleared(self, settings: Any, rtx: Nvinfer, option: str, flag: str, value: bool) -> None:
        """TF32 is set in a fresh configuration, so that clearing it counts."""
        member = getattr(rtx.module.BuilderFlag, flag)
        assert settings(**{option: value}).get_flag(member) is value

    def test_level_workspace_and_details(self, settings: Any, rtx: Nvinfer) -> None:
        result = settings(optimization_level=5, workspace=700)
        assert result.builder_optimization_level == 5
        assert result.get_memory_pool_limit(rtx.module.MemoryPoolType.WORKSPACE) == 700 * MIB
        assert result.profiling_verbosity == rtx.module.ProfilingVerbosity.DETAILED
        assert settings().get_memory_pool_limit(rtx.module.MemoryPoolType.WORKSPACE) > 1024 * MIB

    def test_capabilities(self, settings: Any) -> None:
        result = settings(compute_capabilities=("86", "120"))
        assert [result.get_compute_capability(i).name for i in range(result.num_compute_capabilities)] == [
            "SM86",
            "SM120",
        ]
        assert settings().num_compute_capabilities == 0

    def test_an_engine_for_capabilities_is_built(self, model: bytes, rtx: Nvinfer) -> None:
        assert build(model, rtx, compute_capabilities=("80", "86", "89", "120")).content


class TestRefused:
    """Before TensorRT is asked."""

    @pytest.mark.parametrize(("asked", "close"), [("8.6", "86"), ("12.0", "120"), ("curent", "current")])
    def test_a_capability_that_there_is_not(self, model: bytes, rtx: Nvinfer, asked: str, close: str) -> None:
        with pytest.raises(EngineError, match="no such compute capability") as caught:
            build(model, rtx, compute_capabilities=(asked,))
        assert caught.value.hint == f"Did you mean {close}?"
        assert caught.value.got == asked

    def test_current_with_others(self, model: bytes, rtx: Nvinfer) -> None:
        with pytest.raises(EngineError, match="stands alone"):
            build(model, rtx, compute_capabilities=("current", "86"))

    def test_capabilities_of_a_flavour_without(self, model: bytes, rtx: Nvinfer) -> None:
        other = replace(rtx, backend="tensorrt", flavour="tensorrt-10", features=replace(rtx.features, capabilities=()))
        with pytest.raises(EngineError, match="for the GPU of this machine only"):
            build(model, other, compute_capabilities=("86",))

    @pytest.mark.parametrize(("options", "name"), [
        ({"hardware_compatibility": "ampere+"}, "--hardwareCompatibilityLevel"),
        ({"version_compatible": True}, "--versionCompatible"),
    ])  # fmt: skip
    def test_what_only_tensorrt_has(self, model: bytes, rtx: Nvinfer, options: dict[str, Any], name: str) -> None:
        with pytest.raises(EngineError, match=f"tensorrt-rtx has no {name}") as caught:
            build(model, rtx, **options)
        assert "tensorrt" in str(caught.value.hint)

    @pytest.mark.parametrize(("shapes", "words"), [
        (
            {"image": ((1, 1, 16, 16, 8),) * 3},
            ("smallest", "(batch, 1, 16, 16, 16)", "(1, 1, 16, 16, 8)", "input image"),
        ),
        ({"image": ((1, 1, 16, 16, 16),) * 2 + ((1, 2, 16, 16, 16),)}, ("largest", "(1, 2, 16, 16, 16)")),
        ({"image": ((1, 1, 16, 16),) * 3}, ("smallest", "(1, 1, 16, 16)")),
        ({"image": ((0, 1, 16, 16, 16),) * 3}, ("smallest", "(0, 1, 16, 16, 16)")),
        ({"image": (SHAPES["image"][2], *SHAPES["image"][:2])}, ("out of order", "(4, 1, 16, 16, 16)")),
        ({"imagge": SHAPES["image"]}, ("does not have", "imagge", "Did you mean image?")),
        ({}, ("lacks an input", "input image", "no shapes")),
    ])  # fmt: skip
    def test_shapes_that_do_not_fit(self, model: bytes, rtx: Nvinfer, shapes: Shapes, words: tuple[str, ...]) -> None:
        with pytest.raises(EngineError) as caught:
            build(model, rtx, shapes)
        assert all(word in str(caught.value) for word in words), caught.value


class TestShapesFromIo:
    def test_the_batch_is_free(self) -> None:
        spec = TensorSpec(name="image", dtype="float32", shape=("batch", 2, 64, 48))
        config = TensorRTConfig(min_batch=1, opt_batch=3, max_batch=8)
        assert shapes_from_io([spec], config) == {"image": ((1, 2, 64, 48), (3, 2, 64, 48), (8, 2, 64, 48))}

    def test_a_fixed_batch_stays(self) -> None:
        spec = TensorSpec(name="image", dtype="float32", shape=(2, 1, 8, 8))
        assert shapes_from_io([spec], TensorRTConfig()) == {"image": ((2, 1, 8, 8),) * 3}

    def test_a_free_patch_is_refused(self) -> None:
        spec = TensorSpec(name="image", dtype="float32", shape=("batch", 1, "h", 8))
        with pytest.raises(EngineError, match="no fixed patch"):
            shapes_from_io([spec], TensorRTConfig())


class TestParser:
    def test_all_unsupported_operators_are_named(self, rtx: Nvinfer) -> None:
        refused = small(
            node("Foo", "x", "a", "first/foo", domain="my.domain"),
            node("Det", "a", "b", "second/det"),
            node("Relu", "b", "c", "fine"),
            node("Bernoulli", "c", "y", "third/bernoulli"),
        )
        found = unsupported(refused, rtx)
        assert [text.partition(":")[0] for text in found] == [
            "first/foo (Foo)", "second/det (Det)", "third/bernoulli (Bernoulli)",
        ]  # fmt: skip
        with pytest.raises(EngineError, match="does not support") as caught:
            build(refused, rtx, SMALL)
        assert all(text in str(caught.value) for text in found)

    def test_a_network_that_is_supported(self, model: bytes, rtx: Nvinfer) -> None:
        assert unsupported(model, rtx) == ()

    @pytest.mark.parametrize("operator", ["Conv", "Add"])
    def test_mixed_types(self, rtx: Nvinfer, operator: str) -> None:
        """TensorRT would not find a type for them: a strongly typed network computes in what stands there."""
        other = "w" if operator == "Conv" else "x"
        mixed = small(
            node("Cast", "x", "half", "to half", to=TensorProto.FLOAT16),
            node(operator, f"half {other}", "y", "the/mixed"),
            w=np.zeros((2, 2, 3, 3), np.float32),
        )
        with pytest.raises(EngineError, match="types of an ONNX node") as caught:
            build(mixed, rtx, SMALL)
        assert f"the/mixed ({operator})" in str(caught.value.got)
        assert "cudaError" not in str(caught.value)  # the machine without a GPU is not the cause
        assert (found := unsupported(mixed, rtx))
        assert "same" in found[0]

    def test_asymmetric_quantisation(self, rtx: Nvinfer) -> None:
        refused = small(
            node("QuantizeLinear", "x s z", "q", "quantize"),
            node("DequantizeLinear", "q s z", "y", "dequantize"),
            s=np.float32(1),
            z=np.uint8(128),
        )
        (found,) = unsupported(refused, rtx)
        assert found.startswith("quantize (QuantizeLinear): ")
        assert "zero point" in found

    @pytest.mark.parametrize("cut", [0, 1, 100, -1])
    def test_bytes_that_are_no_model(self, model: bytes, rtx: Nvinfer, cut: int) -> None:
        for call in (lambda: build(model[:cut], rtx), lambda: unsupported(model[:cut], rtx)):
            with pytest.raises(EngineError, match="no ONNX model"):
                call()

    def test_a_file_is_read_as_bytes_are(self, model: bytes, rtx: Nvinfer, tmp_path: Path, plan: Plan) -> None:
        path = tmp_path / "model.onnx"
        for content, words in ((None, "no such ONNX file"), (b"hello world", "no ONNX model"), (model[:-1], "no ONNX")):
            if content is not None:
                path.write_bytes(content)
            with pytest.raises(EngineError, match=words) as caught:
                plan_from_onnx(path, nvinfer=rtx, config=TensorRTConfig(), shapes=SHAPES)
            assert str(path) in str(caught.value)
        path.write_bytes(model)
        assert unsupported(path, rtx) == ()
        built = plan_from_onnx(path, nvinfer=rtx, config=TensorRTConfig(), shapes=SHAPES)
        assert (built.table, built.inputs) == (plan.table, plan.inputs)

    def test_text_is_no_model(self, rtx: Nvinfer) -> None:
        with pytest.raises(EngineError, match="no ONNX model"):
            build(b"hello world", rtx)

    def test_weights_in_another_file(self, network: onnx.ModelProto, rtx: Nvinfer) -> None:
        apart = onnx.ModelProto()
        apart.CopyFrom(network)
        tensor = max(apart.graph.initializer, key=lambda entry: entry.ByteSize())
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="weights.bin")
        with pytest.raises(EngineError):
            build(apart.SerializeToString(), rtx)


class TestFailures:
    """In the builder."""

    def test_too_small_a_workspace(self, model: bytes, rtx: Nvinfer) -> None:
        with pytest.raises(OutOfMemory) as caught:
            build(model, rtx, workspace=1)
        assert "--workspace 1 (MiB)" in str(caught.value.expected)
        assert all(word in str(caught.value.hint) for word in ("workspace", "batch", "patch"))

    def test_fp32_in_3d_on_turing(self, model: bytes, network: onnx.ModelProto, rtx: Nvinfer) -> None:
        with pytest.raises(EngineError, match="Turing") as caught:
            build(model, rtx, compute_capabilities=("75", "86"))
        assert caught.value.where == "node encoder.stages.0.0.convs.0.conv (Conv)"
        assert "FP16" in str(caught.value.hint)
        half = cast(network, "fp16", keep=()).model.SerializeToString()
        assert build(half, rtx, compute_capabilities=("75",)).content  # as the hint says

    @without_driver
    @pytest.mark.parametrize(
        "options",
        [{"refit": True}, {"strip_plan": True}, {"compute_capabilities": ("current",)}],
        ids=["refit", "stripped", "current"],
    )
    def test_what_needs_a_gpu(self, model: bytes, rtx: Nvinfer, options: dict[str, Any]) -> None:
        with pytest.raises(EngineError, match="where there is an NVIDIA GPU") as caught:
            build(model, rtx, **options)
        assert str(no_driver()) in str(caught.value.got)
        assert "build on the machine with the GPU" in str(caught.value.hint)

    def test_messages_of_tensorrt_10(self) -> None:
        """As NVIDIA's issues quote them; they cannot be provoked here."""
        texts = {
            "[tactic.cpp] OutOfMemory (Requested size was 17179869184 bytes.)": OutOfMemory,
            "Error Code 10: Internal Error (Could not find any implementation for node conv1 due to insufficient "
            "workspace. See verbose log for requested sizes.)": OutOfMemory,
            "[x.cpp::resizePhysical::145] Error Code 2: OutOfMemory (no further information)": OutOfMemory,
            "Error Code 1: Cuda Runtime (out of memory)": OutOfMemory,
            "Error Code 10: Internal Error (Could not find implementation for node {ForeignNode[a...b]})": EngineError,
            "Error Code 7: BuildCanceled (Build canceled by user)": Cancelled,
        }  # fmt: skip
        for text, kind in texts.items():
            assert type(build_failure(rows_of((1, text)), workspace=None)) is kind, text

    def test_a_node_is_named_in_onnx_terms(self) -> None:
        nodes = {"a/conv": "Conv", "b/norm": "InstanceNormalization", "b/norm/x": "Add", "node": "Relu"}
        text = "Could not find any implementation for node {ForeignNode[a/conv...b/norm]}."
        assert "node a/conv (Conv), node b/norm (InstanceNormalization)" in str(failing_nodes(text, nodes))
        assert failing_nodes("compile operation 'a/conv' for node", nodes) == "node a/conv (Conv)"
        assert failing_nodes("a/convolution", nodes) is None

    def test_a_build_without_a_message_is_an_error_too(self) -> None:
        assert "no message" in str(build_failure(rows_of(), workspace=None))

    def test_a_sentence_without_places_in_the_source(self) -> None:
        said = (
            "IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Network must have at least one output. "
            "In validate at /_src/optimizer/api/network.cpp:3810)"
        )
        assert sentence(said) == "Network must have at least one output"

    def test_warnings_are_said_once_and_noise_is_not(self) -> None:
        noise = (
            "[checkMacros.cpp::catchCudaError::250] Error Code 1: Cuda Runtime (In x at /y.cpp:250 (cudaError 35: z))"
        )
        rows = rows_of((2, "slow"), (2, noise), (2, "slow"), (2, "other"), (1, noise), (3, "fine"))
        assert rows.warnings() == ("slow", "other")
        assert rows.errors() == (noise,)  # nothing else is left
        assert rows_of((1, noise), (1, "cause")).errors() == ("cause",)


def rows_of(*rows: tuple[int, str]) -> Rows:
    return Rows(all=list(rows))


class TestStopped:
    @pytest.mark.parametrize("error", [KeyboardInterrupt(), Cancelled("enough"), ValueError("a bug")])
    @pytest.mark.parametrize("moment", [0.0, 0.1, 0.9])
    def test_what_tell_raises_stops_the_build_and_comes_out(
        self, model: bytes, rtx: Nvinfer, error: BaseException, moment: float
    ) -> None:
        calls = []

        def tell(phase: str, fraction: float) -> None:
            calls.append(fraction)
            if fraction >= moment:
                raise error

        with pytest.raises(type(error)) as caught:
            plan_from_onnx(model, nvinfer=rtx, config=TensorRTConfig(), shapes=SHAPES, tell=tell)
        assert caught.value is error
        assert sum(fraction >= moment for fraction in calls) == 1  # nothing is told once it is stopping

    def test_the_handler_of_ctrl_c_is_put_back(self, model: bytes, rtx: Nvinfer) -> None:
        before = signal.getsignal(signal.SIGINT)
        with pytest.raises(TrtbuildError):
            build(model, rtx, workspace=1)
        build(model, rtx)
        assert signal.getsignal(signal.SIGINT) is before

    @pytest.mark.skipif(os.name != "posix", reason="signals between processes")
    @pytest.mark.parametrize("moment", ["parsing", "building", "telling"])
    def test_ctrl_c_from_outside(self, model: bytes, rtx: Nvinfer, tmp_path: Path, moment: str) -> None:
        """The signal comes while TensorRT's C++ runs; it ends the build as Python ends: 130 here."""
        path = tmp_path / "model.onnx"
        path.write_bytes(model)
        code = INTERRUPTED.format(tests=str(Path(__file__).parent), path=str(path), moment=moment, shapes=SHAPES)
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
        assert result.returncode == 130, result.stderr
        assert result.stdout.split() == ["sent", "interrupted"]
        assert "Exception caught" not in result.stderr  # nothing was lost in C++


# The signal is sent by another thread to the process and handled by the main thread, in a callback from C++.
INTERRUPTED = """
import os, signal, sys, threading
sys.path.insert(0, {tests!r})
from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt import plan_from_onnx, logger
from trtbuild.nvinfer import nvinfer

moment, sent = {moment!r}, threading.Event()

def interrupt():
    if not sent.is_set():
        sent.set()
        print("sent", flush=True)
        thread = threading.Thread(target=os.kill, args=(os.getpid(), signal.SIGINT))
        thread.start()
        thread.join()

class Watched(list):
    def append(self, row):
        super().append(row)
        if moment == "parsing" and row[1].startswith("Parsing node"):
            interrupt()
        if moment == "building" and row[1].startswith("Compiler backend is used during engine build"):
            interrupt()

def tell(phase, fraction):
    if moment == "telling" and fraction > 0.1:
        interrupt()

original = logger.Rows
def rows():
    result = original(all=Watched())
    return result
import trtbuild.engine.tensorrt.build as build
build.Rows = rows
try:
    plan_from_onnx(open({path!r}, "rb").read(), nvinfer=nvinfer("tensorrt-rtx"), config=TensorRTConfig(),
                   shapes={shapes!r}, tell=tell)
except KeyboardInterrupt:
    print("interrupted")
    sys.exit(130)
"""


class TestPhases:
    def test_a_phase_takes_a_step_of_its_parent(self) -> None:
        phases = Phases()
        phases.open["root"] = Phase(parent=None, steps=4, done=1)
        assert phases.fraction() == pytest.approx(1 / 4)
        phases.open["inner"] = Phase(parent="root", steps=2, done=1)
        assert phases.fraction() == pytest.approx(1 / 4 + 1 / 8)
        del phases.open["inner"]
        assert phases.fraction() == pytest.approx(3 / 8)  # what is reached stays
        phases.open["root"].done = 4
        assert phases.fraction() == 0.99  # 1 is for the finished engine

    def test_phases_that_turn_in_a_circle_end(self) -> None:
        """A phase may be its own parent's name once more in another TensorRT."""
        phases = Phases(open={"a": Phase(parent="a", steps=2, done=1)})
        assert 0 <= phases.fraction() <= 1


def test_two_builds_know_nothing_of_each_other(rtx: Nvinfer, model: bytes) -> None:
    refused = small(node("Det", "x", "y", "det"))
    assert len(unsupported(refused, rtx)) == 1
    rows = Rows()
    logger = new_logger(rtx.module, rows, verbose=False)
    network, _ = parsed(rtx, new_builder(rtx, logger, rows), logger, model)
    assert network.num_outputs == 1
    assert rows.errors() == ()
