"""What an interrupted observation leaves behind, so that it goes on as if nothing had happened.

A `.npz` with `meta` (JSON: format, fingerprint, tensor names, position), `maxima` float64 and `counts` int64
(targets, 2048). Counts are whole numbers and maxima do not round: where it was interrupted
leaves no trace in the result.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild_calibration.errors import CalibrationError
from trtbuild_calibration.files import read_whole, write_whole
from trtbuild_calibration.histogram import BINS

FORMAT = 1
UNREADABLE = (ValueError, KeyError, TypeError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error)
"""What zipfile, NumPy and json raise over a damaged file; RecursionError is a RuntimeError."""


@dataclass(frozen=True, kw_only=True)
class State:
    """How far an observation is.

    Attributes:
        passes: forward passes that are counted in, over all patches and groups.
        maxima: tensor -> largest |x| so far; empty before the first patch.
        counts: int64 (targets, 2048).
    """

    passes: int
    maxima: Mapping[str, float]
    counts: NDArray[np.int64] = field(repr=False)


def new_state(targets: int) -> State:
    """An observation that has seen nothing."""
    return State(passes=0, maxima={}, counts=np.zeros((targets, BINS), np.int64))


def write_state(path: Path, state: State, fingerprint: Mapping[str, Any]) -> None:
    """Writes the state, whole or not at all.

    Raises:
        CalibrationError: the system refused.
    """
    meta = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "tensors": list(state.maxima),
        "passes": state.passes,
    }
    buffer = io.BytesIO()
    np.savez(
        buffer,
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
        maxima=np.array(list(state.maxima.values()), np.float64),
        counts=state.counts,
    )
    write_whole(path, buffer.getvalue())


def read_state(path: Path, fingerprint: Mapping[str, Any], targets: int) -> State:
    """The state in `path`, of this observation.

    Raises:
        CalibrationError: the file is damaged, or is of another observation; the message names what differs.
    """
    raw = read_whole(path, "The state of an observation")
    try:
        _check_sums(raw)
        with np.load(io.BytesIO(raw), allow_pickle=False) as archive:
            meta = json.loads(archive["meta"].tobytes())
            maxima, counts = archive["maxima"], archive["counts"]
        if meta["format"] != FORMAT:
            raise ValueError(f"format {meta['format']}")
        state = State(passes=meta["passes"], maxima=_maxima(meta["tensors"], maxima), counts=counts)
        theirs = dict(meta["fingerprint"])
    except UNREADABLE as error:
        raise damaged_state(path, error) from error
    _check_same(path, theirs, json.loads(json.dumps(fingerprint)))
    if type(state.passes) is not int or state.passes < 0:
        raise damaged_state(path, f"{state.passes} passes")
    if counts.dtype != np.int64 or counts.shape != (targets, BINS) or (counts < 0).any():
        raise damaged_state(path, f"counts {counts.dtype} {counts.shape}")
    return state


def _check_sums(raw: bytes) -> None:
    """Looks at the checksums first: NumPy would believe a damaged header before it meets them."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"{broken} has another checksum")


def _maxima(names: Sequence[str], values: NDArray[Any]) -> dict[str, float]:
    if values.dtype != np.float64 or values.ndim != 1 or not np.isfinite(values).all() or (values < 0).any():
        raise ValueError("maxima")
    return dict(zip(names, values.tolist(), strict=True))


def damaged_state(path: Path, error: object) -> CalibrationError:
    """The message for a state that cannot be believed."""
    return CalibrationError(
        "The state of an observation is damaged.",
        got=str(error) or type(error).__name__,
        where=path,
        hint=f"delete {path.name}; the observation then starts anew",
    )


def _check_same(path: Path, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    differing = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
    if differing:
        raise CalibrationError(
            "The state is of another observation.",
            expected="; ".join(f"{key}: {ours.get(key)!r:.100}" for key in differing),
            got="; ".join(f"{key}: {theirs.get(key)!r:.100}" for key in differing),
            where=path,
            hint=f"repeat it with the settings of then, or delete {path.name} to start anew",
        )
