"""`compile`, `export`, `clean`: from a trained model to networks and bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trtbuild import show
from trtbuild.commands.shared import FOLDER, command, interruptible
from trtbuild.config import CompileConfig
from trtbuild.options import FoldOption


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that say what to take from a trained-model folder."""
    for option in (
        click.option(
            "--assume-plans-architecture",
            is_flag=True,
            help="Your word that a trainer that trtbuild does not know uses the network of plans.json.",
        ),
        click.option(
            "--trust-checkpoint",
            is_flag=True,
            help="Allow the checkpoint and the plans to run code of their own. Only for files you made.",
        ),
        click.option(
            "-chk",
            "checkpoint",
            default="checkpoint_final.pth",
            show_default=True,
            metavar="FILE",
            help="Checkpoint inside every fold.",
        ),
        click.option(
            "-f",
            "folds",
            cls=FoldOption,
            metavar="FOLDS",
            help="Folds: -f 0 1 2, -f 0,1,2 or -f all. Default: all numbered folds.",
        ),
    ):
        function = option(function)
    return function


@command("compile")
@click.argument("model", type=FOLDER)
@click.option("-o", "output", type=FOLDER, required=True, help="The bundle to write, NAME.trtb.")
@model_options
@click.option(
    "--backend",
    "backends",
    multiple=True,
    default=("auto",),
    show_default=True,
    metavar="NAME",
    help="auto, openvino or onnxruntime; repeat it for engines of several backends.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="What the engine computes in. bf16 needs OpenVINO and a CPU that has it.",
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: all this process may use.")
@click.option("--no-tune", is_flag=True, help="Skip the short measurement of streams and batch.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def compile_command(as_json: bool, no_tune: bool, **options: Any) -> None:
    """Make a bundle of a trained-model folder, or of a bundle with other engines.

    MODEL is a folder <Trainer>__<Plans>__<configuration> as nnU-Net left it. Every fold is exported to ONNX, cleaned,
    compared with PyTorch, built for the backend and compared again.
    """
    from trtbuild.steps.compile import compile_bundle
    from trtbuild.steps.inspect import overview

    with show.steps(quiet=as_json) as report:
        bundle = compile_bundle(CompileConfig(tune=not no_tune, **options), interruptible(report))
    facts = overview(bundle)
    show.json_or(as_json, facts, lambda: show.bundle(facts))


@command("export")
@click.argument("model", type=FOLDER)
@click.option("-o", "output", type=FOLDER, required=True, help="Folder for the ONNX files.")
@model_options
@click.option("--overwrite", is_flag=True, help="Write into a folder that is not empty.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def export_command(model: Path, output: Path, overwrite: bool, as_json: bool, **options: Any) -> None:
    """Export every fold to ONNX (opset 20, dynamic batch), compared with PyTorch."""
    from trtbuild.source import SourceConfig
    from trtbuild.steps.export import export_folder

    with show.steps(quiet=as_json) as report:
        config = SourceConfig(folder=model, **options)
        files = export_folder(config, output, overwrite=overwrite, report=interruptible(report))
    facts = [{"fold": f.fold, "file": str(f.file), "max_error": f.max_error} for f in files]
    show.json_or(as_json, {"networks": facts}, lambda: show.exported(facts))


@command("clean")
@click.argument("source", type=FOLDER)
@click.option("-o", "output", type=FOLDER, required=True, help="The clean ONNX file to write.")
@click.option(
    "--rewrite-conv-transpose",
    is_flag=True,
    help="Rewrite ConvTranspose with kernel = stride as 1x1 Conv + depth-to-space (for TensorRT).",
)
@click.option(
    "--split-instance-norm",
    is_flag=True,
    help="Write InstanceNormalization as sums of sums (accurate in float32 on CPUs); without it, join them again.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def clean_command(source: Path, output: Path, as_json: bool, **options: bool) -> None:
    """Clean an ONNX file: fold, drop, name, and show what changed."""
    from trtbuild.steps.export import clean_file
    from trtbuild.steps.inspect import clean_facts

    facts = clean_facts(clean_file(source, output, **options))
    show.json_or(as_json, facts, lambda: show.cleaned(facts))
