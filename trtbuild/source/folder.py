"""A trained-model folder: which files there are, and which folds and checkpoints are meant."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import ModelError
from trtbuild.source.fields import listed

LOOKS_LIKE = "<Trainer>__<Plans>__<configuration>/ with plans.json, dataset.json and fold_X/checkpoint_final.pth"


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What was found. `checkpoints` maps a fold ("0", "1", …, "all") to its file; `notes` say what was chosen."""

    plans: bytes
    dataset: bytes
    checkpoints: dict[str, Path]
    notes: tuple[str, ...]


def find_model(folder: Path, folds: tuple[str, ...] | None, checkpoint: str) -> ModelFolder:
    """The files of a trained-model folder.

    Args:
        folder: holds plans.json, dataset.json and fold_X.
        folds: numbers or "all"; None takes all numbered folds that have the checkpoint, else `fold_all`.
        checkpoint: file name in every fold's folder.

    Raises:
        ModelError: this is no model folder, or a fold or checkpoint is not there; the message lists what is.
    """
    missing = [name for name in ("plans.json", "dataset.json") if not os.path.isfile(folder / name)]
    if missing:
        raise ModelError(f"This is no trained nnU-Net v2 model folder: {missing[0]} is missing.", expected=LOOKS_LIKE,
                         got=_listing(folder), where=folder, hint=_other_folder(folder))  # fmt: skip
    chosen, notes = _available(folder, checkpoint) if folds is None else (folds, ())
    return ModelFolder(
        plans=_content(folder / "plans.json"),
        dataset=_content(folder / "dataset.json"),
        checkpoints={fold: _checkpoint(folder, fold, checkpoint) for fold in chosen},
        notes=notes,
    )


def _available(folder: Path, checkpoint: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """nnU-Net's choice (`auto_detect_available_folds`), and what there is to say about it."""
    numbered = sorted((fold for fold in _folds(folder) if fold != "all"), key=int)
    complete = tuple(fold for fold in numbered if os.path.isfile(folder / f"fold_{fold}" / checkpoint))
    if complete:
        left_out = [fold for fold in numbered if fold not in complete]
        note = f"left out, because {checkpoint} is missing: fold_{', fold_'.join(left_out)}"
        return complete, (note,) if left_out else ()
    if os.path.isfile(folder / "fold_all" / checkpoint):
        return ("all",), (f"there is no numbered fold with {checkpoint}: fold_all is used",)
    raise ModelError(f"No fold has a {checkpoint}.", expected=f"fold_0/{checkpoint}", got=_checkpoints(folder),
                     where=folder, hint="name another checkpoint with -chk, or finish the training")  # fmt: skip


def _checkpoint(folder: Path, fold: str, checkpoint: str) -> Path:
    path = folder / f"fold_{fold}" / checkpoint
    if fold not in _folds(folder):
        raise ModelError(f"There is no fold {fold}.", expected=f"fold_{fold}", got=_checkpoints(folder), where=folder,
                         hint="choose folds that are there with -f")  # fmt: skip
    if not os.path.isfile(path):
        raise ModelError(f"Fold {fold} has no {checkpoint}.", expected=checkpoint, got=_checkpoints(folder), where=path,
                         hint="name another checkpoint with -chk, or other folds with -f")  # fmt: skip
    return path


def _folds(folder: Path) -> list[str]:
    names = (re.fullmatch(r"fold_(0|[1-9][0-9]*|all)", path.name) for path in _entries(folder) if os.path.isdir(path))
    return [name.group(1) for name in names if name]


def _checkpoints(folder: Path) -> str:
    return listed(sorted(str(path.relative_to(folder)) for path in folder.glob("fold_*/*.pth")))


def _listing(folder: Path) -> str:
    if not os.path.isdir(folder):
        return "a file" if os.path.exists(folder) else "no such folder"
    return listed([path.name for path in _entries(folder)])


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError as error:
        raise ModelError("The model folder cannot be read.", got=error.strerror, where=folder,
                         hint="choose a folder that you may read") from error  # fmt: skip


def _other_folder(folder: Path) -> str:
    """Names the model folder where the user is one level off."""
    near: Iterable[Path] = [folder.parent, *(_entries(folder) if os.path.isdir(folder) else ())]
    models = [path for path in near if all(os.path.isfile(path / name) for name in ("plans.json", "dataset.json"))]
    return f"did you mean {models[0]}?" if models else "give the folder that nnUNetv2_train wrote"


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read.", got=error, where=path) from error
