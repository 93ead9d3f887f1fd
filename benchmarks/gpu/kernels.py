"""Bandwidth of the kernels beside what the same card copies: bytes that must move / time, as a share of the copy's.

    python benchmarks/gpu/kernels.py --output rows.jsonl

Bytes are the least that a kernel can read and write: each voxel once, weights and tables not counted. Each time begins
with a cold cache, since some of the arrays would fit into a large card's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np
from events import Events, repeated
from kernel_jobs import Job, Sizes, jobs
from numpy.typing import NDArray
from targets import BANDWIDTH, SLOWEST
from verdicts import Row, write_rows

from trtbuild.runtime.device import Buffer, opened_device
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu
from trtbuild.runtime.nvrtc import kernels_cubin

Before = Callable[[], None]


def bandwidth(gpu: Gpu, events: Events, job: Job, before: Before, repeats: int) -> float:
    """Bytes per second, the median of the repeats."""
    with ExitStack() as stack:
        places = []
        for array in job.arrays:
            buffer = _filled(gpu, array)
            stack.callback(buffer.close)
            places.append(buffer.address)
        stack.callback(gpu.stream.synchronize)
        launch = job.launch(*places)
        return job.nbytes / statistics.median(repeated(events, lambda: gpu.launch(launch), before, repeats))


def copy_bandwidth(gpu: Gpu, events: Events, nbytes: int, before: Before, repeats: int) -> float:
    """What the card copies within its memory: bytes read and written per second."""
    source, target = gpu.device.buffer(nbytes), gpu.device.buffer(nbytes)
    gpu.stream.zero(source, nbytes)

    def copy() -> None:
        with gpu.device.current():
            gpu.device.cuda.memcpy_dtod_async(target.address, source.address, nbytes, gpu.stream.made())

    try:
        return 2 * nbytes / statistics.median(repeated(events, copy, before, repeats))
    finally:
        gpu.stream.synchronize()
        source.close()
        target.close()


def _filled(gpu: Gpu, array: NDArray[Any] | int) -> Buffer:
    nbytes = array if isinstance(array, int) else array.nbytes
    buffer = gpu.device.buffer(nbytes)
    if isinstance(array, int):
        gpu.stream.zero(buffer, nbytes)
    else:
        gpu.upload(buffer, np.ascontiguousarray(array))
    return buffer


@contextmanager
def _zeroed(gpu: Gpu, nbytes: int) -> Iterator[Before]:
    """Sets as many bytes to 0 as the card's cache does not hold."""
    buffer = gpu.device.buffer(nbytes)
    try:
        yield lambda: gpu.stream.zero(buffer, nbytes)
    finally:
        gpu.stream.synchronize()
        buffer.close()


def rows_of_kernels(gpu: Gpu, events: Events, sizes: Sizes) -> Iterator[Row]:
    """The copy, then every kernel as a share of it."""
    with _zeroed(gpu, sizes.copy) as before:
        copied = copy_bandwidth(gpu, events, sizes.copy, before, sizes.repeats)
        yield Row(part="kernels", name="copy within the card", value=copied / 1e9, unit="GB/s")
        yield from _rows_of_jobs(gpu, events, sizes, before, copied)


def _rows_of_jobs(gpu: Gpu, events: Events, sizes: Sizes, before: Before, copied: float) -> Iterator[Row]:
    shares: dict[str, float] = {}
    for job in jobs(sizes):
        found = bandwidth(gpu, events, job, before, sizes.repeats)
        shares[job.name] = 100 * found / copied
        yield Row(
            part="kernels", name=job.name, value=shares[job.name], unit="%", limit=BANDWIDTH,
            note=f"{found / 1e9:.0f} GB/s, {job.nbytes / 1e6:.0f} MB",
        )  # fmt: skip
    slowest = min(shares, key=shares.__getitem__)
    yield Row(part="kernels", name=SLOWEST, value=shares[slowest], unit="%", limit=BANDWIDTH, note=slowest)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True, help="JSON lines, one per row.")
def main(output: Path) -> None:
    """Measures every kernel on the first GPU."""
    with opened_device() as device, opened_gpu(device, kernels_cubin(device.capability)) as gpu:
        write_rows(output, rows_of_kernels(gpu, Events(gpu), Sizes()))


if __name__ == "__main__":
    main()
