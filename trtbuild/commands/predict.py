"""`predict`: images to segmentations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from trtbuild import show
from trtbuild.commands.shared import FOLDER, command, interruptible
from trtbuild.config import PredictConfig
from trtbuild.errors import InputError, SomeCasesFailed, TrtbuildError
from trtbuild.options import BYTES, DEVICES, FoldOption, InputsOption, WeightsOption
from trtbuild.spec import json_from_value

DICOM = "dicom_seg"


@command("predict")
@click.argument("bundles", metavar="BUNDLE...", type=FOLDER, nargs=-1, required=True)
@click.option(
    "-i",
    "inputs",
    cls=InputsOption,
    type=FOLDER,
    required=True,
    help="A folder with case_0000 files, image files, case lists (.json, .txt), or DICOM series (a folder of slices, "
    "or of such folders): all words up to the next option.",
)
@click.option("-o", "output", type=FOLDER, required=True, help="Output folder; it is made if needed.")
@click.option("-f", "folds", cls=FoldOption, metavar="FOLDS", help="Folds of the bundles to use. Default: all.")
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
    "-prev_stage_predictions",
    "previous_stage",
    type=FOLDER,
    help="Folder with predictions of a cascade's first stage, in place of running it.",
)
@click.option(
    "--weights", cls=WeightsOption, metavar="NUMBERS", help="Of an ensemble's bundles: --weights 2 1. Default: equal."
)
@click.option(
    "--vote",
    type=click.Choice(["soft", "hard"]),
    default="soft",
    show_default=True,
    help="How an ensemble decides: mean of the probabilities (nnU-Net's way), or most labels.",
)
@click.option("--disagreement", is_flag=True, help="Also write a map of the entropy, 0 to 1: OUTPUT/disagreement/case.")
@click.option(
    "--postprocessing",
    type=FOLDER,
    metavar="FILE",
    help="nnU-Net's postprocessing.json or .pkl (which is read, not run) in place of the bundle's rules; or none.",
)
@click.option(
    "-ot",
    "--output-type",
    "output_type",
    type=click.Choice(["nnunet", DICOM]),
    default="nnunet",
    show_default=True,
    help=f"Of the segmentations: the model's own file ending, or {DICOM} (for DICOM input) beside it.",
)
@click.option(
    "--max-memory",
    "max_memory",
    type=BYTES,
    metavar="SIZE",
    help="Of all processes together, such as 8G. A case that would need more waits for the others, is summed in "
    "float16, or is refused by name. Default: what is free, and no float16.",
)
@click.option(
    "--devices",
    type=DEVICES,
    default="0",
    show_default=True,
    metavar="NUMBERS",
    help="GPUs for engines that need one, such as 0,1, all of one kind. The cases go over them; a single case is "
    "shared among them (not with -num_parts).",
)
@click.option(
    "--max-device-memory",
    "device_memory",
    type=BYTES,
    metavar="SIZE",
    help="Of each GPU, for a case. One that would need more leaves the GPU in parts, is summed in float16, or is "
    "refused by name. Default: what is free, and no float16.",
)
@click.option("-num_parts", "num_parts", type=click.IntRange(1), default=1, help="Split the cases into so many parts.")
@click.option("-part_id", "part_id", type=click.IntRange(0), default=0, help="The part to predict, from 0.")
@click.option(
    "-npp",
    "preparing",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="0 reads and prepares in turn with the network, any other number beside it.",
)
@click.option("-nps", "writing", type=click.IntRange(0), default=1, show_default=True, help="The same for writing.")
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    metavar="NAME",
    help="auto takes the first engine of the bundle that runs here; a name takes that one or fails.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: those of the engine's record.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def predict_command(as_json: bool, disable_tta: bool, output_type: str, **options: Any) -> None:
    """Segment images with a bundle, or with several as an ensemble. Outputs have nnU-Net's names and types.

    \b
      trtbuild predict brain.trtb -i imagesTs -o out
      trtbuild predict 2d.trtb 3d.trtb -i imagesTs -o out            an ensemble
      trtbuild predict lung.trtb -i dicom_folder -o out -ot dicom_seg
    """
    from trtbuild.steps.folder_run.cases import predict_cases

    config = PredictConfig(mirroring=not disable_tta, dicom_seg=output_type == DICOM, **options)
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
