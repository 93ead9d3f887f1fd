"""Which cases of a folder run are to be predicted, and of each what to ask for and what it will take.

Does: refuses a case that cannot be written or lacks its previous stage, reads its header, and plans its memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from numpy.typing import NDArray

from trtbuild.config import PredictConfig
from trtbuild.errors import InputError
from trtbuild.runtime import Progress
from trtbuild.runtime.memory import CaseShape
from trtbuild.spec import ModelSpec
from trtbuild.steps.folder_run.ending import CASE_ERRORS, CaseEnding, Outcome, failed_outcome
from trtbuild.steps.folder_run.messages import Reading, Request
from trtbuild.steps.folder_run.outputs import COPIES, Folder, Targets
from trtbuild.steps.folder_run.planning import CasePlan, Planner, Preparer
from trtbuild.steps.folder_run.record import RECORD
from trtbuild.steps.prediction.predictor import Predictor

if TYPE_CHECKING:
    from trtbuild.runtime.gpu.uploads import Uploads
    from trtbuild.volume import Prepared
    from trtbuild.volume.cases import Case
    from trtbuild.volume.image import Header, Image


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
    """Callbacks of a folder run: the number of cases once, each case as it starts and ends, progress inside it.

    `case_progress` is told (case, stage, done, total) whenever `progress` is told the same without the case, and that a
    case goes to be written: ("write", 0, 1). With several GPUs the calls come from several threads, one at a time.
    """

    started: Callable[[int, Predictor], None] = lambda count, predictor: None
    case_started: Callable[[CasePlan], None] = lambda plan: None
    case_ended: Callable[[Outcome], None] = lambda outcome: None
    progress: Progress | None = None
    case_progress: Callable[[str, str, int, int], None] = lambda case, stage, done, total: None


@dataclass(frozen=True, kw_only=True)
class Run:
    """What every case of a folder run shares.

    `changed` are the cases whose finished outputs went because their inputs are no longer those that they were made of.
    `uploads` takes the next image to the GPU while a case runs, where there is one GPU and no limit to its memory.
    """

    config: PredictConfig
    folder: Folder
    changed: frozenset[str]
    predictor: Predictor
    source: Source
    planner: Planner
    ending: CaseEnding
    events: Events
    uploads: Uploads | None = None

    def targets(self, case: str) -> Targets:
        """The case's files in the output folder."""
        return self.folder.targets(case)


@dataclass(frozen=True, kw_only=True)
class Ahead:
    """A case that is to be predicted. The plan has no sizes where the header does not tell how large the case is."""

    case: Case
    plan: CasePlan
    request: Request


def planned_cases(cases: Sequence[Case], run: Run) -> Iterator[Ahead | Outcome]:
    """The cases that are to be predicted; of the others, which are finished or cannot be, their outcome."""
    for case in cases:
        if is_kept(case, run):
            yield Outcome(case=case.id, output=None, error=None, seconds={}, warnings=())
            continue
        try:
            ahead = ahead_of(case, run)
        except CASE_ERRORS as error:
            yield failed_outcome(case.id, error)
            continue
        yield ahead


def is_kept(case: Case, run: Run) -> bool:
    """Whether the case is finished: what must not be continued is gone by now (`outputs.prepared_folder`)."""
    return run.config.continue_prediction and os.path.isfile(run.folder.segmentation(case.id))


def ahead_of(case: Case, run: Run) -> Ahead:
    """The request for a case, and its plan.

    Raises:
        InputError: its outputs cannot be written, its previous stage or a file is missing, or its header is damaged.
        OutOfMemory: it would not fit.
    """
    _check_writable(case, run)
    models, raw = run.predictor.models, run.predictor.on_device
    request = Request(
        case=case.id,
        files=case.files,
        specs=tuple(model.stages[0].spec for model in models),
        previous=_previous(run.config, case, run.folder.ending),
        keep=not raw and any(len(model.stages) > 1 for model in models),
        raw=raw,  # then the device prepares it
    )
    plan = run.planner.plan(case.id, run.source.look(request).result(), len(case.files))
    return Ahead(case=case, plan=plan, request=request)


def sized(ahead: Ahead, image: Image, run: Run) -> Ahead:
    """The case with its plan; made now where its header did not tell how large it is.

    Raises:
        OutOfMemory: it does not fit.
    """
    if ahead.plan.bytes is not None:
        return ahead
    _, z, y, x = image.data.shape
    shape = CaseShape(shape=(z, y, x), spacing=image.spacing, voxel_bytes=0)
    return replace(ahead, plan=run.planner.plan_shape(ahead.case.id, shape))


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
