"""The rules behind `stable_names`: what the parts of a graph are called, by structure and paths of parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtbuild.graph.wiring import STANDARD

if TYPE_CHECKING:
    import onnx

PATH = re.compile(r"\w+(\.\w+)+")  # the path of a parameter; exporters' own names hold no dot, or a slash or a colon
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")  # operators that give their part of the network its name
ROLES = {  # dynamic_network_architectures' ConvDropoutNormReLU holds conv and norm, and both again in all_modules
    "Conv": "conv",
    "ConvTranspose": "conv",
    "InstanceNormalization": "norm",
    "BatchNormalization": "norm",
    "GroupNormalization": "norm",
    "LayerNormalization": "norm",
}


def parameter_path(name: str, operator: str) -> str:
    """The first of the paths by which nnU-Net's networks reach the parameter `name` of `operator`; "" if it is no path.

    UNet's decoder holds the encoder as well, so `decoder.encoder.` is `encoder.`; the blocks hold their conv and norm
    a second time as `all_modules.0`, `all_modules.1`, ….
    """
    if not PATH.fullmatch(name):
        return ""
    if name.startswith("decoder.encoder."):
        name = name.removeprefix("decoder.")
    return re.sub(r"\ball_modules\.\d+\b", ROLES[operator], name) if operator in ROLES else name


class FreeNames:
    """Gives out each name once; a name that is taken gets `_1`, `_2`, …."""

    def __init__(self, taken: set[str]) -> None:
        self._taken = set(taken)

    def free(self, wanted: str) -> str:
        """`wanted`, or the first numbered form of it that is not taken."""
        name, count = wanted, 0
        while name in self._taken:
            count += 1
            name = f"{wanted}_{count}"
        self._taken.add(name)
        return name


@dataclass(frozen=True, kw_only=True)
class NewNames:
    """New names: of the nodes in order, and of the tensors by their old name."""

    nodes: tuple[str, ...]
    tensors: Mapping[str, str]


def names_from_structure(
    order: Sequence[onnx.NodeProto],
    stored: Mapping[str, onnx.TensorProto],
    interface: Mapping[str, str],
    opset: int,
) -> NewNames:
    """Names for the nodes `order` (each after those that it reads) and their tensors.

    A Conv, ConvTranspose, Gemm or MatMul is called like its parameter's module, `encoder.stages.0.0.convs.0.conv`. Any
    other node is called by the module that it follows and its operator, `encoder.stages.0.0.convs.0.conv/LeakyRelu`.
    The outputs of a node are `<node>_output_0`, …. A parameter keeps its path; without one, or as a vector that several
    nodes read, it is `<first reader>/<name of the operator's input>`. `interface` names the inputs and outputs.
    """
    readers = _readers(order, stored)
    paths = {name: parameter_path(name, order[indices[0]].op_type) for name, indices in readers.items()}
    owners = dict(interface) | {name: path.rpartition(".")[0] for name, path in paths.items()}
    constant = set(stored)
    node_names, tensor_names = FreeNames(set()), FreeNames(set(interface.values()))
    nodes, tensors = [], dict(interface)
    for node in order:
        base, owner = _base_name(node, owners, constant)
        name = node_names.free(base)
        nodes.append(name)
        if all(tensor in constant for tensor in node.input if tensor):
            constant.update(node.output)
        for position, tensor in enumerate(node.output):
            owners.setdefault(tensor, owner)
            if tensor and tensor not in tensors:
                tensors[tensor] = tensor_names.free(f"{name}_output_{position}")
    for tensor, indices in readers.items():
        if tensor not in tensors:
            own = paths[tensor] if len(indices) == 1 or len(stored[tensor].dims) > 1 else ""
            first = indices[0]
            tensors[tensor] = tensor_names.free(own or f"{nodes[first]}/{_formal_name(order[first], tensor, opset)}")
    return NewNames(nodes=tuple(nodes), tensors=tensors)


def _readers(order: Sequence[onnx.NodeProto], stored: Mapping[str, onnx.TensorProto]) -> dict[str, list[int]]:
    """For each stored tensor, the nodes that read it; in the order of first use."""
    readers: dict[str, list[int]] = {}
    for index, node in enumerate(order):
        for tensor in dict.fromkeys(node.input):
            if tensor in stored:
                readers.setdefault(tensor, []).append(index)
    return readers


def _base_name(node: onnx.NodeProto, owners: Mapping[str, str], constant: set[str]) -> tuple[str, str]:
    """The name that the node should have, and the module that it belongs to."""
    if node.op_type in WEIGHTED and len(node.input) > 1 and node.input[1] in constant:
        own = owners.get(node.input[1], "")
        if own:
            return own, own
    moving = [tensor for tensor in node.input if tensor not in constant]
    still = [tensor for tensor in node.input if tensor in constant]
    owner = next((owners[tensor] for tensor in (*moving, *still) if owners.get(tensor)), "")
    return (f"{owner}/{node.op_type}" if owner else node.op_type), owner


def _formal_name(node: onnx.NodeProto, tensor: str, opset: int) -> str:
    import onnx

    position = list(node.input).index(tensor)
    if node.domain not in STANDARD:
        return f"input_{position}"
    formal = onnx.defs.get_schema(node.op_type, opset, "").inputs
    name: str = formal[min(position, len(formal) - 1)].name
    return name
