"""Which options the user wrote, and whether anything would come of them."""

from __future__ import annotations

import click
from click.core import ParameterSource

LIMITS = ("gate_patches", "max_mean_loss", "max_class_loss", "min_agreement", "no_roll_back")
"""The parameters of a gate."""


def options_given(*names: str) -> list[str]:
    """The options among these parameters that the user wrote, as written in the help; defaults are not."""
    ctx = click.get_current_context()
    return [
        (param.secondary_opts if param.secondary_opts and not ctx.params[param.name] else param.opts)[-1]
        for param in ctx.command.params
        if param.name in names
        and ctx.get_parameter_source(param.name) not in (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    ]


def check_options(precision: str, *, cases: bool, gate: bool) -> None:
    """What would be dropped in silence is a usage error: options of calibration and gate where neither happens.

    Args:
        precision: that is asked for.
        cases: whether cases are named to calibrate and to judge on.
        gate: whether there is to be a gate.
    """
    asked = ["--gate"] * gate if options_given("gate") else []
    limits, sample = options_given(*LIMITS), options_given("patches", "seed")
    if limits and not gate:
        raise click.UsageError(f"{limits[0]} is for the gate: leave --no-gate out.")
    if precision == "fp32" and (limits or asked or sample):
        raise click.UsageError(f"{[*limits, *asked, *sample][0]} is for a --precision below fp32.")
    if not cases and (limits or asked or sample):
        raise click.UsageError(f"{[*limits, *asked, *sample][0]} needs cases: add --calibration.")
    if precision == "bf16" and options_given("patches"):
        raise click.UsageError("--calibration-patches is for int8 and fp16: BF16 calibrates nothing.")
    if precision != "int8" and options_given("no_roll_back"):
        raise click.UsageError("--no-roll-back is for int8: only its layers are rolled back.")
