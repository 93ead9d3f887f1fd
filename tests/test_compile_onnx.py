"""Any ONNX file -> an engine of TensorRT-RTX, which builds without a GPU; shapes and arrays of all kinds."""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph_samples import floats, model_of, node
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from polygraphy.json import save_json
from precision_samples import PATCHES, all_ranges, amax_of, network_model, patch_of

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.layers_file import read_layers_file
from trtbuild.errors import EngineError, GraphError, InputError, OutputError, TrtbuildError
from trtbuild.graph import clean, load_onnx
from trtbuild.graph.precision import quantize, tensorrt_form
from trtbuild.spec import BuildRecord, TensorSpec, value_from_json
from trtbuild.steps.compilation.onnx_config import OnnxFileConfig
from trtbuild.steps.compilation.onnx_file import CompiledOnnx, compile_onnx_file
from trtbuild.steps.compilation.onnx_shapes import profile_of
from trtbuild.steps.layers import engine_layers
from trtbuild.steps.precision.arrays import measured_ranges, patches_from_file

NET = "plain2d"
SHAPE = (1, *PATCHES[NET])
SPEC = TensorSpec(name="image", dtype="float32", shape=("b", *SHAPE))
DATA = np.concatenate([patch_of(NET, seed) for seed in range(3)])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return saved(network_model(NET), tmp_path)


@pytest.fixture
def arrays(tmp_path: Path) -> Path:
    np.save(tmp_path / "arrays.npy", DATA)
    return tmp_path / "arrays.npy"


def saved(network: onnx.ModelProto, folder: Path) -> Path:
    (folder / "model.onnx").write_bytes(network.SerializeToString())
    return folder / "model.onnx"


def compiled(model: Path, lines: list[str] | None = None, **more: Any) -> CompiledOnnx:
    config = OnnxFileConfig(model=model, output=model.with_name("out.engine"), backend="tensorrt-rtx", **more)
    return compile_onnx_file(config, [].append if lines is None else lines.append, lambda line: None)


def table_of(output: Path) -> Any:
    facts = json.loads(output.with_name("out.engine.json").read_text())
    return read_layers_file(json.dumps(facts["layers"]).encode()).table


def two_inputs(operator: str = "Add") -> onnx.ModelProto:
    """Two images through one Conv each and `operator`, and two outputs."""
    nodes = [
        node("Conv", "a wa", "ca", "conv_a", pads=[1, 1, 1, 1]),
        node("Conv", "b wb", "cb", "conv_b", pads=[1, 1, 1, 1]),
        node(operator, "ca cb", "s", "sum"),
        node("Relu", "cb", "r", "relu"),
    ]
    shape: tuple[Any, ...] = ("n", 4, "h", "w")
    weights = {"wa": floats(4, 4, 3, 3), "wb": floats(4, 4, 3, 3, seed=1)}
    return model_of(nodes, {"a": shape, "b": shape}, {"s": shape, "r": shape}, weights)


# the engine


@pytest.mark.parametrize(
    ("precision", "more", "types"),
    [
        ("fp32", {}, {"Float"}),
        ("fp16", {}, {"Half", "Float"}),
        ("fp16", {"calibration": True}, {"Half", "Float"}),
        ("bf16", {}, {"BFloat16", "Float"}),
        ("int8", {"calibration": True}, {"Int8", "Half", "Float"}),
        ("int8", {"calibration": True, "rest": "fp32"}, {"Int8", "Float"}),
        ("int8", {"calibration": True, "rest": "bf16"}, {"Int8", "BFloat16", "Float"}),
    ],
    ids=["fp32", "fp16", "fp16 calibrated", "bf16", "int8", "int8+fp32", "int8+bf16"],
)
def test_an_engine_computes_in_the_precision(
    precision: str, more: dict[str, Any], types: set[str], model: Path, arrays: Path
) -> None:
    more = {**more, **({"calibration": arrays} if "calibration" in more else {})}
    result = compiled(model, precision=precision, **more)
    layers = table_of(model).layers
    assert {tensor.dtype for layer in layers for tensor in (*layer.inputs, *layer.outputs)} == types
    if precision == "int8":
        convs = {layer.nodes: layer for layer in layers if layer.kind == "correlation"}
        quantized = [layer for nodes, layer in convs.items() if set(nodes) & set(result.quantized)]
        assert len(quantized) == len(result.quantized) == 7
        assert {layer.inputs[0].dtype for layer in quantized} == {"Int8"}
        assert len(convs) > len(quantized)
        assert any("first or last layer" in line for line in result.left)


def test_what_is_kept_is_not_quantised(model: Path, arrays: Path) -> None:
    result = compiled(model, precision="int8", calibration=arrays, keep=("decoder",), quantize_ends=True)
    assert result.quantized
    assert not [name for name in result.quantized if "decoder" in name]
    assert any(line.startswith("decoder") and "--keep" in line for line in result.left)
    lines: list[str] = []
    with pytest.raises(TrtbuildError, match="finds no layer") as caught:
        compiled(model, lines, precision="int8", calibration=arrays, keep=("nothing",), overwrite=True)
    assert "trtbuild clean model.onnx" in str(caught.value)
    assert "encoder" in str(caught.value), "some of the names"
    assert lines == [], "before the calibration"


def test_three_files_say_what_was_made(model: Path) -> None:
    result = compiled(model, tensorrt=TensorRTConfig(max_batch=2))
    engine, facts = model.with_name("out.engine").read_bytes(), model.with_name("out.engine.json").read_text()
    record = value_from_json(BuildRecord, json.loads(facts)["record"])
    assert record == result.record
    assert engine[:4] == b"vtrt"
    assert record.profile.max == (2, *SHAPE)
    assert record.options["maxShapes"] == f"image:2x{'x'.join(map(str, SHAPE))}"
    assert record.options["sha256"] == hashlib.sha256(engine).hexdigest()
    assert record.memory.device_per_batch.keys() == {"2"}
    assert (record.file, record.inference_precision) == ("out.engine", "f32")
    typed = load_onnx(model.with_name("out.onnx"))
    assert "ConvTranspose" not in {n.op_type for n in typed.graph.node}


def test_the_same_again_takes_the_engine_again_and_another_precision_does_not(model: Path) -> None:
    lines: list[str] = []
    compiled(model, lines)
    first = model.with_name("out.engine").read_bytes()
    compiled(model, lines, overwrite=True)
    assert model.with_name("out.engine").read_bytes() == first
    compiled(model, lines, overwrite=True, precision="bf16")
    assert [line.split(" of out")[0] for line in lines] == ["building the engine", "reusing the engine",
                                                            "building the engine"]  # fmt: skip
    assert "the network (its ONNX)" in lines[-1]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_several_inputs_and_outputs_with_free_sizes(precision: str, tmp_path: Path) -> None:
    result = compiled(
        saved(two_inputs(), tmp_path), precision=precision,
        min_shapes="a:1x4x8x8,b:1x4x8x8", opt_shapes="a:1x4x16x16,b:1x4x16x16", max_shapes="a:2x4x32x32,b:2x4x32x32",
    )  # fmt: skip
    facts = json.loads((tmp_path / "out.engine.json").read_text())
    assert [spec["name"] for spec in facts["inputs"]] == ["a", "b"]
    assert [spec["name"] for spec in facts["outputs"]] == ["s", "r"]
    assert result.record.options["optShapes"] == "a:1x4x16x16,b:1x4x16x16"


def renamed(network: onnx.ModelProto, names: dict[str, str]) -> onnx.ModelProto:
    result = onnx.ModelProto()
    result.CopyFrom(network)
    for part in result.graph.node:
        part.input[:] = [names.get(name, name) for name in part.input]
        part.output[:] = [names.get(name, name) for name in part.output]
    for value in (*result.graph.input, *result.graph.output, *result.graph.value_info):
        value.name = names.get(value.name, value.name)
    return result


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_inputs_and_outputs_keep_their_names(precision: str, tmp_path: Path) -> None:
    """Also where an inner tensor of the cleaned graph is called so."""
    network = network_model(NET)
    inner = next(n.output[0] for n in network.graph.node if n.op_type == "Conv")
    names = {"image": "scan:0", "logits": inner, inner: "something else"}
    np.savez(tmp_path / "a.npz", **{"scan:0": DATA})
    more: dict[str, Any] = {"calibration": tmp_path / "a.npz"} if precision == "int8" else {}
    compiled(saved(renamed(network, names), tmp_path), precision=precision, **more)
    facts = json.loads((tmp_path / "out.engine.json").read_text())
    assert [[spec["name"] for spec in facts[side]] for side in ("inputs", "outputs")] == [["scan:0"], [inner]]


def test_int8_takes_one_input(tmp_path: Path, arrays: Path) -> None:
    with pytest.raises(InputError, match="one float32 input"):
        compiled(saved(two_inputs(), tmp_path), precision="int8", calibration=arrays, opt_shapes="a:1x4x8x8,b:1x4x8x8")
    assert not (tmp_path / "out.engine").exists()


def test_int8_takes_a_fixed_patch(tmp_path: Path, arrays: Path) -> None:
    shape: tuple[Any, ...] = ("n", 1, "h", "w")
    network = model_of([node("Conv", "x w", "y", "c")], {"x": shape}, {"y": None}, {"w": floats(2, 1, 3, 3)})
    network.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 2, "i", "j"]))
    with pytest.raises(InputError, match="fixed patch"):
        compiled(saved(network, tmp_path), precision="int8", calibration=arrays, opt_shapes="x:1x1x8x8",
                 quantize_ends=True)  # fmt: skip


def test_a_network_with_its_own_scales_needs_no_arrays(tmp_path: Path, arrays: Path) -> None:
    source = network_model(NET)
    ready = quantize(source, amax_of(source, DATA[:1]), keep=(), zero_point="u8").model
    path = saved(ready, tmp_path)
    result = compiled(path, precision="int8", rest="fp32")
    assert len(result.quantized) == 7
    for wrong, match in (({"precision": "fp16"}, "--precision int8"),
                         ({"precision": "int8", "calibration": arrays}, "needs none")):  # fmt: skip
        with pytest.raises(TrtbuildError, match=match):
            compiled(path, overwrite=True, **wrong)


def _with_dead_parts(network: onnx.ModelProto) -> onnx.ModelProto:
    """An initializer that nobody reads, as exporters leave them, and a dead pair of Q/DQ on the input."""
    network.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), "unused"))
    network.graph.initializer.append(numpy_helper.from_array(np.float32(1), "dead scale"))
    name = network.graph.input[0].name
    network.graph.node.append(node("QuantizeLinear", "", "dead", "dead q"))
    network.graph.node[-1].input[:] = [name, "dead scale", "unused"]
    return network


def test_dead_parts_of_a_quantised_network_do_not_matter(tmp_path: Path) -> None:
    source = network_model(NET)
    ready = quantize(source, amax_of(source, DATA[:1]), keep=(), zero_point="s8").model
    assert len(compiled(saved(_with_dead_parts(ready), tmp_path), precision="int8", rest="fp32").quantized) == 7


def test_dead_quantizers_do_not_make_a_quantised_network(tmp_path: Path) -> None:
    result = compiled(saved(_with_dead_parts(network_model(NET)), tmp_path), precision="fp32")
    assert (result.quantized, result.record.precision) == ((), "fp32")


def test_an_unknown_operator_is_named_before_the_build(tmp_path: Path) -> None:
    network = model_of([node("Det", "x", "y", "determinant")], {"x": (1, 3, 3)}, {"y": (1,)})
    with pytest.raises(EngineError, match=r"\(Det\): this operator is not supported"):
        compiled(saved(network, tmp_path), opt_shapes="x:1x3x3")


def test_an_unknown_operator_is_named_before_a_calibration_stumbles_over_it(tmp_path: Path) -> None:
    nodes = [node("Conv", "x w", "h", "c", pads=[1, 1, 1, 1]), helper.make_node("Foo", ["h"], ["y"], domain="my")]
    network = model_of(nodes, {"x": ("n", 1, 8, 8)}, {"y": ("n", 1, 8, 8)}, {"w": floats(1, 1, 3, 3)})
    network.opset_import.append(helper.make_opsetid("my", 1))
    np.save(tmp_path / "a.npy", np.ones((1, 1, 8, 8), np.float32))
    with pytest.raises(EngineError, match=r"Foo") as caught:
        compiled(saved(network, tmp_path), precision="int8", calibration=tmp_path / "a.npy", quantize_ends=True)
    assert "OpenVINO" not in str(caught.value)


def test_a_damaged_model_is_an_error_of_the_graph(tmp_path: Path) -> None:
    for content in (b"", b"garbage", network_model(NET).SerializeToString()[:-1000]):
        (tmp_path / "model.onnx").write_bytes(content)
        with pytest.raises(GraphError):
            compiled(tmp_path / "model.onnx")


@pytest.mark.parametrize("more", [{}, {"method": "entropy"}], ids=["auto", "entropy"])
def test_the_facts_say_how_the_precision_came_about(more: dict[str, Any], model: Path, arrays: Path) -> None:
    lines: list[str] = []
    result = compiled(model, lines, precision="int8", calibration=arrays, **more)
    method = more.get("method", "percentile")
    facts = json.loads(model.with_name("out.engine.json").read_text())
    assert facts["precision"] == {"method": method, "patches": len(DATA), "quantized": list(result.quantized),
                                  "left": list(result.left)}  # fmt: skip
    record = value_from_json(BuildRecord, facts["record"])
    assert (record.options["calibration_method"], record.options["calibration_patches"]) == (method, len(DATA))
    assert lines[0] == f"calibrating on {len(DATA)} inputs, thresholds by {method}"
    assert engine_layers(model.with_name("out.engine"))["engines"][0]["precision"] == "int8"


def test_without_calibration_there_is_no_method(model: Path) -> None:
    result = compiled(model)
    assert (result.method, result.patches) == (None, None)
    assert "calibration_method" not in result.record.options


@pytest.mark.parametrize("stage", ["out.onnx", "out.engine.json", "build.sh"])
def test_the_outputs_change_together(stage: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk at any of them leaves all as they were."""
    names = ("out.engine", "out.onnx", "out.engine.json", "build.sh")
    for name in names:
        model.with_name(name).write_bytes(b"old")
    write = Path.write_bytes

    def full(path: Path, content: bytes) -> int:
        if path.suffix == Path(stage).suffix and path.name.startswith(".trtbuild-"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match="free some space"):
        compiled(model, emit_script=model.with_name("build.sh"), overwrite=True)
    assert [model.with_name(name).read_bytes() for name in names] == [b"old"] * 4
    assert not [path for path in model.parent.iterdir() if path.name.startswith(".trtbuild-")]


def test_the_engine_gets_its_name_last(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed_to: list[str] = []
    replace_ = os.replace

    def noted(source: Any, target: Any) -> None:
        renamed_to.append(Path(target).name)
        replace_(source, target)

    monkeypatch.setattr(os, "replace", noted)
    compiled(model, emit_script=model.with_name("build.sh"))
    ours = [name for name in renamed_to if name.startswith(("out.", "build."))]
    assert (sorted(ours), ours[-1]) == (["build.sh", "out.engine", "out.engine.json", "out.onnx"], "out.engine")


@pytest.mark.parametrize("name", ["out.engine", "out.onnx", "out.engine.json"])
def test_an_output_replaces_no_folder(name: str, model: Path) -> None:
    model.with_name(name).mkdir()
    lines: list[str] = []
    with pytest.raises(OutputError, match="no file"):
        compiled(model, lines, overwrite=True)
    assert lines == []


def test_an_output_replaces_no_calibration_arrays(model: Path) -> None:
    with pytest.raises(TrtbuildError, match="replace an input"):
        compiled(model, precision="int8", calibration=model.with_name("out.engine.json"), overwrite=True)


@pytest.mark.parametrize("name", ["model.onnx", "arrays.npy", "out.engine", "out.onnx", "out.engine.json", "link"])
def test_a_script_replaces_nothing_of_the_command(name: str, model: Path, arrays: Path) -> None:
    model.with_name("link").symlink_to(arrays)
    before = model.read_bytes(), arrays.read_bytes()
    lines: list[str] = []
    with pytest.raises(OutputError, match="script"):
        compiled(model, lines, precision="int8", calibration=arrays, emit_script=model.with_name(name), overwrite=True)
    assert lines == []
    assert (model.read_bytes(), arrays.read_bytes()) == before


def test_a_missing_model_is_said_with_a_next_step(tmp_path: Path) -> None:
    with pytest.raises(GraphError, match="check the path"):
        compiled(tmp_path / "nope.onnx")


def test_rtx_has_no_timing_cache_to_leave_out(model: Path) -> None:
    """Also where the engine is there already, and nothing would be built."""
    compiled(model)
    with pytest.raises(EngineError, match="--noTimingCache"):
        compiled(model, overwrite=True, tensorrt=TensorRTConfig(timing_cache=False))


@pytest.mark.parametrize("name", ["out.engine", "out.onnx", "out.engine.json"])
def test_no_output_is_replaced_unasked(name: str, model: Path) -> None:
    model.with_name(name).write_bytes(b"mine")
    with pytest.raises(OutputError, match="--overwrite"):
        compiled(model)
    assert model.with_name(name).read_bytes() == b"mine"


def test_a_missing_folder_is_noticed_before_the_build(model: Path) -> None:
    given = OnnxFileConfig(model=model, output=model.parent / "none" / "a.engine", backend="tensorrt-rtx")
    with pytest.raises(OutputError, match="no such folder"):
        compile_onnx_file(given, pytest.fail, pytest.fail)


def test_the_typed_graph_never_replaces_the_model(model: Path) -> None:
    link = model.with_name("link.onnx")
    link.symlink_to(model)
    for source in (model, link, model.parent / "." / "model.onnx"):
        with pytest.raises(TrtbuildError, match="would replace the model"):
            OnnxFileConfig(model=source, output=model.with_suffix(".engine"), backend="tensorrt-rtx", overwrite=True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"precision": "int4"}, {"precision": "fp16", "rest": "fp16"}, {"precision": "fp32", "calibration": Path("a")},
        {"precision": "bf16", "fp16_norms": True}, {"method": "entropy"}, {"keep": ("a",)}, {"quantize_ends": True},
        {"min_shapes": "x:1"}, {"min_shapes": "x:1", "opt_shapes": "x:1"}, {"output": Path("a.plan")}, {"threads": 0},
        {"backend": "openvino"}, {"precision": "int8", "keep": ("(",)},
    ],
)  # fmt: skip
def test_wishes_that_do_not_go_together(wrong: dict[str, Any]) -> None:
    given: dict[str, Any] = {"model": Path("m.onnx"), "output": Path("a.engine"), "backend": "tensorrt-rtx"}
    OnnxFileConfig(**given)
    with pytest.raises(TrtbuildError):
        OnnxFileConfig(**{**given, **wrong})


def test_int8_without_arrays_is_refused(model: Path) -> None:
    with pytest.raises(TrtbuildError, match="calibration-arrays"):
        compiled(model, precision="int8")


# shapes

INPUTS = (
    TensorSpec(name="x", dtype="float32", shape=("b", 1, "h", 8)),
    TensorSpec(name="y:0", dtype="float32", shape=(1, 3)),
)


def config(**more: Any) -> OnnxFileConfig:
    return OnnxFileConfig(model=Path("m.onnx"), output=Path("a.engine"), backend="tensorrt-rtx", **more)


def test_shapes_as_trtexec_writes_them() -> None:
    found = profile_of(config(min_shapes="x:1x1x4x8", opt_shapes="x:1x1x8x8,'y:0':1x3", max_shapes="x:2x1x9x8"), INPUTS)
    assert found == {"x": ((1, 1, 4, 8), (1, 1, 8, 8), (2, 1, 9, 8)), "y:0": ((1, 3),) * 3}
    assert profile_of(config(opt_shapes="x:1x1x4x8"), INPUTS)["x"] == ((1, 1, 4, 8),) * 3
    free_batch = (TensorSpec(name="x", dtype="float32", shape=("b", 1, 8)),)
    assert profile_of(config(), free_batch) == {"x": ((1, 1, 8), (1, 1, 8), (4, 1, 8))}


@pytest.mark.parametrize("name", ["a,b", "a:1x2,b:3", "it's", "a'b','c", " x", "x:1x2", "it's:1,2"])
def test_names_in_quotes_hold_anything(name: str) -> None:
    inputs = [TensorSpec(name=name, dtype="float32", shape=("b", "n")), TensorSpec(name="z", dtype="float32",
                                                                                 shape=("b", 3))]  # fmt: skip
    for text in (f"'{name}':2x7,z:2x3", f"z:2x3,'{name}':2x7"):
        assert profile_of(config(opt_shapes=text), inputs) == {name: ((2, 7),) * 3, "z": ((2, 3),) * 3}


@pytest.mark.parametrize("text", ["x", "z:1x1x4x8", "x:1x1x4x8,y:0:1x4", "'y:0':1x3", "x:1x1x4x9"])
def test_an_error_names_the_option_that_was_given(text: str) -> None:
    with pytest.raises(TrtbuildError) as caught:
        profile_of(config(opt_shapes=text), INPUTS)
    assert "--optShapes" in str(caught.value).partition("next:")[0]
    assert "--minShapes" not in str(caught.value)
    assert "next:" in str(caught.value)


def test_batches_that_nothing_comes_of_are_refused() -> None:
    with pytest.raises(TrtbuildError, match="--max-batch"):
        config(opt_shapes="x:1x1x4x8", batch_options=("--max-batch",))
    fixed = (TensorSpec(name="x", dtype="float32", shape=(3, 1, 8)),)
    with pytest.raises(TrtbuildError, match="--max-batch"):
        profile_of(config(batch_options=("--max-batch",)), fixed)
    assert profile_of(config(), fixed) == {"x": ((3, 1, 8),) * 3}
    free = (TensorSpec(name="x", dtype="float32", shape=("b", 1, 8)),)
    assert profile_of(config(batch_options=("--max-batch",)), free)["x"][2] == (4, 1, 8)


def test_sizes_that_no_engine_can_run_are_an_error(tmp_path: Path) -> None:
    """TensorRT only warns, and builds: 4000 * 30000 * 30000 is more than 2^40 elements."""
    shape: tuple[Any, ...] = ("n", 1, "h", "w")
    network = model_of([node("Relu", "x", "y", "r")], {"x": shape}, {"y": shape}, {})
    small = "x:1x1x8x8"
    with pytest.raises(EngineError, match="do not go together"):
        compiled(saved(network, tmp_path), min_shapes=small, opt_shapes=small, max_shapes="x:4000x1x30000x30000")
    assert not (tmp_path / "out.engine").exists()


@pytest.mark.parametrize(
    "text",
    [
        "x", "x:", ":1x1", "x:1x1x4x8,x:1x1x4x8", "x:1x-1x4x8", "x:0x1x4x8", "x:1x1x4", "x:1x1x4x8x1", "x:1x2x4x8",
        "x:1x1x4x9", "z:1x1x4x8", "x:1x1x4x8,", "x:1 x1x4x8", "x:１x1x4x8", "y:0:1x3", "x:1x1x4x8,y:0:1x4",
        "x:1x1x4x99999999999", "x:0x1_0x4x8",
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_errors(text: str) -> None:
    with pytest.raises(TrtbuildError):
        profile_of(config(opt_shapes=text), INPUTS)


def test_sizes_out_of_order_are_errors() -> None:
    with pytest.raises(EngineError):
        profile_of(config(min_shapes="x:2x1x8x8", opt_shapes="x:1x1x8x8", max_shapes="x:2x1x8x8"), INPUTS)


def test_free_sizes_want_shapes() -> None:
    with pytest.raises(EngineError, match="--minShapes"):
        profile_of(config(), INPUTS)


# arrays


def feed(array: NDArray[Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return {"array": base64.b64encode(buffer.getvalue()).decode(), "polygraphy_class": "ndarray"}


@pytest.mark.parametrize("kind", ["stack", "one", "npz", "npz compressed", "polygraphy"])
def test_the_inputs_come_out_of_every_kind_of_file(kind: str, tmp_path: Path) -> None:
    path, expected = tmp_path / "a.npy", DATA
    if kind == "stack":
        np.save(path, DATA)
    elif kind == "one":
        np.save(path, DATA[0])
        expected = DATA[:1]
    elif kind.startswith("npz"):
        path = tmp_path / "a.npz"
        (np.savez if kind == "npz" else np.savez_compressed)(path, image=DATA)
    else:
        path = tmp_path / "a.json"
        save_json([{"image": DATA[:1]}, {"image": DATA[1:]}], str(path))
    patches = patches_from_file(path, SPEC)
    np.testing.assert_array_equal(np.stack([patches[index] for index in range(len(patches))]), expected)
    with pytest.raises(IndexError):
        patches[len(patches)]


def _with(value: float) -> NDArray[np.float32]:
    copy = DATA.copy()
    copy[1, 0, 3, 3] = value
    return copy


OBJECTS = np.array([{"a": 1}], dtype=object)
WRONG: dict[str, NDArray[Any]] = {
    "NaN": _with(np.nan), "infinity": _with(-np.inf), "float64": DATA.astype(np.float64),
    "float16": DATA.astype(np.float16), "int": DATA.astype(np.int32), "big endian": DATA.astype(">f4"),
    "shape": DATA[:, :, 1:], "rank": DATA[0, 0], "more ranks": DATA[None], "empty": DATA[:0], "objects": OBJECTS,
}  # fmt: skip


@pytest.mark.parametrize("ending", ["npy", "npz", "json"])
@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_do_not_fit_are_refused(name: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{ending}"
    if ending == "npy":
        np.save(path, WRONG[name], allow_pickle=True)
    elif ending == "npz":
        np.savez(path, image=WRONG[name])
    else:
        path.write_text(json.dumps([{"image": feed(WRONG[name])}]))
    with pytest.raises(InputError) as caught:
        patches_from_file(path, SPEC)
    assert str(path) in str(caught.value)


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("form", ["npy", "pickle as npy", "npz", "pickle as npz", "json", "pickle as json"])
def test_nothing_in_a_file_is_executed(form: str, tmp_path: Path) -> None:
    bomb, path = Bomb(tmp_path / "executed"), tmp_path / f"a.{form.rpartition(' ')[2]}"
    array = np.array([bomb], dtype=object)
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(bomb))
    elif form == "npy":
        np.save(path, array, allow_pickle=True)
    elif form == "npz":
        np.savez(path, image=array)
    else:
        path.write_text(json.dumps([{"image": feed(array)}]))
    with pytest.raises(InputError):
        patches_from_file(path, SPEC)
    assert not (tmp_path / "executed").exists()


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.npy", b""), ("a.npy", b"\x93NUMPY"), ("a.npy", b"\x93NUMPY\x01\x00\xff\xff{"),
        ("a.npz", b""), ("a.npz", b"PK\x03\x04garbage"),
        ("a.json", b""), ("a.json", b"{"), ("a.json", b"\xff"), ("a.json", b"[" * 100_000), ("a.json", b"[]"),
        ("a.json", _json({"image": feed(DATA)})), ("a.json", _json([feed(DATA)])), ("a.json", _json([[1]])),
        ("a.json", _json([{"image": DATA[0].tolist()}])), ("a.json", _json([{"image": feed(DATA), "other": 1}])),
        ("a.json", _json([{"image": {**feed(DATA), "polygraphy_class": "Tensor"}}])),
        ("a.json", _json([{"image": {"array": "?", "polygraphy_class": "ndarray"}}])),
        ("a.json", _json([{"image": {"array": 7, "polygraphy_class": "ndarray"}}])),
        ("a.json", _json([{"image": {"array": feed(DATA)["array"][:-400], "polygraphy_class": "ndarray"}}])),
        ("a.pkl", b""), ("a", b""),
    ],
)  # fmt: skip
def test_damaged_files_are_refused(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError):
        patches_from_file(tmp_path / name, SPEC)


def test_cut_files_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", DATA)
    np.savez(tmp_path / "a.npz", image=DATA)
    for path in (tmp_path / "a.npy", tmp_path / "a.npz"):
        whole = path.read_bytes()
        for length in (1, 60, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(InputError):
                patches_from_file(path, SPEC)


def test_a_header_that_promises_too_much_is_refused(tmp_path: Path) -> None:
    header = {"descr": "<f4", "fortran_order": False, "shape": (2**40, *SHAPE)}
    for ending in ("npy", "npz", "json"):
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, header)
        path = tmp_path / f"a.{ending}"
        if ending == "npy":
            path.write_bytes(buffer.getvalue())
        elif ending == "npz":
            with zipfile.ZipFile(path, "w") as archive:
                archive.writestr("image.npy", buffer.getvalue())
        else:
            content = {"array": base64.b64encode(buffer.getvalue()).decode(), "polygraphy_class": "ndarray"}
            path.write_text(json.dumps([{"image": content}]))
        with pytest.raises(InputError):
            patches_from_file(path, SPEC)


@pytest.mark.parametrize("names", [("other",), ("image", "other"), ()])
def test_arrays_for_other_inputs_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **dict.fromkeys(names, DATA))
    with pytest.raises(InputError):
        patches_from_file(tmp_path / "a.npz", SPEC)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    for ending in ("npy", "npz", "json"):
        with pytest.raises(InputError):
            patches_from_file(tmp_path / f"none.{ending}", SPEC)


def test_ranges_are_those_that_onnx_runtime_sees(arrays: Path) -> None:
    """The judge takes the maxima of each input with ONNX Runtime; the network under test runs in OpenVINO."""
    source = network_model(NET)
    model = clean(source, rewrite_conv_transpose=False, split_instance_norm=False).model
    patches = patches_from_file(arrays, SPEC)
    found = measured_ranges(model, patches, method="minmax", threads=2, say=lambda line: None)
    each = [amax_of(model, DATA[index : index + 1]) for index in range(len(DATA))]
    assert found.amax == pytest.approx({name: max(one[name] for one in each) for name in each[0]}, rel=1e-4)
    every = [all_ranges(model, DATA[index : index + 1]) for index in range(len(DATA))]
    judged = {name: max(one[name] for one in every) for name in every[0]}
    shared = judged.keys() & found.largest.keys()
    assert len(shared) > 15
    assert {name: found.largest[name] for name in shared} == pytest.approx({n: judged[n] for n in shared}, rel=1e-4)
    assert {n.input[0] for n in tensorrt_form(model).graph.node if n.op_type == "Conv"} <= found.amax.keys()


def test_values_beyond_fp16_stay_float32(tmp_path: Path) -> None:
    """With arrays the layer that overflows is known; without them nobody can."""
    nodes = [node("Conv", "x w", "h", "big"), node("Relu", "h", "r", "relu"), node("Conv", "r v", "y", "small")]
    weights = {"w": np.full((1, 1, 1, 1), 60000, np.float32), "v": np.full((1, 1, 1, 1), 1e-5, np.float32)}
    network = model_of(nodes, {"x": ("n", 1, 8, 8)}, {"y": ("n", 1, 8, 8)}, weights)
    path = saved(network, tmp_path)
    np.save(tmp_path / "a.npy", np.full((1, 1, 8, 8), 5, np.float32))
    with_arrays = compiled(path, precision="fp16", calibration=tmp_path / "a.npy")
    assert any("300000" in line for line in with_arrays.left)
    assert not any("without calibration" in line for line in with_arrays.warnings)
    without = compiled(path, precision="fp16", overwrite=True)
    assert any("without calibration" in line for line in without.warnings)
    assert json.loads((tmp_path / "out.engine.json").read_text())["warnings"] == list(without.warnings)


@pytest.mark.parametrize("ending", ["npy", "npz", "json"])
def test_zeros_alone_are_no_calibration(ending: str, tmp_path: Path) -> None:
    path, zeros = tmp_path / f"a.{ending}", np.zeros_like(DATA)
    for last in (0.0, 1e-3):
        zeros[-1, -1, -1, -1] = last
        if ending == "npy":
            np.save(path, zeros)
        elif ending == "npz":
            np.savez(path, image=zeros)
        else:
            save_json([{"image": zeros}], str(path))
        if last:
            assert len(patches_from_file(path, SPEC)) == len(DATA)
        else:
            with pytest.raises(InputError, match="nothing but zeros"):
                patches_from_file(path, SPEC)


def test_a_scale_that_is_a_guess_is_said(tmp_path: Path) -> None:
    """Behind a Relu of negative values all is zero."""
    nodes = [node("Conv", "x w", "h", "first"), node("Relu", "h", "r", "relu"), node("Conv", "r v", "y", "second")]
    weights = {"w": np.full((1, 1, 1, 1), -1, np.float32), "v": np.ones((1, 1, 1, 1), np.float32)}
    network = model_of(nodes, {"x": ("n", 1, 8, 8)}, {"y": ("n", 1, 8, 8)}, weights)
    for sign, guesses in ((1, 1), (-1, 0)):
        np.save(tmp_path / "a.npy", np.full((1, 1, 8, 8), sign, np.float32))
        result = compiled(saved(network, tmp_path), precision="int8", calibration=tmp_path / "a.npy",
                          quantize_ends=True, overwrite=True)  # fmt: skip
        assert len(result.quantized) == 2
        assert sum("is a guess" in line for line in result.warnings) == guesses


def test_a_network_that_overflows_on_its_arrays_is_refused(model: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "huge.npy", np.full(DATA.shape, 3e38, np.float32))
    with pytest.raises(TrtbuildError, match=r"not finite|NaN|finite"):
        compiled(model, precision="int8", calibration=tmp_path / "huge.npy")


def test_ctrl_c_leaves_nothing_behind(model: Path) -> None:
    def say(line: str) -> None:
        raise KeyboardInterrupt

    given = OnnxFileConfig(model=model, output=model.with_name("out.engine"), backend="tensorrt-rtx")
    with pytest.raises(KeyboardInterrupt):
        compile_onnx_file(replace(given, overwrite=True), lambda line: None, say)
    assert sorted(path.name for path in model.parent.iterdir()) == ["cache", "model.onnx"]
