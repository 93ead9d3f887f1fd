"""Preprocessed cases as nnU-Net v2 leaves them: which files belong to which case.

Three kinds of folder, as `nnunetv2.training.dataloading.nnunet_dataset` reads them: `<id>.b2nd` + `<id>_seg.b2nd`;
`<id>.npz` with the keys `data` and `seg`; and `<id>.npy` + `<id>_seg.npy`, which go before an `.npz` of the same name.
The pickles beside them are never opened.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trtbuild_calibration.errors import CalibrationError
from trtbuild_calibration.files import sha256_of

SEGMENTATION = "_seg"
ENDINGS = (".b2nd", ".npz", ".npy")
FOLDER_HINT = "give the folder of one configuration, such as nnUNet_preprocessed/Dataset501_X/nnUNetPlans_3d_fullres"


@dataclass(frozen=True, kw_only=True)
class Case:
    """The files of one preprocessed case.

    Attributes:
        name: nnU-Net's identifier.
        data: image, (C, Z, Y, X).
        segmentation: labels (1, Z, Y, X), the same file as `data` for an `.npz`; None without labels.
        previous: labels that the stage before predicted, for the second stage of a cascade.
    """

    name: str
    data: Path
    segmentation: Path | None
    previous: Path | None = None


def cases_from_folder(folder: Path, *, previous: Path | None = None) -> tuple[Case, ...]:
    """The cases of a folder, sorted by name.

    Args:
        folder: one configuration of one preprocessed dataset.
        previous: `predicted_next_stage/<configuration>` of the stage before, which must hold every case.

    Raises:
        CalibrationError: no folder, no cases in it, two kinds of files, or a case that the stage before lacks.
    """
    names = _file_names(folder)
    kinds = {Path(name).suffix for name in names} & set(ENDINGS)
    if not kinds:
        raise _no_cases(folder)
    if ".b2nd" in kinds and len(kinds) > 1:
        raise CalibrationError(
            "The folder holds cases in two formats; nnU-Net does not read it either.",
            expected="either .b2nd files, or .npz and .npy files",
            got=", ".join(sorted(kinds)),
            where=folder,
            hint="remove what an older nnU-Net left, or preprocess into a new folder",
        )
    found = _blosc_cases(folder, names) if ".b2nd" in kinds else _numpy_cases(folder, names)
    cases = sorted(found, key=lambda case: case.name)
    if not cases:
        raise CalibrationError(
            "The folder holds segmentations but no image.", expected="<id>.b2nd, .npz or .npy", where=folder
        )
    if previous is None:
        return tuple(cases)
    return tuple(_with_previous(case, previous) for case in cases)


def digest(case: Case) -> str:
    """SHA-256 over the files of a case, for the fingerprint of what was calibrated."""
    paths = (case.data, case.segmentation, case.previous)
    return sha256_of(dict.fromkeys(path for path in paths if path is not None))


def _file_names(folder: Path) -> set[str]:
    try:
        return {path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
    except FileNotFoundError as error:
        raise CalibrationError("There is no such folder.", where=folder, hint=FOLDER_HINT) from error
    except NotADirectoryError as error:
        raise CalibrationError("Calibration takes a folder, not a file.", where=folder, hint=FOLDER_HINT) from error
    except OSError as error:
        raise CalibrationError("The folder cannot be read.", got=error.strerror, where=folder) from error


def _no_cases(folder: Path) -> CalibrationError:
    """What stands in the folder instead of cases decides what the message tells to do."""
    below = [path for path in sorted(folder.iterdir()) if path.is_dir() and _holds_cases(path)]
    if below:
        return CalibrationError(
            "The folder holds no preprocessed cases, its subfolders do.",
            expected="the folder of one configuration",
            got=", ".join(path.name for path in below),
            where=folder,
            hint=f"give {below[0]}" if len(below) == 1 else "give the one whose configuration the model has",
        )
    raw = any((folder / name).is_dir() for name in ("imagesTr", "imagesTs")) or any(
        re.search(r"_\d{4}\.", path.name) for path in folder.iterdir() if path.is_file()
    )
    if raw:
        return CalibrationError(
            "The folder holds raw images, not preprocessed cases.",
            expected=".b2nd, .npz or .npy files of nnU-Net v2",
            where=folder,
            hint=f"{FOLDER_HINT}; raw images go into --calibration-images",
        )
    return CalibrationError(
        "The folder holds no preprocessed cases.",
        expected=".b2nd, .npz or .npy files of nnU-Net v2",
        got="an empty folder" if not any(folder.iterdir()) else "other files",
        where=folder,
        hint=FOLDER_HINT,
    )


def _holds_cases(folder: Path) -> bool:
    try:
        return any(path.suffix in ENDINGS for path in folder.iterdir())
    except OSError:  # a folder that we may not look into has nothing to offer
        return False


def _blosc_cases(folder: Path, names: set[str]) -> Iterator[Case]:
    for name in _identifiers(names, ".b2nd"):
        labels = f"{name}{SEGMENTATION}.b2nd"
        yield Case(name=name, data=folder / f"{name}.b2nd", segmentation=folder / labels if labels in names else None)


def _numpy_cases(folder: Path, names: set[str]) -> Iterator[Case]:
    for name in sorted(set(_identifiers(names, ".npz")) | set(_identifiers(names, ".npy"))):
        archive = folder / f"{name}.npz"
        data, labels = f"{name}.npy", f"{name}{SEGMENTATION}.npy"
        packed = _members(archive) if archive.name in names else set()
        if data not in names and "data" not in packed:
            raise CalibrationError(
                "A case has no image.", expected=f"the key data in {archive.name}, or {data}", where=archive
            )
        yield Case(
            name=name,
            data=folder / data if data in names else archive,
            segmentation=folder / labels if labels in names else archive if "seg" in packed else None,
        )


def _identifiers(names: Iterable[str], ending: str) -> list[str]:
    """nnU-Net's rule: what ends in `_seg` is a segmentation, except in an `.npz`, which holds its own."""
    found = [name.removesuffix(ending) for name in names if name.endswith(ending)]
    return [name for name in found if ending == ".npz" or not name.endswith(SEGMENTATION)]


def _members(path: Path) -> set[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (zipfile.BadZipFile, OSError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception | str) -> CalibrationError:
    """The message for a file that is cut or holds something else than its ending says."""
    return CalibrationError(
        "A file of a preprocessed case is damaged.",
        expected=f"a whole {path.suffix} file of nnU-Net v2",
        got=str(error) or type(error).__name__,
        where=path,
        hint="copy it again, or preprocess the case again",
    )


def _with_previous(case: Case, folder: Path) -> Case:
    """nnU-Net's order: `.b2nd` beside `.b2nd`; else `.npy` before `.npz`."""
    endings = (".b2nd",) if case.data.suffix == ".b2nd" else (".npy", ".npz")
    for ending in endings:
        if (folder / (case.name + ending)).is_file():
            return Case(
                name=case.name, data=case.data, segmentation=case.segmentation, previous=folder / (case.name + ending)
            )
    raise CalibrationError(
        "The stage before has not predicted a case.",
        expected=" or ".join(case.name + ending for ending in endings),
        where=folder,
        hint="finish the training of the lower resolution: nnU-Net predicts the next stage's cases at its end",
    )
