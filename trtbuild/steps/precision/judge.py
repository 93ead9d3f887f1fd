"""The gate's last word: the network that was decided for, in the engine of every backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trtbuild.accuracy.agreement import facts_from_agreement
from trtbuild.accuracy.gate import Verdict, facts_from_verdict, verdict
from trtbuild.spec import BuildRecord
from trtbuild.steps.precision.decide import Decision
from trtbuild.steps.precision.gate import Gate

ONLY_WITHOUT = "only with every layer back in higher precision does it pass"
Facts = Mapping[str, Any]


def judged_engines(
    gate: Gate, records: Sequence[BuildRecord], file: Path, decision: Decision | None, say: Callable[[str], None]
) -> tuple[tuple[Facts, ...], tuple[str, ...]]:
    """What the bundle's `gates` say of a network, and why it may not be used.

    Args:
        gate: the patches.
        records: how it runs, one backend after the other.
        file: the network.
        decision: how an INT8 network was decided for, with the first backend: its measurement is not repeated.
        say: called with what is under way.
    """
    gates, failures = list[Facts](), list[str]()
    for number, record in enumerate(records):
        if number == 0 and decision is not None and decision.verdict is not None:
            judged, measured = decision.verdict, dict(decision.facts)
        else:
            judged, measured = _measured(gate, record, file, say)
            measured |= {} if decision is None else {"method": decision.method}
        reasons = _reasons(judged, decision)
        gates.append({**_facts(gate, record, reasons), **measured})
        failures += [f"{record.network}, {record.backend}: {reason}" for reason in reasons]
    return tuple(gates), tuple(failures)


def _measured(
    gate: Gate, record: BuildRecord, file: Path, say: Callable[[str], None]
) -> tuple[Verdict, dict[str, Any]]:
    found = gate.agreement(record, file, lambda line: say(f"{record.backend}: {line}"))
    judged = verdict(found, gate.limits)
    return judged, {"agreement": facts_from_agreement(found), "verdict": facts_from_verdict(judged)}


def _reasons(judged: Verdict, decision: Decision | None) -> tuple[str, ...]:
    if judged.passed and decision is not None and not decision.network.quantized:
        return (ONLY_WITHOUT,)
    return judged.reasons if not judged.passed else ()


def _facts(gate: Gate, record: BuildRecord, reasons: tuple[str, ...]) -> dict[str, Any]:
    return {
        "network": record.network,
        "backend": record.backend,
        "precision": record.precision,
        "inference_precision": record.inference_precision,
        "cases": list(gate.cases),
        "patches": len(gate.patches),
        "coverage": gate.coverage.to_json(),
        "passed": not reasons,
    }
