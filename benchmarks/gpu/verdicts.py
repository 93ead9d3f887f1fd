"""What was measured beside its target: rows of the record, and the table."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

Verdict = Literal["met", "missed", "not run", "recorded"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number. `limit` is the target (None: there is none), which the value must reach, or stay below.

    `value` None was not run, for the reason in `note`.
    """

    part: str
    name: str
    value: float | None
    unit: str = ""
    limit: float | None = None
    at_least: bool = True
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        """Against the target; a value that is no number misses it."""
        if self.value is None:
            return "not run"
        if self.limit is None:
            return "recorded"
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "met" if met else "missed"

    @property
    def target(self) -> str:
        """In words."""
        return "" if self.limit is None else f"{'>=' if self.at_least else '<='} {_number(self.limit, self.unit)}"


def row_from_json(data: Mapping[str, Any]) -> Row:
    """Of `record`."""
    return Row(**{name: value for name, value in data.items() if name != "verdict"})


def record(row: Row) -> dict[str, Any]:
    """One JSON line."""
    return {**asdict(row), "verdict": row.verdict}


def write_rows(output: Path, rows: Iterable[Row]) -> None:
    """JSON lines, each written as it comes, so that what was measured is kept whatever happens then."""
    with output.open("w") as file:
        for row in rows:
            file.write(json.dumps(record(row)) + "\n")
            file.flush()


def markdown(rows: Sequence[Row], machine: Mapping[str, Any], how: str) -> str:
    """The record as a table, one line per row in the order of the rows."""
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("met", "missed", "not run")}
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    lines = [
        "# On a GPU",
        "",
        f"{machine['gpu']}, compute capability {machine['capability']}, driver for CUDA {machine['driver']}; {machine['cpu']}, "
        f"{machine['processors']} processors, {machine['date']}, commit {machine['commit']}.  ",
        f"{versions}, Python {machine['python']}.",
        "",
        how,
        "",
        f"Targets: {counts['met']} met, {counts['missed']} missed, {counts['not run']} not run.",
        "",
        "| part | what | value | target | verdict | note |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line_of, rows)]) + "\n"


def line_of(row: Row) -> str:
    """A line of the table."""
    value = "" if row.value is None else _number(row.value, row.unit)
    note = " ".join(row.note.replace("|", "/").split())
    return f"| {row.part} | {row.name} | {value} | {row.target} | {row.verdict} | {note} |"


def _number(value: float, unit: str) -> str:
    if unit == "%":
        return f"{value:.1f} %"
    return f"{value:.4g}{' ' * bool(unit)}{unit}"
