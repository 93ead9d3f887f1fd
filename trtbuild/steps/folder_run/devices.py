"""Cases over several GPUs: each has a thread and a predictor of its own, and takes the next case that has been read."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from trtbuild.runtime.gpu.parallel import at_once, named_error
from trtbuild.steps.folder_run.case_queue import CaseQueue
from trtbuild.steps.folder_run.ending import Outcome
from trtbuild.steps.folder_run.flow import one_case
from trtbuild.steps.folder_run.planned import Events, Run, planned_cases
from trtbuild.steps.folder_run.shared_ending import Order, SharedEnding
from trtbuild.steps.prediction.predictor import Predictor

if TYPE_CHECKING:
    from trtbuild.volume.cases import Case

Call = TypeVar("Call", bound=Callable[..., Any])


def run_cases_on_devices(cases: Sequence[Case], run: Run, predictors: Mapping[int, Predictor]) -> tuple[Outcome, ...]:
    """Every case to its outcome, in their order, whichever GPU has taken it.

    Args:
        cases: of the run.
        run: what they share; its `predictor` and `ending` are replaced by those of each GPU.
        predictors: by the GPU's number.

    Raises:
        EngineError: a GPU failed, which is named; as everything else that is raised here, once all threads have ended
            and what was being written is whole.
    """
    from threadpoolctl import threadpool_limits

    order = Order([case.id for case in cases], run.events.case_ended)
    queue = CaseQueue(run.planner, gpus=len(predictors), ahead=run.config.preparing > 0)
    run = replace(run, events=_in_turn(run.events, queue))
    # around all threads: each sets the same limit for its cases, and puts back what it found
    with ExitStack() as stack:
        stack.enter_context(threadpool_limits(1, user_api="blas"))
        writers = None
        if run.config.writing:
            writers = stack.enter_context(ThreadPoolExecutor(len(predictors), "trtbuild-write"))
        lanes = []
        for device, predictor in predictors.items():
            lane = replace(run, predictor=predictor, ending=SharedEnding(order, writers, queue.stop))
            lanes.append(partial(_serve, device, lane, queue))
        stack.enter_context(at_once(lanes, queue.stop))
        _bring(cases, run, queue, order)
    if queue.error is not None:
        raise queue.error
    return order.outcomes


def _bring(cases: Sequence[Case], run: Run, queue: CaseQueue, order: Order) -> None:
    """Asks for one case after the other, as many ahead as there are places."""
    for item in planned_cases(cases, run):
        if isinstance(item, Outcome):
            order.put(item)
            continue
        plan = queue.admit(item.plan)
        if plan is None:
            return
        queue.put(replace(item, plan=plan), run.source.submit(item.request))
    queue.close()


def _serve(device: int, run: Run, queue: CaseQueue) -> None:
    """Predicts cases on one GPU until none comes."""
    try:
        while _next_case(run, queue):
            pass
        run.ending.settle()
    except BaseException as error:  # noqa: BLE001  # the thread that waits for this one raises it
        queue.stop(named_error(error, f"GPU {device}"))


def _next_case(run: Run, queue: CaseQueue) -> bool:
    """Takes a case to its end, or to the thread that writes; False where there is none."""
    waiting = queue.take()
    if waiting is None:
        return False
    run.events.case_started(waiting.ahead.plan)
    case = waiting.ahead.case.id
    ahead, work = one_case(waiting.ahead, waiting.reading, run)
    del waiting  # its arrays must not live as long as the writing
    if work is None:
        queue.ended(case)
        return True
    queue.writes(case, ahead.plan.bytes)
    run.ending.write(_releasing(work, lambda: queue.ended(case)))
    return True


def _releasing(work: Callable[[], Outcome], release: Callable[[], None]) -> Callable[[], Outcome]:
    def done() -> Outcome:
        try:
            return work()
        finally:
            release()

    return done


def _in_turn(events: Events, queue: CaseQueue) -> Events:
    """The callbacks called by one thread at a time; `progress` stops every case where the run stops."""
    lock = threading.RLock()

    def in_turn(call: Call) -> Call:
        def locked(*values: Any) -> Any:
            with lock:
                return call(*values)

        return locked  # type: ignore[return-value]  # it takes and gives what `call` does

    def progress(stage: str, done: int, total: int) -> bool | None:
        if queue.error is not None:
            return False
        return None if events.progress is None else events.progress(stage, done, total)

    return replace(
        events,
        case_started=in_turn(events.case_started),
        case_ended=in_turn(events.case_ended),
        progress=in_turn(progress),
        case_progress=in_turn(events.case_progress),
    )
