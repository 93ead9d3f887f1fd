"""`inspect`, `doctor`: what a bundle holds and what this machine has."""

from __future__ import annotations

from pathlib import Path

import click

from trtbuild import show, show_precision
from trtbuild.commands.shared import FOLDER, command
from trtbuild.spec import json_from_value


@command("inspect")
@click.argument("bundle", type=FOLDER)
@click.option("--verify", is_flag=True, help="Also check the hash of every file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_command(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what a bundle holds: model, engines, precision of each layer, scales, coverage, what the gate said."""
    from trtbuild.steps.inspect import inspect_bundle

    facts = inspect_bundle(bundle, verify=verify)
    show.json_or(as_json, facts, lambda: show_precision.bundle(facts))


@command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(as_json: bool) -> None:
    """Show what this machine has and what is missing, with the command that installs it."""
    from trtbuild.steps.doctor import health

    facts = json_from_value(health())
    show.json_or(as_json, facts, lambda: show.health(facts))
