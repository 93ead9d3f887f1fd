"""The record `predict_from_raw_data_args.json` of an output folder, and for which outputs it vouches.

The record is nnU-Net's; its key "trtbuild" holds what outputs depend on, and under "cases" what each case that it
speaks for was read from (`inputs.marks_from_cases`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trtbuild.atomic import write_whole
from trtbuild.errors import OutputError

RECORD = "predict_from_raw_data_args.json"
Marks = Mapping[str, list[str]]
"""By case: what its inputs look like."""


def write_record(folder: Path, arguments: Mapping[str, Any], cases: Marks) -> None:
    """Writes the record; `arguments` without "cases"."""
    settings = {**arguments["trtbuild"], "cases": dict(sorted(cases.items()))}
    write_whole(folder / RECORD, json.dumps({**arguments, "trtbuild": settings}, indent=4).encode())


def vouched(folder: Path, now: Mapping[str, Any]) -> Marks:
    """The cases that the record speaks for, if it has the settings `now`; none where there is no record.

    Records of versions that did not note inputs speak for no case.

    Raises:
        OutputError: the record cannot be read, or has other settings.
    """
    path = folder / RECORD
    if not os.path.lexists(path):
        return {}
    try:
        before = json.loads(path.read_bytes()).get("trtbuild")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise OutputError(
            "The record of the run to continue cannot be read.", where=path, got=error, hint="predict into a new folder"
        ) from error
    there = before if isinstance(before, dict) else {}
    keys = [key for key in now if key not in there or there[key] != now[key]]
    cases = there.get("cases")
    if keys or not isinstance(cases, dict | list):
        raise OutputError(
            "The outputs in this folder were made in another way.",
            where=path,
            expected={key: now[key] for key in keys} or "cases",
            got={key: there.get(key) for key in keys} or cases,
            hint="predict into a new folder, or without --continue_prediction",
        )
    return cases if isinstance(cases, dict) else {}


def require_vouched(case: str, known: Marks, target: Path) -> None:
    """Raises OutputError where nobody knows how the output `target` of the case was made."""
    if case not in known:
        raise OutputError(
            "An output in this folder was made in another way, or it is unknown how.",
            expected=f"{RECORD} of the run that made it",
            got=f"no record that names the case {case} and its inputs",
            where=target,
            hint="predict into a new folder, or without --continue_prediction",
        )
