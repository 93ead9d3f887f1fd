"""The border to the image libraries: what they raise becomes an error of ours, what they write appears whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.atomic import whole_file
from trtbuild.errors import CaseNotWritable, InputError, MissingExtra, OutOfMemory, OutputError, TrtbuildError
from trtbuild.volume.image import Map, Segmentation

PAIRS = (".hdr", ".img", ".mhd", ".nhdr")
"""Endings of formats that keep header and voxels in two files, so that one rename cannot make them appear whole."""
PROBE = 1 << 20
"""Bytes that a disk must still take where a library could not write and does not say why."""


def one_line(error: BaseException) -> str:
    """The text of a foreign error on one line; the end of a long one, where ITK says what happened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else "…" + text[-300:]


@contextmanager
def reading(file: Path, kind: str) -> Iterator[None]:
    """Maps everything that a library raises over `file`, which should be a `kind`; the cause is kept.

    Image libraries raise errors of all kinds over damaged bytes (struct.error, zlib.error, IndexError, SyntaxError …),
    so there is no shorter list than Exception. Only calls into a library belong in the block.
    """
    try:
        yield
    except TrtbuildError:
        raise
    except MemoryError as error:
        raise OutOfMemory("The host has no memory left for the image.", got=one_line(error), where=file,
                          hint="Give the process more memory, or crop the image.") from error  # fmt: skip
    except Exception as error:
        hint = "Open the file in a viewer; if it is damaged, copy or export it again."
        raise InputError(
            "The image cannot be read.", expected=f"{kind}, whole", got=one_line(error), where=file, hint=hint
        ) from error


def labels_as_written(segmentation: Segmentation | Map, path: Path) -> Segmentation:
    """The segmentation (Z, Y, X) as uint8 where its maximum is below 255, else as uint16: nnU-Net's rule.

    nnU-Net lets values outside wrap around; here they are CaseNotWritable. A float32 map stays as it is.
    """
    if segmentation.dtype.kind == "f":
        return segmentation  # type: ignore[return-value]  # written by the same lines
    low, high = int(segmentation.min()), int(segmentation.max())
    if low < 0 or high > np.iinfo(np.uint16).max:
        raise CaseNotWritable("The labels do not fit the file.", expected="0 to 65535", got=f"{low} to {high}",
                              where=path)  # fmt: skip
    dtype: type[np.integer[Any]] = np.uint8 if high < 255 else np.uint16
    labels: NDArray[np.integer[Any]] = segmentation.astype(dtype, copy=False)
    return labels


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """`whole_file` for a library that writes: yields the temporary path, and maps everything that the library raises.

    Raises:
        CaseNotWritable: the library refuses what it should write, and the disk is not the reason.
        OutputError: the block or the replacement failed for another reason. In both cases `path` is as before.
    """
    if path.suffix.lower() in PAIRS:
        raise OutputError("Segmentations are written as one file.", expected="an ending such as .nii.gz or .mha",
                          got=path.suffix, where=path)  # fmt: skip
    with whole_file(path) as temporary:
        try:
            yield temporary
        except (OutputError, MissingExtra):
            raise
        except InputError as error:  # what was written is not whole: the disk took less, and the library did not notice
            raise OutputError("The segmentation cannot be written.", got=error.what, where=path,
                              hint="Free some space on the disk.") from error  # fmt: skip
        except MemoryError as error:
            raise OutOfMemory("The host has no memory left to write the segmentation.", where=path) from error
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # `whole_file` knows these.
            _require_space(temporary)
            raise CaseNotWritable("The segmentation cannot be written.", got=one_line(error), where=path,
                                  hint="Check the image's header and the file ending.") from error  # fmt: skip


def _require_space(temporary: Path) -> None:
    """Lets the system say whether it refuses to write here; C++ libraries do not pass its reason on.

    Raises:
        OSError: it does; `whole_file` knows these.
    """
    with temporary.open("ab") as stream:
        stream.write(bytes(PROBE))
        stream.flush()
        os.fsync(stream.fileno())
