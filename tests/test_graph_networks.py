"""trtbuild.graph on nnU-Net's networks, written by both exporters of torch."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet, ResidualEncoderUNet
from graph_samples import assert_same_results, floats, operators, run

from trtbuild.graph import clean, io_from_model, op_counts, table_from_clean


def settings(dimensions: int, features: list[int]) -> dict[str, Any]:
    """nnU-Net's default block settings (`nnUNetPlans` of nnunetv2 2.8), few features."""
    stages = len(features)
    return {
        "input_channels": 1,
        "n_stages": stages,
        "features_per_stage": features,
        "conv_op": getattr(torch.nn, f"Conv{dimensions}d"),
        "kernel_sizes": [[3] * dimensions] * stages,
        "strides": [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
        "num_classes": 3,
        "conv_bias": True,
        "norm_op": getattr(torch.nn, f"InstanceNorm{dimensions}d"),
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": torch.nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
        "deep_supervision": False,
    }


def plain(dimensions: int, features: list[int], strides: list[list[int]] | None = None) -> torch.nn.Module:
    stages = len(features)
    changes = {"n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
    if strides:
        changes["strides"] = strides
    return PlainConvUNet(**{**settings(dimensions, features), **changes})


def residual(dimensions: int, features: list[int]) -> torch.nn.Module:
    stages = len(features)
    blocks = {"n_blocks_per_stage": [1, 3, 2, 2][:stages], "n_conv_per_stage_decoder": [1] * (stages - 1)}
    return ResidualEncoderUNet(**settings(dimensions, features), **blocks)


NETWORKS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    # the topology of nnU-Net's default 3d_fullres: 6 stages, 2 convs each, all strides 2
    "3d_fullres": (lambda: plain(3, [4, 4, 8, 8, 8, 8]), (64, 64, 64)),
    "anisotropic": (lambda: plain(3, [4, 4, 8], [[1, 1, 1], [1, 2, 2], [2, 2, 2]]), (4, 16, 16)),
    "2d": (lambda: plain(2, [4, 8, 8, 8]), (32, 48)),
    "residual": (lambda: residual(3, [4, 4, 8, 8]), (16, 16, 24)),
}


@cache
def network(name: str) -> torch.nn.Module:
    """The network with seeded weights; norms as if trained (no two alike), but for the untrained `3d_fullres`."""
    torch.manual_seed(0)
    net = NETWORKS[name][0]().eval()
    if name != "3d_fullres":
        with torch.no_grad():
            for parameter in net.parameters():
                if parameter.ndim == 1:
                    parameter.copy_(1 + 0.1 * torch.randn_like(parameter))
    return net


@cache
def exported(name: str, dynamo: bool) -> bytes:
    """The ONNX bytes at opset 20 with a free batch dimension."""
    patch = NETWORKS[name][1]
    buffer = io.BytesIO()
    if dynamo:
        shapes = {"dynamic_shapes": ({0: torch.export.Dim("b", min=1, max=8)},), "external_data": False}
    else:
        shapes = {"dynamic_axes": {"x": {0: "b"}, "y": {0: "b"}}}
    with warnings.catch_warnings(), open(os.devnull, "w") as silent, contextlib.redirect_stdout(silent):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network(name), (torch.zeros(2, 1, *patch),), buffer, dynamo=dynamo, opset_version=20, input_names=["x"],
            output_names=["y"], **shapes,
        )  # fmt: skip
    return buffer.getvalue()


def model_of(name: str, dynamo: bool) -> onnx.ModelProto:
    return onnx.ModelProto.FromString(exported(name, dynamo))


DEFAULT = {"Concat": 5, "Conv": 23, "ConvTranspose": 5, "InstanceNormalization": 22, "LeakyRelu": 22}
REWRITTEN = {
    "Concat": 5,
    "Conv": 28,
    "InstanceNormalization": 22,
    "LeakyRelu": 22,
    "Reshape": 10,
    "Transpose": 5,
}
# 4 norms of 64^3 voxels down to 4^3 each and 2 of 2^3; 2 means each, by steps of 8 until 8 voxels are left
POOLS = 2 * 4 * (5 + 4 + 3 + 2 + 1)
SPLIT = {
    "Add": 2 * 22,
    "AveragePool": POOLS,
    "Concat": 5,
    "Conv": 23,
    "ConvTranspose": 5,
    "Div": 22,
    "GlobalAveragePool": 2 * 22,
    "LeakyRelu": 22,
    "Mul": 2 * 22,
    "Pow": 22,
    "Sqrt": 22,
    "Sub": 2 * 22,
}


@pytest.mark.parametrize(("dynamo", "identities"), [(False, 40), (True, 0)])
def test_node_counts_of_the_default_network_before_and_after(dynamo: bool, identities: int) -> None:
    """dynamo=False writes an Identity for each norm parameter that equals another one: 2 x 22 norms, 2 x 2 distinct."""
    model = model_of("3d_fullres", dynamo)
    assert op_counts(model) == dict(sorted(({"Identity": identities} if identities else {}).items() | DEFAULT.items()))
    after = clean(model, rewrite_conv_transpose=False, split_instance_norm=False)
    assert op_counts(after.model) == DEFAULT
    assert (len(model.graph.initializer), len(after.model.graph.initializer)) == (60, 60)
    rewritten = clean(model, rewrite_conv_transpose=True, split_instance_norm=False)
    assert op_counts(rewritten.model) == REWRITTEN
    assert sum(REWRITTEN.values()) == sum(DEFAULT.values()) + 3 * 5
    # the targets of the two Reshapes per ConvTranspose are new
    assert len(rewritten.model.graph.initializer) == 70
    split = clean(model, rewrite_conv_transpose=False, split_instance_norm=True)
    assert op_counts(split.model) == SPLIT
    # epsilon and the exponent are new
    assert len(split.model.graph.initializer) == 62
    rows = {row.what: (row.before, row.after) for row in table_from_clean(model, after)}
    assert rows["nodes"] == (77 + identities, 77)
    assert rows["bytes"][1] < rows["bytes"][0]


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
class TestBothExporters:
    def test_cleaning_keeps_every_bit_of_the_logits(self, name: str, dynamo: bool) -> None:
        model = model_of(name, dynamo)
        x = floats(2, 1, *NETWORKS[name][1], seed=3)
        for rewrite in (False, True):
            assert_same_results(model, clean(model, rewrite_conv_transpose=rewrite, split_instance_norm=False).model, x)

    def test_cleaning_again_changes_nothing(self, name: str, dynamo: bool) -> None:
        for rewrite in (False, True):
            once = clean(model_of(name, dynamo), rewrite_conv_transpose=rewrite, split_instance_norm=False).model
            twice = clean(once, rewrite_conv_transpose=rewrite, split_instance_norm=False)
            assert not any(report.modified for report in twice.reports)
            assert twice.model.SerializeToString() == once.SerializeToString()

    def test_cleaning_a_split_graph_again_joins_and_splits_to_the_same_bytes(self, name: str, dynamo: bool) -> None:
        once = clean(model_of(name, dynamo), rewrite_conv_transpose=False, split_instance_norm=True).model
        twice = clean(once, rewrite_conv_transpose=False, split_instance_norm=True)
        modified = [report.name for report in twice.reports if report.modified]
        assert modified == ["join_instance_norm", "split_instance_norm", "infer_shapes"]
        assert twice.model.SerializeToString() == once.SerializeToString()

    def test_every_tensor_has_a_shape_and_only_the_batch_is_free(self, name: str, dynamo: bool) -> None:
        patch = NETWORKS[name][1]
        for rewrite, split in ((False, False), (True, False), (False, True), (True, True)):
            model = clean(model_of(name, dynamo), rewrite_conv_transpose=rewrite, split_instance_norm=split).model
            specs = [(spec.name, spec.shape) for spec in io_from_model(model)]
            assert specs == [("image", ("batch", 1, *patch)), ("logits", ("batch", 3, *patch))]
            dims = {value.name: value.type.tensor_type.shape.dim for value in model.graph.value_info}
            assert {output for node in model.graph.node for output in node.output} - set(dims) == {"logits"}
            for shape in dims.values():
                assert shape[0].dim_param == "batch"
                assert all(dimension.dim_value > 0 for dimension in shape[1:])

    def test_no_path_of_the_exporting_machine_is_left(self, name: str, dynamo: bool) -> None:
        model = clean(model_of(name, dynamo), rewrite_conv_transpose=False, split_instance_norm=True).model
        content = model.SerializeToString()
        assert b"site-packages" not in content
        assert b".py" not in content


@pytest.mark.parametrize("rewrite", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_both_exporters_give_the_same_names_and_weights(name: str, rewrite: bool) -> None:
    one, two = (
        clean(model_of(name, dynamo), rewrite_conv_transpose=rewrite, split_instance_norm=False).model.graph
        for dynamo in (False, True)
    )
    assert [(n.name, n.op_type, *n.input, *n.output) for n in one.node] == [
        (n.name, n.op_type, *n.input, *n.output) for n in two.node
    ]
    assert list(one.value_info) == list(two.value_info)
    assert [(w.name, list(w.dims), w.raw_data) for w in one.initializer] == [
        (w.name, list(w.dims), w.raw_data) for w in two.initializer
    ]


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "3d_fullres"])
def test_initializers_are_called_like_the_networks_own_parameters(name: str) -> None:
    """`named_parameters` names a parameter with several paths by the first; the unused heads are deep supervision's."""
    model = clean(model_of(name, True), rewrite_conv_transpose=False, split_instance_norm=False).model
    parameters = {key for key, _ in network(name).named_parameters()}
    heads = sorted({key.split(".")[2] for key in parameters if key.startswith("decoder.seg_layers.")})
    unused = {key for key in parameters if key.startswith("decoder.seg_layers.") and key.split(".")[2] != heads[-1]}
    assert {tensor.name for tensor in model.graph.initializer} == parameters - unused


def test_the_order_of_residual_branches_is_that_of_the_network() -> None:
    model = clean(model_of("residual", False), rewrite_conv_transpose=False, split_instance_norm=False).model
    adds = [node for node in model.graph.node if node.op_type == "Add"]
    assert operators(model).count("AveragePool") == 3
    assert adds[0].name == "encoder.stages.0.blocks.0.conv2.conv/Add"
    assert all(node.input[0].startswith(node.name.removesuffix("/Add")) for node in adds)


def test_the_rewrite_of_a_2d_network_differs_by_rounding_at_most_under_full_optimisation() -> None:
    """ONNX Runtime then computes 2-D Convs in blocked channels: another order of summation of 8 float32 terms."""
    model = model_of("2d", True)
    x = floats(2, 1, 32, 48, seed=4)
    (kept,), (rewritten,) = (
        run(clean(model, rewrite_conv_transpose=flag, split_instance_norm=False).model, x, plain=False)
        for flag in (False, True)
    )
    np.testing.assert_allclose(rewritten, kept, rtol=0, atol=1e-5 * float(np.abs(kept).max()))
