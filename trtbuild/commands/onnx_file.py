"""`compile NET.onnx`: an engine of any network, without nnU-Net's plans."""

from __future__ import annotations

from typing import Any

import click

from trtbuild import show, show_precision
from trtbuild.commands.given import options_given
from trtbuild.commands.shared import FOLDER, interruptible
from trtbuild.config import TensorRTConfig

ONNX_FILE = (
    click.option("--minShapes", "min_shapes", metavar="X:1x1x64x64,…", default="", help="NET.onnx: smallest inputs."),
    click.option("--optShapes", "opt_shapes", metavar="X:4x1x64x64,…", default="", help="NET.onnx: usual inputs."),
    click.option("--maxShapes", "max_shapes", metavar="X:8x1x64x64,…", default="", help="NET.onnx: largest inputs."),
    click.option(
        "--calibration-arrays",
        "arrays",
        type=FOLDER,
        metavar="FILE",
        help="NET.onnx: inputs to measure ranges on: .npy (N, *shape), .npz (an array per input), Polygraphy's .json.",
    ),
)
BATCHES = ("min_batch", "opt_batch", "max_batch")
OWN = ("min_shapes", "opt_shapes", "max_shapes", "arrays")
SHARED = (
    "output", "backends", "precision", "rest", "method", "keep", "quantize_ends", "fp16_norms", "emit_script",
    "threads", "overwrite",
)  # fmt: skip


def check_model_options(arguments: dict[str, Any]) -> None:
    """Options of an ONNX file beside a trained model are a usage error."""
    given = options_given(*OWN)
    if given:
        raise click.UsageError(f"{given[0]} is for NET.onnx, and {arguments['model'] or 'this'} is a trained model.")
    for name in OWN:
        arguments.pop(name)


def compile_onnx(arguments: dict[str, Any], tensorrt: TensorRTConfig, *, as_json: bool) -> None:
    """Compiles `arguments["model"]`, an ONNX file; an option of trained models is a usage error."""
    from trtbuild.spec import json_from_value
    from trtbuild.steps.compilation.backends import tensorrt_flavour
    from trtbuild.steps.compilation.onnx_config import OnnxFileConfig
    from trtbuild.steps.compilation.onnx_file import compile_onnx_file

    strange = options_given("no_tune", *(name for name in arguments if name not in (*SHARED, *OWN, "model")))
    if strange:
        raise click.UsageError(f"{strange[0]} is for trained models, and {arguments['model']} is an ONNX file.")
    values = {name: arguments[name] for name in (*SHARED, *OWN) if name not in ("backends", "method", "arrays")}
    method = None if arguments["method"] == "auto" else arguments["method"]
    with show_precision.steps(quiet=as_json) as progress:
        config = OnnxFileConfig(
            model=arguments["model"],
            backend=tensorrt_flavour(arguments["backends"], progress.report),
            method=method,
            calibration=arguments["arrays"],
            batch_options=tuple(options_given(*BATCHES)),
            tensorrt=tensorrt,
            **values,
        )
        compiled = compile_onnx_file(config, interruptible(progress.report), interruptible(progress.say))
    facts = json_from_value(compiled)
    show.json_or(as_json, facts, lambda: show_precision.onnx_file(facts))
