"""The process that reads and prepares cases for a run; `trtbuild.steps.folder_run.child` starts it.

It answers one message after the other until its standard input ends. Nothing that a library does here reaches the
run: prints go to stderr, a crash or the system's out-of-memory killer ends this process only.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from trtbuild.errors import InputError, TrtbuildError
from trtbuild.machine import give_back_memory, keep_no_large_block
from trtbuild.spec import ModelSpec
from trtbuild.steps.folder_run.messages import (
    HELLO,
    Done,
    Failed,
    Forget,
    Look,
    Read,
    Reading,
    Second,
    Stage,
    Warm,
    receive,
    send,
)
from trtbuild.volume.image import Header, Image, LabelImage
from trtbuild.volume.preparation.preprocess import Prepared, prepared_from_array

PR_SET_PDEATHSIG = 1
"""linux/prctl.h"""
FIRST_VICTIM = "1000"
"""The largest oom_score_adj (man 5 proc): one case fails rather than the run, whose memory is the larger part."""
EMPTY = "every voxel of the image is 0"

Tell = Callable[[Stage], None]


def main() -> None:
    """Serves until the other end is closed."""
    messages, replies = _own_pipes()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the run decides what Ctrl-C means
    _depend_on_parent()
    keep_no_large_block()
    replies.write(HELLO)
    kept: dict[str, Image] = {}
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            _serve(receive(messages), kept, replies)
            give_back_memory()


def _own_pipes() -> tuple[io.FileIO, io.FileIO]:
    """The pipes to the run, out of the reach of libraries: their stdin is empty, their stdout is stderr."""
    messages, replies = os.dup(0), os.dup(1)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return io.FileIO(messages, "rb"), io.FileIO(replies, "wb")


def _depend_on_parent() -> None:
    """Linux: dies with the thread that started this process, even inside a library, and before it for lack of memory.

    Elsewhere the process ends at its next message or reply after the run has gone.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        with contextlib.suppress(OSError):  # no /proc
            Path("/proc/self/oom_score_adj").write_text(FIRST_VICTIM)


def _serve(message: object, kept: dict[str, Image], replies: io.FileIO) -> None:
    """Answers one message. Its arrays, and those of the answer, are free when this returns."""
    try:
        send(replies, Done(value=answer(message, kept, lambda stage: send(replies, stage))))
    except BrokenPipeError:
        raise
    except TrtbuildError as error:
        failed = Failed(error=_plain(error))
    except MemoryError as error:
        failed = Failed(error=MemoryError(str(error)))  # NumPy's own class has other arguments
    except Exception as error:  # noqa: BLE001  # a bug: the run raises it with its traceback
        text = "".join(traceback.format_exception(error))
        failed = Failed(error=RuntimeError(f"in the process that reads images:\n{text}"))
    else:
        return
    send(replies, failed)


def _plain(error: TrtbuildError) -> TrtbuildError:
    """The error without its cause and frames (they hold arrays), its parts as text: foreign values may not travel."""
    for part in ("what", "expected", "got", "where", "hint"):
        value = getattr(error, part)
        setattr(error, part, None if value is None else str(value))
    error.__cause__ = error.__context__ = None
    return error.with_traceback(None)


def answer(message: object, kept: dict[str, Image], tell: Tell) -> Reading | Prepared | Header | None:
    """The answer to one message; `kept` holds the images of cases by name, `tell` hears how far it is.

    Raises what the reader and the preparation raise.
    """
    from threadpoolctl import threadpool_limits

    # resampling is a few small matrix products, and the cores belong to the network
    with threadpool_limits(1, user_api="blas"):
        match message:
            case Look(read=read):
                return _header(read, tell)
            case Read():
                return _reading(message, kept, tell)
            case Second():
                return _second(message, kept, tell)
            case Forget(case=case):
                kept.pop(case, None)
            case Warm(specs=specs):
                for spec in specs:
                    _load(spec)
            case _:
                raise TypeError(f"{message!r} is no message")
    return None


def _header(read: Read, tell: Tell) -> Header | None:
    """What the header says; None where it cannot be read, which reading the case will say better."""
    spec, files = _files(read, "reading the header", tell)
    try:
        if all(os.path.isdir(file) for file in files):
            from trtbuild.volume.io.dicom_io import series_header

            return series_header(files, spec.reader)
        from trtbuild.volume.io import reader_named

        return reader_named(spec.reader).image_header(files, spec.channels)
    except InputError:
        return None


def _files(read: Read, stage: str, tell: Tell) -> tuple[ModelSpec, tuple[Path, ...]]:
    """The case's files, from the folder where their paths start, and the model that says how to read them."""
    if read.folder is not None:
        os.chdir(read.folder)
    files = read.request.files
    tell(Stage(name=stage, amount=_megabytes(sum(map(_bytes_on_disk, files)))))
    return read.request.specs[0], files


def _reading(read: Read, kept: dict[str, Image], tell: Tell) -> Reading:
    request = read.request
    clock = [time.perf_counter()]
    image = _image(read, tell)
    previous_stage = None if request.previous is None else _labels(request.previous, request.specs[0], image)
    clock.append(time.perf_counter())
    warnings = (*image.warnings, *(() if previous_stage is None else previous_stage.warnings))
    if request.raw:
        return Reading(
            image=replace(image, warnings=warnings),
            prepared=(),
            seconds={"read": clock[1] - clock[0], "prepare": 0.0},
            previous=None if previous_stage is None else previous_stage.labels,
        )
    if request.keep:
        kept[request.case] = image
    prepared = []
    for spec in request.specs:
        tell(Stage(name="preparing", amount=_amount(image, spec)))
        previous = None if spec.previous_stage is None or previous_stage is None else previous_stage.labels
        prepared.append(prepared_from_array(image.data, image.spacing, spec, previous))
    clock.append(time.perf_counter())
    seconds = dict(zip(("read", "prepare"), np.diff(clock).tolist(), strict=True))
    facts = replace(image, data=np.empty((0, *image.data.shape[1:]), np.float32), warnings=warnings)
    return Reading(image=facts, prepared=tuple(prepared), seconds=seconds)


def _second(message: Second, kept: dict[str, Image], tell: Tell) -> Prepared:
    case = message.read.request.case
    if case not in kept:  # the process that kept it has died
        kept[case] = _image(message.read, tell)
    image = kept[case]
    tell(Stage(name="preparing", amount=_amount(image, message.spec)))
    return prepared_from_array(image.data, image.spacing, message.spec, message.segmentation)


def _image(read: Read, tell: Tell) -> Image:
    """The image of a request, with a warning where it is empty."""
    spec, files = _files(read, "reading", tell)
    if all(os.path.isdir(file) for file in files):
        from trtbuild.volume.io.dicom_io import read_series

        image = read_series(files, spec.channels, spec.reader)
    else:
        from trtbuild.volume.io import reader_named

        image = reader_named(spec.reader).read_image(files, spec.channels)
    return image if image.data.any() else replace(image, warnings=(*image.warnings, EMPTY))


def _bytes_on_disk(path: Path) -> int:
    """Of a file, or of the files in a folder; 0 where there is none, which the reader says better."""
    if os.path.isdir(path):
        return sum(_bytes_on_disk(Path(entry.path)) for entry in os.scandir(path) if entry.is_file())
    return os.path.getsize(path) if os.path.isfile(path) else 0


def _labels(file: Path, spec: ModelSpec, image: Image) -> LabelImage:
    from trtbuild.volume.io.previous import labels_for_image

    return labels_for_image(file, spec.reader, image)


def _amount(image: Image, spec: ModelSpec) -> str:
    """How large a case is, as read and for the network, for the message of a process that died over it."""
    shape = (len(spec.channels), *image.data.shape[1:])
    kept = 3 - spec.dimensions  # a 2-D configuration keeps the spacing along its first axis
    axes = spec.transpose_forward[kept:]
    growth = math.prod(image.spacing[axis] / target for axis, target in zip(axes, spec.spacing, strict=True))
    size = 4 * math.prod(shape)
    return f"{' x '.join(map(str, shape))} voxels, {_megabytes(size)}, {_megabytes(size * growth)} for the network"


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.1f} MB"


def _load(spec: ModelSpec) -> None:
    """Imports what a case of this model will need: its reader, and by a tiny case the libraries that prepare."""
    from trtbuild.volume.io import reader_named

    reader_named(spec.reader)
    target = spec.spacing if spec.dimensions == 3 else (1.0, *spec.spacing)
    spacing = [2 * target[axis] for axis in spec.transpose_backward]
    prepared_from_array(np.zeros((len(spec.channels), 4, 4, 4), np.float32), spacing, spec)


if __name__ == "__main__":
    main()
