"""nnU-Net's Tiff3DIO: stacks of slices in .tif files, whose spacing stands in a .json file beside them.

The spacing of case_0000.tif, case_0001.tif … stands in case.json, that of a segmentation case.tif too, as
``{"spacing": [z, y, x]}`` in mm. Where there is no such file it is (1, 1, 1), which is nnU-Net's rule, and a warning.

Where nnU-Net's class goes wrong, this one does not: it cuts five characters off every name, so that the spacing of an
image without channel number is sought under a wrong name and taken for (1, 1, 1); here only a channel number is cut
off. It writes the .json file after the segmentation; here the segmentation comes last, and both appear whole.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from trtbuild.atomic import write_whole
from trtbuild.errors import InputError
from trtbuild.volume.image import Geometry, Header, Image, LabelImage, Map, Segmentation, TiffGeometry
from trtbuild.volume.io.foreign import labels_as_written, reading, written
from trtbuild.volume.io.labels import labels_from_file
from trtbuild.volume.io.stack import Part, header_from_files, image_from_files, require_files

UNKNOWN = (1, 1, 1)
"""nnU-Net's spacing where nothing says it."""


def read_image(files: Sequence[Path], channels: tuple[str, ...]) -> Image:
    """See `ReaderWriter`."""
    require_files(files, channels)
    beside = json_of_image(files[0])
    image = image_from_files(files, channels, partial(_part, beside=beside))
    return replace(image, warnings=(*image.warnings, *_warnings(beside)))


def read_segmentation(file: Path, *, allow_negative: bool = False) -> LabelImage:
    """See `ReaderWriter`."""
    beside = file.with_suffix(".json")
    labels = labels_from_file(file, partial(_part, beside=beside), allow_negative)
    return replace(labels, warnings=(*labels.warnings, *_warnings(beside)))


def image_header(files: Sequence[Path], channels: tuple[str, ...]) -> Header | None:
    """See `ReaderWriter`."""
    return header_from_files(files, channels, _header)


def write_segmentation(segmentation: Segmentation | Map, geometry: Geometry, path: Path) -> None:
    """See `ReaderWriter`. The spacing goes into a .json file beside it, which is replaced if it is there."""
    if not isinstance(geometry, TiffGeometry):
        raise TypeError(f"Tiff3DIO writes stacks that it has read, not {type(geometry).__name__}")
    labels = labels_as_written(segmentation, path)
    with written(path) as temporary:
        # without "minisblack" three slices or columns would be colours
        tifffile.imwrite(temporary, data=labels, compression="zlib", photometric="minisblack")
        beside = json.dumps({"spacing": list(geometry.spacing)}, indent=4, sort_keys=True)
        write_whole(path.with_suffix(".json"), beside.encode())


def nnunet_properties(image: Image) -> dict[str, Any]:
    """See `ReaderWriter`."""
    place = image.geometry
    if not isinstance(place, TiffGeometry):
        raise TypeError(f"Tiff3DIO describes stacks that it has read, not {type(place).__name__}")
    return {"spacing": list(place.spacing)}


def json_of_image(file: Path) -> Path:
    """The .json file that holds the spacing of an image file: its name without the channel number."""
    return file.with_name(re.sub(r"_[0-9]{4}$", "", file.stem) + ".json")


def _part(file: Path, beside: Path) -> Part:
    spacing = _spacing(beside)
    with reading(file, "a tif stack"), _opened(file) as tiff:
        _require_stack(tiff, file)
        values = tiff.asarray()
        with np.errstate(over="ignore"):  # A value beyond float32 becomes infinite, which is refused by name.
            data = np.ascontiguousarray(values[None], dtype=np.float32)
    z, y, x = map(float, spacing)
    return Part(data=data, spacing=(z, y, x), geometry=TiffGeometry(spacing=spacing), placement={})


def _header(file: Path) -> Header:
    z, y, x = map(float, _spacing(json_of_image(file)))
    with reading(file, "a tif stack"), _opened(file) as tiff:
        _require_stack(tiff, file)
        shape, dtype = tiff.series[0].shape, tiff.series[0].dtype
    return Header(shape=tuple(shape), spacing=(z, y, x), channels=1, voxel_bytes=dtype.itemsize)


def _require_stack(tiff: tifffile.TiffFile, file: Path) -> None:
    """An InputError where the file is no 3-D array of real numbers."""
    shape, dtype = tiff.series[0].shape, tiff.series[0].dtype
    if len(shape) != 3:
        raise InputError("The file is no stack of slices.", expected="3 dimensions: z, y, x", got=tuple(shape),
                         where=file, hint="2-D pictures need a model trained with NaturalImage2DIO.")  # fmt: skip
    if dtype is None or dtype.kind not in "buif":
        raise InputError("The stack has no plain intensities.", expected="real numbers", got=dtype, where=file)


class _Complaints(logging.Handler):
    """What tifffile logs as an error in this thread."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.messages: list[str] = []
        self.owner = threading.get_ident()

    def emit(self, record: logging.LogRecord) -> None:
        if record.thread == self.owner:
            self.messages.append(record.getMessage())


@contextmanager
def _opened(file: Path) -> Iterator[tifffile.TiffFile]:
    """The file, if tifffile has no complaint about it.

    It only logs that the chain of pages leads out of a truncated file, and returns the slices before the damage.
    """
    log, complaints = logging.getLogger("tifffile"), _Complaints()
    log.addHandler(complaints)
    try:
        with tifffile.TiffFile(file) as tiff:
            yield tiff
    finally:
        log.removeHandler(complaints)
    if complaints.messages:
        raise InputError("The stack is damaged.", expected="a whole tif file", got=complaints.messages[0], where=file,
                         hint="Copy or export the file again.")  # fmt: skip


def _spacing(beside: Path) -> tuple[float, float, float]:
    """The three numbers as the .json file spells them, integers as integers; `UNKNOWN` where there is no file."""
    try:
        content = beside.read_bytes()
    except FileNotFoundError:
        return UNKNOWN
    except OSError as error:
        raise InputError("The spacing of the stack cannot be read.", got=error.strerror, where=beside) from error
    try:
        found = json.loads(content)
        spacing = found["spacing"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _no_spacing(beside, f"{type(error).__name__}: {error}"[:200]) from error
    if not isinstance(spacing, list) or len(spacing) != 3 or not all(map(_is_length, spacing)):
        raise _no_spacing(beside, json.dumps(spacing)[:200])
    z, y, x = spacing
    return z, y, x


def _is_length(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _no_spacing(beside: Path, got: str) -> InputError:
    return InputError("The file beside the stack does not say its spacing.", where=beside, got=got,
                      expected='{"spacing": [z, y, x]}, three positive numbers in mm',
                      hint="Correct it; without the file nnU-Net takes (1, 1, 1).")  # fmt: skip


def _warnings(beside: Path) -> tuple[str, ...]:
    """The warning that there is no spacing."""
    if beside.exists():
        return ()
    return (f"There is no {beside.name}, so the spacing is taken to be 1 x 1 x 1 mm, as nnU-Net does.",)
