"""Files of arrays as calibration patches for a network that is no nnU-Net's, and what the network makes of them.

`.npy` is a stack of inputs (N, *shape) or one input, `.npz` the same by input name, and `.json` what Polygraphy's
--save-inputs writes: a list of {input name: batch}. Nothing in them is executed: arrays of objects are pickles.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError
from trtbuild.spec import TensorSpec
from trtbuild.steps.precision.calibrate import observed_form
from trtbuild.steps.precision.data import as_input_errors
from trtbuild.steps.precision.network import ObservedNetwork
from trtbuild_calibration import Method, Progress, observe, threshold

if TYPE_CHECKING:
    import onnx

Patch = NDArray[np.float32]
READABLE = ".npy, .npz or .json (Polygraphy's --save-inputs)"
POLYGRAPHY_KEYS = {"array", "polygraphy_class"}
BROKEN = (ValueError, EOFError, OSError, KeyError, zipfile.BadZipFile, MemoryError, RecursionError, binascii.Error)
"""What NumPy and the JSON reader raise for a damaged file; MemoryError for a header that promises too much."""


@dataclass(frozen=True, kw_only=True)
class ArrayPatches:
    """Implements `trtbuild_calibration.Patches` on stacks (n, *shape), float32 and finite."""

    stacks: tuple[Patch, ...] = field(repr=False)

    def __len__(self) -> int:
        return sum(map(len, self.stacks))

    def __getitem__(self, index: int, /) -> Patch:
        for stack in self.stacks:
            if index < len(stack):
                return np.ascontiguousarray(stack[index])
            index -= len(stack)
        raise IndexError(index)


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """Thresholds by tensor that quantised layers read, and the largest |x| of every tensor."""

    amax: Mapping[str, float] = field(repr=False)
    largest: Mapping[str, float] = field(repr=False)


def patches_from_file(path: Path, spec: TensorSpec) -> ArrayPatches:
    """The inputs of a file, for a network's only input.

    Args:
        path: .npy, .npz or .json.
        spec: the input, float32 (batch, *shape).

    Raises:
        InputError: the file is damaged or of another kind, holds pickles, another type, another shape, another input,
            nothing, zeros alone, or values that are not finite.
    """
    readers = {".npy": _from_npy, ".npz": _from_npz, ".json": _from_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise InputError("Calibration arrays of this kind are not read.", expected=READABLE, got=path.name)
    try:
        arrays = reader(path, spec.name)
    except BROKEN as error:
        raise InputError("The calibration arrays cannot be read.", expected=f"numbers in {READABLE}, no pickles",
                         got=f"{type(error).__name__}: {error}"[:300], where=path,
                         hint="write them again with numpy.save or polygraphy") from error  # fmt: skip
    stacks = tuple(_stack(array, spec, f"{path}, {place}") for place, array in arrays)
    if not sum(map(len, stacks)):
        raise InputError("There are no calibration arrays in the file.", expected="one input at least", where=path,
                         hint="write inputs of the network into it, as it gets them")  # fmt: skip
    if not any(patch.any() for stack in stacks for patch in stack):
        raise InputError("The calibration arrays hold nothing but zeros.", expected="inputs as the network gets them",
                         got=f"{sum(map(len, stacks))} constant zero", where=path,
                         hint="write real, preprocessed inputs into it: ranges of zeros are no ranges")  # fmt: skip
    return ArrayPatches(stacks=stacks)


def measured_ranges(
    model: onnx.ModelProto, patches: ArrayPatches, *, method: Method, threads: int, say: Callable[[str], None]
) -> Ranges:
    """Runs the patches through a clean float32 network with one input, on the CPU; `say` is told how far it is.

    Raises:
        InputError: the network returns NaN or infinity, or has no layer to observe.
        EngineError: OpenVINO does not run it.
    """

    def progress(now: Progress) -> None:
        say(f"calibrating, {now.phase}: {now.done} of {now.total} passes")

    network = ObservedNetwork(model=observed_form(model), patch=patches[0].shape, threads=threads)
    with as_input_errors():
        seen = observe(network, network.targets(), patches, fingerprint={}, progress=progress)
        amax = {name: threshold(histogram, method).amax for name, histogram in seen.histograms.items()}
    return Ranges(amax=amax, largest=seen.ranges)


_Arrays = Sequence[tuple[str, NDArray[Any]]]


def _from_npy(path: Path, name: str) -> _Arrays:
    return [("the array", np.lib.format.open_memmap(path, mode="r"))]


def _from_npz(path: Path, name: str) -> _Arrays:
    with zipfile.ZipFile(path) as archive:
        names = [entry.removesuffix(".npy") for entry in archive.namelist()]
        _check_inputs(names, name, f"{path}")
        with archive.open(f"{name}.npy") as stream:
            return [(f"array {name}", np.lib.format.read_array(stream, allow_pickle=False))]


def _from_json(path: Path, name: str) -> _Arrays:
    feeds = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(feeds, list):
        raise ValueError(f"a list of {{input name: array}} was expected, not {type(feeds).__name__}")
    return [(f"feed {number}", _from_feed(feed, name, f"{path}, feed {number}")) for number, feed in enumerate(feeds)]


def _from_feed(feed: object, name: str, where: str) -> NDArray[Any]:
    if not isinstance(feed, dict):
        raise ValueError(f"{where}: {{input name: array}} was expected, not {type(feed).__name__}")
    _check_inputs(list(feed), name, where)
    value = feed[name]
    if not isinstance(value, dict) or set(value) != POLYGRAPHY_KEYS or value["polygraphy_class"] != "ndarray":
        raise ValueError(f"{where}: {name} is no array of Polygraphy")
    if not isinstance(value["array"], str):
        raise ValueError(f"{where}: the array is no text")
    content = base64.b64decode(value["array"], validate=True)
    array: NDArray[Any] = np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
    return array


def _check_inputs(names: Sequence[str], name: str, where: str) -> None:
    if list(names) != [name]:
        raise InputError("The calibration arrays are for other inputs.", expected=name, where=where,
                         got=", ".join(names) or "none", hint="name the array as the network's input")  # fmt: skip


def _stack(array: NDArray[Any], spec: TensorSpec, where: str) -> Patch:
    """(n, *shape) of one input or several, float32 and finite."""
    shape = spec.shape[1:]
    if array.dtype != np.float32:
        raise InputError("The calibration arrays are of another type.", expected=spec.dtype, got=array.dtype,
                         where=where, hint="array.astype(numpy.float32)")  # fmt: skip
    stack = array[None] if array.ndim == len(shape) else array
    if stack.ndim != len(spec.shape) or any(n != m for n, m in zip(stack.shape[1:], shape, strict=True)):
        expected = ", ".join(map(str, shape))
        raise InputError("The calibration arrays are of another shape than the network's input.",
                         expected=f"(N, {expected}) or ({expected})", got=array.shape, where=where)  # fmt: skip
    for number, patch in enumerate(stack):
        if not np.isfinite(patch).all():
            raise InputError("The calibration arrays hold NaN or infinity.", expected="finite numbers",
                             got="NaN" if np.isnan(patch).any() else "infinity",
                             where=f"{where}, input {number}")  # fmt: skip
    return stack
