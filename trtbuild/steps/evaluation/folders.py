"""`evaluate`: two folders of segmentations become nnU-Net's summary.json, with HD95 and NSD where asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trtbuild
from trtbuild.accuracy.summary import per_case, summary_from_cases, surface_summary
from trtbuild.accuracy.surface import require_surface_library
from trtbuild.atomic import output_error, write_whole
from trtbuild.steps.evaluation.cases import CaseOutcome, Job, measured_cases, processes_for
from trtbuild.steps.evaluation.inputs import EvaluateConfig, Evaluation, evaluation_from_config

__all__ = ["CaseOutcome", "EvaluateConfig", "EvaluationReport", "evaluate_folders"]


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What an evaluation found. `summary` is the content of the written file `output`."""

    output: Path
    summary: Mapping[str, Any]
    evaluation: Evaluation
    processes: int
    failed: tuple[CaseOutcome, ...]


def evaluate_folders(
    config: EvaluateConfig,
    *,
    started: Callable[[Evaluation, int], None] = lambda evaluation, processes: None,
    case_ended: Callable[[CaseOutcome], None] = lambda outcome: None,
) -> EvaluationReport:
    """Compares every prediction with its reference and writes the summary.

    Where cases fail there is no `summary.json`, not even an old one: what could be measured goes to
    `summary.incomplete.json`, without means.

    Args:
        config: folders, labels, output, processes.
        started: called once with what will be compared, and the number of processes.
        case_ended: called after each case.

    Raises:
        InputError, ModelError: nothing can be compared.
        MissingExtra: surfaces are asked for and the library is missing.
        OutputError: the summary cannot be written.
    """
    if config.surface:
        require_surface_library()
    evaluation = evaluation_from_config(config)
    processes = config.processes or processes_for(evaluation, surface=config.surface)
    processes = min(processes, len(evaluation.pairs))
    started(evaluation, processes)
    jobs = [
        Job(pair=pair, reader=evaluation.reader, labels=evaluation.labels, ignore=evaluation.ignore,
            tolerance=config.nsd_tolerance if config.surface else None)
        for pair in evaluation.pairs
    ]  # fmt: skip
    by_case: dict[str, CaseOutcome] = {}
    for outcome in measured_cases(jobs, processes):
        by_case[outcome.case] = outcome
        case_ended(outcome)
    outcomes = [by_case[pair.case] for pair in evaluation.pairs]
    failed = tuple(outcome for outcome in outcomes if outcome.error is not None)
    summary = _summary(config, evaluation, outcomes)
    return EvaluationReport(
        output=_write(config.target, summary, complete=not failed), summary=summary, evaluation=evaluation,
        processes=processes, failed=failed,
    )  # fmt: skip


def _summary(config: EvaluateConfig, evaluation: Evaluation, outcomes: Sequence[CaseOutcome]) -> dict[str, Any]:
    """nnU-Net's keys, and under "trtbuild" what nnU-Net does not have."""
    cases = [outcome.metrics for outcome in outcomes if outcome.metrics is not None]
    failed = {outcome.case: outcome.error for outcome in outcomes if outcome.error is not None}
    ours: dict[str, Any] = {
        "version": trtbuild.__version__,
        "reader": evaluation.reader,
        "label_names": dict(evaluation.names),
        "ignore_label": evaluation.ignore,
        "not_predicted": list(evaluation.not_predicted),
        "warnings": {outcome.case: list(outcome.warnings) for outcome in outcomes if outcome.warnings},
    }
    if failed:
        return {"metric_per_case": per_case(cases), "trtbuild": {**ours, "failed": failed}}
    if config.surface:
        ours["surface"] = {"nsd_tolerance_mm": config.nsd_tolerance, **surface_summary(cases)}
    return {**summary_from_cases(cases), "trtbuild": ours}


def _write(target: Path, summary: Mapping[str, Any], *, complete: bool) -> Path:
    """Writes the summary under its name, or under that of an incomplete one; never both are there."""
    incomplete = target.with_name(target.stem + ".incomplete.json")
    path, other = (target, incomplete) if complete else (incomplete, target)
    try:
        other.unlink(missing_ok=True)
    except OSError as error:
        raise output_error(error, other) from error
    write_whole(path, json.dumps(summary, indent=4, sort_keys=True).encode())
    return path
