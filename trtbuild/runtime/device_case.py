"""One prepared case on a GPU: the image goes there once, and labels come back.

The same tiles, weights, order of additions and way back as on the CPU (`predictor`), so that the same logits give the
same labels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import EngineError, OutOfMemory
from trtbuild.runtime.device_gpu import DeviceEngine, Gpu
from trtbuild.runtime.device_outputs import Output, label_output, logit_output, probability_output
from trtbuild.runtime.device_plan import DevicePlan, device_plans, fitting_plan
from trtbuild.runtime.device_rows import added_rows
from trtbuild.runtime.device_run import Run, allocated
from trtbuild.runtime.device_sizes import DeviceCase
from trtbuild.runtime.predictor import Clock, Member, Prediction, Progress, Settings, tell
from trtbuild.runtime.slabs import Accumulator
from trtbuild.runtime.tiles import tile_plan
from trtbuild.volume import Prepared
from trtbuild.volume.back import Logits, way_back

NOT_LINEAR = (
    "The model resamples its logits with splines, which the device does not: they come back to the host, and the CPU "
    "makes the labels."
)
Result = TypeVar("Result")
Report = Callable[[str], None]
"""Told in words what runs otherwise than asked for."""


def prediction_on_device(
    prepared: Prepared,
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
        prepared: the case.
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
    case = device_case(prepared, member, settings, engines)
    accumulators = _accumulators(settings, limit)
    return _in_memory(
        case, accumulators, engines, gpu, limit, report,
        lambda plan: labels_on_device(prepared, case, plan, settings, engines, gpu, progress, report, clock),
    )  # fmt: skip


def case_logits_on_device(
    prepared: Prepared,
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
    case = replace(device_case(prepared, member, settings, engines), wants_logits=True)
    return _in_memory(
        case, (settings.accumulator,), engines, gpu, limit, report,
        lambda plan: _arrays(prepared, case, plan, engines, gpu, progress, Clock())[0],
    )  # fmt: skip


def labels_on_device(
    prepared: Prepared,
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
    results = _arrays(prepared, case, plan, engines, gpu, progress, clock)
    if plan.labels == "none":
        report(NOT_LINEAR)
        return _finished_on_host(results[0], prepared, case, settings, progress, clock)
    tell(progress, "back", 1, 1)
    clock.lap("back")
    maps = results[1] if case.probabilities else None
    return Prediction(segmentation=results[0], probabilities=maps, grid=prepared.grid, seconds=clock.seconds)


def _in_memory(
    case: DeviceCase,
    accumulators: Sequence[Accumulator],
    engines: Sequence[DeviceEngine],
    gpu: Gpu,
    limit: int | None,
    report: Report,
    run: Callable[[DevicePlan], Result],
) -> Result:
    """The best plan that fits; where it finds no memory after all, the next smaller one, until none is left."""
    plans, free = device_plans(case, accumulators), gpu.device.free_memory()
    plan = fitting_plan(plans, free if limit is None else min(free, limit), gpu.activations(engines))
    while True:
        try:
            return run(plan)
        except OutOfMemory as error:
            smaller, reason = next(plans, None), error.got
            if smaller is None:
                raise
        report(f"The GPU had no memory left ({reason}) with {plan}: the case begins again with {smaller}.")
        plan = smaller


def _arrays(
    prepared: Prepared,
    case: DeviceCase,
    plan: DevicePlan,
    engines: Sequence[DeviceEngine],
    gpu: Gpu,
    progress: Progress | None,
    clock: Clock,
) -> list[NDArray[Any]]:
    """Logits, or labels and with them probabilities where they are asked for."""
    with allocated(prepared, case, plan, engines, gpu) as run:
        outputs = _outputs(run)
        for base, row in added_rows(run, engines, progress):
            clock.lap("network")
            for output in outputs:
                output.finish(base, row.final)
            clock.lap("back")
        return [output.result() for output in outputs]


def device_case(prepared: Prepared, member: Member, settings: Settings, engines: Sequence[DeviceEngine]) -> DeviceCase:
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
    return DeviceCase(
        spec=spec, shape=prepared.data.shape, grid=prepared.grid, way=way_back(prepared.grid, spec), folds=len(engines),
        tiles=tile_plan(prepared.data.shape[1:], spec, axes, settings.step_size), kinds=kinds.pop(),
        probabilities=settings.probabilities, smallest=smallest, largest=largest,
    )  # fmt: skip


def _accumulators(settings: Settings, limit: int | None) -> tuple[Accumulator, ...]:
    if settings.accumulator == "float16":
        return ("float16",)
    return ("float32",) if limit is None else ("float32", "float16")


def _outputs(run: Run) -> tuple[Output, ...]:
    if run.plan.labels == "none":
        return (logit_output(run),)
    return (label_output(run), probability_output(run)) if run.case.probabilities else (label_output(run),)


def _finished_on_host(
    logits: NDArray[np.float32],
    prepared: Prepared,
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
