"""The kernels of preparation.cu for the fake GPU, and what each launch reads and writes; see `fake_kernels`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fake_cuda import Cuda, Span
from fake_cuda import HostKernel as Kernel
from host_kernels import host_kernels

from trtbuild.stitch.launches import Launch
from trtbuild.stitch.preparation_launches import PREPARATION_KERNELS

STRIDED = "depth height width stride_z stride_y stride_x"
CHANNELS = f"channels stride_channel {STRIDED}"


def strided(n: Any, address: int) -> Span:
    """From the first to the last voxel of an image, also where strides are negative."""
    steps = [(n.depth, n.stride_z), (n.height, n.stride_y), (n.width, n.stride_x)]
    steps.append((getattr(n, "channels", 1), getattr(n, "stride_channel", 0)))
    ends = [(extent - 1) * step for extent, step in steps]
    first, last = sum(min(end, 0) for end in ends), sum(max(end, 0) for end in ends)
    return Span(address + n.itemsize * first, n.itemsize * (last - first + 1))


def voxels(n: Any) -> int:
    return int(n.depth * n.height * n.width)


def mask_of(n: Any) -> list[Span]:
    return [Span(n.mask, voxels(n))] if n.mask else []


def groups(n: Any) -> int:
    return 1 if n.axis < 0 else int((n.depth, n.height, n.width)[n.axis])


def flood_spans(n: Any, cuda: Cuda) -> list[Span]:
    last = (n.rows - 1) * n.stride_row + (n.columns - 1) * n.stride_column + (n.length - 1) * n.step
    return [Span(n.state, last + 1), Span(n.unchanged, 4)]


def resize_spans(n: Any, cuda: Cuda) -> list[Span]:
    """The starts are read when the kernel runs: they say which old voxels are."""
    new = (n.depth, n.height, n.width)[n.axis]
    starts = cuda.at(n.starts, 4 * new).view(np.int32)
    if starts.min() < 0 or starts.max() + n.band > n.old:
        return [Span(0, 1)]
    tables = [Span(n.starts, 4 * new), Span(n.entries, 4 * n.band * new)]
    return [Span(n.volume, 4 * voxels(n) // new * n.old), Span(n.out, 4 * voxels(n)), *tables]


def convert_spans(n: Any, cuda: Cuda) -> list[Span]:
    return [Span(n.out, 4 * n.channels * voxels(n)), strided(n, n.array)]


Spans = Callable[[Any, Cuda], list[Span]]
KNOWN: Mapping[str, tuple[str, Spans]] = {
    "not_finite": (f"image first {STRIDED}", lambda n, cuda: [strided(n, n.image), Span(n.first, 4)]),
    "nonzero_box": (f"image box {CHANNELS}", lambda n, cuda: [strided(n, n.image), Span(n.box, 24)]),
    "background": (f"image state {CHANNELS}", lambda n, cuda: [strided(n, n.image), Span(n.state, voxels(n))]),
    "flood": ("state unchanged rows columns length stride_row stride_column step", flood_spans),
    "column_sums": (
        f"image mask sums centre power {STRIDED}",
        lambda n, cuda: [strided(n, n.image), *mask_of(n), Span(n.sums, 8 * n.height * n.width)],
    ),
    "fold": ("values sums n m", lambda n, cuda: [Span(n.values, 8 * n.n), Span(n.sums, 8 * n.m)]),
    "extremes": (f"image keys axis {STRIDED}", lambda n, cuda: [strided(n, n.image), Span(n.keys, 8 * groups(n))]),
    "clip": (
        "volume keys axis depth height width",
        lambda n, cuda: [Span(n.volume, 4 * voxels(n)), Span(n.keys, 8 * groups(n))],
    ),
    "normalize": (
        f"image mask out low high shift scale {STRIDED}",
        lambda n, cuda: [strided(n, n.image), *mask_of(n), Span(n.out, 4 * voxels(n))],
    ),
    "resize": ("volume out starts entries band axis old depth height width", resize_spans),
}


CONVERTED = {"convert_u8": 1, "convert_i8": 1, "convert_u16": 2, "convert_i16": 2, "convert_i32": 4, "convert_f16": 2}
"""Bytes of a value."""


class Named:
    """A launch's arguments by their names; floats stay what they are."""

    itemsize = 4

    def __init__(self, names: str, arguments: Sequence[np.generic]) -> None:
        for name, value in zip(names.split(), arguments, strict=True):
            setattr(self, name, value.item())


@dataclass(frozen=True)
class PreparationKernel:
    """One kernel as `fake_cuda` runs it."""

    name: str
    cuda: Cuda

    def spans(self, arguments: Sequence[np.generic]) -> list[Span]:
        """What it reads and writes, judged when it runs."""
        if self.name in CONVERTED:
            named = Named(f"array out {CHANNELS}", arguments)
            named.itemsize = CONVERTED[self.name]
            return convert_spans(named, self.cuda)
        names, spans = KNOWN[self.name]
        return spans(Named(names, arguments), self.cuda)

    def addresses(self, arguments: Sequence[np.generic]) -> set[int]:
        """What may not be freed before it has run; no mask is none."""
        return {int(a) for a in arguments if isinstance(a, np.uint64)} - {0}

    def run(self, grid: Any, block: Any, arguments: Sequence[Any]) -> None:
        host_kernels().run(Launch(kernel=self.name, grid=grid, block=block, arguments=tuple(arguments)))


def preparation_kernels(cuda: Cuda) -> dict[str, Kernel]:
    return {name: PreparationKernel(name, cuda) for name in PREPARATION_KERNELS}
