"""Identity nodes are taken out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trtbuild.graph.passes import Pass
from trtbuild.graph.surgeon import (
    detach,
    graph_from_model,
    is_constant,
    is_output,
    model_from_graph,
    no_unread_initializers,
    redirect,
)

if TYPE_CHECKING:
    import onnx


def fold_identities(model: onnx.ModelProto) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Let the readers of an Identity read what it reads.

    1. The Identity makes no output of the graph: its readers read its input.
    2. It makes an output, and reads what a node makes that is no output itself: that node makes the output.
    3. It makes an output from an input of the graph, an initializer or another output: it stays, as those names cannot
       be given up.
    """
    graph = graph_from_model(model)
    left, gone = [], []
    for node in [entry for entry in graph.nodes if entry.op == "Identity" and not entry.domain]:
        reason = _fold(graph, node)
        if reason:
            left.append(f"{node.name or node.outputs[0].name}: {reason}")
        else:
            gone.append(node)
    if not gone:
        return model, tuple(left)
    detach(graph, gone)
    return model_from_graph(graph, model), tuple(left)


def _fold(graph: Any, node: Any) -> str:
    """Rewire around `node`; the reason if that is impossible."""
    source, target = node.inputs[0], node.outputs[0]
    if not is_output(graph, target):
        redirect(target, source)
        return ""
    if is_constant(source) or not source.inputs:
        return "joins an output of the graph to an input or initializer"
    if is_output(graph, source):
        return "joins two outputs of the graph"
    maker = source.inputs[0]
    position = next(i for i, tensor in enumerate(maker.outputs) if tensor is source)
    node.inputs.clear()
    node.outputs.clear()
    maker.outputs[position] = target
    redirect(source, target)
    return ""


def _ensures(model: onnx.ModelProto) -> tuple[str, ...]:
    outputs = {value.name for value in model.graph.output}
    nodes = [node for node in model.graph.node if node.op_type == "Identity" and not node.domain]
    return tuple(f"the Identity {node.name or node.output[0]} is still there" for node in nodes
                 if node.output[0] not in outputs)  # fmt: skip


FOLD_IDENTITIES = Pass(name="fold_identities", requires=no_unread_initializers, apply=fold_identities, ensures=_ensures)
