"""Which INT8 network: the contest of the calibration methods, and the layers that go back to higher precision."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from trtbuild.accuracy.agreement import Agreement, facts_from_agreement
from trtbuild.accuracy.gate import Verdict, facts_from_verdict, score, verdict
from trtbuild.accuracy.rollback import RollBack, facts_from_roll_back, roll_back
from trtbuild.atomic import write_whole
from trtbuild.errors import TrtbuildError
from trtbuild.graph.precision import Layer, Quantized, keep_ends, quantize, weighted_layers
from trtbuild.spec import BuildRecord
from trtbuild.steps.precision.gate import Gate
from trtbuild_calibration import METHODS, ScaleTable
from trtbuild_calibration import Method as Threshold

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]
KEPT, END, ROLLED_BACK = "--keep", "first or last layer", "rolled back by the gate"
AS_ASKED = "kept as asked"  # what `quantize` says of the names that it is given


@dataclass(frozen=True, kw_only=True)
class Int8Job:
    """What INT8 candidates are made from and judged with.

    Attributes:
        model: clean float32 network in the form that the engine runs.
        table: its scales.
        methods: that take part in the contest.
        kept: the layers that stay in higher precision whatever the gate says, and why (`kept_layers`).
        record: how a candidate runs; its `options.quantized_layers` is set for each.
        gate: None leaves the choice to `methods`, of which there is then one.
        scratch: a folder for candidates.
    """

    model: onnx.ModelProto = field(repr=False)
    table: ScaleTable = field(repr=False)
    methods: tuple[Threshold, ...]
    kept: Mapping[str, str]
    record: BuildRecord
    gate: Gate | None
    scratch: Path

    def quantized(self, method: Threshold, kept: Collection[str]) -> Quantized:
        """The network with all layers but these in INT8, as CPU backends want it (uint8 activations)."""
        return quantize(self.model, self.table.amax(method), keep={*self.kept, *kept}, zero_point="u8")

    def agreement(self, gate: Gate, candidate: Quantized, say: Say) -> Agreement:
        """Runs a candidate through the gate's patches."""
        file = self.scratch / f"{self.record.network}.onnx"
        content: bytes = candidate.model.SerializeToString()
        write_whole(file, content)
        return gate.agreement(with_layers(self.record, len(candidate.quantized)), file, say)


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The network, by which method, and how that came about. `verdict` is None where there was no gate.

    `left` says `<name>: <reason>` of each layer that is not in INT8.
    """

    network: Quantized
    left: tuple[str, ...]
    method: Threshold
    verdict: Verdict | None
    facts: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether it may be used: the gate passed it with something left in INT8, or there was no gate."""
        return bool(self.network.quantized) and (self.verdict is None or self.verdict.passed)


def kept_layers(model: onnx.ModelProto, patterns: Sequence[str], *, ends: bool) -> dict[str, str]:
    """The layers that the user keeps and why: by regular expressions on their names, with `ends` the first and last.

    Raises:
        TrtbuildError: an expression finds no layer (a misspelt one would change nothing in silence), or no Conv is left
            that could be quantised.
    """
    layers = weighted_layers(model)
    for pattern in patterns:
        if not any(re.search(pattern, layer.name) for layer in layers):
            raise TrtbuildError(
                "--keep finds no layer.",
                expected=f"a part of a name such as {layers[0].name if layers else 'none: there are no layers'}",
                got=pattern,
                hint="trtbuild inspect lists the layers of an INT8 bundle",
            )
    reasons = {layer.name: _reason_to_keep(layer, patterns, ends=ends) for layer in layers}
    kept = {name: reason for name, reason in reasons.items() if reason}
    if all(layer.name in kept for layer in layers if layer.operator == "Conv"):
        raise TrtbuildError(
            "With the layers that are kept nothing is left to quantise.",
            expected="one Conv at least",
            got=", ".join(f"--keep {pattern}" for pattern in patterns) or "first and last layers alone",
            hint="leave --keep out, or ask for less" if patterns else "add --quantize-ends",
        )
    return kept


def _reason_to_keep(layer: Layer, patterns: Sequence[str], *, ends: bool) -> str:
    """Empty where the layer is not kept."""
    if any(re.search(pattern, layer.name) for pattern in patterns):
        return KEPT
    return END if ends and keep_ends(layer) else ""


def left_with_reasons(left: Sequence[str], reasons: Mapping[str, str]) -> tuple[str, ...]:
    """`Quantized.left`, whose "kept as asked" becomes who asked for it.

    Args:
        left: `<name>: <reason>`.
        reasons: name -> reason, in place of the one that is there.
    """
    lines = {f"{name}: {AS_ASKED}": f"{name}: {reason}" for name, reason in reasons.items()}
    return tuple(lines.get(line, line) for line in left)


def methods_of(method: str) -> tuple[Threshold, ...]:
    """The methods in the contest: all for "auto"."""
    return METHODS if method == "auto" else (cast(Threshold, method),)


def with_layers(record: BuildRecord, count: int) -> BuildRecord:
    """The record with the number of quantised layers, which the runner checks where there are any."""
    return record if not count else replace(record, options={**record.options, "quantized_layers": count})


def decide(job: Int8Job, say: Say) -> Decision:
    """Holds the contest and, where its winner does not pass, rolls layers back until it does or cannot.

    Args:
        job: the network and its gate.
        say: called with what is under way.
    """
    gate = job.gate
    if gate is None:
        method = job.methods[0]
        network = job.quantized(method, ())
        left = left_with_reasons(network.left, job.kept)
        return Decision(network=network, left=left, method=method, verdict=None, facts={})
    trials = {}
    for method in job.methods:
        trials[method] = job.agreement(gate, job.quantized(method, ()), _prefixed(say, method))
    best = min(trials, key=lambda method: score(trials[method], gate.limits))
    judged = verdict(trials[best], gate.limits)
    contest = [{"method": method, **_facts(found, verdict(found, gate.limits))} for method, found in trials.items()]
    network, rolled = job.quantized(best, ()), None
    if not judged.passed and judged.judged and gate.roll_back and network.quantized:
        rolled = _rolled_back(job, gate, best, network.quantized, say)
        network, judged = job.quantized(best, rolled.layers), rolled.verdict
    facts = {
        "contest": contest,
        "method": best,
        "roll_back": None if rolled is None else facts_from_roll_back(rolled),
        **_facts(trials[best] if rolled is None else rolled.agreement, judged),
    }
    back = () if rolled is None else rolled.layers
    left = left_with_reasons(network.left, {**job.kept, **dict.fromkeys(back, ROLLED_BACK)})
    return Decision(network=network, left=left, method=best, verdict=judged, facts=facts)


def _rolled_back(job: Int8Job, gate: Gate, method: Threshold, layers: Sequence[str], say: Say) -> RollBack:
    def evaluate(kept: frozenset[str]) -> Agreement:
        return job.agreement(gate, job.quantized(method, kept), lambda line: None)

    def sensitivity(layer: str) -> float:
        alone = job.quantized(method, set(layers) - {layer})
        return job.agreement(gate, alone, lambda line: None).logits.error_rms

    def progress(stage: str, done: int, total: int) -> None:
        say(f"{stage}: {done} of {total} runs")

    return roll_back(layers, evaluate, sensitivity, lambda found: verdict(found, gate.limits), progress)


def _facts(found: Agreement, judged: Verdict) -> dict[str, Any]:
    return {"agreement": facts_from_agreement(found), "verdict": facts_from_verdict(judged)}


def _prefixed(say: Say, method: str) -> Say:
    return lambda line: say(f"{method}: {line}")
