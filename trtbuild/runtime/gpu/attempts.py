"""One case in the memory that there is: the best plan that fits, or a smaller one where that does not after all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from trtbuild.errors import OutOfMemory
from trtbuild.runtime.gpu.plan import DevicePlan, device_plans, fitting_plan, in_grains
from trtbuild.runtime.gpu.shared import DeviceEngine, Gpu
from trtbuild.runtime.gpu.sizes import DeviceCase
from trtbuild.runtime.predictor import Settings
from trtbuild.runtime.slabs import Accumulator

Result = TypeVar("Result")
Report = Callable[[str], None]
"""Told in words what runs otherwise than asked for."""
IN_HALF = (
    "The device memory that a case may take holds no float32 accumulator: it is float16, which changes about 1e-4 of "
    "the voxels."
)


def accumulators_of(settings: Settings, limit: int | None) -> tuple[Accumulator, ...]:
    """The types that the sum may have, the best one first: float16 where it is asked for, or the user named a limit."""
    if settings.accumulator == "float16":
        return ("float16",)
    return ("float32",) if limit is None else ("float32", "float16")


def in_memory(
    case: DeviceCase,
    accumulators: Sequence[Accumulator],
    engines: Sequence[DeviceEngine],
    gpu: Gpu,
    limit: int | None,
    report: Report,
    run: Callable[[DevicePlan], Result],
) -> Result:
    """The best plan that fits; where it finds no memory after all, the next smaller one, until none is left.

    `accumulators` are those of `accumulators_of`, `limit` the bytes of device memory that the case may take, where the
    user named them. `report` is told of every new beginning, and of a result that was not made with the first one.

    Raises:
        OutOfMemory: none fits, or the smallest one found no memory.
    """
    plans = device_plans(case, accumulators)
    plan = _fitting(plans, case, accumulators, engines, gpu, limit)
    while True:
        try:
            result = run(plan)
        except OutOfMemory as error:
            smaller, reason = next(plans, None), error.got
            if smaller is None:
                raise
        else:
            if plan.accumulator != accumulators[0]:
                report(IN_HALF)
            for note in gpu.graphs.notes():
                report(note)
            return result
        report(f"The GPU had no memory left ({reason}) with {plan}: the case begins again with {smaller}.")
        plan = smaller


def _fitting(
    plans: Iterator[DevicePlan],
    case: DeviceCase,
    accumulators: Sequence[Accumulator],
    engines: Sequence[DeviceEngine],
    gpu: Gpu,
    limit: int | None,
) -> DevicePlan:
    """The best plan for the free memory, and for the limit. Activations that engines have taken already count against
    that, too: what a case is summed in must not depend on which case was the first."""
    free, missing = gpu.device.free_memory(), gpu.activations(engines)
    if limit is not None:
        allowed, all_of_them = limit - in_grains(case.held), _activations(engines, gpu)
        if allowed - all_of_them < free - missing:
            return fitting_plan(plans, allowed, all_of_them, _levers(case, accumulators, limit, short=False))
    return fitting_plan(plans, free, missing, _levers(case, accumulators, limit, short=True))


def _activations(engines: Sequence[DeviceEngine], gpu: Gpu) -> int:
    """Bytes that the engines compute in, taken or not."""
    return gpu.contexts.wanted + sum(engine.activations for engine in engines)


def _levers(case: DeviceCase, accumulators: Sequence[Accumulator], limit: int | None, *, short: bool) -> str:
    """What helps where no plan fits: the free memory is `short`, or else the user's limit."""
    levers = ["compile with a smaller --max-batch", "use a CPU engine"]
    if limit is None and accumulators[-1] == "float32" and not case.wants_logits:
        levers.insert(0, "allow a float16 accumulator by naming the limit yourself with --max-device-memory")
    levers.insert(0, "close other programs that use the GPU" if short else "raise --max-device-memory")
    return ", or ".join(levers)
