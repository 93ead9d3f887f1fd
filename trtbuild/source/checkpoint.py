"""Reading a checkpoint without running what it says.

A checkpoint is a pickle, and nnU-Net loads it with `weights_only=False`: whoever wrote the file decides what runs.
Here torch's restricted unpickler reads it, with NumPy's scalars and dtypes allowed in addition, because nnU-Net's own
log and optimizer state hold them. Anything else needs the user's word.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from trtbuild.errors import ModelError, Untrusted
from trtbuild.source.extras import require
from trtbuild.source.fields import Field
from trtbuild.source.files import ModelFile, file_on_disk

if TYPE_CHECKING:
    import torch

ZIP_MAGIC = b"PK\x03\x04"
PREFIX = "module."  # left behind by DistributedDataParallel in front of every name
WRAPPER = "_orig_mod"  # the part that torch.compile adds, in front or wherever a submodule was compiled


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What inference needs of a checkpoint. The weights are mapped from the file where its format allows it."""

    file: ModelFile
    sha256: str
    weights: Mapping[str, torch.Tensor]
    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...]
    fold: str | None


def load_checkpoint(source: Path | ModelFile, *, trust: bool) -> Checkpoint:
    """Reads a checkpoint of nnU-Net v2.

    Args:
        source: the .pth file; one inside a zip is read into memory whole.
        trust: let the file run code while it is read (`--trust-checkpoint`).

    Raises:
        Untrusted: the file asks for something outside the allow-list; nothing of it was run.
        ModelError: the file is damaged, is no checkpoint of nnU-Net, or holds NaN or infinite weights.
        MissingExtra: PyTorch is not installed.
    """
    require("torch")
    file = file_on_disk(source) if isinstance(source, Path) else source
    where = file.where
    try:
        with file.open() as stream:
            digest = _sha256(stream)
            stream.seek(0)
            content = _content(file, stream, trust)
    except OSError as error:
        raise ModelError("The checkpoint cannot be read.", got=error, where=where) from error
    if not isinstance(content, dict):
        raise ModelError("The file is no checkpoint of nnU-Net.", expected="a dict", got=type(content), where=where)
    checkpoint = Field(content, str(where))
    arguments = checkpoint["init_args"]
    fold = arguments.get("fold")
    return Checkpoint(
        file=file,
        sha256=digest,
        weights=_weights(checkpoint["network_weights"], file.name),
        configuration=arguments["configuration"].text(),
        trainer=checkpoint["trainer_name"].text(),
        mirror_axes=_mirror_axes(checkpoint.get("inference_allowed_mirroring_axes")),
        fold=None if fold is None else str(fold.value),
    )


def _content(file: ModelFile, stream: BinaryIO, trust: bool) -> Any:
    torch = require("torch")
    is_zip = stream.read(4) == ZIP_MAGIC  # what torch has written since 1.6; only such a file can be mapped
    stream.seek(0)
    if is_zip:
        _refuse_packed(stream, file.where)
    mapped = is_zip and file.path is not None
    try:
        with torch.serialization.safe_globals(_allowed()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they warn of is refused below, if it matters
            return torch.load(file.path if mapped else stream, map_location="cpu", weights_only=not trust, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # damaged pickles end in nearly every exception there is, OSError included
        raise _read_error(error, file.where, refusable=not trust, is_zip=is_zip) from error


def _refuse_packed(stream: BinaryIO, where: Path) -> None:
    """torch stores its tensors as they are. Packed ones could unpack to any size, so they are refused unread."""
    try:
        with zipfile.ZipFile(stream) as archive:
            packed = [member for member in archive.infolist() if member.compress_type != zipfile.ZIP_STORED]
            total = sum(member.file_size for member in archive.infolist())
        size = stream.seek(0, os.SEEK_END)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error):
        return  # damaged: torch says so
    finally:
        stream.seek(0)
    if packed or total > size:
        raise ModelError(
            "The checkpoint is packed in a way that torch does not write.",
            expected=f"members as they are, together at most the file's {size} bytes",
            got=f"{total} bytes" + (f", {packed[0].filename} compressed" if packed else ""),
            where=where,
            hint="take the file that nnU-Net wrote; do not use this one unless you know who made it",
        )


def _read_error(error: Exception, path: Path, *, refusable: bool, is_zip: bool) -> ModelError:
    """Refused or damaged? A file that is no zip and names no global is not what `torch.save` wrote."""
    asked_for = re.search(r"GLOBAL (\S+)", str(error))
    if refusable and isinstance(error, pickle.UnpicklingError) and (is_zip or asked_for):
        return Untrusted(
            "The checkpoint asks for code that trtbuild does not run unasked.",
            expected="tensors, numbers, strings, and lists and dicts of them",
            got=asked_for.group(1) if asked_for else _reason(error),
            where=path,
            hint="if you trust whoever made the file, and it is not damaged, pass --trust-checkpoint: "
            "it may then run any code",
        )
    return ModelError(
        "The checkpoint cannot be read: it is damaged or of another kind.",
        got=f"{type(error).__name__}: {_reason(error)}",
        where=path,
        hint="copy it again from where it was trained",
    )


def _reason(error: Exception) -> str:
    found = re.search(r"WeightsUnpickler error: (.+)", str(error))
    return found.group(1) if found else str(error).partition("\n")[0]


def _allowed() -> list[Any]:
    """The allow-list beyond torch's own: NumPy scalars, under the names of NumPy 1 and 2, and their dtypes."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    dtypes = [getattr(np.dtypes, name) for name in np.dtypes.__all__]
    return [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar"), np.dtype, *dtypes]


def _weights(weights: Field, name: str) -> Mapping[str, Any]:
    torch = require("torch")
    tensors = dict(weights.entries())
    plain = (isinstance(key, str) and isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
             and tensor.device.type == "cpu" for key, tensor in tensors.items())  # fmt: skip
    if not tensors or not all(plain):
        raise ModelError("The weights are not a table of dense tensors by name.", where=weights.path,
                         got=sorted({type(value).__name__ for value in tensors.values()}) or "nothing")  # fmt: skip
    names = plain_names(tensors)
    if len(set(names.values())) != len(names):
        raise ModelError("Two weights have the same name once torch.compile's marks are removed.", where=weights.path,
                         expected="each weight once", got=f"{len(names)} weights")  # fmt: skip
    tensors = {names[key]: tensor for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError("A weight is NaN or infinite.", expected="finite weights", got=key, where=weights.path,
                             hint=f"the training broke down; use another checkpoint than {name} (-chk)")  # fmt: skip
    return tensors


def _mirror_axes(axes: Field | None) -> tuple[int, ...]:
    """Missing or None means that the training did not mirror."""
    if axes is None:
        return ()
    numbers = tuple(axis.integer(0, 2) for axis in axes.items())
    if len(set(numbers)) != len(numbers):
        raise axes.wrong("each axis once")
    return numbers


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Name -> what it would be had nobody wrapped the network: without the marks of torch.compile and DDP."""
    plain = {name: ".".join(part for part in name.split(".") if part != WRAPPER) for name in names}
    while plain and all(name.startswith(PREFIX) for name in plain.values()):
        plain = {name: short[len(PREFIX) :] for name, short in plain.items()}
    return plain


def _sha256(stream: BinaryIO) -> str:
    digest = hashlib.sha256()
    while block := stream.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
