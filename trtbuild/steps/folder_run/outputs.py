"""The output folder of `predict`: where it may be, what it must not overwrite, and what an earlier run left in it.

An output is only kept (`--continue_prediction`) where the record vouches for it (`steps.record`): the same settings,
and inputs that have not changed. All others go before a new record comes: no crash in between can make old outputs
pass for new ones. While a run lives, no run with other settings may begin (`steps.claim`): so what a run still writes
after another has put its record in place was made in that record's way.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.atomic import locked, output_error, remove_strays, write_whole
from trtbuild.errors import InputError, OutputError
from trtbuild.spec import Reader
from trtbuild.steps.folder_run.claim import claimed
from trtbuild.steps.folder_run.inputs import marks_from_cases
from trtbuild.steps.folder_run.record import RECORD, Marks, require_vouched, vouched, write_record

if TYPE_CHECKING:
    from trtbuild.volume.cases import Case

COPIES = ("dataset.json", "plans.json")
MAPS = "disagreement"
"""The folder of the maps, where no evaluation takes them for labels."""
MANIFEST, MANIFEST_KEYS, MANIFEST_LIMIT = "bundle.json", ("format", "stages"), 16 << 20
"""What makes a folder a bundle: a JSON object with these keys, of this many bytes at most (bundle/FORMAT.md)."""


@dataclass(frozen=True, kw_only=True)
class Targets:
    """The files of one case; those that a run does not make are named too, so that older ones can be removed.

    `beside` are those that the writer makes beside the segmentation and the map (Tiff3DIO's spacings).
    """

    segmentation: Path
    probabilities: Path
    properties: Path
    disagreement: Path
    dicom_seg: Path
    beside: tuple[Path, ...]

    def __iter__(self) -> Iterator[Path]:
        """All paths, the segmentation first."""
        yield from (self.segmentation, self.probabilities, self.properties, self.disagreement, self.dicom_seg)
        yield from self.beside


@dataclass(frozen=True, kw_only=True)
class Folder:
    """An output folder: its path, the ending of segmentations such as ".nii.gz", and the reader whose writer writes."""

    path: Path
    ending: str
    reader: Reader

    def segmentation(self, case: str) -> Path:
        """Where it is, its case is finished."""
        return self.path / (case + self.ending)

    def targets(self, case: str) -> Targets:
        """The files of one case."""
        from trtbuild.volume.io import files_beside

        segmentation, map_ = self.segmentation(case), self.path / MAPS / (case + self.ending)
        return Targets(
            segmentation=segmentation,
            probabilities=self.path / f"{case}.npz",
            properties=self.path / f"{case}.pkl",
            disagreement=map_,
            dicom_seg=self.path / f"{case}.dcm",
            beside=(*files_beside(self.reader, segmentation), *files_beside(self.reader, map_)),
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
        if _is_bundle(folder):
            raise OutputError(
                "The output folder is a bundle, or inside one.",
                got=f"{folder / MANIFEST} exists",
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


def _is_bundle(folder: Path) -> bool:
    """Whether its bundle.json is a bundle's: other programs have files of this name, too."""
    file = folder / MANIFEST
    try:
        if not file.is_file() or file.stat().st_size > MANIFEST_LIMIT:
            return False
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(key in content for key in MANIFEST_KEYS)


def check_inputs(folder: Folder, cases: Iterable[Case], inputs: Iterable[Path]) -> None:
    """No file of this run may take the place of one of its inputs, links followed on both sides.

    Args:
        folder: need not exist.
        cases: what will be predicted; the folder of a DICOM series stands for the files in it.
        inputs: what else is read.

    Raises:
        InputError: names the output and the input.
    """
    targets = _existing_targets(folder, cases)
    if not targets:  # what does not exist cannot be overwritten
        return
    slices = {os.path.dirname(real): target for real, target in targets.items() if real.endswith(".dcm")}
    for source in inputs:
        _refuse_overwriting(source, targets.get(os.path.realpath(source)))
    for source in (file for case in cases for file in case.files):
        real = os.path.realpath(source)
        _refuse_overwriting(source, targets.get(real, slices.get(real)))


def _existing_targets(folder: Folder, cases: Iterable[Case]) -> dict[str, Path]:
    """Files of this run that are there already, by their real paths."""
    try:
        folders = [one for one in (folder.path, folder.path / MAPS) if one.is_dir()]
        there = {one / name for one in folders for name in os.listdir(one)}
    except OSError as error:
        raise output_error(error, folder.path) from error
    if not there:
        return {}
    common = [folder.path / name for name in (*COPIES, RECORD)]
    targets = chain(common, (path for case in cases for path in folder.targets(case.id)))
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


@contextlib.contextmanager
def prepared_folder(
    folder: Folder,
    cases: Sequence[Case],
    beside: Callable[[Case], Iterable[Path]],
    *,
    copies: Mapping[str, bytes],
    arguments: Mapping[str, Any],
    continuing: bool,
) -> Iterator[frozenset[str]]:
    """Makes the folder, clears it of what this run will make anew, and writes the files that stand beside the cases.

    The folder belongs to runs with these settings until the block ends. Yields the finished cases whose inputs have
    changed since: continuing predicts them anew, for no image is lost by that, and removes their old outputs first.

    Args:
        folder: the folder.
        cases: this run's.
        beside: what is read for a case besides its files (`inputs.files_beside_case`).
        copies: dataset.json and plans.json.
        arguments: the record; its key "trtbuild" holds what outputs depend on.
        continuing: keep the segmentations that a record with the same settings and inputs vouches for.

    Raises:
        OutputError: the folder cannot be written, holds outputs of other or unknown settings, or another run writes
            there with other settings, or the same cases from other inputs.
    """
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        for one in (folder.path, folder.path / MAPS):
            if one.is_dir():
                remove_strays(one)
    except OSError as error:
        raise output_error(error, folder.path) from error
    with contextlib.ExitStack() as stack:
        with locked(folder.path) as effective:  # the parts of a run (-num_parts) share the record
            claim = claimed(folder.path, arguments["trtbuild"])
            others = stack.enter_context(claim) if effective else False
            known = _known(folder.path, arguments["trtbuild"], continuing=continuing)
            marks = marks_from_cases(cases, beside)
            if others:
                _require_same_inputs(marks, known, folder.path)
            finished = _finished(folder, marks, known) if continuing else frozenset()
            changed = frozenset(case for case in finished if known[case] != marks[case])
            for case in marks:
                if case not in finished or case in changed:
                    remove_files(folder.targets(case))
            for name, content in copies.items():
                write_whole(folder.path / name, content)
            write_record(folder.path, arguments, {**known, **marks})
            del known, marks  # a run may take days
        yield changed


def _known(output: Path, settings: Mapping[str, Any], *, continuing: bool) -> Marks:
    try:
        return vouched(output, settings)
    except OutputError:
        if continuing:
            raise
        return {}  # what was made in another way is no longer vouched for


def _finished(folder: Folder, cases: Iterable[str], known: Marks) -> frozenset[str]:
    """The cases that have a segmentation, if it is known of each how it was made. Nothing is removed before."""
    finished = []
    for case in cases:
        target = folder.segmentation(case)
        if os.path.lexists(target):
            require_vouched(case, known, target)
            finished.append(case)
    return frozenset(finished)


def _require_same_inputs(marks: Marks, known: Marks, output: Path) -> None:
    """While another run lives, a case of its must not become one of other inputs: it may be about to write it."""
    for case, now in marks.items():
        if case in known and known[case] != now:
            raise OutputError(
                "Another run writes here, and knows a case with other inputs.",
                expected=now,
                got=known[case],
                where=output,
                hint="wait until it has ended, or choose another folder with -o",
            )
