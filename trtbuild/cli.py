"""The command line: all verbs together, and what becomes of their errors."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator

import click

import trtbuild
from trtbuild.commands.compile import clean_command, compile_command, export_command
from trtbuild.commands.evaluate import evaluate_command
from trtbuild.commands.look import doctor_command, inspect_command
from trtbuild.commands.precision import calibrate_command, quantize_command
from trtbuild.commands.predict import predict_command
from trtbuild.commands.shared import CONTEXT, Interrupts
from trtbuild.errors import TrtbuildError

INTERRUPTED = 130


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


@click.group(context_settings=CONTEXT)
@click.version_option(trtbuild.__version__, "-V", "--version", prog_name="trtbuild")
def main() -> None:
    """Makes a verified bundle of a trained nnU-Net v2 model and runs it without PyTorch.

    \b
      trtbuild compile MODEL_FOLDER -o brain.trtb     once, with PyTorch
      trtbuild predict brain.trtb -i IMAGES -o OUT    anywhere

    Exit codes: 0 done, 1 input or environment, 2 usage, 3 a gate failed, 4 some cases failed, 130 interrupted.
    """


for verb in (
    compile_command,
    export_command,
    clean_command,
    calibrate_command,
    quantize_command,
    predict_command,
    evaluate_command,
    inspect_command,
    doctor_command,
):
    main.add_command(verb)


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
