"""`calibrate` and `quantize`, and the options about precision that `compile` shares with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trtbuild import show_precision
from trtbuild.commands.shared import FOLDER, command, interruptible
from trtbuild.config import CalibrationConfig, GateConfig, QuantizeConfig
from trtbuild.options import FoldOption
from trtbuild.show import json_or

Decorator = Callable[[Callable[..., None]], Callable[..., None]]

CALIBRATION = (
    click.option(
        "--calibration",
        "data",
        type=FOLDER,
        metavar="FOLDER",
        help="Preprocessed training cases: nnUNet_preprocessed/DatasetX, or the folder of one configuration in it.",
    ),
    click.option(
        "--calibration-images",
        "images",
        type=FOLDER,
        metavar="FOLDER",
        help="Raw images in place of preprocessed cases, such as imagesTr.",
    ),
    click.option(
        "--calibration-labels", "labels", type=FOLDER, metavar="FOLDER", help="The labels of these images: labelsTr."
    ),
    click.option(
        "--calibration-previous",
        "previous",
        type=FOLDER,
        metavar="FOLDER",
        help="For the second stage of a cascade: what the first one predicted (predicted_next_stage/CONFIG, or "
        "segmentations beside raw images).",
    ),
    click.option(
        "--calibration-patches",
        "patches",
        type=click.IntRange(1),
        default=CalibrationConfig.patches,
        show_default=True,
        help="Patches to measure ranges on.",
    ),
    click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Of the choice of patches."),
)
GATE = (
    click.option(
        "--gate/--no-gate",
        default=True,
        show_default=True,
        help="Compare with FP32 on held-out cases, and refuse what loses too much (exit code 3).",
    ),
    click.option(
        "--gate-patches",
        type=click.IntRange(1),
        default=GateConfig.patches,
        show_default=True,
        help="Patches of the held-out cases.",
    ),
    click.option(
        "--max-mean-loss",
        type=click.FloatRange(0, 1),
        default=GateConfig.mean_loss,
        show_default=True,
        help="Largest loss of mean Dice against the labels. 0.006 is what plain INT8 costs an nnU-Net (MedPTQ, 2026).",
    ),
    click.option(
        "--max-class-loss",
        type=click.FloatRange(0, 1),
        default=GateConfig.class_loss,
        show_default=True,
        help="Largest loss of Dice of any class, so that a mean hides no lost organ.",
    ),
    click.option(
        "--min-agreement",
        type=click.FloatRange(0, 1),
        default=GateConfig.agreement,
        show_default=True,
        help="Without labels: least Dice of any class between the engine and FP32.",
    ),
    click.option(
        "--no-roll-back",
        is_flag=True,
        help="Do not search for the layers that hurt: the gate passes as it is or fails.",
    ),
)
LAYERS = (
    click.option(
        "--keep",
        multiple=True,
        metavar="REGEX",
        help="Layers that stay in higher precision, by their names (trtbuild inspect lists them). May be repeated.",
    ),
    click.option(
        "--quantize-ends", is_flag=True, help="Quantise the first and the last layer, too: little time, much accuracy."
    ),
)


def options(*groups: tuple[Decorator, ...]) -> Decorator:
    """The options of these groups, in their order."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        for decorator in reversed([entry for group in groups for entry in group]):
            function = decorator(function)
        return function

    return decorate


def calibration_from(given: dict[str, Any]) -> CalibrationConfig | None:
    """Takes the options about calibration out of `given`; None where no cases are named."""
    names = ("data", "images", "labels", "previous", "patches", "seed", "scales")
    values = {name: given.pop(name) for name in names if name in given}
    if values["data"] is None and values["images"] is None:
        for name in ("labels", "previous", "scales"):
            if values.get(name) is not None:
                raise click.UsageError(f"There is nothing to calibrate on beside {values[name]}: add --calibration.")
        return None
    return CalibrationConfig(**values)


def gate_from(given: dict[str, Any]) -> GateConfig | None:
    """Takes the options about the gate out of `given`."""
    config = GateConfig(
        patches=given.pop("gate_patches"),
        mean_loss=given.pop("max_mean_loss"),
        class_loss=given.pop("max_class_loss"),
        agreement=given.pop("min_agreement"),
        roll_back=not given.pop("no_roll_back"),
    )
    return config if given.pop("gate") else None


@command("calibrate")
@click.argument("bundle", type=FOLDER)
@click.option("-o", "scales", type=FOLDER, required=True, help="Folder for the scales. A second run resumes there.")
@options(CALIBRATION)
@click.option("-f", "folds", cls=FoldOption, metavar="FOLDS", help="Folds. Default: all of the bundle.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: all this process may use.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def calibrate_command(
    bundle: Path, folds: tuple[str, ...] | None, threads: int | None, as_json: bool, **given: Any
) -> None:
    """Measure the activations of a bundle's networks on training patches.

    Writes for each network NAME.json (thresholds by entropy, percentile and min-max, ranges, coverage, fingerprint) and
    NAME.cache (TensorRT's calibration cache). `compile --precision int8 --scales FOLDER` uses them; an interrupted run
    goes on where it was. The cases that compile's gate will judge by are left out.
    """
    from trtbuild.steps.precision.verbs import calibrate_bundle

    config = calibration_from(given)
    if config is None:
        raise click.UsageError("Name the training cases with --calibration or --calibration-images.")
    with show_precision.steps(quiet=as_json) as progress:
        facts = calibrate_bundle(
            bundle, config, folds=folds, threads=threads, report=interruptible(progress.report),
            say=interruptible(progress.say),
        )  # fmt: skip
    json_or(as_json, facts, lambda: show_precision.calibrations(facts["calibrations"]))


@command("quantize")
@click.argument("source", type=FOLDER)
@click.option(
    "--scales",
    type=FOLDER,
    metavar="FILE",
    help="NAME.json of `trtbuild calibrate`, which knows its network, or a calibration cache of TensorRT, which does "
    "not: only the names of its tensors are compared. A network with Q/DQ of its own needs none.",
)
@click.option("-o", "output", type=FOLDER, required=True, help="The INT8 ONNX file to write.")
@click.option(
    "--backend",
    type=click.Choice(["openvino", "onnxruntime", "tensorrt"]),
    default="openvino",
    show_default=True,
    help="Whose form of the graph: uint8 with zero point 128 for CPUs, int8 with 0 and rewritten ConvTransposes for "
    "TensorRT.",
)
@click.option(
    "--method",
    type=click.Choice(["entropy", "percentile", "minmax"]),
    help="Which thresholds of the table. Default: percentile, or what a cache holds.",
)
@click.option(
    "--rest",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    default="fp32",
    show_default=True,
    help="What is not quantised; fp16 and bf16 are for TensorRT.",
)
@click.option("--fp16-norms", is_flag=True, help="With --rest fp16: normalise in FP16, too (else in FP32).")
@options(LAYERS)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def quantize_command(as_json: bool, **given: Any) -> None:
    """Write INT8 (explicit Q/DQ) into a clean ONNX network.

    No gate judges this file: `compile --precision int8` does. A network that comes with Q/DQ of its own (from
    quantisation-aware training) keeps them, and is only brought into the form of the backend.
    """
    from trtbuild.steps.precision.verbs import quantize_file

    facts = quantize_file(QuantizeConfig(**given))
    json_or(as_json, facts, lambda: show_precision.quantized(facts))
