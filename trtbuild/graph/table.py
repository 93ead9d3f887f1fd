"""What a model consists of: its operators before and after cleaning, its inputs and outputs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtbuild.graph.passes import CleanResult
from trtbuild.graph.wiring import graph_inputs, opset_of
from trtbuild.spec import TensorSpec

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """One line of the before/after table: how many of `what` there were and are."""

    what: str
    before: int
    after: int


def op_counts(model: onnx.ModelProto) -> dict[str, int]:
    """Number of nodes per operator, sorted by its name; operators outside the standard are `domain::name`."""
    names = (f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in model.graph.node)
    return dict(sorted(Counter(names).items()))


def table_from_clean(before: onnx.ModelProto, result: CleanResult) -> tuple[TableRow, ...]:
    """One row per operator, then all nodes, the initializers and the bytes of the file."""
    old, new = op_counts(before), op_counts(result.model)
    rows = [TableRow(what=name, before=old.get(name, 0), after=new.get(name, 0)) for name in sorted(old | new)]
    for what, count in _totals(before).items():
        rows.append(TableRow(what=what, before=count, after=_totals(result.model)[what]))
    return tuple(rows)


def _totals(model: onnx.ModelProto) -> dict[str, int]:
    graph = model.graph
    return {"nodes": len(graph.node), "initializers": len(graph.initializer), "bytes": model.ByteSize()}


def opset_from_model(model: onnx.ModelProto) -> int:
    """Version of the standard operators that the model uses."""
    return opset_of(model)


def io_from_model(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The inputs, then the outputs; a dimension without number and name is called "?"."""
    import onnx

    specs = []
    for value in (*graph_inputs(model), *model.graph.output):
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim)
        name = onnx.TensorProto.DataType.Name(tensor.elem_type)
        dtype = "bfloat16" if name == "BFLOAT16" else str(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type))
        specs.append(TensorSpec(name=value.name, dtype=dtype, shape=shape))
    return tuple(specs)
