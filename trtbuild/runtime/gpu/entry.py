"""An image that is on the GPU already becomes labels there: nothing of it is copied to the host or back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from trtbuild.errors import EngineError, InputError
from trtbuild.runtime.device import Buffer
from trtbuild.runtime.gpu.array import SharedArray, shared_array
from trtbuild.runtime.gpu.attempts import accumulators_of, in_memory
from trtbuild.runtime.gpu.case import (
    NOT_LINEAR,
    arrays_of_case,
    device_case,
    finished_on_host,
)
from trtbuild.runtime.gpu.labels import DeviceLabels
from trtbuild.runtime.gpu.plan import DevicePlan, in_grains
from trtbuild.runtime.gpu.prepare import DevicePrepared, closed_after, prepared_from_image
from trtbuild.runtime.gpu.prepare_plan import FLOAT, check_room
from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.runtime.on_device import OnDevice
from trtbuild.runtime.predictor import EMPTY, Clock, Member, Progress, Settings, tell
from trtbuild.spec import ModelSpec
from trtbuild.stitch.preparation_launches import Image, Stored, convert
from trtbuild.volume import CaseGrid
from trtbuild.volume.back import label_type
from trtbuild.volume.preparation.checks import check_shape, checked_previous, checked_spacing

KINDS: Mapping[str, Stored] = {
    "bool": "u8", "uint8": "u8", "int8": "i8", "uint16": "u16", "int16": "i16", "int32": "i32", "float16": "f16",
}  # fmt: skip
"""Types besides float32, by NumPy's names."""
ON_HOST = "hand over the image on the host, to predict_array"


@dataclass(frozen=True, kw_only=True, eq=False)
class DevicePrediction:
    """The labels of one case, `grid` the way back that was taken, `seconds` wall time per stage, and what was told."""

    labels: DeviceLabels
    grid: CaseGrid
    seconds: Mapping[str, float]
    warnings: tuple[str, ...] = ()


def prediction_from_device_array(
    array: Any, spacing: Sequence[float], member: Member, settings: Settings, progress: Progress | None = None
) -> DevicePrediction:
    """Segments one image with one configuration, where it is.

    Args:
        array: (C, Z, Y, X) as `prediction_from_array` takes it, in memory of the GPU that the member runs on: anything
            with `__dlpack__` or `__cuda_array_interface__`. float32 in any strides is read as it is; float16, bool and
            integers up to 16 bits and int32 become float32 on the device. Left unchanged.
        spacing: mm in array axis order (z, y, x).
        member: a configuration without a previous stage, whose engines are on a GPU.
        settings: as there, without probabilities.
        progress: called as the case advances.

    Raises:
        InputError: as `prepared_from_array`; the array is not in this GPU's memory, of another type, or probabilities
            are asked for.
        OutOfMemory: there is no memory.
        EngineError: the member runs on no GPU, or the device failed.
        Cancelled: `progress` said so.
    """
    place, spec, clock, notes = member.device, member.spec, Clock(), list[str]()
    if place is None:
        raise EngineError("The model does not run on a GPU.", where=spec.configuration, hint=ON_HOST)
    if settings.probabilities:
        raise InputError("Probabilities do not stay on the device.", expected="labels only", hint=ON_HOST)
    millimetres = checked_spacing(spacing)
    tell(progress, "prepare", 0, 1)
    with ExitStack() as stack:
        with shared_array(array, place.gpu) as shared:
            check_shape(shared.shape, spec)
            checked_previous(None, shared.shape[1:], spec)
            prepared = _prepared(shared, millimetres, spec, place.gpu, place.limit)
            stack.enter_context(closed_after(prepared))
        tell(progress, "prepare", 1, 1)
        clock.lap("prepare")
        notes += [EMPTY] * prepared.empty
        buffer = _predicted(prepared, member, settings, place, progress, notes.append, clock)
    shape = tuple(prepared.grid.shape[axis] for axis in spec.transpose_backward)
    labels = DeviceLabels(buffer, shape, np.dtype(label_type(spec.labels)), place.gpu.device.index)
    return DevicePrediction(labels=labels, grid=prepared.grid, seconds=clock.seconds, warnings=tuple(notes))


def _prepared(
    shared: SharedArray, spacing: tuple[float, ...], spec: ModelSpec, gpu: Gpu, limit: int | None
) -> DevicePrepared:
    channels, z, y, x = shared.shape
    c, *steps = shared.strides
    image = Image(address=shared.address, channels=channels, shape=(z, y, x), strides=(c, steps[0], steps[1], steps[2]))
    if shared.dtype == np.float32 and shared.dtype.isnative:
        return prepared_from_image(image, spacing, spec, gpu, limit)
    kind = KINDS.get(shared.dtype.name) if shared.dtype.isnative else None
    if kind is None:
        raise InputError("The device does not read images of this type.", expected=f"float32, {', '.join(KINDS)}",
                         got=shared.dtype.str, hint="convert it: array.astype(float32)")  # fmt: skip
    nbytes = FLOAT * channels * math.prod((z, y, x))
    check_room([nbytes], gpu, limit, 0, (z, y, x))
    with ExitStack() as stack:
        copy = gpu.device.buffer(nbytes)
        stack.callback(copy.close)
        stack.callback(gpu.stream.synchronize)
        gpu.launch(convert(image, copy.address, kind=kind))
        floats = replace(image, address=copy.address, strides=(z * y * x, y * x, x, 1))
        return prepared_from_image(floats, spacing, spec, gpu, limit, in_grains([nbytes]))


def _predicted(
    prepared: DevicePrepared,
    member: Member,
    settings: Settings,
    place: OnDevice,
    progress: Progress | None,
    report: Callable[[str], None],
    clock: Clock,
) -> Buffer:
    """The labels of the image, in memory that stays; whatever goes wrong gives it back."""
    gpu, engines = place.gpu, place.engines
    case = replace(device_case(prepared, member, settings, engines), labels_stay=True)

    def run(plan: DevicePlan) -> None:
        results = arrays_of_case(prepared, case, plan, engines, gpu, progress, clock, labels)
        if plan.labels == "none":
            report(NOT_LINEAR)
            gpu.upload(labels, finished_on_host(results[0], prepared, case, settings, progress, clock).segmentation)
            return
        tell(progress, "back", 1, 1)
        clock.lap("back")

    held, what = in_grains([case.image_bytes]), "The labels do not fit into the GPU's memory."
    check_room([case.whole_label_bytes], gpu, place.limit, held, case.grid.shape, what)
    with ExitStack() as stack:
        labels = gpu.device.buffer(case.whole_label_bytes)
        stack.callback(labels.close)
        in_memory(case, accumulators_of(settings, place.limit), engines, gpu, place.limit, report, run)
        stack.pop_all()
    return labels
