"""nnU-Net's post-processing: which steps `postprocessing.json` or `.pkl` names, and what they do to a segmentation."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import ModelError, Untrusted
from trtbuild.spec import KeepLargestComponent
from trtbuild.volume.postprocessing.components import components_bytes, keep_largest_component
from trtbuild.volume.postprocessing.plain_pickle import Global, value_from_pickle

FUNCTION = "remove_all_but_largest_component_from_segmentation"
MODULE = "nnunetv2.postprocessing.remove_connected_components"
HIGHEST_LABEL = 65535  # nnU-Net's writers hold a segmentation in uint16 at most
MOST_LABELS = 1 << 20
"""Labels of all steps together. 65535 classes have half of it; a pickle can name one long tuple a million times."""
LARGEST_FILE = {".pkl": 4 << 20, ".json": 64 << 20}
"""Bytes: 65535 labels take 1.3 MB in a pickle; the .json holds the metrics of every label too."""

Voxels = TypeVar("Voxels", bound=np.integer[Any])


def postprocessing_from_file(path: Path) -> tuple[KeepLargestComponent, ...]:
    """The steps of nnU-Net's `postprocessing.json` or `postprocessing.pkl`, in their order.

    The pickle, a tuple (functions, keyword arguments), is read without executing it (`value_from_pickle`). Of the
    .json the keys `postprocessing_fns` and `postprocessing_kwargs` count. `labels_or_regions` is a label, a region or
    a list of both, and means their union (nnunetv2.postprocessing.remove_connected_components).

    Raises:
        ModelError: the file is missing, damaged, or not one of nnU-Net's; or it names another function.
        Untrusted: the pickle would have to be executed.
    """
    where, content = str(path), _content(path)
    if path.suffix == ".pkl":
        data = value_from_pickle(content, (f"{MODULE} {FUNCTION}",), where)
        if type(data) is not tuple or len(data) != 2:
            raise _wrong("a tuple (functions, keyword arguments)", data, where)
        functions, arguments = data
    else:
        data = _json(content, where)
        functions, arguments = (_entry(data, key, where) for key in ("postprocessing_fns", "postprocessing_kwargs"))
    if type(functions) is not list or type(arguments) is not list or len(functions) != len(arguments):
        raise _wrong("two lists of equal length", (functions, arguments), where)
    steps = tuple(_step(f, a, where) for f, a in zip(functions, arguments, strict=True))
    if sum(len(step.labels) for step in steps) > MOST_LABELS:
        raise ModelError("The post-processing names more labels than any real one.", expected=f"at most {MOST_LABELS}",
                         where=where)  # fmt: skip
    return steps


def _content(path: Path) -> bytes:
    limit = LARGEST_FILE.get(path.suffix)
    if limit is None:
        raise ModelError("This is no post-processing file of nnU-Net.", expected="postprocessing.json or .pkl",
                         got=path.name, where=path)  # fmt: skip
    try:
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise ModelError("The post-processing cannot be read.", got=os.strerror(error.errno or 0), where=path,
                         hint="check the path") from error  # fmt: skip
    if len(content) > limit:
        raise ModelError("The post-processing file is larger than any real one.", expected=f"at most {limit} bytes",
                         where=path)  # fmt: skip
    return content


def _json(content: bytes, where: str) -> dict[str, Any]:
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelError("The post-processing is not JSON.", got=error, where=where,
                         hint="copy the file again") from error  # fmt: skip
    if not isinstance(data, dict):
        raise _wrong("a JSON object", data, where)
    return data


def _entry(data: dict[str, Any], key: str, where: str) -> Any:
    if key not in data:
        raise _wrong(f"the key {key}", list(data), where)
    return data[key]


def _step(function: Any, arguments: Any, where: str) -> KeepLargestComponent:
    name = function.name.rpartition(" ")[2] if isinstance(function, Global) else function
    if name != FUNCTION:
        raise Untrusted("The post-processing runs a function that trtbuild does not know.", expected=FUNCTION,
                        got=_shown(name), where=where, hint="leave the post-processing out")  # fmt: skip
    if type(arguments) is not dict or not {"labels_or_regions"} <= set(arguments) <= {
        "labels_or_regions",
        "background_label",
    }:
        raise _wrong("labels_or_regions, and background_label at most", arguments, where)
    background = _label(arguments.get("background_label", 0), where)
    return KeepLargestComponent(labels=_labels(arguments["labels_or_regions"], where), background=background)


def _labels(value: Any, where: str) -> tuple[int, ...]:
    """The union: every label once, in the order of its first appearance."""
    found: dict[int, None] = {}
    count = 0
    for entry in value if type(value) in (list, tuple) else (value,):
        members = entry if type(entry) in (list, tuple) else (entry,)
        count += len(members)
        if count > MOST_LABELS:
            raise ModelError("A step of the post-processing names more labels than any real one.",
                             expected=f"at most {MOST_LABELS}", where=where)  # fmt: skip
        found.update((_label(member, where), None) for member in members)
    return tuple(found)


def _label(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value <= HIGHEST_LABEL:
        raise _wrong(f"a label from 0 to {HIGHEST_LABEL}", value, where)
    return value


def _wrong(expected: str, got: Any, where: str) -> ModelError:
    return ModelError("The post-processing is not in nnU-Net's form.", expected=expected, got=_shown(got), where=where)


def _shown(value: Any) -> str:
    """A short text; never the whole, which a pickle can make endless."""
    text = repr(value) if isinstance(value, (str, int, Global)) or value is None else f"a {type(value).__name__}"
    return text if len(text) <= 100 else text[:100] + " …"


def postprocessed(segmentation: NDArray[Voxels], steps: Sequence[KeepLargestComponent]) -> NDArray[Voxels]:
    """A copy of `segmentation` after the steps; shape (Z, Y, X) and dtype stay.

    As nnU-Net's `remove_all_but_largest_component_from_segmentation`: voxels that share a corner are neighbours, and
    components of the largest size all stay.

    Raises:
        ModelError: the background of a step does not fit the dtype.
    """
    result = segmentation.copy()
    for step in steps:
        if step.background > np.iinfo(result.dtype).max:
            raise ModelError("The background of the post-processing does not fit the segmentation.",
                             expected=f"at most {np.iinfo(result.dtype).max}", got=step.background)  # fmt: skip
        keep_largest_component(result, step.labels, step.background)
    return result


def postprocessing_bytes(shape: Sequence[int], itemsize: int = 2) -> int:
    """Upper bound of the memory that `postprocessed` takes beside its input, the copy included, in bytes."""
    return math.prod(shape) * itemsize + components_bytes(shape)
