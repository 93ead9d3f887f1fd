"""A case on the device: its memory, with the image and the tables in it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np

from trtbuild.errors import EngineError, NonFinite
from trtbuild.runtime.device import Buffer
from trtbuild.runtime.gpu.plan import DevicePlan
from trtbuild.runtime.gpu.prepare import DevicePrepared
from trtbuild.runtime.gpu.shared import DeviceEngine, Gpu
from trtbuild.runtime.gpu.sizes import DeviceCase
from trtbuild.runtime.gpu.tables import Tables, tables_of_case
from trtbuild.runtime.slabs import window_weights
from trtbuild.stitch.preparation_launches import UNSET, contiguous, not_finite
from trtbuild.volume import Prepared


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """A case on the device: its memory by the names of `DevicePlan.buffers`, and its tables."""

    gpu: Gpu
    case: DeviceCase
    plan: DevicePlan
    memory: Mapping[str, Buffer]
    tables: Tables

    def table(self, offset: int) -> int:
        """The address of something in the tables."""
        return self.memory["tables"].address + offset

    @property
    def plane(self) -> int:
        """Voxels of one slice of the accumulator."""
        return math.prod(self.case.tiles.grid.shape[1:])


@contextmanager
def allocated(
    prepared: Prepared | DevicePrepared,
    case: DeviceCase,
    plan: DevicePlan,
    engines: Sequence[DeviceEngine],
    gpu: Gpu,
    labels: Buffer | None = None,
) -> Iterator[Run]:
    """The case's memory, with the image and the tables in it and an accumulator of zeros. `labels` is for those that
    stay on the device, and not closed.

    Whatever happens in the block: nothing is under way after it, and the memory is given back.

    Raises:
        NonFinite: the case holds NaN or infinity.
        OutOfMemory: there is no memory.
    """
    if isinstance(prepared, Prepared):
        _check_finite(prepared, case)
    weights = window_weights(case.tiles, case.spec, len(engines) * case.flips)
    tables = tables_of_case(case.tiles, [group for row in plan.groups for group in row], weights, case.way)
    with ExitStack() as stack:
        memory: dict[str, Buffer] = {}
        for name, nbytes in plan.buffers.items():
            memory[name] = gpu.device.buffer(nbytes)
            stack.callback(memory[name].close)
        stack.callback(gpu.graphs.clear)  # before the memory goes whose addresses they hold
        stack.callback(gpu.stream.synchronize)  # the first that happens at the end: nothing is freed under work
        gpu.upload(memory["tables"], tables.content)
        if labels is not None:
            memory["labels"] = labels
        run = Run(gpu=gpu, case=case, plan=plan, memory=memory, tables=tables)
        if isinstance(prepared, DevicePrepared):
            memory["image"] = prepared.image
            _check_finite_there(run)
        else:
            gpu.upload(memory["image"], np.ascontiguousarray(prepared.data))
        gpu.stream.zero(memory["accumulator"], memory["accumulator"].nbytes)
        yield run


def _check_finite(prepared: Prepared, case: DeviceCase) -> None:
    """A network may swallow NaN (ReLU), so that the accumulator would not show it; see `runner.check_batch`."""
    if not all(np.isfinite(plane).all() for channel in prepared.data for plane in channel):
        raise _non_finite(case)


def _check_finite_there(run: Run) -> None:
    """The same of a case that was prepared on the device. The status word is still unused."""
    image, (channels, z, y, x) = run.memory["image"], run.case.shape
    if image.closed:
        raise EngineError("This prepared case was given back.", hint="prepare it again for every prediction")
    run.gpu.launch(not_finite(contiguous(image.address, (channels * z, y, x)), run.table(run.tables.status)))
    status = np.empty(1, dtype=np.int32)
    run.gpu.download(status, run.memory["tables"], run.tables.status)
    if status[0] != UNSET:
        raise _non_finite(run.case)


def _non_finite(case: DeviceCase) -> NonFinite:
    return NonFinite("The prepared case holds NaN or infinity.", expected="finite values",
                     where=f"configuration {case.spec.configuration}")  # fmt: skip
