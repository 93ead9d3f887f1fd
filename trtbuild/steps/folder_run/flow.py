"""Cases one after the other with three in flight at most: one is read and prepared, one in the network, one written.

Their number is fixed, so that memory does not grow with the folder. Where the planner says that three do not fit, the
next case waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from trtbuild.errors import CaseNotWritable, InputError, NonFinite, OutOfMemory, TrtbuildError, WorkerDied
from trtbuild.runtime import Prediction
from trtbuild.steps.folder_run.ending import Outcome, timed
from trtbuild.steps.folder_run.messages import Reading
from trtbuild.steps.folder_run.outputs import remove_files
from trtbuild.steps.folder_run.planned import Ahead, Events, Run, Source, ahead_of, is_kept, sized
from trtbuild.steps.folder_run.planning import CasePlan
from trtbuild.steps.folder_run.writing import Place, write_case

if TYPE_CHECKING:
    from trtbuild.volume import Prepared
    from trtbuild.volume.cases import Case
    from trtbuild.volume.image import Image

CASE_ERRORS = (InputError, CaseNotWritable, NonFinite, OutOfMemory, WorkerDied)
"""What fails a case and not the run."""
CHANGED = "its inputs have changed since it was finished, so it was predicted anew"
"""The warning of a case that was to be continued."""


def run_cases(cases: Sequence[Case], run: Run) -> None:
    """Every case to its outcome (`run.ending`), in their order."""
    items = _planned(cases, run)
    current, skipped = _next(items)
    _skip(skipped, run)
    reading = None if current is None else run.source.submit(current.request)
    written: CasePlan | None = None
    while current is not None and reading is not None:
        following, skipped = _next(items)
        before, written = written, _written_beside(run, None, current.plan, written)
        after = following.plan if following is not None and run.config.preparing else None
        early = after is not None and run.planner.fits(after, current.plan, written)
        alone = before is not written or (after is not None and not early)
        plan = run.planner.in_flight(after if early else None, current.plan, written, alone=alone)
        current = replace(current, plan=plan)
        run.events.case_started(plan)
        next_reading = run.source.submit(following.request) if following is not None and early else None
        current, work = _one_case(current, reading, run)
        reading = None  # its arrays must not live as long as the writing
        if work is not None:
            run.ending.write(work)
            written = current.plan
        _skip(skipped, run)
        if following is not None and next_reading is None:
            written = _written_beside(run, following.plan, None, written)
            next_reading = run.source.submit(following.request)
        current, reading = following, next_reading


def _written_beside(
    run: Run, preparing: CasePlan | None, network: CasePlan | None, written: CasePlan | None
) -> CasePlan | None:
    """The case that is still being written; waits until it is, and gives None, where the others do not fit beside."""
    if written is None or run.planner.fits(preparing, network, written):
        return written
    run.ending.settle()
    return None


def _skip(outcomes: Iterable[Outcome], run: Run) -> None:
    for outcome in outcomes:
        run.ending.ended(outcome)


def _next(items: Iterator[Ahead | Outcome]) -> tuple[Ahead | None, list[Outcome]]:
    """The next case that is to be predicted, and those before it that are not."""
    skipped: list[Outcome] = []
    for item in items:
        if isinstance(item, Ahead):
            return item, skipped
        skipped.append(item)
    return None, skipped


def _planned(cases: Sequence[Case], run: Run) -> Iterator[Ahead | Outcome]:
    """The cases that are to be predicted; of the others, which are finished or cannot be, their outcome."""
    for case in cases:
        if is_kept(case, run):
            yield Outcome(case=case.id, output=None, error=None, seconds={}, warnings=())
            continue
        try:
            ahead = ahead_of(case, run)
        except CASE_ERRORS as error:
            yield _failed(case.id, error)
            continue
        yield ahead


def _one_case(ahead: Ahead, reading: Future[Reading], run: Run) -> tuple[Ahead, Callable[[], Outcome] | None]:
    """Waits for the case and predicts it; returns it with its size, and what will write it, None where it failed."""
    case, targets = ahead.case.id, run.targets(ahead.case.id)
    try:
        ready = reading.result()
        ahead = sized(ahead, ready.image, run)
        prediction = _predicted(ahead, ready, run)
    except (*CASE_ERRORS, MemoryError) as error:
        run.ending.ended(_failed(case, error, ahead.plan))
        return ahead, None
    finally:
        run.source.forget(case)
    image, spec = ready.image, run.predictor.spec
    changed = (CHANGED,) if case in run.changed else ()
    place = _place(ahead.case, image, run)

    def write() -> Outcome:
        started = time.perf_counter()
        try:
            write_case(prediction, place, targets, spec)
        except (*CASE_ERRORS, MemoryError) as error:
            remove_files(targets)  # probabilities may be there already
            return _failed(case, error, ahead.plan)
        return Outcome(
            case=case,
            output=str(targets.segmentation),
            error=None,
            seconds=timed(prediction.seconds, "write", started),
            warnings=(*changed, *image.warnings, *prediction.warnings),
            predicted=ahead.plan.peak,
            adapted=ahead.plan.adapted,
        )

    return ahead, write


def _predicted(ahead: Ahead, reading: Reading, run: Run) -> Prediction:
    prepared = list(reading.prepared)

    def prepare(model: int, stage: int, labels: NDArray[Any] | None) -> Prepared:
        if stage == 0:
            return prepared[model]
        spec = run.predictor.models[model].stages[stage].spec
        if labels is None:
            raise ValueError("a second stage needs the labels of the first")
        return run.source.second(ahead.case.id, spec, labels).result()

    def progress(stage: str, done: int, total: int) -> bool | None:
        run.ending.settle(wait=False)
        return None if run.events.progress is None else run.events.progress(stage, done, total)

    prediction = run.predictor.predict_prepared(prepare, ahead.plan.settings, progress)
    later = prediction.seconds.get("prepare", 0.0)
    first = {"read": reading.seconds["read"], "prepare": reading.seconds["prepare"] + later}
    return replace(prediction, seconds={**prediction.seconds, **first})


def _place(case: Case, image: Image, run: Run) -> Place:
    from trtbuild.volume.io import reader_named

    return Place(
        geometry=image.geometry,
        properties=reader_named(run.predictor.spec.reader).nnunet_properties(image),
        series=case.files[0] if run.config.dicom_seg else None,
        bundle=run.predictor.identity,
    )


def _failed(case: str, error: TrtbuildError | MemoryError, plan: CasePlan | None = None) -> Outcome:
    peak = None if plan is None else plan.peak
    if isinstance(error, MemoryError):
        error = _out_of_memory(case, error)
    return Outcome(case=case, output=None, error=str(error), seconds={}, warnings=(), predicted=peak)


def _out_of_memory(case: str, error: MemoryError) -> OutOfMemory:
    return OutOfMemory(
        "There is not enough memory for a case.",
        where=case,
        got=str(error) or "MemoryError",
        hint="check the spacing in the file's header, or predict on a machine with more memory",
    )


__all__ = ["Events", "Run", "Source", "run_cases"]
