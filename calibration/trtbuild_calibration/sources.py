"""Where patches come from: a `Source` is one case, in files, in memory, or made when it is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trtbuild_calibration.arrays import ArrayFile, open_array
from trtbuild_calibration.cases import Case
from trtbuild_calibration.errors import CalibrationError

Box = tuple[tuple[int, int], ...]
"""(start, one past the end) of each of Z, Y and X; a box lies inside the image."""


class Source(Protocol):
    """One preprocessed case.

    Attributes:
        name: unique among the cases.
        shape: (C, Z, Y, X); C counts what the network takes, one-hot channels of a cascade included.
    """

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, int, int, int]: ...

    def read(self, box: Box) -> NDArray[np.float32]:
        """The image in this box, (C, *box)."""
        ...

    def read_labels(self, box: Box) -> NDArray[np.int16] | None:
        """The labels in this box, (Z, Y, X); None, for every box alike, where there are none."""
        ...


@dataclass(frozen=True, kw_only=True)
class ArraySource:
    """A case whose arrays lie in memory.

    Attributes:
        data: float32 (C, Z, Y, X).
        labels: integers (Z, Y, X), or None.
    """

    name: str
    data: NDArray[np.float32] = field(repr=False)
    labels: NDArray[Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.data.ndim != 4 or 0 in self.data.shape:
            raise CalibrationError(
                "An image has the wrong number of axes, or no values.",
                expected="(C, Z, Y, X)",
                got=self.data.shape,
                where=self.name,
            )
        if self.labels is not None and self.labels.shape != self.data.shape[1:]:
            raise _other_shape(self.name, self.data.shape[1:], self.labels.shape)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        c, z, y, x = self.data.shape
        return c, z, y, x

    def read(self, box: Box) -> NDArray[np.float32]:
        return self.data[(slice(None), *_slices(box))].astype(np.float32)

    def read_labels(self, box: Box) -> NDArray[np.int16] | None:
        return None if self.labels is None else _labels(self.labels[_slices(box)], self.name)


@dataclass(frozen=True, kw_only=True)
class FileSource:
    """A case in files, read box by box; for a cascade with the stage before as one-hot channels after the image.

    Attributes:
        one_hot: the labels that get a channel each, in this order.
    """

    name: str
    data: ArrayFile
    segmentation: ArrayFile | None = None
    previous: ArrayFile | None = None
    one_hot: tuple[int, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int, int]:
        c, z, y, x = self.data.shape
        return c + len(self.one_hot), z, y, x

    def read(self, box: Box) -> NDArray[np.float32]:
        image: NDArray[np.float32] = self.data.read((slice(None), *_slices(box))).astype(np.float32, copy=False)
        if self.previous is None:
            return image
        before = self.previous.read(_slices(box))
        # nnU-Net's MoveSegAsOneHotToDataTransform: one channel per label, in the order given
        channels = [(before == label).astype(np.float32)[None] for label in self.one_hot]
        return np.concatenate([image, *channels])

    def read_labels(self, box: Box) -> NDArray[np.int16] | None:
        if self.segmentation is None:
            return None
        return _labels(self.segmentation.read((slice(0, 1), *_slices(box)))[0], self.segmentation.path)


def open_case(case: Case, *, channels: int, one_hot: Sequence[int] = ()) -> FileSource:
    """A case of a folder, its headers read and checked.

    Args:
        channels: of the image, without those of a cascade.
        one_hot: the foreground labels of the stage before in the order of the network's channels; needs
            `case.previous`.

    Raises:
        CalibrationError: a file is missing or damaged, has other channels or another shape, or holds no numbers.
    """
    data = open_array(case.data, "data")
    if data.shape[0] != channels:
        raise CalibrationError(
            "A case has another number of channels than the network.",
            expected=channels,
            got=data.shape[0],
            where=case.data,
            hint="give the dataset that the model was trained on",
        )
    if bool(one_hot) != (case.previous is not None):
        raise CalibrationError(
            "The labels of the stage before and its channels come together or not at all.",
            expected="predictions of the stage before for a second stage, and none for any other",
            got=f"{len(one_hot)} one-hot channels, predictions {case.previous}",
            where=case.name,
        )
    labels = None if case.segmentation is None else open_array(case.segmentation, "seg")
    before = None if case.previous is None else open_array(case.previous, "seg", axes="ZYX")
    if labels is not None and labels.shape != (1, *data.shape[1:]):
        raise _other_shape(labels.path, (1, *data.shape[1:]), labels.shape)
    if before is not None and before.shape != data.shape[1:]:
        raise _other_shape(before.path, data.shape[1:], before.shape)
    return FileSource(name=case.name, data=data, segmentation=labels, previous=before, one_hot=tuple(one_hot))


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _labels(values: NDArray[Any], where: object) -> NDArray[np.int16]:
    """Labels as int16; some tools write them as floats."""
    with np.errstate(invalid="ignore"):  # NaN becomes some number, and then differs
        labels = values.astype(np.int16)
    if not np.array_equal(labels, values):
        raise CalibrationError(
            "A segmentation holds something else than labels.",
            expected="whole numbers from -32768 to 32767",
            got=f"{values.dtype} {values[labels != values][0]}",
            where=where,
        )
    return labels


def _other_shape(where: object, expected: tuple[int, ...], got: tuple[int, ...]) -> CalibrationError:
    return CalibrationError(
        "Labels have another shape than their image.",
        expected=expected,
        got=got,
        where=where,
        hint="preprocess the case again",
    )
