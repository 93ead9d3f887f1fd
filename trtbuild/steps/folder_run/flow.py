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

from trtbuild.runtime import Prediction
from trtbuild.runtime.case import Prepare
from trtbuild.steps.folder_run.ending import CASE_ERRORS, Outcome, failed_outcome, timed
from trtbuild.steps.folder_run.messages import Reading
from trtbuild.steps.folder_run.outputs import remove_files
from trtbuild.steps.folder_run.planned import Ahead, Events, Run, Source, planned_cases, sized
from trtbuild.steps.folder_run.planning import CasePlan
from trtbuild.steps.folder_run.writing import Place, write_case

if TYPE_CHECKING:
    from trtbuild.runtime.gpu.prepare import DevicePrepared
    from trtbuild.runtime.gpu.uploads import Uploads
    from trtbuild.volume import Prepared
    from trtbuild.volume.cases import Case
    from trtbuild.volume.image import Image

CHANGED = "its inputs have changed since it was finished, so it was predicted anew"
"""The warning of a case that was to be continued."""


def run_cases(cases: Sequence[Case], run: Run) -> None:
    """Every case to its outcome (`run.ending`), in their order."""
    items = planned_cases(cases, run)
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
        current, work = one_case(current, reading, run, next_reading)
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


def one_case(
    ahead: Ahead, reading: Future[Reading], run: Run, following: Future[Reading] | None = None
) -> tuple[Ahead, Callable[[], Outcome] | None]:
    """Waits for the case and predicts it; returns it with its size, and what will write it, None where it failed.

    The image of `following`, as soon as it is read, goes to the GPU meanwhile where `run.uploads` is given.
    """
    case, targets = ahead.case.id, run.targets(ahead.case.id)
    try:
        ready = reading.result()
        ahead = sized(ahead, ready.image, run)
        prediction = _predicted(ahead, ready, run, following)
    except (*CASE_ERRORS, MemoryError) as error:
        run.ending.ended(failed_outcome(case, error, ahead.plan.peak))
        return ahead, None
    finally:
        run.source.forget(case)
    spec, place, seen = run.predictor.spec, _place(ahead.case, ready.image, run), ready.image.warnings
    changed = (CHANGED,) if case in run.changed else ()
    run.events.case_progress(case, "write", 0, 1)

    def write() -> Outcome:
        started = time.perf_counter()
        try:
            write_case(prediction, place, targets, spec)
        except (*CASE_ERRORS, MemoryError) as error:
            remove_files(targets)  # probabilities may be there already
            return failed_outcome(case, error, ahead.plan.peak)
        return Outcome(
            case=case,
            output=str(targets.segmentation),
            error=None,
            seconds=timed(prediction.seconds, "write", started),
            warnings=(*changed, *seen, *prediction.warnings),
            predicted=ahead.plan.peak,
            adapted=ahead.plan.adapted,
        )

    return ahead, write


def _predicted(ahead: Ahead, reading: Reading, run: Run, following: Future[Reading] | None) -> Prediction:
    case, events = ahead.case.id, run.events

    def progress(stage: str, done: int, total: int) -> bool | None:
        run.ending.settle(wait=False)
        if stage == "network" and done and run.uploads is not None:  # by then the case has all its memory
            _upload_more(following, run.uploads)
        events.case_progress(case, stage, done, total)
        return None if events.progress is None else events.progress(stage, done, total)

    prepare = _prepared_here(reading, run) if ahead.request.raw else _prepared_there(case, reading, run)
    prediction = run.predictor.predict_prepared(prepare, ahead.plan.settings, progress)
    later = prediction.seconds.get("prepare", 0.0)
    first = {"read": reading.seconds["read"], "prepare": reading.seconds["prepare"] + later}
    return replace(prediction, seconds={**prediction.seconds, **first})


def _upload_more(following: Future[Reading] | None, uploads: Uploads) -> None:
    """One more piece of the next image, where that has been read."""
    if following is not None and following.done() and not following.cancelled() and following.exception() is None:
        uploads.step(following.result().image.data)


def _prepared_there(case: str, reading: Reading, run: Run) -> Prepare:
    """The first stages came prepared; a second one is prepared where the image was kept."""
    prepared = list(reading.prepared)

    def prepare(model: int, stage: int, labels: NDArray[Any] | None) -> Prepared:
        if stage == 0:
            return prepared[model]
        spec = run.predictor.models[model].stages[stage].spec
        if labels is None:
            raise ValueError("a second stage needs the labels of the first")
        return run.source.second(case, spec, labels).result()

    return prepare


def _prepared_here(reading: Reading, run: Run) -> Prepare:
    """The predictor prepares every stage from the voxels, on its GPU where it can."""
    image, predictor = reading.image, run.predictor

    def prepare(model: int, stage: int, labels: NDArray[Any] | None) -> Prepared | DevicePrepared:
        given = stage == 0 and predictor.models[model].stages[stage].spec.previous_stage is not None
        before = reading.previous if given else labels
        uploaded = None if run.uploads is None else run.uploads.taken(image.data)
        try:
            return predictor.prepared(model, stage, image.data, image.spacing, before, uploaded)
        finally:
            if uploaded is not None:
                uploaded.close()

    return prepare


def _place(case: Case, image: Image, run: Run) -> Place:
    from trtbuild.volume.io import reader_named

    return Place(
        geometry=image.geometry,
        properties=reader_named(run.predictor.spec.reader).nnunet_properties(image),
        series=case.files[0] if run.config.dicom_seg else None,
        bundle=run.predictor.identity,
    )


__all__ = ["CASE_ERRORS", "Events", "Run", "Source", "one_case", "run_cases"]
