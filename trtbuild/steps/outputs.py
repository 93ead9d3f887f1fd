"""The output folder of `predict`: where it may be, what it must not overwrite, and what an earlier run left in it.

The record `predict_from_raw_data_args.json` is nnU-Net's; its key "trtbuild" holds the settings of the run and the
cases that it speaks for. An output is only kept (`--continue_prediction`) where the record vouches for it. So outputs
of other settings go before a new record comes: no crash in between can make old outputs pass for new ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.atomic import output_error, write_whole
from trtbuild.errors import InputError, OutputError

if TYPE_CHECKING:
    from trtbuild.volume.cases import Case

RECORD = "predict_from_raw_data_args.json"
COPIES = ("dataset.json", "plans.json")


def case_targets(output: Path, case: str, ending: str) -> tuple[Path, Path, Path]:
    """The files of one case: the segmentation, the probabilities (.npz), the properties beside them (.pkl)."""
    return output / (case + ending), output / f"{case}.npz", output / f"{case}.pkl"


def check_folder(output: Path) -> None:
    """Refuses a place whose owner would break: a file, a bundle (also inside one), a trained-model folder.

    Raises:
        OutputError: says which.
    """
    if os.path.exists(output) and not os.path.isdir(output):
        raise OutputError("The output is a file, not a folder.", where=output, hint="name a folder with -o")
    real = Path(os.path.realpath(output))
    for folder in (real, *real.parents):
        if os.path.isfile(folder / "bundle.json"):
            raise OutputError(
                "The output folder is a bundle, or inside one.",
                got=f"{folder / 'bundle.json'} exists",
                where=output,
                hint="choose a folder outside; a bundle with other files in it cannot be opened",
            )
    if os.path.isfile(real / "plans.json") and any(real.glob("fold_*")):
        raise OutputError(
            "The output folder is a trained model.",
            got="plans.json and fold_*",
            where=output,
            hint="choose another folder; predictions would replace the model's plans.json and dataset.json",
        )


def check_inputs(output: Path, cases: Sequence[Case], inputs: Iterable[Path], ending: str) -> None:
    """No file of this run may take the place of one of its inputs, links followed on both sides.

    Raises:
        InputError: names the output and the input.
    """
    files = (*inputs, *(file for case in cases for file in case.files))
    # a path that does not exist cannot be overwritten; reading it fails its own case
    read = {os.path.realpath(file): file for file in files if os.path.lexists(file)}
    common = [output / name for name in (*COPIES, RECORD)]
    for target in (*common, *(path for case in cases for path in case_targets(output, case.id, ending))):
        source = read.get(os.path.realpath(target))
        if source is not None:
            raise InputError(
                "An output would overwrite an input.", got=source, where=target, hint="choose another folder with -o"
            )


def remove_files(paths: Iterable[Path]) -> None:
    """Removes what is there. Raises OutputError where the system refuses."""
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise output_error(error, path) from error


def prepare_folder(
    output: Path,
    cases: Sequence[str],
    ending: str,
    *,
    copies: Mapping[str, bytes],
    arguments: Mapping[str, Any],
    continuing: bool,
) -> None:
    """Makes the folder, clears it of what this run will make anew, and writes the files that stand beside the cases.

    Args:
        output: the folder.
        cases: ids of this run's cases.
        ending: of segmentations, such as ".nii.gz".
        copies: dataset.json and plans.json.
        arguments: the record; its key "trtbuild" holds what outputs depend on.
        continuing: keep the segmentations that a record with the same settings vouches for.

    Raises:
        OutputError: the folder cannot be written, or holds outputs of other or unknown settings.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, output) from error
    known = _vouched(output / RECORD, arguments["trtbuild"]) if continuing else frozenset()
    for case in cases:
        targets = case_targets(output, case, ending)
        if continuing and os.path.lexists(targets[0]):
            _check_known(case, known, targets[0])
        else:
            remove_files(targets)
    for name, content in copies.items():
        write_whole(output / name, content)
    settings = {**arguments["trtbuild"], "cases": sorted(known.union(cases))}
    write_whole(output / RECORD, json.dumps({**arguments, "trtbuild": settings}, indent=4).encode())


def _vouched(path: Path, now: Mapping[str, Any]) -> frozenset[str]:
    """The cases that the record speaks for; none where there is no record."""
    if not os.path.lexists(path):
        return frozenset()
    try:
        before = json.loads(path.read_bytes()).get("trtbuild")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise OutputError(
            "The record of the run to continue cannot be read.", where=path, got=error, hint="predict into a new folder"
        ) from error
    there = before if isinstance(before, dict) else {}
    keys = [key for key in now if key not in there or there[key] != now[key]]
    cases = there.get("cases")
    if keys or not isinstance(cases, list) or not all(isinstance(case, str) for case in cases):
        raise OutputError(
            "The outputs in this folder were made in another way.",
            where=path,
            expected={key: now[key] for key in keys} or "a list of cases",
            got={key: there.get(key) for key in keys} or cases,
            hint="predict into a new folder, or without --continue_prediction",
        )
    return frozenset(cases)


def _check_known(case: str, known: frozenset[str], target: Path) -> None:
    if case not in known:
        raise OutputError(
            "An output in this folder was made in another way, or it is unknown how.",
            expected=f"{RECORD} of the run that made it",
            got=f"no record that names the case {case}",
            where=target,
            hint="predict into a new folder, or without --continue_prediction",
        )
