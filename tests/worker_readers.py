"""A reader whose files do what their names say; `installed` puts it into the processes that a test starts.

In such a process it takes the place of every reader, through Python's own start-up hook (sitecustomize): the product
has no hook for it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from trtbuild.volume import io
from trtbuild.volume.image import Image, LabelImage, PixelGeometry

TESTS = Path(__file__).parent
HOOK = "import worker_readers; worker_readers.take_over()"


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Children of this process get the reader below instead of trtbuild's."""
    (folder / "sitecustomize.py").write_text(HOOK)
    paths = [str(folder), str(TESTS), str(TESTS.parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def take_over() -> None:
    """Called at the start of every Python that a test starts."""
    io.reader_named = lambda name: sys.modules[__name__]
    if any("worker_main" in word for word in sys.orig_argv):
        print("a start-up file prints to stdout", flush=True)


def read_image(files: Sequence[Path], channels: tuple[str, ...]) -> Image:
    """An image of 1, or what the first file's name says."""
    name = files[0].name
    if name == "segfault":
        ctypes.string_at(1)
    elif name == "abort":
        os.write(2, b"terminate called after throwing an instance of 'itk::ExceptionObject'\n")
        os.abort()
    elif name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif name == "exit":
        os.write(2, b"first line\n" * 5000)
        for line in (b"licence server not found\n", b"\n", b"ended\n"):
            os.write(2, line)
            time.sleep(0.02)
        os._exit(3)
    elif name == "memory":
        np.empty(1 << 62, np.uint8)
    elif name == "bug":
        raise ZeroDivisionError("a mistake of ours")
    elif name == "foreign":
        raise type("TheirError", (Exception,), {})("cannot be pickled")
    elif name == "noise":
        print("printed", flush=True)
        os.write(1, b"written to file descriptor 1\n" * 10000)
        os.system("echo from a shell")
        assert sys.stdin.read() == ""
    elif name in ("sleep", "pause"):
        time.sleep(60 if name == "sleep" else 0.5)
    elif name == "hold":
        ctypes.PyDLL(None).sleep(60)  # unlike CDLL, PyDLL keeps Python's lock
    size = int(name) if name.isdigit() else 4
    return Image(data=np.ones((1, size, 256, 256), np.float32), spacing=(1.0, 1.0, 1.0), geometry=PixelGeometry())


def read_segmentation(file: Path, *, allow_negative: bool = False) -> LabelImage:
    """Labels in the number of the file's name."""
    labels = np.full((4, 256, 256), int(file.name), np.uint8)
    return LabelImage(labels=labels, spacing=(1.0, 1.0, 1.0), geometry=PixelGeometry())
