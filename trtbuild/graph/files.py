"""ONNX files: read, checked and written, with every way in which one can be wrong as a GraphError."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.atomic import write_whole
from trtbuild.errors import GraphError, MissingExtra
from trtbuild.graph.wiring import opset_of

if TYPE_CHECKING:
    import onnx

REEXPORT = "Export the network again (trtbuild export), and copy the file whole."
MERGE = "Load it with onnx.load and save it with onnx.save, which writes one file."
INLINE = "Export with fixed control flow, and run onnx.inliner.inline_local_functions if the model has functions."


def load_onnx(path: Path) -> onnx.ModelProto:
    """The checked model of an ONNX file.

    Raises:
        GraphError: the file cannot be read, is no ONNX model, is truncated, or `check_model` refuses it.
        MissingExtra: onnx or onnx-graphsurgeon is not installed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise GraphError("The ONNX file cannot be read.", got=error.strerror or error, where=path) from error
    return model_from_bytes(content, where=path)


def model_from_bytes(content: bytes, *, where: object = "the given bytes") -> onnx.ModelProto:
    """The checked model that an ONNX file holds; errors as `load_onnx`, with `where` as the place."""
    _require_onnx()
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.ModelProto.FromString(content)
    except DecodeError as error:
        raise GraphError("This is no ONNX model, or it was cut off.", expected="an ONNX protobuf", got=error,
                         where=where, hint=REEXPORT) from error  # fmt: skip
    check_model(model, where=where)
    return model


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write `model` to `path`, whole or not at all; equal models give equal bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    write_whole(path, model.SerializeToString(deterministic=True))


def check_model(model: onnx.ModelProto, *, where: object = "the given model") -> None:
    """Refuse a model that is malformed, or that holds parts which the passes cannot carry over.

    Args:
        model: any ONNX model.
        where: what the error names as the place, a path for instance.

    Raises:
        GraphError: no ONNX model, weights in other files, control flow, functions, sparse weights, training parts,
            a tensor whose bytes do not fit its shape, or anything that onnx.checker refuses.
        MissingExtra: onnx is not installed.
    """
    _require_onnx()
    import onnx

    if not isinstance(model, onnx.ModelProto) or not model.ir_version or not model.graph.node:
        raise GraphError("This is no ONNX model.", expected="a model with an IR version and at least one node",
                         got=type(model).__name__, where=where, hint=REEXPORT)  # fmt: skip
    if opset_of(model) > onnx.defs.onnx_opset_version():
        raise GraphError("The model uses newer operators than the installed onnx knows.", got=opset_of(model),
                         expected=f"opset {onnx.defs.onnx_opset_version()} or below", where=where,
                         hint=REEXPORT)  # fmt: skip
    for tensor in model.graph.initializer:
        _check_tensor(tensor, where)
    _check_parts(model, where)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError, ValueError) as error:
        raise GraphError("The ONNX model is malformed.", expected="a model that onnx.checker accepts", got=error,
                         where=where, hint=REEXPORT) from error  # fmt: skip


def _require_onnx() -> None:
    for package in ("onnx", "onnx_graphsurgeon"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtra(package, "graph", "read and clean ONNX graphs") from error


def _check_tensor(tensor: onnx.TensorProto, where: object) -> None:
    """onnx.checker lets unknown types and surplus bytes pass, and before 1.17 missing bytes too."""
    import onnx

    place = f"{where}, tensor {tensor.name}"
    if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
        raise GraphError("The weights are in another file.", expected="an ONNX model with its weights inside",
                         got=[entry.value for entry in tensor.external_data], where=place, hint=MERGE)  # fmt: skip
    if tensor.data_type not in onnx.TensorProto.DataType.values()[1:]:
        raise GraphError("A tensor has an unknown type.", expected="an ONNX data type", got=tensor.data_type,
                         where=place, hint=REEXPORT)  # fmt: skip
    bits = _BITS.get(onnx.TensorProto.DataType.Name(tensor.data_type))
    if bits is None or not tensor.HasField("raw_data"):
        return
    count = math.prod(tensor.dims)
    if len(tensor.raw_data) * 8 != count * bits:
        raise GraphError("The bytes of a tensor do not fit its shape.", expected=f"{count * bits // 8} bytes",
                         got=f"{len(tensor.raw_data)} bytes", where=place, hint=REEXPORT)  # fmt: skip


# onnx.helper.tensor_dtype_to_np_dtype gives float32 for BFLOAT16 in older onnx, so the widths stand here
_BITS = {
    **dict.fromkeys(("INT8", "UINT8", "BOOL"), 8),
    **dict.fromkeys(("FLOAT16", "BFLOAT16", "INT16", "UINT16"), 16),
    **dict.fromkeys(("FLOAT", "INT32", "UINT32"), 32),
    **dict.fromkeys(("DOUBLE", "INT64", "UINT64"), 64),
}


def _check_parts(model: onnx.ModelProto, where: object) -> None:
    """onnx-graphsurgeon drops some of these parts in silence, and the passes look into none of them."""
    import onnx

    kinds = onnx.AttributeProto
    carried = (kinds.FLOAT, kinds.INT, kinds.STRING, kinds.TENSOR, kinds.FLOATS, kinds.INTS, kinds.STRINGS)
    found = [f"local function {function.name}" for function in model.functions]
    found += ["training_info"] * len(model.training_info)
    found += [f"sparse initializer {tensor.values.name}" for tensor in model.graph.sparse_initializer]
    found += [f"quantization annotation of {entry.tensor_name}" for entry in model.graph.quantization_annotation]
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.type not in carried:
                found.append(f"{node.op_type} node {node.name or list(node.output)} with {attribute.name} "
                             f"({kinds.AttributeType.Name(attribute.type)})")  # fmt: skip
    if found:
        raise GraphError("The ONNX model has parts that cannot be cleaned.", expected="one graph of plain nodes: no "
                         "control flow, functions or sparse weights", got="; ".join(found[:5]), where=where,
                         hint=INLINE)  # fmt: skip
