"""The one file that knows onnx-graphsurgeon (`gs`).

What has to be known of it, 0.5 and 0.6: it shares the weights with the model it imports and renames them in place when
it exports; it loses metadata, node docs and initializers that nobody reads; it reads BF16 weights as float32 with
older onnx as soon as their values are touched; its `cleanup` shifts outputs when it drops one in the middle. So
weights stay `TensorProto` here, and a model comes back with everything outside its graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from trtbuild.graph.wiring import initializer_names, model_like, output_names

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray


def graph_from_model(model: onnx.ModelProto) -> Any:
    """A `gs.Graph` that shares the weights of `model`."""
    import onnx_graphsurgeon as gs

    with quiet():
        return gs.import_onnx(model)


def model_from_graph(graph: Any, model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with `graph` in place of its own graph. `graph` may not have renamed the weights of `model`."""
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

    result = model_like(model)
    with quiet():
        result.graph.CopyFrom(OnnxExporter.export_graph(graph))
    return result


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of graphsurgeon on the terminal: it prints one for every BF16 model."""
    from onnx_graphsurgeon.logger import G_LOGGER

    severity = G_LOGGER.severity
    G_LOGGER.severity = G_LOGGER.CRITICAL
    try:
        yield
    finally:
        G_LOGGER.severity = severity


def is_constant(tensor: Any) -> bool:
    """Whether the tensor is an initializer."""
    import onnx_graphsurgeon as gs

    return isinstance(tensor, gs.Constant)


def proto_from_constant(tensor: Any) -> onnx.TensorProto:
    """The stored weights of an initializer of an imported graph."""
    proto: onnx.TensorProto = tensor._values.tensor
    return proto


def constant(proto: onnx.TensorProto) -> Any:
    """An initializer with the name, type and bytes of `proto`."""
    import onnx_graphsurgeon as gs
    from onnx_graphsurgeon.ir.tensor import LazyValues

    return gs.Constant(proto.name, LazyValues(proto))


def make_constant(tensor: Any, proto: onnx.TensorProto) -> None:
    """Turn the tensor that a node computes into an initializer; the node loses this output."""
    from onnx_graphsurgeon.ir.tensor import LazyValues

    copy = type(proto)()
    copy.CopyFrom(proto)
    copy.name = tensor.name
    tensor.inputs.clear()
    tensor.to_constant(LazyValues(copy))


def int64_constant(name: str, values: list[int]) -> Any:
    """A one-dimensional int64 initializer."""
    import onnx

    return constant(onnx.helper.make_tensor(name, onnx.TensorProto.INT64, [len(values)], values))


def variable(name: str, dtype: Any, shape: list[Any] | None) -> Any:
    """A tensor that a node computes; `dtype` as graphsurgeon has it, a free dimension is a name or None."""
    import onnx_graphsurgeon as gs

    return gs.Variable(name, dtype=dtype, shape=shape)


def node(operator: str, name: str, inputs: list[Any], outputs: list[Any], **attributes: Any) -> Any:
    """A node of the standard operators."""
    import onnx_graphsurgeon as gs

    return gs.Node(op=operator, name=name, inputs=inputs, outputs=outputs, attrs=attributes)


def is_output(graph: Any, tensor: Any) -> bool:
    """Whether the tensor is an output of the graph (graphsurgeon compares tensors by name, this does not)."""
    return any(tensor is output for output in graph.outputs)


def detach(graph: Any, nodes: list[Any]) -> None:
    """Remove these very nodes (graphsurgeon's own `remove` takes the first that looks alike)."""
    gone = {id(entry) for entry in nodes}
    for entry in nodes:
        entry.inputs.clear()
        entry.outputs.clear()
    graph.nodes = [entry for entry in graph.nodes if id(entry) not in gone]


def redirect(old: Any, new: Any) -> None:
    """Let every reader of tensor `old` read `new`."""
    for reader in list(old.outputs):
        for position, tensor in enumerate(reader.inputs):
            if tensor is old:
                reader.inputs[position] = new


def no_unread_initializers(model: onnx.ModelProto) -> tuple[str, ...]:
    """The requirement of every pass that goes through graphsurgeon, which would lose such initializers unasked."""
    read = {name for entry in model.graph.node for name in entry.input} | output_names(model)
    return tuple(f"nobody reads the initializer {name}" for name in sorted(initializer_names(model) - read))


def bits_from_proto(proto: onnx.TensorProto) -> NDArray[np.unsignedinteger[Any]]:
    """The stored values as unsigned integers of the same width, in the tensor's shape: exact for every float type."""
    import numpy as np
    import onnx

    width = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.BFLOAT16: 2,
             onnx.TensorProto.DOUBLE: 8}[proto.data_type]  # fmt: skip
    if proto.HasField("raw_data"):
        flat = np.frombuffer(proto.raw_data, dtype=f"<u{width}")
    elif proto.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16):
        flat = np.array(proto.int32_data, dtype=np.uint16)  # ONNX keeps the bits of both in int32_data
    else:
        flat = onnx.numpy_helper.to_array(proto).reshape(-1).view(f"<u{width}")
    bits: NDArray[np.unsignedinteger[Any]] = flat.reshape(tuple(proto.dims))
    return bits


def constant_from_bits(name: str, data_type: int, bits: NDArray[np.unsignedinteger[Any]]) -> Any:
    """An initializer from the bits of its values."""
    import onnx

    return constant(onnx.TensorProto(name=name, data_type=data_type, dims=bits.shape, raw_data=bits.tobytes()))
