"""What a pass is, and how a list of them runs.

A pass is a value: a name, what it requires of a model, what it does, what it ensures afterwards. `run_passes` holds
each pass to its contract, and to the one that all share: the model stays well formed and its inputs and outputs keep
number, order and type. Passes never change the model that they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trtbuild.errors import GraphError
from trtbuild.graph.wiring import interface, node_labels, wiring_problems

if TYPE_CHECKING:
    import onnx

SHOWN = 5  # problems that an error message lists


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One change of a graph, with its contract.

    `requires` and `ensures` return what does not hold, one phrase each, so an empty tuple is consent. `apply` returns
    the new model, which is the given object if and only if there was nothing to do, and one phrase for each thing that
    it could have worked on but left alone, with the reason. Applying a pass to its own result changes nothing.
    """

    name: str
    requires: Callable[[onnx.ModelProto], tuple[str, ...]]
    apply: Callable[[onnx.ModelProto], tuple[onnx.ModelProto, tuple[str, ...]]]
    ensures: Callable[[onnx.ModelProto], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class PassReport:
    """What one pass did: `removed`, `added` and `changed` name nodes, `left` says what it left alone and why."""

    name: str
    modified: bool
    nodes_before: int
    nodes_after: int
    initializers_before: int
    initializers_after: int
    removed: tuple[str, ...]
    added: tuple[str, ...]
    changed: tuple[str, ...]
    left: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CleanResult:
    """The cleaned model, and one report per pass in the order in which they ran."""

    model: onnx.ModelProto
    reports: tuple[PassReport, ...]


def run_passes(model: onnx.ModelProto, passes: Sequence[Pass]) -> CleanResult:
    """Run `passes` one after the other.

    Raises:
        GraphError: a requirement does not hold, a pass failed, or its result is not what it ensures. The message names
            the pass and those that ran before it.
    """
    reports: list[PassReport] = []
    for step in passes:
        place = f"pass {step.name}, after {', '.join(r.name for r in reports) or 'no other pass'}"
        _hold(f"The pass {step.name} cannot start: what it requires does not hold.", step.requires(model), place)
        after, left = _applied(step, model, place)
        broken = step.ensures(after) + wiring_problems(after) + _interface_problems(model, after)
        _hold(f"The pass {step.name} broke its contract.", broken, place)
        reports.append(_report(step.name, model, after, left))
        model = after
    return CleanResult(model=model, reports=tuple(reports))


def nothing(model: onnx.ModelProto) -> tuple[str, ...]:
    """A requirement that every model meets."""
    return ()


def _applied(step: Pass, model: onnx.ModelProto, place: str) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    try:
        return step.apply(model)
    except MemoryError:
        raise
    except Exception as error:  # whatever onnx or graphsurgeon raises, the user has to hear which pass it was
        raise GraphError(
            f"The pass {step.name} failed.", got=f"{type(error).__name__}: {error}", where=place
        ) from error


def _hold(what: str, problems: tuple[str, ...], place: str) -> None:
    if problems:
        shown = "; ".join(problems[:SHOWN]) + ("" if len(problems) <= SHOWN else f"; and {len(problems) - SHOWN} more")
        raise GraphError(what, got=shown, where=place, hint="Please report this, with the ONNX file if you may.")


def _interface_problems(before: onnx.ModelProto, after: onnx.ModelProto) -> tuple[str, ...]:
    if interface(before) == interface(after):
        return ()
    return (f"inputs and outputs were {interface(before)} and are {interface(after)}",)


def _report(name: str, before: onnx.ModelProto, after: onnx.ModelProto, left: tuple[str, ...]) -> PassReport:
    old, new = node_labels(before), node_labels(after)
    return PassReport(
        name=name,
        modified=after is not before,
        nodes_before=len(before.graph.node),
        nodes_after=len(after.graph.node),
        initializers_before=len(before.graph.initializer),
        initializers_after=len(after.graph.initializer),
        removed=tuple(label for label in old if label not in new),
        added=tuple(label for label in new if label not in old),
        changed=tuple(label for label in new if label in old and old[label] != new[label]),
        left=left,
    )
