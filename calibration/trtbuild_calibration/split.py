"""Which cases calibrate and which judge: a gate on the cases that it was calibrated on would prove little."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from trtbuild_calibration.errors import CalibrationError
from trtbuild_calibration.files import read_whole

SHARE = 0.2
"""Of the cases that the gate gets where no fold says it."""


def split_cases(
    names: Sequence[str], seed: int, validation: Sequence[str] | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names for the calibration and names for the gate, both sorted; no name is in both.

    Args:
        names: all cases.
        seed: draws the gate's cases where no validation list is given.
        validation: the fold's validation cases, which the trained network has not seen. Those among `names` are the
            gate's. A single case calibrates, and the gate gets none.

    Raises:
        CalibrationError: no names, a name twice, a seed below 0, no validation case among them, or nothing else.
    """
    ordered = sorted(names)
    if not ordered or len(set(ordered)) < len(ordered):
        raise CalibrationError("Cases must have different names, and there must be one.", got=", ".join(ordered))
    if seed < 0:
        raise CalibrationError("The seed is wrong.", expected="at least 0", got=seed)
    if len(ordered) == 1:
        return (ordered[0],), ()
    if validation is None:
        held_out = max(1, round(len(ordered) * SHARE))
        chosen = np.random.default_rng(seed).choice(len(ordered), held_out, replace=False)
        gate = {ordered[int(i)] for i in chosen}
    else:
        gate = set(validation) & set(ordered)
    if not gate or len(gate) == len(ordered):
        raise CalibrationError(
            "The validation cases of the fold leave nothing to one side.",
            expected="some of the cases for the calibration and some for the gate",
            got=f"{len(gate)} of {len(ordered)} cases are validation cases",
            hint="give the whole preprocessed folder of the training",
        )
    return tuple(name for name in ordered if name not in gate), tuple(sorted(gate))


def validation_cases(path: Path, fold: int) -> tuple[str, ...]:
    """The validation cases of a fold in nnU-Net's `splits_final.json`: a list of {"train": [...], "val": [...]}.

    Raises:
        CalibrationError: the file cannot be read, is of another form, or lacks the fold.
    """
    try:
        splits = json.loads(read_whole(path, "The list of folds"))
    except (ValueError, RecursionError) as error:
        raise _wrong(path, "JSON", error) from error
    if not isinstance(splits, list) or not splits:
        raise _wrong(path, "a list of folds", type(splits).__name__)
    for number, entry in enumerate(splits):
        _check_fold(path, number, entry)
    if not 0 <= fold < len(splits):
        raise _wrong(path, f"fold {fold}", f"folds 0 to {len(splits) - 1}")
    return tuple(splits[fold]["val"])


def _check_fold(path: Path, number: int, entry: Any) -> None:
    if not isinstance(entry, dict) or set(entry) != {"train", "val"}:
        raise _wrong(path, 'the keys "train" and "val"', f"fold {number}: {entry!r:.80}")
    for key, names in entry.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise _wrong(path, "lists of names", f"fold {number}, {key}: {names!r:.80}")
    both = set(entry["train"]) & set(entry["val"])
    if both:
        raise _wrong(path, "train and val without a common case", f"fold {number}: {', '.join(sorted(both))}")


def _wrong(path: Path, expected: str, got: object) -> CalibrationError:
    return CalibrationError(
        "The list of folds is not nnU-Net's.",
        expected=expected,
        got=got,
        where=path,
        hint="give splits_final.json of the preprocessed dataset",
    )
