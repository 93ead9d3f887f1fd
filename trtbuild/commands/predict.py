"""`predict`: images to segmentations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from trtbuild import show
from trtbuild.commands.shared import FOLDER, command, interruptible
from trtbuild.config import PredictConfig
from trtbuild.errors import InputError, SomeCasesFailed, TrtbuildError
from trtbuild.options import FoldOption, InputsOption
from trtbuild.spec import json_from_value


@command("predict")
@click.argument("bundle", type=FOLDER)
@click.option(
    "-i",
    "inputs",
    cls=InputsOption,
    type=FOLDER,
    required=True,
    help="A folder with case_0000 files, image files, or case lists (.json, .txt): all words up to the next option.",
)
@click.option("-o", "output", type=FOLDER, required=True, help="Output folder; it is made if needed.")
@click.option("-f", "folds", cls=FoldOption, metavar="FOLDS", help="Folds of the bundle to use. Default: all.")
@click.option(
    "-step_size",
    "step_size",
    type=float,
    default=0.5,
    show_default=True,
    help="Distance between windows as a share of the patch.",
)
@click.option("--disable_tta", is_flag=True, help="No mirroring: faster (8x in 3D), slightly less accurate.")
@click.option("--save_probabilities", is_flag=True, help="Also write case.npz and case.pkl, as nnU-Net does.")
@click.option("--continue_prediction", "--c", is_flag=True, help="Keep the finished cases of an interrupted run.")
@click.option(
    "-prev_stage_predictions", "previous_stage", type=FOLDER, help="Predictions of the previous stage of a cascade."
)
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="auto takes the first engine of the bundle that runs here; a name takes that one or fails.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: those of the engine's record.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def predict_command(as_json: bool, disable_tta: bool, previous_stage: Path | None, **options: Any) -> None:
    """Segment images with a bundle. Outputs have nnU-Net's names and types."""
    from trtbuild.steps.cases import predict_cases

    if previous_stage is not None:
        raise InputError(
            "The bundle is not the second stage of a cascade.",
            got="-prev_stage_predictions",
            where=options["bundle"],
            hint="leave the option out",
        )
    config = PredictConfig(mirroring=not disable_tta, **options)
    with show.cases(quiet=as_json) as events:
        summary = predict_cases(config, replace(events, progress=interruptible(events.progress)))
    facts = json_from_value(summary)
    show.json_or(as_json, facts, lambda: show.summary(facts))
    if summary.failed:
        raise failure(len(summary.failed), len(summary.outcomes), [(o.case, o.error or "") for o in summary.failed])


def failure(failed: int, total: int, errors: list[tuple[str, str]]) -> TrtbuildError:
    """Exit code 1 where no case succeeded, 4 where some did; the message names every failed case."""
    text = "\n\n".join(f"case {case}: {error}" for case, error in errors)
    if failed == total:
        return InputError(f"No case could be predicted.\n\n{text}" if total > 1 else text)
    return SomeCasesFailed(f"{failed} of {total} cases failed.\n\n{text}")
