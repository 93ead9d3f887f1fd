"""The output folder of `predict`: where it may be, what it must not overwrite, and what an earlier run left in it.

The record `predict_from_raw_data_args.json` is nnU-Net's; its key "trtbuild" holds the settings of the run and the
cases that it speaks for. An output is only kept (`--continue_prediction`) where the record vouches for it. So outputs
of other settings go before a new record comes: no crash in between can make old outputs pass for new ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.atomic import locked, output_error, remove_strays, write_whole
from trtbuild.errors import InputError, OutputError

if TYPE_CHECKING:
    from trtbuild.volume.cases import Case

RECORD = "predict_from_raw_data_args.json"
COPIES = ("dataset.json", "plans.json")


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The files of one case; those that a run does not make are named too, so that older ones can be removed."""

    segmentation: Path
    probabilities: Path
    properties: Path
    disagreement: Path
    dicom_seg: Path

    def __iter__(self) -> Iterator[Path]:
        """All paths, the segmentation first."""
        yield from (self.segmentation, self.probabilities, self.properties, self.disagreement, self.dicom_seg)


def case_targets(output: Path, case: str, ending: str) -> Targets:
    """The files of one case. Maps stand in a folder of their own, where no evaluation takes them for labels."""
    return Targets(
        segmentation=output / (case + ending),
        probabilities=output / f"{case}.npz",
        properties=output / f"{case}.pkl",
        disagreement=output / "disagreement" / (case + ending),
        dicom_seg=output / f"{case}.dcm",
    )


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


def check_inputs(output: Path, cases: Iterable[Case], inputs: Iterable[Path], ending: str) -> None:
    """No file of this run may take the place of one of its inputs, links followed on both sides.

    Args:
        output: the folder, which need not exist.
        cases: what will be predicted; the folder of a DICOM series stands for the files in it.
        inputs: what else is read.
        ending: of segmentations.

    Raises:
        InputError: names the output and the input.
    """
    targets = _existing_targets(output, cases, ending)
    if not targets:  # what does not exist cannot be overwritten
        return
    slices = {os.path.dirname(real): target for real, target in targets.items() if real.endswith(".dcm")}
    for source in inputs:
        _refuse_overwriting(source, targets.get(os.path.realpath(source)))
    for source in (file for case in cases for file in case.files):
        real = os.path.realpath(source)
        _refuse_overwriting(source, targets.get(real, slices.get(real)))


def _existing_targets(output: Path, cases: Iterable[Case], ending: str) -> dict[str, Path]:
    """Files of this run that are there already, by their real paths."""
    try:
        folders = [folder for folder in (output, output / "disagreement") if folder.is_dir()]
        there = {folder / name for folder in folders for name in os.listdir(folder)}
    except OSError as error:
        raise output_error(error, output) from error
    if not there:
        return {}
    common = [output / name for name in (*COPIES, RECORD)]
    targets = chain(common, (path for case in cases for path in case_targets(output, case.id, ending)))
    return {os.path.realpath(target): target for target in targets if target in there}


def _refuse_overwriting(source: Path, target: Path | None) -> None:
    if target is not None:
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
        for folder in (output, output / "disagreement"):
            if folder.is_dir():
                remove_strays(folder)
    except OSError as error:
        raise output_error(error, output) from error
    with locked(output):  # the parts of a run (-num_parts) share the record
        _prepare(output, cases, ending, copies, arguments, continuing=continuing)


def _prepare(
    output: Path,
    cases: Sequence[str],
    ending: str,
    copies: Mapping[str, bytes],
    arguments: Mapping[str, Any],
    *,
    continuing: bool,
) -> None:
    try:
        known = _vouched(output / RECORD, arguments["trtbuild"])
    except OutputError:
        if continuing:
            raise
        known = frozenset()  # what was made in another way is no longer vouched for
    for case in cases:
        targets = case_targets(output, case, ending)
        if continuing and os.path.lexists(targets.segmentation):
            _check_known(case, known, targets.segmentation)
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
