"""What travels between a run and the process that reads its cases, and how it crosses a pipe.

A message is a pickle whose arrays travel beside it as raw bytes: they are written from where they lie, and read into
the memory where they stay. Both ends are ours and one was started by the other, so that unpickling is safe.

    <u64: bytes of the pickle> <u32: arrays> <u64 each: bytes of an array> <pickle> <arrays>
"""

from __future__ import annotations

import io
import pickle
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trtbuild.spec import ModelSpec
from trtbuild.volume.image import Image, Segmentation
from trtbuild.volume.preparation.preprocess import Prepared

HELLO = b"trtbuild reads images here\n"
"""The first line from the process. What comes before it is noise that Python's start-up files print."""
LINE = 4096
COUNTS, LENGTH = struct.Struct("<QI"), struct.Struct("<Q")


@dataclass(frozen=True, kw_only=True)
class Request:
    """A case to read and prepare.

    `files` are its channels in order, or for each channel the folder of a DICOM series. `specs` are the first stages of
    all members, with the same reader and channels. `previous` is the label file of an earlier stage, for the specs that
    have one. With `keep` the image stays for `Worker.second` until `Worker.forget`. With `raw` it is read and not
    prepared: whoever runs the network prepares it.
    """

    case: str
    files: tuple[Path, ...]
    specs: tuple[ModelSpec, ...]
    previous: Path | None = None
    keep: bool = False
    raw: bool = False

    def __post_init__(self) -> None:
        if len({(spec.reader, spec.channels) for spec in self.specs}) != 1:
            raise ValueError("the models of a request must have one reader and the same channels")


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """A case as the process gives it.

    `image` has no voxels: its `data` is (0, Z, Y, X), for geometry, spacing, shape and warnings. `prepared` has one
    entry per spec of the request; `seconds` the wall time of "read" and "prepare". A raw one has the voxels, nothing
    prepared, and as `previous` the labels (Z, Y, X) of an earlier stage where the request named their file.
    """

    image: Image
    prepared: tuple[Prepared, ...]
    seconds: Mapping[str, float]
    previous: Segmentation | None = None


@dataclass(frozen=True, kw_only=True)
class Warm:
    """To the process: import what these models need."""

    specs: tuple[ModelSpec, ...]


@dataclass(frozen=True, kw_only=True)
class Read:
    """To the process: answer the request. Its relative paths start at `folder`."""

    request: Request
    folder: str | None


@dataclass(frozen=True, kw_only=True)
class Look:
    """To the process: what the case's header says, without its voxels."""

    read: Read


@dataclass(frozen=True, kw_only=True, eq=False)
class Second:
    """To the process: prepare the kept image for a second stage; where it is not kept (any more), read it again."""

    read: Read
    spec: ModelSpec
    segmentation: Segmentation


@dataclass(frozen=True, kw_only=True)
class Forget:
    """To the process: drop a kept image."""

    case: str


@dataclass(frozen=True, kw_only=True)
class Stage:
    """From the process: what it does from now on ("reading", "preparing"), and with how much."""

    name: str
    amount: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Done:
    """From the process: the answer."""

    value: object


@dataclass(frozen=True, kw_only=True, eq=False)
class Failed:
    """From the process: the error that stands for the answer."""

    error: Exception


Message = Warm | Look | Read | Second | Forget
Reply = Stage | Done | Failed


def send(pipe: io.FileIO, message: Message | Reply) -> None:
    """Writes one message; its contiguous arrays are not copied.

    Nothing is written where it cannot be pickled. OSError where nobody reads any more.
    """
    arrays: list[pickle.PickleBuffer] = []
    body = pickle.dumps(message, protocol=5, buffer_callback=arrays.append)
    views = [memoryview(body), *(array.raw() for array in arrays)]
    _write(pipe, memoryview(COUNTS.pack(len(body), len(arrays))))
    _write(pipe, memoryview(b"".join(LENGTH.pack(view.nbytes) for view in views[1:])))
    for view in views:
        _write(pipe, view)


def receive(pipe: io.FileIO) -> object:
    """Reads one message; EOFError where the other end is closed, MemoryError where its arrays do not fit."""
    length, count = COUNTS.unpack(_filled(pipe, COUNTS.size))
    lengths = [n for (n,) in LENGTH.iter_unpack(_filled(pipe, count * LENGTH.size))]
    body = _filled(pipe, length)
    return pickle.loads(body, buffers=[_filled(pipe, n) for n in lengths])


def _write(pipe: io.FileIO, view: memoryview) -> None:
    while view:
        view = view[pipe.write(view) :]


def _filled(pipe: io.FileIO, length: int) -> memoryview:
    """The next bytes of the pipe. NumPy's memory: it is not set to zero first, and large blocks go back when freed."""
    data = rest = np.empty(length, np.uint8).data
    while rest:
        count = pipe.readinto(rest)
        if not count:
            raise EOFError("the other end of the pipe is closed")
        rest = rest[count:]
    return data
