"""Where a trained model's files lie: in a folder, or inside a zip. Both answer the same few questions."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from trtbuild.errors import ModelError

FOLD = re.compile(r"fold_(0|[1-9][0-9]*|all)")


@dataclass(frozen=True, kw_only=True)
class ModelFile:
    """One file. `where` names it in messages; `path` is set where it lies on the disk and can be mapped."""

    name: str
    where: Path
    path: Path | None
    open: Callable[[], BinaryIO]


class ModelFiles(Protocol):
    """The files of one trained model. Names are relative to it, with "/" between the parts."""

    @property
    def where(self) -> Path:
        """The folder, or the folder's place inside the zip."""

    def listing(self) -> list[str]:
        """What lies directly in it; ModelError if it is there and cannot be read."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def folds(self) -> list[str]:
        """The folds of which there is a folder: "0", "1", … and "all"."""

    def checkpoints(self) -> list[str]:
        """All .pth files in folders of folds."""

    def read(self, name: str) -> bytes:
        """The content of a JSON file that `has` found."""

    def file(self, name: str) -> ModelFile:
        """A file that `has` found, to be opened later."""


@dataclass(frozen=True)
class FolderFiles:
    """A trained-model folder."""

    where: Path

    def listing(self) -> list[str]:
        return [path.name for path in self._entries()]

    def has(self, name: str) -> bool:
        return os.path.isfile(self.where / name)

    def folds(self) -> list[str]:
        return folds_of(path.name for path in self._entries() if os.path.isdir(path))

    def checkpoints(self) -> list[str]:
        return sorted(path.relative_to(self.where).as_posix() for path in self.where.glob("fold_*/*.pth"))

    def read(self, name: str) -> bytes:
        try:
            return (self.where / name).read_bytes()
        except OSError as error:
            raise ModelError(f"{name} cannot be read.", got=error, where=self.where / name) from error

    def file(self, name: str) -> ModelFile:
        return file_on_disk(self.where / name)

    def _entries(self) -> list[Path]:
        try:
            return sorted(self.where.iterdir())
        except OSError as error:
            raise ModelError("The model folder cannot be read.", got=error.strerror, where=self.where,
                             hint="choose a folder that you may read") from error  # fmt: skip


def file_on_disk(path: Path) -> ModelFile:
    """A file by its path."""
    return ModelFile(name=path.name, where=path, path=path, open=lambda: path.open("rb"))


def folds_of(names: Iterable[str]) -> list[str]:
    """The folds whose folders are among the names."""
    return [found.group(1) for found in map(FOLD.fullmatch, names) if found]
