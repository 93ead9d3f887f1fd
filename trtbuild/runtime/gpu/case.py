"""One prepared case on a GPU: the image goes there once, and labels come back.

The same tiles, weights, order of additions and way back as on the CPU (`predictor`), so that the same logits give the
same labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import EngineError
from trtbuild.runtime.device import Buffer
from trtbuild.runtime.gpu.attempts import Report, accumulators_of, in_memory
from trtbuild.runtime.gpu.outputs import Output, label_output, logit_output, probability_output
from trtbuild.runtime.gpu.plan import DevicePlan
from trtbuild.runtime.gpu.prepare import DevicePrepared, closed_after, shape_of
from trtbuild.runtime.gpu.rows import added_rows
from trtbuild.runtime.gpu.run import Run, allocated
from trtbuild.runtime.gpu.shared import DeviceEngine, Gpu
from trtbuild.runtime.gpu.sizes import DeviceCase
from trtbuild.runtime.predictor import Clock, Member, Prediction, Progress, Settings, tell
from trtbuild.runtime.tiles import tile_plan
from trtbuild.volume import Prepared
from trtbuild.volume.back import Logits, way_back

NOT_LINEAR = (
    "The model resamples its logits with splines, which the device does not: they come back to the host, and the CPU "
    "makes the labels."
)


def prediction_on_device(
    prepared: Prepared | DevicePrepared,
    member: Member,
    settings: Settings,
    engines: Sequence[DeviceEngine],
    gpu: Gpu,
    progress: Progress | None,
    report: Report,
    clock: Clock,
    limit: int | None = None,
) -> Prediction:
    """Segments a prepared case; the labels are those of `prediction_from_prepared` for the same logits.

    Args:
        prepared: the case. One on the device is closed at the end, whatever happens.
        member: its `spec` and `mirror_axes`.
        settings: as there. `accumulator` "float16" is used where it is given, or where `limit` is and float32 does
            not fit.
        engines: one per fold, that run on `gpu`.
        gpu: the device.
        progress: called with "network" and "back".
        report: told where the case is begun again in less memory, and where the host makes the labels.
        clock: of the case.
        limit: bytes of device memory that the case may take, where the user named one.

    Raises:
        OutOfMemory: no plan fits the free memory, or even the smallest found none; says what would fit.
        NonFinite: a network returned NaN or infinity, or the case holds some.
        EngineError: an engine or the device failed.
        Cancelled: `progress` said so.
    """
    with closed_after(prepared):
        case = device_case(prepared, member, settings, engines)
        accumulators = accumulators_of(settings, limit)
        return in_memory(
            case, accumulators, engines, gpu, limit, report,
            lambda plan: labels_on_device(prepared, case, plan, settings, engines, gpu, progress, report, clock),
        )  # fmt: skip


def case_logits_on_device(
    prepared: Prepared | DevicePrepared,
    member: Member,
    settings: Settings,
    engines: Sequence[DeviceEngine],
    gpu: Gpu,
    progress: Progress | None,
    report: Report,
    limit: int | None = None,
) -> Logits:
    """Mean logits (heads, Z, Y, X) on the host, the very ones of `case_logits`, for an ensemble that averages them.

    In the type of `settings.accumulator`, which no limit changes: members are averaged in one type. The other arguments
    and the errors are those of `prediction_on_device`.
    """
    with closed_after(prepared):
        case = replace(device_case(prepared, member, settings, engines), wants_logits=True)
        return in_memory(
            case, (settings.accumulator,), engines, gpu, limit, report,
            lambda plan: arrays_of_case(prepared, case, plan, engines, gpu, progress, Clock())[0],
        )  # fmt: skip


def labels_on_device(
    prepared: Prepared | DevicePrepared,
    case: DeviceCase,
    plan: DevicePlan,
    settings: Settings,
    engines: Sequence[DeviceEngine],
    gpu: Gpu,
    progress: Progress | None,
    report: Report,
    clock: Clock,
) -> Prediction:
    """As `prediction_on_device`, with one plan of `device_plans`. Whatever happens, nothing is under way at the end and
    all memory of the case is given back."""
    results = arrays_of_case(prepared, case, plan, engines, gpu, progress, clock)
    if plan.labels == "none":
        report(NOT_LINEAR)
        return finished_on_host(results[0], prepared, case, settings, progress, clock)
    tell(progress, "back", 1, 1)
    clock.lap("back")
    maps = results[1] if case.probabilities else None
    return Prediction(segmentation=results[0], probabilities=maps, grid=prepared.grid, seconds=clock.seconds)


def arrays_of_case(
    prepared: Prepared | DevicePrepared,
    case: DeviceCase,
    plan: DevicePlan,
    engines: Sequence[DeviceEngine],
    gpu: Gpu,
    progress: Progress | None,
    clock: Clock,
    labels: Buffer | None = None,
) -> list[NDArray[Any]]:
    """Logits, or labels and with them probabilities where they are asked for. Labels that stay on the device are in
    `labels` then, and not among them."""
    with allocated(prepared, case, plan, engines, gpu, labels) as run:
        outputs = _outputs(run)
        for base, row in added_rows(run, engines, progress):
            clock.lap("network")
            for output in outputs:
                output.finish(base, row.final)
            clock.lap("back")
        return [output.result() for output in outputs]


def device_case(
    prepared: Prepared | DevicePrepared, member: Member, settings: Settings, engines: Sequence[DeviceEngine]
) -> DeviceCase:
    """What the case is to the device.

    Raises:
        EngineError: there is no engine, or the folds' engines do not take the same tiles.
    """
    spec, axes = member.spec, member.mirror_axes if settings.mirroring else ()
    kinds = {engine.kinds for engine in engines}
    smallest, largest = (max(e.smallest for e in engines), min(e.largest for e in engines)) if engines else (1, 0)
    if len(kinds) != 1 or smallest > largest:
        raise EngineError(
            "The folds' engines do not fit each other.",
            expected="one type of tensor, and a batch that all of them take",
            got=f"types {sorted(kinds)}, batches from {smallest} to {largest}",
            where=spec.configuration,
        )
    shape = shape_of(prepared)
    return DeviceCase(
        spec=spec, shape=shape, grid=prepared.grid, way=way_back(prepared.grid, spec), folds=len(engines),
        tiles=tile_plan(shape[1:], spec, axes, settings.step_size), kinds=kinds.pop(),
        probabilities=settings.probabilities, smallest=smallest, largest=largest,
        resident=isinstance(prepared, DevicePrepared),
    )  # fmt: skip


def _outputs(run: Run) -> tuple[Output, ...]:
    if run.plan.labels == "none":
        return (logit_output(run),)
    if run.case.labels_stay:
        return (replace(label_output(run), result=lambda: np.empty(0)),)
    return (label_output(run), probability_output(run)) if run.case.probabilities else (label_output(run),)


def finished_on_host(
    logits: Logits,
    prepared: Prepared | DevicePrepared,
    case: DeviceCase,
    settings: Settings,
    progress: Progress | None,
    clock: Clock,
) -> Prediction:
    from trtbuild.volume.back import probabilities_from_logits, segmentation_from_logits

    grid, spec = prepared.grid, case.spec
    tell(progress, "back", 0, 1)
    segmentation = segmentation_from_logits(logits, grid, spec, threads=settings.threads)
    maps = probabilities_from_logits(logits, grid, spec, threads=settings.threads) if settings.probabilities else None
    tell(progress, "back", 1, 1)
    clock.lap("back")
    return Prediction(segmentation=segmentation, probabilities=maps, grid=grid, seconds=clock.seconds)
