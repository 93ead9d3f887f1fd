"""Which layers to roll back to higher precision, where a candidate with all of them quantised did not pass the gate.

A search over sets of layers that knows neither networks nor numbers: the caller runs and judges them. Every answer,
"it cannot" included, is a set that was itself run and judged; what the search assumes (the more is rolled back the
better, damage seen alone is damage seen together) can cost layers or runs and never a wrong claim.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from trtbuild.accuracy.agreement import Agreement, facts_from_agreement
from trtbuild.accuracy.gate import Verdict, facts_from_verdict
from trtbuild.errors import InputError

GIVE_BACK = 8
"""Runs of the gate that may go into giving layers back: as many as the bisection over 256 layers takes."""

Evaluate = Callable[[frozenset[str]], Agreement]
Report = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """The error of the network in which this layer alone is quantised; infinite where that gives NaN."""

    layer: str
    error: float


@dataclass(frozen=True, kw_only=True)
class RollBack:
    """The outcome. `verdict` and `agreement` are of the network with exactly `layers` rolled back.

    Where it passed, `layers` are in the order of their sensitivity, the worst first. Where it did not, `layers` are
    all, and rolling back cannot help. `sensitivities` holds every layer, the worst first, and is empty where it
    cannot pass. `gate_runs` counts calls of `evaluate`, `refinements` how many of them tried to give a layer back.
    """

    layers: tuple[str, ...]
    sensitivities: tuple[LayerSensitivity, ...]
    agreement: Agreement
    verdict: Verdict
    sensitivity_runs: int
    gate_runs: int
    refinements: int

    @property
    def passed(self) -> bool:
        """Whether the network passes the gate with `layers` rolled back."""
        return self.verdict.passed


@dataclass(frozen=True, kw_only=True)
class _Trial:
    """One run of the gate."""

    layers: tuple[str, ...]
    agreement: Agreement
    verdict: Verdict


def roll_back(
    layers: Sequence[str],
    evaluate: Evaluate,
    sensitivity: Callable[[str], float],
    passed: Callable[[Agreement], Verdict],
    progress: Report | None = None,
    *,
    give_back: int = GIVE_BACK,
) -> RollBack:
    """The layers to roll back so that the gate passes.

    1. All layers are rolled back; if even that does not pass, the answer is that it cannot, after one run.
    2. The sensitivity of each layer is measured and the layers are put in its order, the worst first.
    3. Bisection over k finds a k for which rolling back the k worst passes and the k - 1 worst does not.
    4. The others of these k, from the least sensitive on, are quantised again one by one, if it still passes.

    With n layers there are at most n sensitivity runs and 1 + ceil(log2 n) + min(give_back, k - 1) runs of the gate; no
    set is run twice. If rolling back more layers never makes it worse, k is the smallest, and with `give_back` >= k - 1
    every layer of the answer is needed.

    Args:
        layers: names of the quantised layers, without duplicates; ties in sensitivity keep their order.
        evaluate: runs the candidate with the given layers in higher precision and all others quantised. It is not
            called with the empty set, the candidate that did not pass.
        sensitivity: the error of the network in which only the given layer is quantised; larger is worse. NaN and
            infinity are the worst.
        passed: the gate.
        progress: called with the stage ("roll back all", "sensitivity", "bisection", "giving back"), runs done and
            the most that there can be. It stops the search by raising.
        give_back: the most runs for step 4.

    Raises:
        InputError: there is no layer, a name comes twice, or `give_back` is negative.
        Whatever the callables raise.
    """
    _require_layers(layers, give_back)
    report = progress if progress is not None else _silence

    def tried(kept: tuple[str, ...]) -> _Trial:
        agreement = evaluate(frozenset(kept))
        return _Trial(layers=kept, agreement=agreement, verdict=passed(agreement))

    report("roll back all", 0, 1)
    everything = tried(tuple(layers))
    report("roll back all", 1, 1)
    if not everything.verdict.passed:
        return _outcome(everything, (), bisections=0, refinements=0)
    ranked = _ranked(layers, sensitivity, report)
    best, bisections = _bisected(everything, tuple(s.layer for s in ranked), tried, report)
    best, refinements = _refined(best, tried, give_back, report)
    return _outcome(best, ranked, bisections, refinements)


def facts_from_roll_back(found: RollBack) -> dict[str, Any]:
    """For the bundle's `gates`: plain dicts, lists and scalars, numbers finite or None (an infinite sensitivity)."""
    return {
        "passed": found.passed,
        "layers": list(found.layers),
        "sensitivities": [
            {"layer": s.layer, "error": s.error if math.isfinite(s.error) else None} for s in found.sensitivities
        ],
        "sensitivity_runs": found.sensitivity_runs,
        "gate_runs": found.gate_runs,
        "refinements": found.refinements,
        "agreement": facts_from_agreement(found.agreement),
        "verdict": facts_from_verdict(found.verdict),
    }


def _ranked(layers: Sequence[str], sensitivity: Callable[[str], float], report: Report) -> tuple[LayerSensitivity, ...]:
    measured = []
    for number, layer in enumerate(layers):
        report("sensitivity", number, len(layers))
        error = float(sensitivity(layer))
        measured.append(LayerSensitivity(layer=layer, error=math.inf if math.isnan(error) else error))
    report("sensitivity", len(layers), len(layers))
    return tuple(sorted(measured, key=lambda s: -s.error))


def _bisected(
    everything: _Trial, order: tuple[str, ...], tried: Callable[[tuple[str, ...]], _Trial], report: Report
) -> tuple[_Trial, int]:
    """A trial that passed while the one with a layer less did not, and the number of runs.

    Between the calls the `failing` worst do not pass (0: the candidate itself) and `best` does.
    """
    best = _Trial(layers=order, agreement=everything.agreement, verdict=everything.verdict)
    failing, runs, most = 0, 0, (len(order) - 1).bit_length()  # ceil(log2 n)
    while len(best.layers) - failing > 1:
        report("bisection", runs, most)
        middle = tried(order[: (failing + len(best.layers)) // 2])
        runs += 1
        if middle.verdict.passed:
            best = middle
        else:
            failing = len(middle.layers)
    report("bisection", most, most)
    return best, runs


def _refined(
    best: _Trial, tried: Callable[[tuple[str, ...]], _Trial], give_back: int, report: Report
) -> tuple[_Trial, int]:
    """`best` without the layers that it can do without, and the number of runs.

    The least sensitive layer stays: that the rest without it does not pass is how the bisection ended.
    """
    candidates = best.layers[-2::-1][:give_back]
    for number, layer in enumerate(candidates):
        report("giving back", number, len(candidates))
        without = tried(tuple(name for name in best.layers if name != layer))
        if without.verdict.passed:
            best = without
    report("giving back", len(candidates), len(candidates))
    return best, len(candidates)


def _outcome(trial: _Trial, ranked: tuple[LayerSensitivity, ...], bisections: int, refinements: int) -> RollBack:
    return RollBack(
        layers=trial.layers,
        sensitivities=ranked,
        agreement=trial.agreement,
        verdict=trial.verdict,
        sensitivity_runs=len(ranked),
        gate_runs=1 + bisections + refinements,
        refinements=refinements,
    )


def _require_layers(layers: Sequence[str], give_back: int) -> None:
    if not layers:
        raise InputError("There is no quantised layer that could be rolled back.", expected="at least one layer")
    twice = sorted({layer for layer in layers if layers.count(layer) > 1})
    if twice:
        raise InputError("A layer is listed twice.", expected="distinct names", got=", ".join(twice))
    if give_back < 0:
        raise InputError("The number of runs for giving layers back is out of range.", expected=">= 0", got=give_back)


def _silence(stage: str, done: int, total: int) -> None:
    pass
