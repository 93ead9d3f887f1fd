"""`evaluate`: predictions against references."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trtbuild import show, show_evaluation
from trtbuild.commands.shared import FOLDER, command, interruptible
from trtbuild.errors import InputError, SomeCasesFailed, TrtbuildError
from trtbuild.options import GreedyOption


class LabelsOption(GreedyOption):
    """`-l 1 2 3`: all whole numbers that follow."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **(kwargs | {"multiple": True, "type": click.INT}))

    def takes(self, word: str) -> bool:
        """Whole numbers."""
        return word.removeprefix("-").isdecimal()


@command("evaluate")
@click.argument("reference", type=FOLDER)
@click.argument("prediction", type=FOLDER)
@click.option("-djfile", "dataset", type=FOLDER, help="dataset.json. Default: the one in the prediction folder.")
@click.option("-pfile", "plans", type=FOLDER, help="plans.json. Default: the one in the prediction folder, if any.")
@click.option("-l", "labels", cls=LabelsOption, metavar="LABELS", help="Labels to evaluate, in place of -djfile.")
@click.option("-il", "ignore", type=int, help="Ignore label; goes with -l.")
@click.option("-o", "output", type=FOLDER, help="The file to write. Default: summary.json in the prediction folder.")
@click.option("-np", "processes", type=click.IntRange(1), help="Processes. Default: what this machine may use.")
@click.option("--chill", is_flag=True, help="Evaluate what is there where references have no prediction.")
@click.option("--surface", is_flag=True, help="Also HD95 and NSD. Needs pip install 'trtbuild[evaluate]'.")
@click.option(
    "--nsd-tolerance",
    type=click.FloatRange(0),
    default=2.0,
    show_default=True,
    metavar="MM",
    help="Distance in mm up to which surfaces agree.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def evaluate_command(as_json: bool, labels: tuple[int, ...], **options: Any) -> None:
    """Compare a folder of predictions with a folder of references.

    Writes nnU-Net's summary.json: the same keys and values, with what nnU-Net does not measure under "trtbuild".
    """
    from trtbuild.steps.evaluation.folders import EvaluateConfig, evaluate_folders

    config = EvaluateConfig(labels=labels or None, **options)
    with show_evaluation.comparing(quiet=as_json) as (started, case_ended):
        report = evaluate_folders(config, started=started, case_ended=interruptible(case_ended))
    facts = {"output": str(report.output), **report.summary}
    show.json_or(as_json, facts, lambda: show_evaluation.evaluation(report))
    if report.failed:
        raise failure(len(report.evaluation.pairs), [(o.case, o.error or "") for o in report.failed], report.output)


def failure(total: int, errors: list[tuple[str, str]], output: Path) -> TrtbuildError:
    """Exit code 1 where no case could be compared, 4 where some could; the message names every failed case."""
    text = "\n\n".join(f"case {case}: {error}" for case, error in errors)
    if len(errors) == total:
        return InputError(f"No case could be compared.\n\n{text}")
    return SomeCasesFailed(
        f"{len(errors)} of {total} cases failed, so there is no summary; {output} has the others.\n\n{text}"
    )
