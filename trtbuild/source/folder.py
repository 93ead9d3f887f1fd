"""A trained model's files: which there are, and which folds and checkpoints are meant."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import ModelError
from trtbuild.source.fields import listed
from trtbuild.source.files import FolderFiles, ModelFile, ModelFiles

LOOKS_LIKE = "<Trainer>__<Plans>__<configuration>/ with plans.json, dataset.json and fold_X/checkpoint_final.pth"


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """What was found. `checkpoints` maps a fold ("0", "1", …, "all") to its file; `notes` say what was chosen."""

    plans: bytes
    dataset: bytes
    checkpoints: dict[str, ModelFile]
    notes: tuple[str, ...]


def find_model(folder: Path, folds: tuple[str, ...] | None, checkpoint: str) -> ModelFolder:
    """`model_from_files` of a folder on the disk."""
    return model_from_files(FolderFiles(folder), folds, checkpoint)


def model_from_files(files: ModelFiles, folds: tuple[str, ...] | None, checkpoint: str) -> ModelFolder:
    """The files of a trained model.

    Args:
        files: plans.json, dataset.json and fold_X.
        folds: numbers or "all"; None takes all numbered folds that have the checkpoint, else `fold_all`.
        checkpoint: file name in every fold's folder.

    Raises:
        ModelError: this is no model, or a fold or checkpoint is not there; the message lists what is.
    """
    missing = [name for name in ("plans.json", "dataset.json") if not files.has(name)]
    if missing:
        raise ModelError(f"This is no trained nnU-Net v2 model folder: {missing[0]} is missing.", expected=LOOKS_LIKE,
                         got=_found(files), where=files.where, hint=_other_folder(files))  # fmt: skip
    chosen, notes = _available(files, checkpoint) if folds is None else (folds, ())
    return ModelFolder(
        plans=files.read("plans.json"),
        dataset=files.read("dataset.json"),
        checkpoints={fold: _checkpoint(files, fold, checkpoint) for fold in chosen},
        notes=notes,
    )


def _available(files: ModelFiles, checkpoint: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """nnU-Net's choice (`auto_detect_available_folds`), and what there is to say about it."""
    numbered = sorted((fold for fold in files.folds() if fold != "all"), key=int)
    complete = tuple(fold for fold in numbered if files.has(f"fold_{fold}/{checkpoint}"))
    if complete:
        left_out = [fold for fold in numbered if fold not in complete]
        note = f"left out, because {checkpoint} is missing: fold_{', fold_'.join(left_out)}"
        return complete, (note,) if left_out else ()
    if files.has(f"fold_all/{checkpoint}"):
        return ("all",), (f"there is no numbered fold with {checkpoint}: fold_all is used",)
    raise ModelError(f"No fold has a {checkpoint}.", expected=f"fold_0/{checkpoint}", got=listed(files.checkpoints()),
                     where=files.where, hint="name another checkpoint with -chk, or finish the training")  # fmt: skip


def _checkpoint(files: ModelFiles, fold: str, checkpoint: str) -> ModelFile:
    if fold not in files.folds():
        raise ModelError(f"There is no fold {fold}.", expected=f"fold_{fold}", got=listed(files.checkpoints()),
                         where=files.where, hint="choose folds that are there with -f")  # fmt: skip
    name = f"fold_{fold}/{checkpoint}"
    if not files.has(name):
        raise ModelError(f"Fold {fold} has no {checkpoint}.", expected=checkpoint, got=listed(files.checkpoints()),
                         where=files.where / name,
                         hint="name another checkpoint with -chk, or other folds with -f")  # fmt: skip
    return files.file(name)


def _found(files: ModelFiles) -> str:
    if isinstance(files, FolderFiles) and not os.path.isdir(files.where):
        return "a file" if os.path.exists(files.where) else "no such folder"
    return listed(files.listing())


def _other_folder(files: ModelFiles) -> str:
    """Names the model folder where the user is one level off."""
    folder = files.where
    inner: Iterable[Path] = (folder / name for name in files.listing()) if os.path.isdir(folder) else ()
    near = [folder.parent, *inner]
    models = [path for path in near if all(os.path.isfile(path / name) for name in ("plans.json", "dataset.json"))]
    return f"did you mean {models[0]}?" if models else "give the folder that nnUNetv2_train wrote"
