"""Cases one after the other with three in flight at most: one is read and prepared, one in the network, one written.

Their number is fixed, so that memory does not grow with the folder. Where the planner says that three do not fit, the
next case waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from trtbuild.config import PredictConfig
from trtbuild.errors import InputError, NonFinite, OutOfMemory, TrtbuildError, WorkerDied
from trtbuild.runtime import Prediction, Progress
from trtbuild.runtime.memory import CaseShape
from trtbuild.spec import ModelSpec
from trtbuild.steps.ending import Ending, Outcome, timed
from trtbuild.steps.messages import Reading, Request
from trtbuild.steps.outputs import COPIES, RECORD, Targets, case_targets, remove_files
from trtbuild.steps.planning import CasePlan, Planner, Preparer
from trtbuild.steps.predict import Predictor
from trtbuild.steps.writing import Place, write_case

if TYPE_CHECKING:
    from trtbuild.volume import Prepared
    from trtbuild.volume.cases import Case
    from trtbuild.volume.image import Header, Image

CASE_ERRORS = (InputError, NonFinite, OutOfMemory, WorkerDied)
"""What fails a case and not the run."""


class Source(Preparer, Protocol):
    """Reads and prepares cases, in the order of the requests: `worker.Worker`, or `local.LocalWorker`."""

    def look(self, request: Request) -> Future[Header | None]:
        """What the case's header says, where it can be read."""

    def submit(self, request: Request) -> Future[Reading]:
        """The case as the first stage of every model sees it."""

    def second(self, case: str, spec: ModelSpec, segmentation: NDArray[Any]) -> Future[Prepared]:
        """A kept case as a second stage sees it."""

    def forget(self, case: str) -> None:
        """Frees a kept case."""


@dataclass(frozen=True, kw_only=True)
class Events:
    """Callbacks of a folder run: the number of cases once, each case as it starts and ends, progress inside it."""

    started: Callable[[int, Predictor], None] = lambda count, predictor: None
    case_started: Callable[[CasePlan], None] = lambda plan: None
    case_ended: Callable[[Outcome], None] = lambda outcome: None
    progress: Progress | None = None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every case of a folder run shares."""

    config: PredictConfig
    predictor: Predictor
    source: Source
    planner: Planner
    ending: Ending
    events: Events

    def targets(self, case: str) -> Targets:
        """The case's files in the output folder."""
        return case_targets(self.config.output, case, self.predictor.spec.file_ending)


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A case that is to be predicted."""

    case: Case
    plan: CasePlan
    request: Request


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
        work = _one_case(current, reading, run)
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
    config, predictor = run.config, run.predictor
    specs = tuple(model.stages[0].spec for model in predictor.models)
    cascades = any(len(model.stages) > 1 for model in predictor.models)
    for case in cases:
        if config.continue_prediction and os.path.isfile(run.targets(case.id).segmentation):
            yield Outcome(case=case.id, output=None, error=None, seconds={}, warnings=())
            continue
        try:
            _check_writable(case, run)
            previous = _previous(config, case, predictor.spec.file_ending)
            request = Request(case=case.id, files=case.files, specs=specs, previous=previous, keep=cascades)
            plan = run.planner.plan(case.id, run.source.look(request).result(), len(case.files))
        except CASE_ERRORS as error:
            yield _failed(case.id, error)
            continue
        yield Ahead(case=case, plan=plan, request=request)


def _check_writable(case: Case, run: Run) -> None:
    """Refuses a case whose outputs cannot be: a DICOM-SEG of no series, a file in the place of the run's own."""
    from trtbuild.volume.io import files_beside

    if run.config.dicom_seg and not case.is_dicom:
        raise InputError(
            "A DICOM segmentation refers to a DICOM series, which the case is not.",
            got=case.files[0].name,
            where=case.id,
            hint="leave -ot out, or give the folder of the series with -i",
        )
    for file in files_beside(run.predictor.spec.reader, run.targets(case.id).segmentation):
        if file.name in (*COPIES, RECORD):
            raise InputError(
                f"The spacing of the case would be written to {file.name}, which belongs to the folder.",
                where=case.id,
                hint="give the case another name",
            )


def _previous(config: PredictConfig, case: Case, ending: str) -> Path | None:
    """The label file of the case's first stage, where the user gave a folder of them."""
    if config.previous_stage is None:
        return None
    file = config.previous_stage / (case.id + ending)
    if not os.path.isfile(file):
        raise InputError(
            "The case has no prediction of the previous stage.",
            expected=file.name,
            where=config.previous_stage,
            hint="predict the same cases with the previous stage first, or compile both into one bundle",
        )
    return file


def _one_case(ahead: Ahead, reading: Future[Reading], run: Run) -> Callable[[], Outcome] | None:
    """Waits for the case and predicts it; returns what will write it, None where it failed."""
    case, targets = ahead.case.id, run.targets(ahead.case.id)
    try:
        ready = reading.result()
        ahead = _sized(ahead, ready.image, run)
        prediction = _predicted(ahead, ready, run)
    except (*CASE_ERRORS, MemoryError) as error:
        run.ending.ended(_failed(case, error, ahead.plan))
        return None
    finally:
        run.source.forget(case)
    image, spec = ready.image, run.predictor.spec
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
            warnings=(*image.warnings, *prediction.warnings),
            predicted=ahead.plan.peak,
            adapted=ahead.plan.adapted,
        )

    return write


def _sized(ahead: Ahead, image: Image, run: Run) -> Ahead:
    """The case with its plan; made now where its header did not tell how large it is.

    Raises:
        OutOfMemory: it does not fit.
    """
    if ahead.plan.bytes is not None:
        return ahead
    _, z, y, x = image.data.shape
    shape = CaseShape(shape=(z, y, x), spacing=image.spacing, voxel_bytes=0)
    return replace(ahead, plan=run.planner.plan_shape(ahead.case.id, shape))


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
        bundle="+".join(model.bundle.identity for model in run.predictor.models),
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
