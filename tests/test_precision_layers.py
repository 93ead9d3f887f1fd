"""Which layers a network has, what they read and where they stand."""

from __future__ import annotations

import onnx
import pytest
from graph_samples import floats, model_of, node
from precision_samples import PATCHES, network_model

from trtbuild.graph.precision import keep_ends, targets, tensorrt_form, weighted_layers

PATCH = {"x": ["n", 2, 8, 8]}


def conv(source: str, result: str, name: str, weight: str = "w") -> onnx.NodeProto:
    return node("Conv", f"{source} {weight}", result, name, kernel_shape=[1, 1])


def roles(model: onnx.ModelProto) -> dict[str, str]:
    return {layer.name: layer.role for layer in weighted_layers(model)}


def test_a_plain_unet_has_its_layers_in_order_with_concats_seen_through() -> None:
    layers = weighted_layers(network_model("plain3d"))
    assert [(layer.name, layer.operator, layer.role) for layer in layers] == [
        ("encoder.stages.0.0.convs.0.conv", "Conv", "stem"),
        ("encoder.stages.1.0.convs.0.conv", "Conv", "body"),
        ("encoder.stages.1.0.convs.1.conv", "Conv", "body"),
        ("encoder.stages.2.0.convs.0.conv", "Conv", "body"),
        ("decoder.transpconvs.0", "ConvTranspose", "body"),
        ("decoder.stages.0.convs.0.conv", "Conv", "body"),
        ("decoder.transpconvs.1", "ConvTranspose", "body"),
        ("decoder.stages.1.convs.0.conv", "Conv", "body"),
        ("decoder.seg_layers.1", "Conv", "head"),
    ]
    behind = {layer.name: layer for layer in layers}["decoder.stages.1.convs.0.conv"]
    assert behind.activation == "decoder.transpconvs.1/Concat_output_0"
    assert behind.sources == ("decoder.transpconvs.1_output_0", "encoder.stages.0.0.convs.0.conv/LeakyRelu_output_0")
    assert layers[0].sources == ("image",)


def test_skip_projections_of_a_residual_encoder_are_layers_of_their_own() -> None:
    layers = weighted_layers(network_model("residual3d"))
    projections = [layer for layer in layers if "skip" in layer.name]
    assert [layer.operator for layer in projections] == ["Conv"]  # the third stage has as many channels as the second
    assert all(layer.activation.endswith("AveragePool_output_0") for layer in projections)
    assert [layer.name for layer in layers if layer.role == "stem"] == ["encoder.stem.convs.0.conv"]
    assert [layer.name for layer in layers if layer.role == "head"] == ["decoder.seg_layers.1"]


@pytest.mark.parametrize("name", PATCHES)
def test_norms_joined_or_written_out_make_no_difference(name: str) -> None:
    joined, split = (network_model(name, split=flag) for flag in (False, True))
    assert weighted_layers(joined) == weighted_layers(split)
    assert targets(joined) == targets(split)


@pytest.mark.parametrize("name", PATCHES)
def test_every_conv_of_the_form_for_tensorrt_reads_a_target_of_the_bundles_network(name: str) -> None:
    model = network_model(name, split=True)
    before = model.SerializeToString(deterministic=True)
    rewritten = tensorrt_form(model)
    assert model.SerializeToString(deterministic=True) == before
    layers = weighted_layers(rewritten)
    assert {layer.operator for layer in layers} == {"Conv"}
    assert [(layer.name, layer.activation, layer.sources) for layer in layers] == [
        (layer.name, layer.activation, layer.sources) for layer in weighted_layers(model)
    ]
    assert targets(rewritten) == targets(model)
    assert not {"AveragePool", "Pow"} & {n.op_type for n in rewritten.graph.node} or name.startswith("residual")


def test_every_layer_that_the_input_reaches_is_a_stem_and_every_one_before_an_output_a_head() -> None:
    """Two stems behind a pool and a pad, a body, and two heads, one before a Softmax (deep supervision)."""
    model = model_of(
        [
            node("MaxPool", "x", "pooled", "pool", kernel_shape=[1, 1]),
            conv("pooled", "a", "stem one"),
            conv("x", "b", "stem two"),
            node("Add", "a b", "c", "add"),
            conv("c", "d", "body"),
            conv("d", "e", "head one"),
            node("Softmax", "e", "y", "softmax", axis=1),
            node("Relu", "d", "f", "relu"),
            conv("f", "z", "head two"),
        ],
        PATCH,
        {"y": ["n", 2, 8, 8], "z": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1)},
    )
    assert roles(model) == {
        "stem one": "stem", "stem two": "stem", "body": "body", "head one": "head", "head two": "head",
    }  # fmt: skip
    assert [layer.name for layer in weighted_layers(model) if not keep_ends(layer)] == ["body"]


def test_a_lone_layer_is_a_stem_and_no_layer_is_no_target() -> None:
    alone = model_of([conv("x", "y", "only")], PATCH, {"y": ["n", 2, 8, 8]}, {"w": floats(2, 2, 1, 1)})
    assert roles(alone) == {"only": "stem"}
    none = model_of([node("Relu", "x", "y", "relu")], PATCH, {"y": ["n", 2, 8, 8]})
    assert weighted_layers(none) == ()
    assert targets(none) == ()


def test_shapes_are_no_way_from_the_input_to_a_layer() -> None:
    """The second Conv reads values of the first one only; the Reshape's target comes from the input's shape."""
    model = model_of(
        [
            conv("x", "a", "stem"),
            node("Shape", "x", "s", "shape"),
            node("Reshape", "a s", "b", "reshape"),
            conv("b", "y", "behind"),
        ],
        PATCH,
        {"y": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1)},
    )
    assert roles(model) == {"stem": "stem", "behind": "head"}


def test_concats_of_concats_are_followed_and_each_source_is_named_once() -> None:
    model = model_of(
        [
            conv("x", "a", "first"),
            conv("x", "b", "second"),
            node("Concat", "a b", "ab", "inner", axis=1),
            node("Concat", "ab a", "aba", "outer", axis=1),
            conv("aba", "y", "wide", "w6"),
        ],
        PATCH,
        {"y": ["n", 2, 8, 8]},
        {"w": floats(2, 2, 1, 1), "w6": floats(2, 6, 1, 1)},
    )
    assert targets(model) == (("x", ("x",)), ("aba", ("a", "b")))


def test_a_concat_with_a_stored_tensor_is_observed_itself() -> None:
    model = model_of(
        [node("Concat", "x stored", "both", "concat", axis=1), conv("both", "y", "layer")],
        {"x": [1, 2, 8, 8]},
        {"y": [1, 2, 8, 8]},
        {"w": floats(2, 3, 1, 1), "stored": floats(1, 1, 8, 8)},
    )
    assert targets(model) == (("both", ("both",)),)


def test_layers_without_a_name_are_called_by_operator_and_output() -> None:
    model = model_of([conv("x", "y", "")], PATCH, {"y": ["n", 2, 8, 8]}, {"w": floats(2, 2, 1, 1)})
    assert [layer.name for layer in weighted_layers(model)] == ["Conv(y)"]
