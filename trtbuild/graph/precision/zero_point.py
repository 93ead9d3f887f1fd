"""The two forms of symmetric INT8 activations: int8 with zero point 0, and uint8 with zero point 128.

q_u8 = q_s8 + 128 is the same grid, so results are the same bit for bit. TensorRT takes only int8 with 0. OpenVINO
(seen in 2025.4.1 and 2026.4.1) computes int8 with 0 wrongly behind a Concat: it moves the quantisation to the Concat's
inputs as uint8 with 128, which is then not subtracted. With uint8 and 128 in the graph it is right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from trtbuild.errors import GraphError
from trtbuild.graph.naming import FreeNames
from trtbuild.graph.precision.flow import activations, finished, is_standard, stored_values
from trtbuild.graph.split_instance_norm import with_parts
from trtbuild.graph.wiring import initializer_names, output_names

if TYPE_CHECKING:
    import onnx

ZeroPoint = Literal["s8", "u8"]
ZEROS: Mapping[ZeroPoint, int] = {"s8": 0, "u8": 128}
FORMS: Mapping[int, ZeroPoint] = {3: "s8", 2: "u8"}  # by onnx.TensorProto.INT8 and UINT8
CARRIERS = ("Concat", "Flatten", "Gather", "Identity", "MaxPool", "Reshape", "Slice", "Split", "Squeeze", "Transpose",
            "Unsqueeze")  # what may stand between Q and DQ: it moves values or compares them  # fmt: skip
WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
FLIP = 0x80  # int8 q and uint8 q + 128 differ in this bit
SYMMETRIC = "Quantise it symmetrically: int8 with zero point 0, or uint8 with 128."


def with_zero_point(model: onnx.ModelProto, form: ZeroPoint) -> onnx.ModelProto:
    """The same model with all its quantised activations in `form`; `model` itself if they are already.

    1. Zero points of the Q and DQ nodes of activations become int8 0 ("s8") or uint8 128 ("u8"); scales stay.
    2. Stored activations (a DQ of an initializer that no layer reads as its weight) get the bytes of the other type.
    3. Weights and biases stay: any integer type, any zero point.

    Raises:
        GraphError: a zero point of an activation is neither 0 of int8 nor 128 of uint8, or not stored; an operator
            that computes with integers, an input or an output of the graph has the quantised tensor.
    """
    graph = _Graph.of(model)
    pairs, constants = _flood(graph, _activation_loaders(model, graph))
    changed = {key: node for key, node in pairs.items() if _form_of(graph, node) != form}
    if not changed:
        return model
    nodes, zeros = _with_zeros(model, graph, changed, form)
    flipped = {name for name in constants if FORMS[graph.stored[name].data_type] != form}
    read = {name for node in nodes for name in node.input} | graph.outputs
    tensors = {tensor.name: tensor for tensor in model.graph.initializer if tensor.name in read}
    tensors |= {name: _flipped(tensors[name], form) for name in flipped} | zeros
    return finished("with_zero_point", model, with_parts(model, nodes, list(tensors.values())))


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """A model, looked up by tensor name; a node is known by its first output."""

    made: Mapping[str, onnx.NodeProto]
    readers: Mapping[str, list[tuple[onnx.NodeProto, int]]]
    stored: Mapping[str, onnx.TensorProto]
    outputs: set[str]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Graph:
        readers: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
        for node in model.graph.node:
            for position, name in enumerate(node.input):
                readers.setdefault(name, []).append((node, position))
        return cls(
            made={name: node for node in model.graph.node for name in node.output if name},
            readers=readers,
            stored=stored_values(model),
            outputs=output_names(model),
        )


def _activation_loaders(model: onnx.ModelProto, graph: _Graph) -> list[onnx.NodeProto]:
    """The DequantizeLinears of activations."""
    moving = set(activations(model))
    loaders = [node for node in model.graph.node if is_standard(node, "DequantizeLinear")]
    return [node for node in loaders if node.input[0] in moving or not _is_weight(graph, node.output[0])]


def _is_weight(graph: _Graph, tensor: str) -> bool:
    """Whether layers read the tensor as weight or bias and nobody else does."""
    readers = graph.readers.get(tensor, [])
    if tensor in graph.outputs or not readers:
        return False
    return all(
        position > 0
        if is_standard(node, *WEIGHTED)
        else is_standard(node, *CARRIERS) and _is_weight(graph, node.output[0])
        for node, position in readers
    )


def _flood(graph: _Graph, loaders: list[onnx.NodeProto]) -> tuple[dict[str, onnx.NodeProto], set[str]]:
    """The Q and DQ nodes that quantised tensors join to `loaders`, and the initializers among these tensors."""
    pairs: dict[str, onnx.NodeProto] = {}
    constants: set[str] = set()
    seen: set[str] = set()
    waiting = [node.input[0] for node in loaders]
    while waiting:
        tensor = waiting.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        maker = graph.made.get(tensor)
        if maker is not None and is_standard(maker, "QuantizeLinear"):
            pairs[maker.output[0]] = maker
        elif maker is not None and is_standard(maker, *CARRIERS):
            waiting += maker.input if maker.op_type == "Concat" else maker.input[:1]
            waiting += maker.output
        elif tensor in graph.stored:
            constants.add(tensor)
        else:
            raise _unmovable(tensor, "the graph's input" if maker is None else f"{maker.op_type} {maker.name}")
        if tensor in graph.outputs:
            raise _unmovable(tensor, "an output of the graph")
        for node, position in graph.readers.get(tensor, []):
            if is_standard(node, "DequantizeLinear") and position == 0:
                pairs[node.output[0]] = node
            elif is_standard(node, *CARRIERS) and (position == 0 or node.op_type == "Concat"):
                waiting += node.output
            else:
                raise _unmovable(tensor, f"{node.op_type} {node.name}")
    return pairs, constants


def _unmovable(tensor: str, other: str) -> GraphError:
    return GraphError("A quantised tensor is used as integers, so its zero point cannot be changed.",
                      expected="QuantizeLinear before it and DequantizeLinear behind it", got=other,
                      where=f"tensor {tensor}", hint="Export the network with Q/DQ nodes only.")  # fmt: skip


def _form_of(graph: _Graph, node: onnx.NodeProto) -> ZeroPoint:
    """The form of a Q or DQ node, whose zero point has to be that of one of the two."""
    from onnx import numpy_helper

    name = node.input[2] if len(node.input) > 2 else ""
    kind, values = _type_without_zero_point(graph, node), [0]
    if name:
        if name not in graph.stored:
            raise GraphError("A zero point is not stored in the model.", expected="an initializer", got="a computed "
                             "or fed tensor", where=f"{node.op_type} {node.name}, tensor {name}",
                             hint="Clean the model first (trtbuild clean).")  # fmt: skip
        kind = graph.stored[name].data_type
        values = numpy_helper.to_array(graph.stored[name]).ravel().tolist()
    form = FORMS.get(kind)
    if form is None or set(values) != {ZEROS[form]}:
        raise GraphError("An activation is not quantised symmetrically to 8 bits.",
                         expected="int8 with zero point 0, or uint8 with 128", got=_shown(kind, values),
                         where=f"{node.op_type} {node.name}, tensor {node.input[0]}", hint=SYMMETRIC)  # fmt: skip
    return form


def _type_without_zero_point(graph: _Graph, node: onnx.NodeProto) -> int:
    """The element type on the integer side of a node with no zero point, which is 0 then.

    A QuantizeLinear gives uint8 unless `output_dtype` says otherwise (opset 21 on); a DequantizeLinear reads what it is
    given, which is what the QuantizeLinear or initializer before it has.
    """
    if node.op_type == "QuantizeLinear":
        return next((int(entry.i) for entry in node.attribute if entry.name == "output_dtype" and entry.i), 2)
    if node.input[0] in graph.stored:
        return int(graph.stored[node.input[0]].data_type)
    maker = graph.made[node.input[0]]
    if maker.op_type == "QuantizeLinear" and len(maker.input) > 2 and maker.input[2] in graph.stored:
        return int(graph.stored[maker.input[2]].data_type)
    return _type_without_zero_point(graph, maker)


def _shown(kind: int, values: list[int]) -> str:
    import onnx

    return f"{onnx.TensorProto.DataType.Name(kind).lower()} with zero point {', '.join(map(str, sorted(set(values))))}"


def _with_zeros(
    model: onnx.ModelProto, graph: _Graph, changed: Mapping[str, onnx.NodeProto], form: ZeroPoint
) -> tuple[list[onnx.NodeProto], dict[str, onnx.TensorProto]]:
    """All nodes, those of `changed` with zero points of `form`, and these; an old name stays if only these read it."""
    import numpy as np
    from onnx import numpy_helper

    taken = {name for node in model.graph.node for name in (node.name, *node.input, *node.output)}
    names = FreeNames(taken | initializer_names(model))
    new: dict[str, str] = {}
    zeros: dict[str, onnx.TensorProto] = {}
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.output[0] not in changed:
            nodes.append(node)
            continue
        old = node.input[2] if len(node.input) > 2 else ""
        key = old or f"{node.input[1]}/zero_point"
        if key not in new:
            alone = old and all(reader.output[0] in changed for reader, _ in graph.readers[old])
            new[key] = old if alone else names.free(key)
            shape = tuple(graph.stored[old].dims) if old else _shape_of_scale(graph, node)
            values = np.full(shape, ZEROS[form], np.int8 if form == "s8" else np.uint8)
            zeros[new[key]] = numpy_helper.from_array(values, new[key])
        copy = type(node)()
        copy.CopyFrom(node)
        copy.input[:] = [*node.input[:2], new[key]]
        kept = [entry for entry in copy.attribute if entry.name != "output_dtype"]
        copy.ClearField("attribute")
        copy.attribute.extend(kept)
        nodes.append(copy)
    return nodes, zeros


def _shape_of_scale(graph: _Graph, node: onnx.NodeProto) -> tuple[int, ...]:
    if node.input[1] not in graph.stored:
        raise GraphError("A scale is not stored in the model.", expected="an initializer", got="a computed tensor",
                         where=f"{node.op_type} {node.name}, tensor {node.input[1]}",
                         hint="Clean the model first (trtbuild clean).")  # fmt: skip
    return tuple(graph.stored[node.input[1]].dims)


def _flipped(tensor: onnx.TensorProto, form: ZeroPoint) -> onnx.TensorProto:
    """The same levels as the other type."""
    import numpy as np
    from onnx import numpy_helper

    values = numpy_helper.to_array(tensor)
    bits = values.view(np.uint8) ^ np.uint8(FLIP)
    return numpy_helper.from_array(bits.view(np.int8 if form == "s8" else np.uint8), tensor.name)
