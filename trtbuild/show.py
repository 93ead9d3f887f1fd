"""What the command line prints: tables, progress, JSON. It takes plain values and knows no room."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from trtbuild.steps.folder_run.ending import Outcome
    from trtbuild.steps.folder_run.flow import Events
    from trtbuild.steps.folder_run.planning import CasePlan

STAGES = {
    "read": "reading",
    "prepare": "preparing",
    "network": "network",
    "back": "back to the image",
    "write": "writing",
}


def console(*, to_error: bool = False) -> Console:
    """A console on stdout, or on stderr for progress; it prints text as it is, brackets and colons included.

    Where nobody reads any more (`trtbuild … | head`) the rest goes nowhere: the work goes on, and its exit code stays.
    """
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.file.fileno())

    return Patient(stderr=to_error, highlight=False, markup=False, emoji=False, soft_wrap=True)


def json_or(as_json: bool, facts: Any, otherwise: Callable[[], None]) -> None:
    """Prints the facts as one JSON document, or the tables."""
    if as_json:
        click.echo(json.dumps(facts, indent=2, default=str))
    else:
        otherwise()


@contextlib.contextmanager
def steps(*, quiet: bool) -> Iterator[Callable[[str], None]]:
    """One line per step on stderr, with a spinner on the running one where stderr is a terminal."""
    if quiet:
        yield lambda line: None
        return
    screen = console(to_error=True)
    if not screen.is_terminal:
        yield lambda line: screen.print(line)
        return
    from rich.text import Text

    with screen.status("starting") as status:

        def report(line: str) -> None:
            screen.print(Text.assemble(("•", "dim"), " ", line))
            status.update(Text(line))  # a plain string would be read as markup

        yield report


@contextlib.contextmanager
def cases(*, quiet: bool) -> Iterator[Events]:
    """Progress of a folder run on stderr: on a terminal a bar for the cases and one for each that runs, a line per case
    elsewhere."""
    from trtbuild.steps.folder_run.flow import Events

    if quiet:
        yield Events()
        return
    screen = console(to_error=True)
    if not screen.is_terminal:
        yield _plain_events(screen)
        return
    with _bars(screen) as events:
        yield events


def _started_lines(count: int, predictor: Any) -> list[str]:
    """What was not taken and why, and what runs: one line per model."""
    lines = [f"not {name}: {reason}" for model in predictor.models for name, reason in model.refused]
    lines.append(f"{count} case{'s' * (count != 1)}")
    for model in predictor.models:
        records = iter(model.records)
        for stage in model.stages:
            info, folds = stage.runners[0].describe(), len(stage.runners)
            record, *_ = islice(records, folds)  # of each runner
            lines.append(
                f"{printable(stage.spec.configuration)}, {folds} fold{'s' * (folds != 1)}: {info.backend} "
                f"{info.version} in {computes_in(record.precision, info.inference_precision)} on {info.device}"
            )
    return lines


def computes_in(precision: str, inference_precision: str) -> str:
    """A network's precision and what the backend computes the rest of it in, as a phrase: `int8, rest f32`."""
    return f"int8, rest {inference_precision}" if precision == "int8" else inference_precision


def printable(name: str) -> str:
    """A name of a file as one harmless line: a terminal would obey the control characters in it."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in name)


def _plan_line(plan: CasePlan) -> str:
    """The memory that a case will take, and what was changed to make it fit."""
    case = printable(plan.case)
    if plan.peak is None:
        return f"{case}: its size is not known before it is read"
    adapted = f"; to fit: {', '.join(plan.adapted)}" if plan.adapted else ""
    return f"{case}: up to {plan.peak / 1e9:.2f} GB of memory{adapted}"


def _plain_events(screen: Console) -> Events:
    from trtbuild.steps.folder_run.flow import Events

    def started(count: int, predictor: Any) -> None:
        for line in _started_lines(count, predictor):
            screen.print(line)

    return Events(
        started=started,
        case_started=lambda plan: screen.print(_plan_line(plan)),
        case_ended=lambda outcome: screen.print(_outcome_line(outcome)),
    )


@contextlib.contextmanager
def _bars(screen: Console) -> Iterator[Events]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    from trtbuild.steps.folder_run.flow import Events

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as bars:
        overall = bars.add_task("cases", total=None)
        running: dict[str, TaskID] = {}

        def started(count: int, predictor: Any) -> None:
            for line in _started_lines(count, predictor):
                screen.print(line)
            bars.update(overall, total=count)

        def left(case: str) -> None:
            if case in running:
                bars.remove_task(running.pop(case))

        def ended(outcome: Outcome) -> None:
            left(outcome.case)
            screen.print(_outcome_line(outcome))
            bars.advance(overall)

        def progress(case: str, stage: str, done: int, total: int) -> None:
            if stage == "write":  # it is written beside the next case, which takes its line
                left(case)
                return
            if case not in running:
                running[case] = bars.add_task("", total=None)
            bars.update(running[case], description=f"  {printable(case)}: {STAGES[stage]}", completed=done, total=total)

        yield Events(
            started=started,
            case_started=lambda plan: screen.print(_plan_line(plan)),
            case_ended=ended,
            case_progress=progress,
        )


def _outcome_line(outcome: Outcome) -> str:
    case = printable(outcome.case)
    if outcome.error is not None:
        return f"{case}: FAILED. {outcome.error.splitlines()[0]}"
    if outcome.output is None:
        return f"{case}: kept, it was finished before"
    warnings = "".join(f"\n  warning: {text}" for text in outcome.warnings)
    return f"{case}: {sum(outcome.seconds.values()):.1f} s{warnings}"


def new_table(*columns: str, title: str | None = None) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def summary(facts: Mapping[str, Any]) -> None:
    """Cases with their seconds per stage."""
    done = [o for o in facts["outcomes"] if o["output"] is not None]
    if not done:
        return
    stages = list(done[0]["seconds"])
    table = new_table("case", *stages, "seconds")
    for outcome in done:
        seconds = outcome["seconds"]
        table.add_row(
            printable(outcome["case"]), *(f"{seconds[s]:.2f}" for s in stages), f"{sum(seconds.values()):.2f}"
        )
    console().print(table)


def exported(files: Sequence[Mapping[str, Any]]) -> None:
    """The exported files with their difference to PyTorch."""
    table = new_table("fold", "largest difference to PyTorch", "file")
    for file in files:
        table.add_row(file["fold"], f"{file['max_error']:.1e}", file["file"])
    console().print(table)


def cleaned(facts: Mapping[str, Any]) -> None:
    """Counts before and after cleaning, the passes that changed something, and what they left alone."""
    table = new_table("", "before", "after")
    for row in facts["rows"]:
        table.add_row(row["what"], str(row["before"]), str(row["after"]))
    console().print(table)
    changed = [p["name"] for p in facts["passes"] if p["modified"]]
    console().print(f"changed by: {', '.join(changed) or 'no pass, the graph was clean'}")
    for line in (f"{p['name']} left {left}" for p in facts["passes"] for left in p["left"]):
        console().print(line)


def bundle(facts: Mapping[str, Any]) -> None:
    """A bundle at a glance."""
    from rich.text import Text

    out = console()
    size = f"  {facts['bytes'] / 1e6:.1f} MB  {facts['identity'][:16]}"
    out.print(Text.assemble((facts["path"], "bold"), size))
    for stage in facts["stages"]:
        spec = stage["spec"]
        rows = {
            "model": f"{spec['dataset']}, {spec['trainer']}, {spec['plans']}, {spec['configuration']}",
            "channels": ", ".join(
                f"{c} ({n['kind']})" for c, n in zip(spec["channels"], spec["normalization"], strict=True)
            ),
            "labels": ", ".join(spec["labels"]["names"]),
            "patch": " x ".join(map(str, spec["patch"])),
            "spacing": " x ".join(f"{s:g}" for s in spec["spacing"]) + " mm",
            "mirror axes": ", ".join(map(str, stage["mirror_axes"])) or "none",
            "reader": f"{spec['reader']}, *{spec['file_ending']}",
        }
        for name, text in rows.items():
            out.print(f"  {name:<12} {printable(text)}")
    table = new_table("engine", "backend", "computes in", "settings")
    for engine in facts["engines"]:
        settings = ", ".join(f"{key} {value}" for key, value in engine["options"].items() if _is_setting(key, value))
        table.add_row(
            printable(engine["network"]),
            printable(f"{engine['backend']} {engine['version']}"),
            printable(computes_in(engine["precision"], engine["inference_precision"])),
            printable(settings),
        )
    out.print(table)
    if "verified" in facts:
        out.print(f"all {len(facts['verified'])} files have the right hash")


def _is_setting(key: str, value: object) -> bool:
    """What says how an engine runs: no hash or path, and nothing that is not set."""
    return key not in ("key", "sha256", "layers") and value is not False and value != ""


def health(facts: Mapping[str, Any]) -> None:
    """What is installed, what is not, and how to get it."""
    out = console()
    out.print(
        f"trtbuild {facts['trtbuild']}, Python {facts['python']}, {facts['system']}, {facts['processors']} processors"
    )
    table = new_table("extra", "packages", "missing")
    for extra, packages in facts["extras"].items():
        there = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        missing = [name for name, version in packages.items() if not version]
        command = "pip install trtbuild" if extra == "base" else f"pip install 'trtbuild[{extra}]'"
        advice = f"{', '.join(missing)}\n{command}" if missing else ""
        table.add_row(extra, there, advice)
    out.print(table)
    table = new_table("backend", "state", "why")
    for backend in facts["backends"]:
        table.add_row(
            backend["name"], f"ready, {backend['version']}" if backend["available"] else "not here", backend["reason"]
        )
    out.print(table)
    for number, gpu in enumerate(facts["gpus"]):
        out.print(f"GPU {number}: {printable(gpu.get('error') or _gpu(gpu))}")


def _gpu(gpu: Mapping[str, Any]) -> str:
    return (
        f"{gpu['gpu']}, {gpu['memory'] / (1 << 30):.1f} GiB, compute capability {gpu['capability']}, driver for CUDA "
        f"{gpu['driver']}"
    )
