"""What leaves the device: labels and probabilities of slices that are final, or logits where the host goes on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.runtime.gpu.run import Run
from trtbuild.runtime.gpu.sizes import BYTES, KINDS, label_bytes
from trtbuild.runtime.gpu.tables import TAP_BYTES
from trtbuild.stitch.launches import Label, Logits, TapAddresses, labels, probabilities
from trtbuild.volume.back import Segmentation, empty_segmentation, ready_slices

Write = Callable[[Logits, int, int], None]
"""Begins to write output slices [first, last) from logits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Output:
    """A result that grows: `finish(base, final)` writes what slices before `final` of the padded image, in an
    accumulator that begins at slice `base`, make ready; `result` waits, and gives the array."""

    finish: Callable[[int, int], None]
    result: Callable[[], NDArray[Any]]


def label_output(run: Run) -> Output:
    """Labels (Z, Y, X) of the image."""
    full = empty_segmentation(run.case.grid, run.case.spec)
    image = full.transpose(run.case.spec.transpose_backward)  # the same memory in the image's order
    if run.plan.labels == "whole":
        buffer = run.memory["labels"]
        run.gpu.stream.zero(buffer, buffer.nbytes)
        write = _into_image(run, full)
    else:
        write = _by_slabs(run, full[run.case.grid.box])

    def result() -> Segmentation:
        if run.plan.labels == "whole":
            run.gpu.download(image, run.memory["labels"])
        return image

    return Output(finish=_when_ready(run, write), result=result)


def probability_output(run: Run) -> Output:
    """Probabilities (heads, Z, Y, X) float32 of the image; outside the crop that of the background is 1."""
    grid, spec = run.case.grid, run.case.spec
    full = np.zeros((spec.labels.heads, *(grid.shape[axis] for axis in spec.transpose_backward)), dtype=np.float32)
    if spec.labels.decision == "argmax":
        full[0] = 1.0
    inside = full.transpose(0, *(1 + axis for axis in spec.transpose_forward))[(slice(None), *grid.box)]
    heads, (_, height, width) = spec.labels.heads, grid.cropped
    buffer = run.memory["probabilities"]

    def write(logits: Logits, first: int, last: int) -> None:
        for a in range(first, last, run.plan.probability_slices):
            block = np.empty((heads, min(last - a, run.plan.probability_slices), height, width), dtype=np.float32)
            strides = (math.prod(block.shape[1:]), height * width, width, 1)
            run.gpu.launch(
                probabilities(logits, _taps(run, a, a + block.shape[1]), buffer.address, kind="f32", strides=strides,
                              regions=_regions(run))
            )  # fmt: skip
            run.gpu.download(block, buffer)
            inside[:, a : a + block.shape[1]] = block

    return Output(finish=_when_ready(run, write), result=lambda: full)


def logit_output(run: Run) -> Output:
    """Mean logits (heads, Z, Y, X) of the case on the network's grid, in the accumulator's type."""
    grid, source = run.case.tiles.grid, run.memory["accumulator"]
    heads, item = run.case.spec.labels.heads, BYTES[KINDS[run.plan.accumulator]]
    whole = np.empty((heads, *run.case.shape[1:]), dtype=run.plan.accumulator)
    done = 0

    def finish(base: int, final: int) -> None:
        nonlocal done
        offset = grid.inside[0].start
        ready = _final_of_case(run, final)
        planes = np.empty((ready - done, *grid.shape[1:]), dtype=whole.dtype)
        for head, into in enumerate(whole):
            first = head * run.plan.depth + done + offset - base
            run.gpu.download(planes, source, item * run.plane * first)
            into[done:ready] = planes[(slice(None), *grid.inside[1:])]
        done = ready

    return Output(finish=finish, result=lambda: whole)


def _when_ready(run: Run, write: Write) -> Callable[[int, int], None]:
    done = 0

    def finish(base: int, final: int) -> None:
        nonlocal done
        ready = ready_slices(run.case.way, _final_of_case(run, final))
        if ready > done:
            write(_logits(run, base), done, ready)
        done = ready

    return finish


def _final_of_case(run: Run, final: int) -> int:
    """Slices of the case, without padding, that are final."""
    inside = run.case.tiles.grid.inside[0]
    return max(0, min(final, int(inside.stop)) - int(inside.start))


def _into_image(run: Run, full: Segmentation) -> Write:
    """Labels into the image's own memory on the device, which lies as `full` does on the host."""
    strides = tuple(stride // full.itemsize for stride in full.strides)
    corner = sum(part.start * stride for part, stride in zip(run.case.grid.box, full.strides, strict=True))

    def write(logits: Logits, first: int, last: int) -> None:
        out = run.memory["labels"].address + corner + first * full.strides[0]
        _launch_labels(run, logits, first, last, out, (strides[0], strides[1], strides[2]))

    return write


def _by_slabs(run: Run, cropped: Segmentation) -> Write:
    """Labels into a slab on the device, and from there into the crop on the host."""
    buffer, (_, height, width) = run.memory["labels"], run.case.grid.cropped

    def write(logits: Logits, first: int, last: int) -> None:
        for a in range(first, last, run.plan.label_slices):
            b = min(last, a + run.plan.label_slices)
            _launch_labels(run, logits, a, b, buffer.address, (height * width, width, 1))
            slab = np.empty((b - a, height, width), dtype=cropped.dtype)
            run.gpu.download(slab, buffer)
            cropped[a:b] = slab

    return write


def _launch_labels(run: Run, logits: Logits, first: int, last: int, out: int, strides: tuple[int, int, int]) -> None:
    kind: Label = "u8" if label_bytes(run.case.spec) == 1 else "u16"
    taps, values = _taps(run, first, last), run.table(run.tables.values)
    run.gpu.launch(labels(logits, taps, values, out, kind=kind, strides=strides, regions=_regions(run)))


def _regions(run: Run) -> bool:
    return run.case.way.labels.decision == "regions"


def _taps(run: Run, first: int, last: int) -> TapAddresses:
    """Of output slices [first, last)."""
    z, y, x = (run.table(offset) for offset in run.tables.taps)
    _, height, width = run.case.grid.cropped
    return TapAddresses(z=z + TAP_BYTES * first, y=y, x=x, shape=(last - first, height, width))


def _logits(run: Run, base: int) -> Logits:
    """The accumulator without padding; its first slice is slice `base` of the padded image."""
    grid, kind = run.case.tiles.grid, KINDS[run.plan.accumulator]
    z, y, x = (part.start for part in grid.inside)
    skipped = max(0, z - base)
    width = grid.shape[2]
    first = skipped * run.plane + y * width + x
    return Logits(
        address=run.memory["accumulator"].address + BYTES[kind] * first,
        kind=kind,
        heads=run.case.spec.labels.heads,
        origin_z=base + skipped - z,
        strides=(run.plan.depth * run.plane, run.plane, width),
    )
