"""The layers of an engine: from TensorRT's log and inspector, as a file, and what they say of precision and speed.

`data/tensorrt_rtx_layers.json` holds the last messages of a build by TensorRT-RTX 1.7.1.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from precision_samples import amax_of, network_model, patch_of

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt import plan_from_onnx, shapes_from_io
from trtbuild.engine.tensorrt.coverage import coverage, warnings
from trtbuild.engine.tensorrt.table import (
    facts_from_table,
    layers_file,
    read_layers_file,
    table_from_facts,
    table_from_inspector,
    table_from_log,
)
from trtbuild.engine.tensorrt.values import EngineLayer, EngineTable, LayerTensor
from trtbuild.errors import EngineError
from trtbuild.graph import io_from_model
from trtbuild.graph.cost import operations
from trtbuild.graph.precision import cast, keep_ends, quantize, tensorrt_form, weighted_layers
from trtbuild.nvinfer import nvinfer

RECORDED = Path(__file__).parent / "data" / "tensorrt_rtx_layers.json"
ROWS: list[str] = json.loads(RECORDED.read_text())["messages"]
(TABLE_AT,) = (n for n, row in enumerate(ROWS) if row.startswith("Layers:"))
OPERATIONS = {"conv": 2 * 4 * 512 * 4 * 27, "up": 2 * 4 * 512 * 2 * 8}


def recorded() -> EngineTable:
    table = table_from_log(ROWS)
    assert table is not None
    return table


def changed(old: str, new: str) -> list[str]:
    """The recorded messages with the first `old` of the table replaced."""
    assert old in ROWS[TABLE_AT]
    return [row.replace(old, new, 1) if number == TABLE_AT else row for number, row in enumerate(ROWS)]


class TestLog:
    def test_every_row_tensor_and_node_is_there(self) -> None:
        table = recorded()
        text = ROWS[TABLE_AT].partition("\n\nI/O Tensors")[0]
        assert [layer.kind for layer in table.layers] == re.findall("LayerType: ([^,]*)", text)
        constants = sum(part.count("{ Name: ") for part in re.findall("Constants: (.*?), Outputs", text))
        tensors = [tensor for layer in table.layers for tensor in (*layer.inputs, *layer.outputs)]
        assert len(tensors) == text.count("{ Name: ") - constants
        assert sum(len(layer.nodes) for layer in table.layers) == text.count("[ONNX Layer: ")

    def test_a_layer_is_read_with_all_that_it_says(self) -> None:
        (layer,) = (layer for layer in recorded().layers if layer.kind == "correlation")
        channels_last = "(NDHWC) Channel major format with 3 spatial dimensions"
        assert layer.name == "conv_myl0_2"
        assert layer.tactic == "__myelin_CASK_STUB"
        assert layer.nodes == ("conv", "x/DequantizeLinear", "conv.weight/DequantizeLinear")
        assert [(t.shape, t.dtype, t.format) for t in layer.inputs] == [((-1, 4, 8, 8, 8), "Int8", channels_last)]
        assert [(t.shape, t.dtype, t.format) for t in layer.outputs] == [((-1, 4, 8, 8, 8), "Float", channels_last)]

    def test_the_memory_is_that_of_the_messages(self) -> None:
        table = recorded()
        assert f"Total Activation Memory: {table.activation_memory} bytes" in ROWS
        assert f"Total Weights Memory: {table.weights_memory} bytes" in ROWS
        silent = table_from_log([ROWS[TABLE_AT]])
        assert silent is not None
        assert (silent.activation_memory, silent.weights_memory) == (None, None)

    def test_a_log_without_a_table_has_none(self) -> None:
        assert table_from_log([]) is None
        assert table_from_log([row for row in ROWS if not row.startswith("Layers:")]) is None

    @pytest.mark.parametrize(
        ("old", "new", "row"),
        [
            ("LayerType: correlation", "LayerKind: correlation", 3),
            ("Dimensions: [-1,4,8,8,8]", "Dimensions: [b,4,8,8,8]", 2),
            ("Dimensions: [-1,4,8,8,8]", "Dimensions: [-1,4,,8]", 2),
            ("Datatype: Int8, ", "", 2),
            ("[ONNX Layer: conv]", "[Layer: conv]", 3),
            ("[ONNX Layer: conv]", "[ONNX Layer: conv", 3),
            ("StreamId: 0", "StreamId: x", 1),
            ("Constants: []", "Constants: none", 1),
            ("Name: conv_myl0_2", "Name: conv, LayerType: x", 3),
            ("Name: conv_myl0_2", "Name: co\nnv", 3),
        ],
    )
    def test_a_row_in_another_form_is_refused_and_named(self, old: str, new: str, row: int) -> None:
        with pytest.raises(EngineError) as caught:
            table_from_log(changed(old, new))
        assert f"row {row}: " in str(caught.value)

    def test_a_cut_or_doubled_table_is_refused(self) -> None:
        whole = ROWS[TABLE_AT]
        end = whole.index("\n\nI/O Tensors:\n")
        for size in range(len("Layers:\n"), end, 97):
            with pytest.raises(EngineError, match="cut off"):
                table_from_log([whole[:size]])
        with pytest.raises(EngineError, match="several"):
            table_from_log([whole, whole])

    def test_any_damage_is_an_error_or_a_table(self) -> None:
        generator = random.Random(0)
        whole = ROWS[TABLE_AT]
        for _ in range(300):
            place = generator.randrange(len(whole))
            text = (
                whole[:place] + generator.choice(["", ",", "]", "}", "\n", "\x1f", "[ ", "9" * 30]) + whole[place + 1 :]
            )
            with contextlib.suppress(EngineError):
                table_from_log([text])

    def test_a_memory_message_in_another_form_is_refused(self) -> None:
        with pytest.raises(EngineError, match="memory"):
            table_from_log([*ROWS, "Total Activation Memory: 12 MiB"])


def inspector_10() -> dict[str, Any]:
    """As TensorRT 10 documents and prints it: one text for format and type, the separator as it is."""
    return {
        "Layers": [
            {
                "Name": "Reformatting CopyNode for Input Tensor 0 to conv + relu", "LayerType": "Reformat",
                "Inputs": [{"Name": "x", "Location": "Device", "Dimensions": [1, 4, 8, 8],
                            "Format/Datatype": "Row major linear FP32"}],
                "Outputs": [{"Name": "r", "Location": "Device", "Dimensions": [1, 4, 8, 8],
                             "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
                "ParameterType": "Reformat", "Origin": "REFORMAT", "TacticValue": "0x0", "StreamId": 0, "Metadata": "",
            },
            {
                "Name": "conv + relu", "LayerType": "CaskConvolution",
                "Inputs": [{"Name": "r", "Location": "Device", "Dimensions": [1, 4, 8, 8],
                            "Format/Datatype": "Thirty-two wide channel vectorized row major Int8 format"}],
                "Outputs": [{"Name": "y", "Location": "Device", "Dimensions": [1, 4, 8, 8],
                             "Format/Datatype": "Channel major FP16 format where channel % 8 == 0"}],
                "ParameterType": "Convolution", "Kernel": [3, 3], "Weights": {"Type": "Int8", "Count": 144},
                "TacticName": "sm80_xmma_fprop", "StreamId": 0,
                "Metadata": "[ONNX Layer: conv]\x1e[ONNX Layer: relu]",
            },
        ],
        "Bindings": ["x", "y"],
    }  # fmt: skip


def inspector_11() -> dict[str, Any]:
    """The same as TensorRT 11 documents it: format and type apart, tensors in place of bindings."""
    document = inspector_10()
    for layer in document["Layers"]:
        for tensor in (*layer["Inputs"], *layer["Outputs"]):
            text = tensor.pop("Format/Datatype")
            tensor["Format"] = text
            tensor["Datatype"] = "Float" if "FP32" in text else "Half" if "FP16" in text else "Int8"
    del document["Bindings"]
    document["I/O Tensors"] = [{"Name": "x", "IOMode": "Input", "DataType": "Float", "Dimensions": [1, 4, 8, 8]}]
    return document


class TestInspector:
    def test_both_versions_give_the_same_table(self) -> None:
        tables = [table_from_inspector(json.dumps(form())) for form in (inspector_10, inspector_11)]
        assert tables[0] == tables[1]
        reformat, conv = tables[0].layers
        assert [t.dtype for t in (*reformat.inputs, *reformat.outputs, *conv.outputs)] == ["Float", "Int8", "Half"]
        assert (conv.kind, conv.tactic, conv.nodes) == ("CaskConvolution", "sm80_xmma_fprop", ("conv", "relu"))
        assert tables[0].activation_memory is None

    def test_separators_may_stand_unescaped(self) -> None:
        text = json.dumps(inspector_10()).replace("\\u001e", "\x1e")
        assert table_from_inspector(text) == table_from_inspector(json.dumps(inspector_10()))

    @pytest.mark.parametrize(
        "change",
        [
            lambda d: d.pop("Layers"),
            lambda d: d["Layers"].__setitem__(1, "conv + relu"),
            lambda d: d["Layers"][1].pop("Outputs"),
            lambda d: d["Layers"][1].__setitem__("Name", 3),
            lambda d: d["Layers"][1].__setitem__("Metadata", "conv"),
            lambda d: d["Layers"][1]["Inputs"].__setitem__(0, None),
            lambda d: d["Layers"][1]["Inputs"][0].__setitem__("Dimensions", [1, "b"]),
            lambda d: d["Layers"][1]["Inputs"][0].__setitem__("Format/Datatype", "Row major"),
            lambda d: d["Layers"][1]["Inputs"][0].__setitem__("Format/Datatype", "FP16 or FP32"),
        ],
    )
    def test_another_form_is_refused(self, change: Callable[[dict[str, Any]], object]) -> None:
        document = inspector_10()
        change(document)
        with pytest.raises(EngineError):
            table_from_inspector(json.dumps(document))

    @pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"Layers": {}}', "[" * 100_000])
    def test_what_is_no_such_json_is_refused(self, text: str) -> None:
        with pytest.raises(EngineError):
            table_from_inspector(text)

    def test_names_only_are_told_apart(self) -> None:
        with pytest.raises(EngineError, match="names of its layers only"):
            table_from_inspector('{"Layers": ["conv + relu"], "Bindings": ["x"]}')


class TestFile:
    def test_a_table_comes_back_as_it_was(self) -> None:
        table = recorded()
        assert table_from_facts(facts_from_table(table)) == table
        found = read_layers_file(layers_file(table, OPERATIONS))
        assert (found.table, found.operations) == (table, OPERATIONS)
        assert layers_file(found.table, found.operations) == layers_file(table, OPERATIONS)

    def test_every_wrong_key_and_value_is_refused(self) -> None:
        """Each place in the file in turn: gone, or of another type."""
        small = replace(recorded(), layers=recorded().layers[1:2])
        content = layers_file(small, OPERATIONS)
        refused = 0
        for place in list(_places(json.loads(content))):
            for value in (object, None, True, -2, 2**64, 1.5, "text", "\ud800", [None], {"x": 1}):
                data = json.loads(content)
                if _replaced(data, place, value):
                    try:
                        found = read_layers_file(json.dumps(data).encode())
                    except EngineError:
                        refused += 1
                        continue
                    assert json.loads(layers_file(found.table, found.operations)) == data
        assert refused > 150

    def test_an_unknown_key_is_refused_in_every_object(self) -> None:
        content = layers_file(replace(recorded(), layers=recorded().layers[1:2]), OPERATIONS)
        tensor_at = ("table", "layers", 0, "inputs", 0)
        for place in ((), ("table",), tensor_at[:3], tensor_at):
            data = json.loads(content)
            target = data
            for key in place:
                target = target[key]
            target["more"] = 1
            with pytest.raises(EngineError, match="file of an engine's layers is wrong"):
                read_layers_file(json.dumps(data).encode())

    @pytest.mark.parametrize(
        "content",
        [b"", b"\xff", b"null", b"[]", b"[" * 100_000, b"1" * 5000, b'{"format": 1, "format": 1}',
         b'{"format": 2, "operations": {}, "table": {}}', b'{"format": true, "operations": {}, "table": {}}',
         b'{"format": NaN, "operations": {}, "table": {}}', b" " * (33 << 20)],
        ids=lambda content: f"{content[:20]!r}",
    )  # fmt: skip
    def test_hostile_bytes_are_refused(self, content: bytes) -> None:
        with pytest.raises(EngineError):
            read_layers_file(content)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Any:
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        yield (*path, key)
        yield from _places(item, (*path, key))


def _replaced(data: Any, place: tuple[Any, ...], value: Any) -> bool:
    """Puts `value` there, or takes the place out for `object`; False where it was there already."""
    for key in place[:-1]:
        data = data[key]
    if value is object:
        del data[place[-1]]
        return True
    if data[place[-1]] == value and type(data[place[-1]]) is type(value):
        return False
    data[place[-1]] = value
    return True


def kernel(kind: str, nodes: tuple[str, ...], *inputs: LayerTensor, out: LayerTensor, name: str = "k") -> EngineLayer:
    return EngineLayer(name=name, kind=kind, tactic="", inputs=inputs, outputs=(out,), nodes=nodes)


def tensor(dtype: str, name: str = "t", shape: tuple[int, ...] = (-1, 2, 5)) -> LayerTensor:
    return LayerTensor(name=name, shape=shape, dtype=dtype, format="")


def table_of(*layers: EngineLayer) -> EngineTable:
    return EngineTable(layers=layers, activation_memory=None, weights_memory=None)


class TestCoverage:
    def test_the_kernel_that_multiplies_decides(self) -> None:
        """Of the recorded engine: an INT8 Conv, and a ConvTranspose whose input and output two kernels lay out."""
        found = coverage(recorded(), OPERATIONS)
        assert {p: n for p, n in found.precisions.items() if n} == {
            "int8": OPERATIONS["conv"],
            "fp32": OPERATIONS["up"],
        }
        kinds = {recorded().layers[index].kind: count for index, count in found.layers.items()}
        assert kinds == {"correlation": OPERATIONS["conv"], "deconv": OPERATIONS["up"]}
        assert found.unknown == ()
        assert found.share("int8") == OPERATIONS["conv"] / sum(OPERATIONS.values())

    @pytest.mark.parametrize(
        ("dtype", "precision"), [("Int8", "int8"), ("Half", "fp16"), ("BFloat16", "bf16"), ("Float", "fp32")]
    )
    def test_a_kernel_computes_in_the_type_of_its_activation(self, dtype: str, precision: str) -> None:
        layer = kernel("CaskConvolution", ("a",), tensor(dtype), tensor("Float"), out=tensor("Float"))
        assert coverage(table_of(layer), {"a": 10}).precisions[precision] == 10

    def test_what_no_kernel_tells_is_unknown(self) -> None:
        layers = (
            kernel("kgen", ("pointwise",), tensor("Half"), out=tensor("Half")),
            kernel("correlation", ("two",), tensor("Half"), out=tensor("Half")),
            kernel("correlation", ("two",), tensor("Int8"), out=tensor("Half")),
            kernel("gemm", ("odd",), tensor("Int64"), out=tensor("Int64")),
            kernel("gemm", ("bare",), out=tensor("Half")),
            kernel("runtime_fusion", ("fused",), tensor("Half"), out=tensor("Half")),
        )
        counts = {"pointwise": 1, "two": 2, "odd": 4, "bare": 8, "fused": 16, "nowhere": 32}
        found = coverage(table_of(*layers), counts)
        assert set(found.unknown) == {"pointwise", "two", "odd", "bare", "nowhere"}
        assert found.operations == 63
        assert sum(found.precisions.values()) == found.precisions["fp16"] == 16

    def test_no_operations_have_no_share(self) -> None:
        assert coverage(recorded(), {}).share("int8") == 0.0


class TestWarnings:
    def test_a_quantised_conv_that_writes_float(self) -> None:
        (found, *_) = warnings(recorded(), OPERATIONS)
        assert found.startswith("1 quantised convolution writes Float: 8 kB per patch where Int8 takes 2 kB.")

    def test_one_that_writes_int8_is_well(self) -> None:
        layer = kernel("CaskConvolution", ("a",), tensor("Int8"), out=tensor("Int8"))
        assert warnings(table_of(layer), {"a": 1}) == ()

    def test_a_conv_transpose(self) -> None:
        assert any(
            "1 ConvTranspose was not rewritten as convolution: up." in w for w in warnings(recorded(), OPERATIONS)
        )

    def test_copies_are_weighed(self) -> None:
        big, small = (-1, 100, 100), (-1, 10)
        conv = kernel("correlation", ("a",), tensor("Float", "x", big), out=tensor("Float", "y", big))
        copy = kernel("Reformat", (), tensor("Float", "y", big), out=tensor("Float", "z", big))
        tiny = kernel(
            "kgen", (), tensor("Float", "y", small), out=tensor("Float", "z", small), name="__myl_Tran_myl0_1"
        )
        assert warnings(table_of(conv, copy), {"a": 1}) == (
            "1 layer only copies or reformat: 80 kB per patch, 50% of what all layers read and write.",
        )
        assert warnings(table_of(conv, tiny), {"a": 1}) == ()

    def test_a_kernel_that_computes_is_no_copy(self) -> None:
        for name in ("__myl_TranAdd_myl0_1", "__myl_MulMaxMove_myl0_2", "conv_myl0_3"):
            layer = kernel("kgen", (), tensor("Float", "x"), out=tensor("Float", "y"), name=name)
            assert warnings(table_of(layer), {}) == ()

    def test_a_quantised_layer_in_float(self) -> None:
        weights = kernel("kgen", ("w/DequantizeLinear",), out=tensor("Float", "w"))
        layer = kernel("deconv", ("up",), tensor("Float", "x"), tensor("Float", "w"), out=tensor("Float", "y"))
        plain = kernel("correlation", ("a",), tensor("Float", "x"), out=tensor("Float", "z"))
        found = warnings(table_of(weights, layer, plain), {"up": 1, "a": 1})
        assert any(text.startswith("1 quantised layer runs in floating point") and ": up." in text for text in found)
        assert warnings(table_of(plain), {"a": 1}) == ()


def typed(name: str, precision: str) -> onnx.ModelProto:
    """A network of `precision_samples` as it goes to TensorRT; "raw" with its ConvTransposes, in INT8 and FP16."""
    model = network_model(name)
    form = model if precision == "raw" else tensorrt_form(model)
    if precision in ("int8", "raw"):
        ranges = amax_of(model, patch_of(name))
        form = quantize(form, ranges, keep=keep_ends, zero_point="s8").model
    half = "bf16" if precision == "bf16" else "fp16"
    return form if precision == "fp32" else cast(form, half, keep=()).model


@pytest.fixture(scope="module")
def built() -> Callable[[str, str], tuple[EngineTable, Mapping[str, int], onnx.ModelProto]]:
    """Engines built by TensorRT-RTX, each once: their tables, operations and models."""
    pytest.importorskip("tensorrt_rtx")
    flavour, config = nvinfer("tensorrt-rtx"), TensorRTConfig(max_batch=2)
    done: dict[tuple[str, str], tuple[EngineTable, Mapping[str, int], onnx.ModelProto]] = {}

    def build(name: str, precision: str) -> tuple[EngineTable, Mapping[str, int], onnx.ModelProto]:
        if (name, precision) not in done:
            model = typed(name, precision)
            inputs = [io for io in io_from_model(model) if io.name == model.graph.input[0].name]
            shapes = shapes_from_io(inputs, config)
            plan = plan_from_onnx(model.SerializeToString(), nvinfer=flavour, config=config, shapes=shapes)
            assert plan.table is not None, plan.warnings
            done[name, precision] = plan.table, operations(model), model
        return done[name, precision]

    return build


@pytest.mark.parametrize("name", ["plain3d", "plain2d", "residual3d"])
class TestBuilt:
    """Real engines of TensorRT-RTX."""

    @pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
    def test_all_operations_are_in_the_precision_of_the_network(self, built: Any, name: str, precision: str) -> None:
        table, counts, _ = built(name, precision)
        found = coverage(table, counts)
        assert found.unknown == ()
        assert found.share(precision) == 1.0
        assert not [text for text in warnings(table, counts) if "quantised" in text or "ConvTranspose" in text]

    def test_in_int8_all_but_the_ends_are_int8(self, built: Any, name: str) -> None:
        table, counts, model = built(name, "int8")
        ends = {layer.name for layer in weighted_layers(model) if layer.role != "body"}
        found = coverage(table, counts)
        assert found.unknown == ()
        assert found.precisions["fp16"] == sum(counts[end] for end in ends)
        assert found.precisions["int8"] == sum(counts.values()) - found.precisions["fp16"]
        body = len(counts) - len(ends)
        assert any(text.startswith(f"{body} quantised convolutions write Float") for text in warnings(table, counts))

    def test_conv_transposes_left_alone_are_warned_of(self, built: Any, name: str) -> None:
        table, counts, model = built(name, "raw")
        names = [layer.name for layer in weighted_layers(model) if layer.operator == "ConvTranspose"]
        (text,) = (text for text in warnings(table, counts) if "ConvTranspose" in text)
        assert text.startswith(f"{len(names)} ConvTransposes were not rewritten")
        assert all(node in text for node in names)

    def test_the_file_keeps_all_of_it(self, built: Any, name: str) -> None:
        table, counts, _ = built(name, "int8")
        found = read_layers_file(layers_file(table, counts))
        assert (found.table, found.operations) == (table, counts)
