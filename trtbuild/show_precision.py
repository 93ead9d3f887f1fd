"""What the command line prints about precision: progress of long steps, layers and scales, coverage, the gate."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trtbuild import show
from trtbuild.show import console, new_table, printable

Facts = Mapping[str, Any]
QUIET_SECONDS = 20.0
"""Between two lines about one long step where no terminal shows the latest one."""


@dataclass(frozen=True, kw_only=True)
class Steps:
    """`report` prints a line per step, `say` shows what is under way within one."""

    report: Callable[[str], None]
    say: Callable[[str], None]


@contextlib.contextmanager
def steps(*, quiet: bool) -> Iterator[Steps]:
    """Progress on stderr: lines, and on a terminal one more that changes in place."""
    if quiet:
        yield Steps(report=lambda line: None, say=lambda line: None)
        return
    screen = console(to_error=True)
    if not screen.is_terminal:
        yield Steps(report=screen.print, say=_now_and_then(screen.print))
        return
    from rich.text import Text

    with screen.status("starting") as status:

        def report(line: str) -> None:
            screen.print(Text.assemble(("•", "dim"), " ", line))
            status.update(Text(line))  # a plain string would be read as markup

        yield Steps(report=report, say=lambda line: status.update(Text(line)))


def _now_and_then(write: Callable[[str], None]) -> Callable[[str], None]:
    last = [time.monotonic()]

    def say(line: str) -> None:
        if time.monotonic() - last[0] >= QUIET_SECONDS:
            last[0] = time.monotonic()
            write(f"  {line}")

    return say


def bundle(facts: Facts) -> None:
    """A bundle, with the precision of its layers and what the gate said where it has any below FP32."""
    show.bundle(facts)
    calibrations(facts["calibrations"])
    for gate in facts["gates"]:
        _shown(_gate, gate)


def calibrations(entries: Sequence[Facts]) -> None:
    """Coverage, and the layers with their scales."""
    for entry in entries:
        _shown(_calibration, entry)


def _shown(how: Callable[[Facts], None], entry: Facts) -> None:
    """The format leaves these entries open, so one that another program wrote is shown as it is."""
    try:
        how(entry)
    except (KeyError, TypeError, AttributeError, ValueError):
        console().print(printable(json.dumps(entry, default=str)))


def _calibration(entry: Facts) -> None:
    out = console()
    out.print(f"calibration of {entry['network']}: {entry['patches']} patches of {len(entry['cases'])} cases")
    _coverage(entry["coverage"])
    layers = entry.get("layers", {})
    table = new_table("tensor", "largest |x|", "entropy", "percentile", "min-max")
    for tensor, amax in entry["amax"].items():
        numbers = (amax[name] for name in ("max", "entropy", "percentile", "minmax"))
        table.add_row(printable(tensor), *(f"{number:.4g}" for number in numbers))
    out.print(table)
    if layers.get("int8"):
        out.print(f"{len(layers['int8'])} layers in INT8, thresholds by {entry['method']}:")
        for name in layers["int8"]:
            out.print(f"  {printable(name)}")
    if layers.get("kept"):
        out.print("in higher precision:")
        for line in layers["kept"]:
            out.print(f"  {printable(line)}")


def _coverage(coverage: Facts) -> None:
    table = new_table("class", "cases", "patches", "voxels", "")
    for label, entry in coverage["classes"].items():
        numbers = (str(entry[name]) for name in ("cases", "patches", "voxels"))
        table.add_row(str(label), *numbers, entry["missed"] or "")
    if coverage["classes"]:
        console().print(table)
    if coverage["note"]:
        console().print(coverage["note"])


def _gate(gate: Facts) -> None:
    """The contest, the classes, the layers that were rolled back, the verdict."""
    out = console()
    state = "passed" if gate["passed"] else "NOT PASSED"
    out.print(
        f"gate of {gate['network']}, {gate['backend']}: {state} on {gate['patches']} patches of "
        f"{', '.join(map(printable, gate['cases']))}"
    )
    if gate.get("contest"):
        table = new_table("thresholds", "mean Dice", "FP32", "worst loss", "flipped voxels", "logit error (rms)", "")
        for trial in gate["contest"]:
            chosen = "chosen" if trial["method"] == gate["method"] else ""
            table.add_row(trial["method"], *_numbers(trial["agreement"], trial["verdict"]), chosen)
        out.print(table)
    table = new_table("class", "Dice", "FP32", "between the two", "voxels")
    for entry in gate["agreement"]["classes"]:
        numbers = (_number(entry[name]) for name in ("dice_candidate", "dice_fp32", "dice_between"))
        table.add_row(printable(entry["name"]), *numbers, str(entry["voxels"]))
    out.print(table)
    if gate.get("roll_back"):
        rolled = gate["roll_back"]
        out.print(
            f"rolled back to higher precision: {', '.join(rolled['layers']) or 'none'} "
            f"({rolled['sensitivity_runs']} sensitivity and {rolled['gate_runs']} gate runs)"
        )
    for line in (*gate["verdict"]["reasons"], *gate["verdict"]["notes"]):
        out.print(f"  {line}")


def _numbers(agreement: Facts, verdict: Facts) -> tuple[str, ...]:
    judged = [entry for entry in agreement["classes"] if entry["name"] in verdict["judged"]]
    name = "dice_candidate" if agreement["labelled"] else "dice_between"
    means = (_mean(judged, name), _mean(judged, "dice_fp32") if agreement["labelled"] else None)
    losses = [
        (entry["dice_fp32"] if agreement["labelled"] else 1.0) - entry[name]
        for entry in judged
        if entry[name] is not None and (entry["dice_fp32"] is not None or not agreement["labelled"])
    ]
    worst = max(losses, default=None)
    return (*map(_number, (*means, worst)), f"{agreement['flips']:.3%}", _number(agreement["error_rms"]))


def _mean(entries: Sequence[Facts], name: str) -> float | None:
    values = [entry[name] for entry in entries if entry[name] is not None]
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def quantized(facts: Facts) -> None:
    """What became INT8, and what did not."""
    out = console()
    out.print(f"{facts['output']}: {len(facts['int8'])} layers in INT8")
    for line in facts["left"]:
        out.print(f"not: {line}")
