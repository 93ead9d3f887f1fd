"""In which precision an engine computes its operations, and what in it will be slow."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from trtbuild.engine.tensorrt.values import EngineLayer, EngineTable, LayerTensor

PRECISIONS = {"Int8": "int8", "Half": "fp16", "BFloat16": "bf16", "Float": "fp32"}
SIZES = {"Int8": 1, "UInt8": 1, "Bool": 1, "FP8": 1, "Half": 2, "BFloat16": 2, "Float": 4, "Int32": 4, "Int64": 8}
PRODUCTS = ("conv", "correlation", "gemm", "matmul", "matrixmultiply", "matrix_multiply")
"""In the kinds of kernels that multiply matrices, TensorRT's own (CaskConvolution, CaskGemm…) and Myelin's."""
FUSIONS = ("fusion",)
"""Kinds that may hold a product; looked at where no kernel of the other kinds names a node."""
COPYING = {"Move", "Tran", "Cast"}
COPY_SHARE = 0.02
"""Of all bytes that layers read and write. Below it a copy costs nothing: the input's own change of format is one."""
NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Operations by the precision that computes them: "int8", "fp16", "bf16", "fp32" (TF32 where that was allowed).

    `operations` is their sum with those of the `unknown` nodes, of which no kernel could be told. `layers` holds the
    operations of each computing kernel by its index in the table.
    """

    operations: int
    precisions: Mapping[str, int]
    layers: Mapping[int, int]
    unknown: tuple[str, ...]

    def share(self, precision: str) -> float:
        """0 to 1, of all operations."""
        return self.precisions.get(precision, 0) / self.operations if self.operations else 0.0


def coverage(table: EngineTable, operations: Mapping[str, int]) -> Coverage:
    """Which kernel computes each node of `operations`, and in what.

    A node's kernel is the one that multiplies (a convolution, a matrix product) and names it; others that name it only
    prepare its input or finish its output. It computes in the type of its first input, the activation: weights alone
    in INT8 make no INT8 kernel. A node with no such kernel, or with several of different precisions, is unknown.
    """
    precisions: dict[str, int] = dict.fromkeys(PRECISIONS.values(), 0)
    layers: dict[int, int] = {}
    unknown = []
    for node, kernels in _kernels(table, operations).items():
        found = {_precision(table.layers[index]) for index in kernels}
        precision = found.pop() if len(found) == 1 else None
        if precision is None:
            unknown.append(node)
            continue
        precisions[precision] += operations[node]
        layers[kernels[0]] = layers.get(kernels[0], 0) + operations[node]
    return Coverage(operations=sum(operations.values()), precisions=precisions, layers=layers, unknown=tuple(unknown))


def warnings(table: EngineTable, operations: Mapping[str, int]) -> tuple[str, ...]:
    """What will be slow, one sentence each; bytes are for one patch."""
    kernels = {index for found in _kernels(table, operations).values() for index in found}
    layers = [table.layers[index] for index in sorted(kernels)]
    found = (_float_outputs(layers), _float_kernels(table, layers), _transposed(layers), _copies(table))
    return tuple(text for text in found if text)


def _kernels(table: EngineTable, nodes: Collection[str]) -> dict[str, list[int]]:
    """The indices of the computing kernels of each node."""
    found: dict[str, list[int]] = {node: [] for node in nodes}
    for words in (PRODUCTS, FUSIONS):
        open_nodes = {node for node, kernels in found.items() if not kernels}
        for index, layer in enumerate(table.layers):
            if any(word in layer.kind.lower() for word in words):
                for node in open_nodes & set(layer.nodes):
                    found[node].append(index)
    return found


def _precision(layer: EngineLayer) -> str | None:
    return PRECISIONS.get(layer.inputs[0].dtype) if layer.inputs else None


def _float_outputs(layers: Sequence[EngineLayer]) -> str | None:
    """TensorRT-RTX does so with every convolution; of TensorRT 10 and 11 it is not known."""
    outputs = [
        tensor for layer in layers if _precision(layer) == "int8" and "deconv" not in layer.kind.lower()
        for tensor in layer.outputs[:1] if tensor.dtype in ("Float", "Half", "BFloat16")
    ]  # fmt: skip
    if not outputs:
        return None
    written, narrow = sum(map(_bytes, outputs)), sum(math.prod(_shape(tensor)) for tensor in outputs)
    return (
        f"{_counted(len(outputs), 'quantised convolution writes', 'quantised convolutions write')} "
        f"{'/'.join(sorted({tensor.dtype for tensor in outputs}))}: {_size(written)} per patch where Int8 takes "
        f"{_size(narrow)}. TensorRT-RTX always does so, so INT8 saves arithmetic and the reading of inputs but no "
        "writing: measure whether it is faster than FP16 before you choose it."
    )


def _float_kernels(table: EngineTable, layers: Sequence[EngineLayer]) -> str | None:
    """Quantised is what reads a DequantizeLinear, or weights that a kernel without inputs dequantises at run time."""
    weights = {
        tensor.name for layer in table.layers if not layer.inputs and any(map(_dequantizes, layer.nodes))
        for tensor in layer.outputs
    }  # fmt: skip
    names = [
        _title(layer) for layer in layers if _precision(layer) != "int8"
        and (any(map(_dequantizes, layer.nodes)) or weights & {tensor.name for tensor in layer.inputs})
    ]  # fmt: skip
    if not names:
        return None
    return (
        f"{_counted(len(names), 'quantised layer runs', 'quantised layers run')} in floating point, with its weights "
        f"dequantised on every run: {_listed(names)}. Leave them out of the quantisation (--keep)."
    )


def _transposed(layers: Sequence[EngineLayer]) -> str | None:
    names = [_title(layer) for layer in layers if "deconv" in layer.kind.lower()]
    if not names:
        return None
    return (
        f"{_counted(len(names), 'ConvTranspose was', 'ConvTransposes were')} not rewritten as convolution: "
        f"{_listed(names)}. TensorRT-RTX has no INT8 kernel for them; those with kernel = stride and no padding can be "
        "rewritten."
    )


def _copies(table: EngineTable) -> str | None:
    copies = [layer for layer in table.layers if layer.inputs and _is_copy(layer)]
    moved, everything = (sum(map(_traffic, layers)) for layers in (copies, table.layers))
    if not copies or moved < COPY_SHARE * everything:
        return None
    return (
        f"{_counted(len(copies), 'layer only copies', 'layers only copy')} or reformat: {_size(moved)} per patch, "
        f"{moved / everything:.0%} of what all layers read and write."
    )


def _is_copy(layer: EngineLayer) -> bool:
    """A Reformat of TensorRT, or a kernel of Myelin, such as `__myl_TranMove_myl0_3`, of nothing but copies."""
    if layer.kind == "Reformat":
        return True
    name = re.match(r"__myl_([A-Za-z]+)_", layer.name)
    words = re.findall("[A-Z][a-z]*", name[1]) if name and layer.kind == "kgen" else []
    return bool(words) and set(words) <= COPYING


def _title(layer: EngineLayer) -> str:
    """The ONNX node that a computing kernel was made of; TensorRT names it first."""
    return layer.nodes[0] if layer.nodes else layer.name


def _dequantizes(node: str) -> bool:
    return node.endswith("DequantizeLinear")


def _traffic(layer: EngineLayer) -> int:
    """Bytes read and written; a tensor that is listed twice is read once."""
    return sum(map(_bytes, {tensor.name: tensor for tensor in (*layer.inputs, *layer.outputs)}.values()))


def _bytes(tensor: LayerTensor) -> int:
    return math.prod(_shape(tensor)) * SIZES.get(tensor.dtype, 1)


def _shape(tensor: LayerTensor) -> Iterator[int]:
    """For a batch of one: the free dimension is -1."""
    return (1 if size < 0 else size for size in tensor.shape)


def _size(number: int) -> str:
    return f"{number / 1e6:.0f} MB" if number >= 1e7 else f"{number / 1e3:.0f} kB"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _listed(names: Sequence[str]) -> str:
    rest = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {rest} more" if rest > 0 else "")
