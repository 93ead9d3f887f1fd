"""`compile`, `export`, `clean`: from a trained model to networks and bundles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from trtbuild import show, show_precision
from trtbuild.commands.given import check_options
from trtbuild.commands.onnx_file import ONNX_FILE, check_model_options, compile_onnx
from trtbuild.commands.precision import CALIBRATION, GATE, LAYERS, calibration_from, gate_from
from trtbuild.commands.precision import options as precision_options
from trtbuild.commands.shared import FOLDER, command, interruptible
from trtbuild.commands.tensorrt import TENSORRT, tensorrt_from
from trtbuild.config import CompileConfig
from trtbuild.options import FoldOption

FACTORY_HELP = (
    "module:function that builds the network, in place of plans.json and the trainer: usually the trainer's own, "
    "my_trainers:MyTrainer.build_network_architecture. The module is imported, so PYTHONPATH must lead to it. The "
    "function gets by name, as far as it asks: architecture_class_name, arch_init_kwargs, arch_init_kwargs_req_import, "
    "num_input_channels, num_output_channels, enable_deep_supervision (False), dataset_json, plans_manager, "
    "configuration_manager."
)


def model_options(function: Callable[..., None]) -> Callable[..., None]:
    """The argument and the options that say which trained model to take and what of it."""
    decorators = (
        click.argument("model", type=FOLDER, required=False),
        click.option(
            "-d", "dataset", metavar="DATASET", help="Dataset123_NAME or 123, looked up below nnUNet_results."
        ),
        click.option("-c", "configuration", metavar="CONFIG", help="Configuration: 2d, 3d_fullres, …"),
        click.option("-tr", "trainer", metavar="TRAINER", help="Trainer. Default with -d alone: nnUNetTrainer."),
        click.option("-p", "plans", metavar="PLANS", help="Plans. Default with -d alone: nnUNetPlans."),
        click.option(
            "-f",
            "folds",
            cls=FoldOption,
            metavar="FOLDS",
            help="Folds: -f 0 1 2, -f 0,1,2 or -f all. Default: all numbered folds.",
        ),
        click.option(
            "-chk",
            "checkpoint",
            default="checkpoint_final.pth",
            show_default=True,
            metavar="FILE",
            help="Checkpoint inside every fold.",
        ),
        click.option("--network", metavar="MODULE:FUNCTION", help=FACTORY_HELP),
        click.option(
            "--trust-checkpoint",
            is_flag=True,
            help="Allow the checkpoint and the plans to run code of their own. Only for files you made.",
        ),
        click.option(
            "--assume-plans-architecture",
            is_flag=True,
            help="Your word that a trainer that trtbuild does not know uses the network of plans.json.",
        ),
    )
    for decorator in reversed(decorators):
        function = decorator(function)
    return function


@command("compile")
@model_options
@click.option("-o", "output", type=FOLDER, required=True, help="The bundle to write, NAME.trtb.")
@click.option(
    "--previous-stage",
    "previous_stage",
    type=FOLDER,
    metavar="MODEL",
    help="For a cascade: the model (folder or zip) of the first stage, for one bundle that runs both.",
)
@click.option(
    "--postprocessing",
    type=FOLDER,
    metavar="FILE",
    help="postprocessing.json or postprocessing.pkl of nnU-Net, applied by predict. A pickle is not executed.",
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    default=("auto",),
    show_default=True,
    metavar="NAME",
    help="auto, openvino, onnxruntime, tensorrt, tensorrt-rtx or onnxruntime-cuda; repeat it for engines of several "
    "backends. The last two need no GPU here; auto takes what runs on this machine.",
)
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8"]),
    default="fp32",
    show_default=True,
    help="What the engine computes in. int8 needs --calibration, and so does fp16 on a CPU, which computes it in "
    "float32: it only halves the file. bf16 on a CPU needs OpenVINO and a CPU that has it.",
)
@precision_options(CALIBRATION)
@click.option(
    "--scales",
    type=FOLDER,
    metavar="FOLDER",
    help="Keep the calibration here: a second run resumes it or uses it again.",
)
@click.option(
    "--method",
    type=click.Choice(["auto", "entropy", "percentile", "minmax"]),
    default="auto",
    show_default=True,
    help="How INT8 thresholds are chosen. auto: the gate decides between the three; percentile for NET.onnx, "
    "which has no gate.",
)
@click.option(
    "--rest",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="What INT8 engines compute in besides the quantised layers. Default: fp32 on a CPU, where bf16 is faster if "
    "it has it; fp16 in TensorRT.",
)
@precision_options(LAYERS, GATE, TENSORRT, ONNX_FILE)
@click.option("--threads", type=click.IntRange(1), help="CPU threads. Default: all this process may use.")
@click.option("--no-tune", is_flag=True, help="Skip the short measurement of streams and batch.")
@click.option("--overwrite", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def compile_command(as_json: bool, no_tune: bool, **options: Any) -> None:
    """Make a bundle of a trained model, or of a bundle with other engines.

    \b
      trtbuild compile MODEL -o brain.trtb
      trtbuild compile MODEL --precision int8 --calibration nnUNet_preprocessed/DatasetX -o brain8.trtb
      trtbuild compile MODEL --backend tensorrt-rtx --precision fp16 -o brain_rtx.trtb
      trtbuild compile net.onnx --backend tensorrt-rtx --precision fp16 -o net.engine

    MODEL is a folder <Trainer>__<Plans>__<configuration> as nnU-Net left it, a zip made by
    nnUNetv2_export_model_to_zip (of several models in it -d, -c, -tr and -p choose one), or a bundle. Without it, -d
    and -c name a model below nnUNet_results. Every fold is exported to ONNX, cleaned, compared with PyTorch, built for
    the backend and compared again. In a lower precision a gate compares it with FP32 on cases that the calibration did
    not see, by Dice against their labels; where it fails, the layers that hurt go back to higher precision, and if
    that does not help the command ends with exit code 3 and a bundle of FP32 engines.

    Any other network, NET.onnx, becomes NAME.engine (the raw plan), NAME.onnx (the typed graph that it was built from)
    and NAME.engine.json (what is known of it).
    """
    from trtbuild.steps.compilation.compile import compile_bundle
    from trtbuild.steps.inspect import overview

    is_onnx = options["model"] is not None and options["model"].suffix.lower() == ".onnx"
    tensorrt = tensorrt_from(options, is_onnx=is_onnx)
    if is_onnx:
        compile_onnx(options, tensorrt, as_json=as_json)
        return
    check_model_options(options)
    cases = options["data"] is not None or options["images"] is not None
    check_options(options["precision"], cases=cases, gate=options["gate"])
    calibration, gate = calibration_from(options), gate_from(options)
    config = CompileConfig(tune=not no_tune, calibration=calibration, gate=gate, tensorrt=tensorrt, **options)
    with show_precision.steps(quiet=as_json) as progress:
        bundle = compile_bundle(config, interruptible(progress.report), interruptible(progress.say))
    facts = overview(bundle)
    show.json_or(as_json, facts, lambda: show_precision.bundle(facts))


@command("export")
@model_options
@click.option("-o", "output", type=FOLDER, required=True, help="Folder for the ONNX files.")
@click.option("--overwrite", is_flag=True, help="Write into a folder that is not empty.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object at the end.")
def export_command(
    model: Path | None,
    dataset: str | None,
    configuration: str | None,
    trainer: str | None,
    plans: str | None,
    output: Path,
    overwrite: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Export every fold to ONNX (opset 20, dynamic batch), compared with PyTorch.

    MODEL is a trained-model folder or a zip of nnU-Net. Without it, -d and -c name a model below nnUNet_results.
    """
    from trtbuild.source import ModelName, SourceConfig
    from trtbuild.steps.compilation.export import export_folder

    name = ModelName(dataset=dataset, configuration=configuration, trainer=trainer, plans=plans)
    with show.steps(quiet=as_json) as report:
        config = SourceConfig(folder=model, name=name, **options)
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
    from trtbuild.steps.compilation.export import clean_file
    from trtbuild.steps.inspect import clean_facts

    facts = clean_facts(clean_file(source, output, **options))
    show.json_or(as_json, facts, lambda: show.cleaned(facts))
