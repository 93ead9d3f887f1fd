"""The kernels for the fake GPU: kernels.cu compiled for the host, and what each launch reads and writes.

The spans are written from the kernels' documentation, by the names of their arguments, so that an address beside its
array is found where the kernel itself would read or write there in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fake_cuda import Cuda, Span
from fake_preparation import preparation_kernels
from host_kernels import host_kernels

from trtbuild.stitch.launches import KERNELS, TAP, Launch

SIZES = {"f32": 4, "f16": 2, "u8": 1, "u16": 2}
GATHER = "image out tiles batch channels depth height width offset_z offset_y offset_x pz py px"
BLEND = "logits total wz wy wx tiles status first_tile batch heads depth height width start_z start_y start_x pz py px"
SHIFT = "total heads depth plane slices"
NEW = "heads regions origin_z stride_head stride_z stride_y depth height width"
LABELS = f"logits out values z_taps y_taps x_taps {NEW} out_z out_y out_x"
PROBABILITIES = f"logits out z_taps y_taps x_taps {NEW} out_head out_z out_y out_x"


def gather_spans(n: Any, kinds: Sequence[int], cuda: Cuda) -> list[Span]:
    patch = n.pz * n.py * n.px
    return [
        Span(n.image, 4 * n.channels * n.depth * n.height * n.width),
        Span(n.out, kinds[0] * n.batch * n.channels * patch),
        Span(n.tiles, 16 * n.batch),
    ]


def blend_spans(n: Any, kinds: Sequence[int], cuda: Cuda) -> list[Span]:
    weights = [Span(n.wz, 4 * n.pz), Span(n.wy, 4 * n.py), Span(n.wx, 4 * n.px)]
    return [
        Span(n.logits, kinds[0] * n.batch * n.heads * n.pz * n.py * n.px),
        Span(n.total, kinds[1] * n.heads * n.depth * n.height * n.width),
        Span(n.tiles, 16 * n.batch),
        Span(n.status, 4),
        *weights,
    ]


def shift_spans(n: Any, kinds: Sequence[int], cuda: Cuda) -> list[Span]:
    return [Span(n.total, kinds[0] * n.heads * n.depth * n.plane)]


def tap_spans(n: Any) -> list[Span]:
    pairs = zip((n.z_taps, n.y_taps, n.x_taps), (n.depth, n.height, n.width), strict=True)
    return [Span(address, TAP.itemsize * count) for address, count in pairs]


def logits_span(n: Any, kind: int, cuda: Cuda) -> Span:
    """From the first to the last voxel that the taps name; they are read when the kernel runs."""
    axes = [cuda.at(span.address, span.nbytes).view(TAP) for span in tap_spans(n)]
    ends = [(int(axis["low"].min()), int(axis["high"].max())) for axis in axes]
    strides = (n.stride_z, n.stride_y, 1)
    shift = (n.origin_z, 0, 0)
    first, last = (sum((end[i] - s) * t for end, s, t in zip(ends, shift, strides, strict=True)) for i in (0, 1))
    return Span(n.logits + kind * first, kind * (last - first + 1 + (n.heads - 1) * n.stride_head))


def out_span(n: Any, kind: int, first: int = 0) -> Span:
    last = (n.depth - 1) * n.out_z + (n.height - 1) * n.out_y + (n.width - 1) * n.out_x
    return Span(n.out, kind * (first + last + 1))


def label_spans(n: Any, kinds: Sequence[int], cuda: Cuda) -> list[Span]:
    spans = [*tap_spans(n), out_span(n, kinds[1]), Span(n.values, 2 * n.heads)]
    return [*spans, logits_span(n, kinds[0], cuda)]


def probability_spans(n: Any, kinds: Sequence[int], cuda: Cuda) -> list[Span]:
    spans = [*tap_spans(n), out_span(n, kinds[1], (n.heads - 1) * n.out_head)]
    return [*spans, logits_span(n, kinds[0], cuda)]


Spans = Callable[[Any, Sequence[int], Cuda], list[Span]]
KNOWN: Mapping[str, tuple[str, Spans]] = {
    "gather": (GATHER, gather_spans),
    "blend": (BLEND, blend_spans),
    "shift": (SHIFT, shift_spans),
    "labels": (LABELS, label_spans),
    "probabilities": (PROBABILITIES, probability_spans),
}


class Named:
    """A launch's arguments by their names, as Python's numbers."""

    def __init__(self, names: str, arguments: Sequence[np.generic]) -> None:
        for name, value in zip(names.split(), arguments, strict=True):
            setattr(self, name, int(value))


@dataclass(frozen=True)
class HostKernel:
    """One kernel as `fake_cuda` runs it."""

    name: str
    cuda: Cuda

    def spans(self, arguments: Sequence[np.generic]) -> list[Span]:
        """What it reads and writes, judged when it runs."""
        family, *kinds = self.name.split("_")
        names, spans = KNOWN[family]
        return spans(Named(names, arguments), [SIZES[kind] for kind in kinds], self.cuda)

    def addresses(self, arguments: Sequence[np.generic]) -> set[int]:
        """What may not be freed before it has run."""
        return {int(a) for a in arguments if isinstance(a, np.uint64)}

    def run(self, grid: Any, block: Any, arguments: Sequence[Any]) -> None:
        host_kernels().run(Launch(kernel=self.name, grid=grid, block=block, arguments=tuple(arguments)))


def give_kernels(cuda: Cuda) -> None:
    """The fake GPU has all kernels from now on."""
    cuda.kernels = {name: HostKernel(name, cuda) for name in KERNELS} | preparation_kernels(cuda)
