"""What `split_instance_norm` wrote out becomes InstanceNormalization again.

TensorRT and the bf16 plugins of the CPU backends want the plain operator: they have kernels of their own for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtbuild.graph.naming import FreeNames
from trtbuild.graph.passes import Pass
from trtbuild.graph.split_instance_norm import FLOAT, shapes_of, spread_suffix, with_dims, with_parts
from trtbuild.graph.surgeon import no_unread_initializers
from trtbuild.graph.wiring import STANDARD, output_names

if TYPE_CHECKING:
    import onnx

# the role of a node, its operator, and which input of which node before in this list it makes
SKELETON = (
    ("scaled", "Mul", "last", 0),
    ("shift", "Sub", "last", 1),
    ("gain", "Div", "scaled", 1),
    ("centred", "Mul", "shift", 1),
    ("mean", "GlobalAveragePool", "centred", 0),
    ("std", "Sqrt", "gain", 1),
    ("shifted", "Add", "std", 0),
    ("variance", "GlobalAveragePool", "shifted", 0),
)
INNER_READS = {"gain": 2, "mean": 2}  # all other tensors between are read once


def join_instance_norm(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Put InstanceNormalization in the place of what computes it as `split_instance_norm` writes it.

    1. The operators, the order of their inputs, the shapes of scale, bias and epsilon have to be those that it writes,
       and nobody else may read what is between. Names play no part, and the kernels may be any that tile the tensor
       without rest, the same for mean and variance: the result is the mean over all voxels then.
    2. The result is what was split, byte for byte if the shapes were inferred before and epsilon was written there
       (ONNX has a default): names, order, scale and bias are the old ones.
    3. Left alone: whatever differs in anything of 1.
    """
    graph = _Graph.of(model)
    found, left = _matches(graph)
    if not found:
        return model, left
    gone = {name for match in found.values() for name in match.inner}
    initializers, vectors = _flat(model, graph, found)
    nodes: list[onnx.NodeProto] = []
    for node in model.graph.node:
        if node.output[0] in found:
            nodes.append(_norm(node, found[node.output[0]], vectors))
        elif node.output[0] not in gone:
            nodes.append(node)
    read = {name for node in nodes for name in node.input} | output_names(model)
    return with_parts(model, nodes, [tensor for tensor in initializers if tensor.name in read]), left


@dataclass(frozen=True, kw_only=True)
class _Graph:
    """A model, looked up by tensor name."""

    makers: Mapping[str, onnx.NodeProto]
    reads: Mapping[str, int]  # how often nodes read a tensor; an output of the graph counts as a read
    shapes: Mapping[str, tuple[int | None, ...]]
    stored: Mapping[str, onnx.TensorProto]  # without those that are inputs too

    @classmethod
    def of(cls, model: onnx.ModelProto) -> _Graph:
        reads: dict[str, int] = dict.fromkeys(output_names(model), 1)
        for name in (name for node in model.graph.node for name in node.input):
            reads[name] = reads.get(name, 0) + 1
        fed = {value.name for value in model.graph.input}
        return cls(
            makers={name: node for node in model.graph.node for name in node.output},
            reads=reads,
            shapes=shapes_of(model),
            stored={tensor.name: tensor for tensor in model.graph.initializer if tensor.name not in fed},
        )


@dataclass(frozen=True, kw_only=True)
class _Match:
    """A norm that was written out: its tensors, and those between them, which nobody else reads."""

    source: str
    scale: str
    bias: str
    epsilon: float
    inner: frozenset[str]


def _matches(graph: _Graph) -> tuple[dict[str, _Match], tuple[str, ...]]:
    """The norms by their output, and what looks like one but differs."""
    found, left = {}, []
    for output, node in graph.makers.items():
        roles = _roles(graph, node)
        if not roles:
            continue
        match = _match(graph, roles)
        if isinstance(match, str):
            left.append(f"{node.name or output}: {match}")
        else:
            found[output] = match
    return found, tuple(left)


def _is(node: onnx.NodeProto | None, operator: str) -> bool:
    return node is not None and node.op_type == operator and node.domain in STANDARD


def _roles(graph: _Graph, last: onnx.NodeProto) -> dict[str, onnx.NodeProto]:
    """The nodes of the pattern that ends with `last`, without the AveragePools; empty if one is missing."""
    if not _is(last, "Add"):
        return {}
    roles = {"last": last}
    for role, operator, reader, position in SKELETON:
        maker = graph.makers.get(roles[reader].input[position])
        if maker is None or not _is(maker, operator):
            return {}
        roles[role] = maker
    return roles


def _match(graph: _Graph, roles: Mapping[str, onnx.NodeProto]) -> _Match | str:
    """The norm, or what differs."""
    source = roles["scaled"].input[0]
    scale, bias, epsilon = roles["gain"].input[0], roles["shift"].input[0], roles["shifted"].input[1]
    averaged, below = _pools(graph, roles["mean"].input[0], source)
    squared, above = _pools(graph, roles["variance"].input[0], source)
    square = graph.makers.get(squared)
    deviation = graph.makers.get(square.input[0]) if square is not None and _is(square, "Pow") else None
    if averaged != source:
        return "its mean is that of another tensor"
    if roles["centred"].input[1] != roles["gain"].output[0]:
        return "its shift is not that of what it scales by"
    if square is None or deviation is None or not _is_two(graph, square.input[1]) or not _is(deviation, "Sub"):
        return "its variance is not the mean of squares"
    if list(deviation.input) != [source, roles["mean"].output[0]]:
        return "its variance is not that of what it scales"
    kernels, others = ([_kernel(pool) for pool in pools] for pools in (below, above))
    if kernels != others:
        return "its mean and variance are pooled differently"
    shape = graph.shapes.get(source, ())
    if not _tiles(shape[2:], kernels):
        return "its pools do not tile the tensor, or its shape is not known"
    if epsilon not in graph.stored or not _is_float(graph.stored[epsilon], ()):
        return "its epsilon is no stored float32 scalar"
    dims = (1, shape[1], *[1] * (len(shape) - 2))
    if not all(name in graph.stored and _is_float(graph.stored[name], dims) for name in (scale, bias)):
        return f"its scale or bias is no stored float32 tensor of shape {dims}"
    reads = {node.output[0]: INNER_READS.get(role, 1) for role, node in roles.items() if role != "last"}
    reads |= {node.output[0]: 1 for node in (*below, *above, square, deviation)}
    if any(graph.reads.get(name, 0) != count for name, count in reads.items()):
        return "others read what is inside of it"
    value = _scalar(graph.stored[epsilon])
    return _Match(source=source, scale=scale, bias=bias, epsilon=value, inner=frozenset(reads))


def _pools(graph: _Graph, tensor: str, source: str) -> tuple[str, tuple[onnx.NodeProto, ...]]:
    """The AveragePools that lead to `tensor` in their order, from `source` at most, and what the first one reads."""
    pools: list[onnx.NodeProto] = []
    while tensor != source and tensor in graph.makers and _is(graph.makers[tensor], "AveragePool"):
        pools.insert(0, graph.makers[tensor])
        tensor = pools[0].input[0]
    return tensor, tuple(pools)


def _kernel(pool: onnx.NodeProto) -> tuple[int, ...]:
    """Kernel of a pool that has it for stride too and no other attribute; otherwise empty, which tiles nothing."""
    values = {attribute.name: tuple(attribute.ints) for attribute in pool.attribute}
    kernel = values.get("kernel_shape", ())
    return kernel if values == {"kernel_shape": kernel, "strides": kernel} else ()


def _tiles(spatial: Sequence[int | None], kernels: Sequence[Sequence[int]]) -> bool:
    rest = [n or 0 for n in spatial]
    for kernel in kernels:
        if len(kernel) != len(rest) or any(n % k for n, k in zip(rest, kernel, strict=True)):
            return False
        rest = [n // k for n, k in zip(rest, kernel, strict=True)]
    return bool(rest) and all(rest)


def _is_float(tensor: onnx.TensorProto, dims: tuple[int | None, ...]) -> bool:
    return bool(tensor.data_type == FLOAT and tuple(tensor.dims) == dims)


def _is_two(graph: _Graph, name: str) -> bool:
    return name in graph.stored and _is_float(graph.stored[name], ()) and _scalar(graph.stored[name]) == 2


def _scalar(tensor: onnx.TensorProto) -> float:
    from onnx import numpy_helper

    return float(numpy_helper.to_array(tensor))


def _flat(
    model: onnx.ModelProto, graph: _Graph, found: Mapping[str, _Match]
) -> tuple[list[onnx.TensorProto], dict[str, str]]:
    """The initializers with scales and biases of shape (C,) too, and the names of these by those of the spread ones.

    Where split left the tensor of shape (C,) beside for others, that one serves again.
    """
    uses = Counter(name for match in found.values() for name in (match.scale, match.bias))
    names = FreeNames({*graph.makers, *graph.reads})
    initializers, flat = [], {}
    for tensor in model.graph.initializer:
        if tensor.name not in uses:
            initializers.append(tensor)
            continue
        dims = (tensor.dims[1],)
        twin = graph.stored.get(tensor.name.removesuffix(spread_suffix(len(tensor.dims))), tensor)
        if graph.reads[tensor.name] > uses[tensor.name]:
            initializers.append(tensor)
        if twin is not tensor and with_dims(tensor, twin.name, dims) == twin:
            flat[tensor.name] = twin.name
        else:
            alone = graph.reads[tensor.name] == uses[tensor.name]
            flat[tensor.name] = tensor.name if alone else names.free(f"{tensor.name}/flat")
            initializers.append(with_dims(tensor, flat[tensor.name], dims))
    return initializers, flat


def _norm(last: onnx.NodeProto, match: _Match, vectors: Mapping[str, str]) -> onnx.NodeProto:
    from onnx import helper

    norm = type(last)()
    norm.CopyFrom(last)
    norm.op_type = "InstanceNormalization"
    norm.input[:] = [match.source, vectors[match.scale], vectors[match.bias]]
    norm.attribute.append(helper.make_attribute("epsilon", match.epsilon))
    return norm


def _ensures(model: onnx.ModelProto) -> tuple[str, ...]:
    return tuple(f"what makes {output} could be joined" for output in _matches(_Graph.of(model))[0])


JOIN_INSTANCE_NORM = Pass(
    name="join_instance_norm", requires=no_unread_initializers, apply=join_instance_norm, ensures=_ensures
)
