"""What `evaluate` prints: a line per case on stderr, and one table with a row per label."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trtbuild.show import console

if TYPE_CHECKING:
    from rich.console import Console

    from trtbuild.steps.evaluation.folders import CaseOutcome, EvaluationReport
    from trtbuild.steps.evaluation.inputs import Evaluation

Started = Callable[["Evaluation", int], None]
CaseEnded = Callable[["CaseOutcome"], None]


@contextlib.contextmanager
def comparing(*, quiet: bool) -> Iterator[tuple[Started, CaseEnded]]:
    """Progress on stderr: a bar on a terminal, and everywhere a line for what is not as it should be."""
    if quiet:
        yield (lambda evaluation, processes: None), (lambda outcome: None)
        return
    screen = console(to_error=True)
    if not screen.is_terminal:
        yield (
            (lambda evaluation, processes: screen.print(_started(evaluation, processes))),
            (lambda outcome: screen.print(_ended(outcome))),
        )
        return
    with _bar(screen) as callbacks:
        yield callbacks


@contextlib.contextmanager
def _bar(screen: Console) -> Iterator[tuple[Started, CaseEnded]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bars:
        task = bars.add_task("cases", total=None)

        def started(evaluation: Evaluation, processes: int) -> None:
            screen.print(_started(evaluation, processes))
            bars.update(task, total=len(evaluation.pairs))

        def ended(outcome: CaseOutcome) -> None:
            if outcome.error is not None or outcome.warnings:
                screen.print(_ended(outcome))
            bars.advance(task)

        yield started, ended


def _started(evaluation: Evaluation, processes: int) -> str:
    cases, labels = len(evaluation.pairs), len(evaluation.labels)
    line = (
        f"{cases} case{'s' * (cases != 1)}, {labels} label{'s' * (labels != 1)}, "
        f"{processes} process{'es' * (processes != 1)}, read by {evaluation.reader}"
    )
    if evaluation.not_predicted:
        line += f"\nwarning: {len(evaluation.not_predicted)} references have no prediction and do not count"
    return line


def _ended(outcome: CaseOutcome) -> str:
    if outcome.error is not None:
        return f"{outcome.case}: FAILED. {outcome.error.splitlines()[0]}"
    return f"{outcome.case}: compared" + "".join(f"\n  warning: {text}" for text in outcome.warnings)


def evaluation(report: EvaluationReport) -> None:
    """The means per label, and where the summary is. Where cases failed there are no means."""
    screen = console()
    if "mean" in report.summary:
        screen.print(_table(report))
    screen.print(f"{'written to' if not report.failed else 'what could be compared is in'} {report.output}")


def _table(report: EvaluationReport) -> Any:
    from rich import box
    from rich.table import Table

    summary, names = report.summary, report.evaluation.names
    surface = summary["trtbuild"].get("surface")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    headings = ["label", "name", "Dice", "IoU"]
    if surface is not None:
        headings += ["HD95 in mm", f"NSD at {surface['nsd_tolerance_mm']:g} mm", "only in one"]
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number < 2 else "right")
    for key, metrics in summary["mean"].items():
        of_surface = None if surface is None else surface["mean"][key]
        table.add_row(key, names.get(key, ""), *_cells(metrics, of_surface))
    foreground = None if surface is None else surface["foreground_mean"]
    table.add_section()
    table.add_row("mean", "", *_cells(summary["foreground_mean"], foreground))
    return table


def _cells(metrics: dict[str, float], surface: dict[str, float] | None) -> list[str]:
    cells = [_number(metrics["Dice"], 4), _number(metrics["IoU"], 4)]
    if surface is not None:
        only = surface.get("one_empty")
        cells += [_number(surface["HD95"], 2), _number(surface["NSD"], 4), "" if only is None else str(only)]
    return cells


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"
