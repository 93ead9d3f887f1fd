"""`inspect`, `doctor`: what a bundle holds and what this machine has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from trtbuild import show, show_layers, show_precision
from trtbuild.commands.shared import FOLDER, command
from trtbuild.spec import json_from_value


@command("inspect")
@click.argument("bundle", type=FOLDER)
@click.option("--verify", is_flag=True, help="Also check the hash of every file.")
@click.option("--layers", is_flag=True, help="Show the kernels of its TensorRT engines and what they compute in.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE", help="Write the layers as an HTML page, too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def inspect_command(bundle: Path, verify: bool, layers: bool, html: Path | None, as_json: bool) -> None:
    """Show what a bundle holds: model, engines, precision of each layer, scales, coverage, what the gate said.

    BUNDLE may also be NAME.engine, as compile makes it of an ONNX file: its layers are shown.
    """
    from trtbuild.steps.inspect import inspect_bundle
    from trtbuild.steps.layers import bundle_layers, engine_layers

    is_engine = bundle.suffix == ".engine"
    facts = {} if is_engine else inspect_bundle(bundle, verify=verify)
    if is_engine or layers or html is not None:
        facts["layers"] = engine_layers(bundle) if is_engine else bundle_layers(bundle)
    if html is not None:
        show_layers.write_page(facts["layers"], html)
    show.json_or(as_json, facts, lambda: _show(facts, layers or is_engine))


def _show(facts: dict[str, Any], layers: bool) -> None:
    if layers:
        show_layers.layers(facts["layers"])
    else:
        show_precision.bundle(facts)


@command("doctor")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def doctor_command(as_json: bool) -> None:
    """Show what this machine has and what is missing, with the command that installs it."""
    from trtbuild.steps.doctor import health

    facts = json_from_value(health())
    show.json_or(as_json, facts, lambda: show.health(facts))
