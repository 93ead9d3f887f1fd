"""Resampling of a case's channels on a GPU: one axis after the other is multiplied with its operator.

The operators are those of `volume/resampling`: an axis' matrix, of which each row is short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from trtbuild.runtime.device import Buffer
from trtbuild.runtime.gpu.normalize import Memory, reset_words
from trtbuild.runtime.gpu.prepare_plan import Kind, Resizing, Step
from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.stitch.launches import Three
from trtbuild.stitch.preparation_launches import clip, contiguous, extremes, packed_operator, resize
from trtbuild.volume.resampling import nearest_index
from trtbuild.volume.resampling.axis import axis_matrix
from trtbuild.volume.resampling.linear import torch_linear_matrix, torch_nearest_index

Operator = tuple[NDArray[np.int32], NDArray[np.float32]]
"""Starts (new,) and entries (band, new), as `resize` of preparation.cu reads them."""


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A step, and the addresses of its operator on the device."""

    step: Step
    starts: int
    entries: int
    band: int


@lru_cache(maxsize=64)
def operator(old: int, new: int, kind: Kind) -> Operator:
    """The operator of one axis."""
    if kind in ("nearest", "torch nearest"):
        index = nearest_index(old, new) if kind == "nearest" else torch_nearest_index(old, new)
        return index.astype(np.int32), np.ones((1, new), dtype=np.float32)
    matrix = torch_linear_matrix(old, new) if kind == "torch" else axis_matrix(old, new, int(kind))
    return packed_operator(matrix)


def placed_operators(steps: Sequence[Step], buffer: Buffer, gpu: Gpu) -> tuple[Placed, ...]:
    """The operators of all steps, one behind the other in a buffer."""
    parts: list[NDArray[np.int32]] = []
    placed, at = [], buffer.address
    for step in steps:
        starts, entries = operator(step.old, step.shape[step.axis], step.kind)
        placed.append(Placed(step=step, starts=at, entries=at + starts.nbytes, band=len(entries)))
        parts += [starts, entries.reshape(-1).view(np.int32)]
        at += starts.nbytes + entries.nbytes
    gpu.upload(buffer, np.concatenate(parts))
    return tuple(placed)


def resample_channel(
    shape: Three, out: int, resizing: Resizing, placed: Sequence[Placed], gpu: Gpu, memory: Memory
) -> None:
    """The channel (`shape`, float32) in the memory "channel", on the network's grid, into `out`; "channel" is used up.

    As `resample_into` of volume/resampling, with sums in another order.
    """
    at, ranges = memory["channel"].address, memory["words"].address
    if resizing.clip:
        groups = 1 if resizing.coarse is None else shape[resizing.coarse]
        reset_words(gpu, memory, 2 * groups)
        gpu.launch(extremes(contiguous(at, shape), ranges, axis=resizing.coarse))
    for number, one in enumerate(placed):
        into = out if one is placed[-1] else memory["channel" if number % 2 else "between"].address
        step = one.step
        gpu.launch(
            resize(at, into, one.starts, one.entries, band=one.band, axis=step.axis, old=step.old, shape=step.shape)
        )
        if resizing.clip and step is resizing.across[-1]:
            gpu.launch(clip(into, ranges, axis=resizing.coarse, shape=step.shape))
        at = into
