"""The command line: arguments -> configuration -> step -> exit code. No logic."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

import trtbuild
from trtbuild import show
from trtbuild.config import CompileConfig, PredictConfig
from trtbuild.errors import InputError, SomeCasesFailed, TrtbuildError
from trtbuild.options import FoldOption, InputsOption, WordCommand
from trtbuild.spec import json_from_value

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
FOLDER = click.Path(path_type=Path, readable=False)  # what cannot be read is refused by who reads it
INTERRUPTED = 130

Decorator = Callable[[Callable[..., None]], Callable[..., None]]


class Interrupts:
    """Remembers Ctrl-C. Python drops a KeyboardInterrupt that is raised inside a callback from C, as Numba's loader."""

    seen = False

    def note(self, signal_number: int, frame: object) -> None:
        """The handler of SIGINT: remembers, then raises as Python's own does."""
        self.seen = True
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raises KeyboardInterrupt if there was one, even if it was dropped."""
        if self.seen:
            raise KeyboardInterrupt


@contextlib.contextmanager
def watched_interrupts() -> Iterator[Interrupts]:
    """Remembers Ctrl-C while the block runs. Only in the main thread, and where Ctrl-C does what Python makes it do."""
    interrupts = Interrupts()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before is not signal.default_int_handler:
        yield interrupts
        return
    signal.signal(signal.SIGINT, interrupts.note)
    try:
        yield interrupts
    finally:
        signal.signal(signal.SIGINT, before)


def interruptible(callback: Callable[..., Any] | None) -> Callable[..., Any]:
    """A progress callback that first raises KeyboardInterrupt if Ctrl-C was pressed and lost."""
    interrupts = click.get_current_context().ensure_object(Interrupts)

    def call(*values: Any) -> Any:
        interrupts.check()
        return None if callback is None else callback(*values)

    return call


def command(name: str) -> Decorator:
    """A verb of the command line, with nnU-Net's one-dash words."""
    return main.command(name, cls=WordCommand, context_settings=CONTEXT)


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


@click.group(context_settings=CONTEXT)
@click.version_option(trtbuild.__version__, "-V", "--version", prog_name="trtbuild")
def main() -> None:
    """Makes a verified bundle of a trained nnU-Net v2 model and runs it without PyTorch.

    \b
      trtbuild compile MODEL_FOLDER -o brain.trtb     once, with PyTorch
      trtbuild predict brain.trtb -i IMAGES -o OUT    anywhere

    Exit codes: 0 done, 1 input or environment, 2 usage, 4 some cases failed, 130 interrupted.
    """


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


@command("inspect")
@click.argument("bundle", type=FOLDER)
@click.option("--verify", is_flag=True, help="Also check the hash of every file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_command(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what a bundle holds: model, networks, engines, where it came from."""
    from trtbuild.steps.inspect import inspect_bundle

    facts = inspect_bundle(bundle, verify=verify)
    show.json_or(as_json, facts, lambda: show.bundle(facts))


@command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(as_json: bool) -> None:
    """Show what this machine has and what is missing, with the command that installs it."""
    from trtbuild.steps.doctor import health

    facts = json_from_value(health())
    show.json_or(as_json, facts, lambda: show.health(facts))


def run(arguments: list[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors for the user are printed without a traceback."""
    try:
        with watched_interrupts() as interrupts:
            main.main(args=arguments, prog_name="trtbuild", standalone_mode=False, obj=interrupts)
            interrupts.check()
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted; finished outputs are kept.", err=True)
        return INTERRUPTED
    except OSError as error:
        where = "" if error.filename is None else f": {os.fsdecode(error.filename)}"
        return reported(TrtbuildError(f"The system refused: {error.strerror or error}{where}"), arguments)
    except TrtbuildError as error:
        return reported(error, arguments)
    return 0


def reported(error: TrtbuildError, arguments: list[str] | None) -> int:
    """Prints the error as text, or as JSON where the command was asked for it; returns the exit code."""
    if "--json" in (arguments if arguments is not None else sys.argv):
        click.echo(json.dumps({"error": type(error).__name__, "message": str(error)}), err=True)
    else:
        click.echo(f"Error: {error}", err=True)
    return error.exit_code
