"""Measures cases in processes: one that a library kills, or that memory cannot hold, fails by name and alone."""

from __future__ import annotations

import math
import multiprocessing
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

from trtbuild.accuracy.metrics import overlaps
from trtbuild.accuracy.summary import CaseMetrics, LabelOrRegion, labels_in
from trtbuild.accuracy.surface import SurfaceAgreement, surface_agreement
from trtbuild.errors import InputError, OutOfMemory, WorkerDied
from trtbuild.machine import available_memory, usable_cpus
from trtbuild.spec import Reader
from trtbuild.steps.evaluation.inputs import Evaluation, Pair
from trtbuild.volume.image import LabelImage
from trtbuild.volume.io.place import differences

COUNTING_BYTES = 8
"""Per voxel, besides what the library takes to read a file: its float32, and the labels of both files in uint16."""
SURFACE_BYTES = 40
"""Per voxel; measured: 31 where a seventh of the volume is surface. Masks, codes, and coordinates of the pieces."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is measured in one case; `tolerance` is in mm, None for no surfaces."""

    pair: Pair
    reader: Reader
    labels: tuple[LabelOrRegion, ...]
    ignore: int | None
    tolerance: float | None


@dataclass(frozen=True, kw_only=True)
class CaseOutcome:
    """Either `metrics` or an `error`; and where the two files disagree about their place in space."""

    case: str
    metrics: CaseMetrics | None
    error: str | None
    warnings: tuple[str, ...] = ()


def measured_case(job: Job) -> CaseOutcome:
    """Reads both files and measures them; what is wrong with them becomes the outcome's `error`."""
    from trtbuild.volume.io import reader_named

    pair, reader = job.pair, reader_named(job.reader)
    try:
        reference = reader.read_segmentation(pair.reference, allow_negative=True)
        prediction = reader.read_segmentation(pair.prediction, allow_negative=True)
        if reference.labels.shape != prediction.labels.shape:
            raise InputError("Reference and prediction differ in shape (z, y, x).", where=pair.prediction,
                             expected=reference.labels.shape, got=prediction.labels.shape,
                             hint="bring the prediction to the grid of the reference")  # fmt: skip
        counted = overlaps(reference.labels, prediction.labels, map(labels_in, job.labels), job.ignore)
        surfaces = None if job.tolerance is None else _surfaces(reference, prediction, job, job.tolerance)
    except (InputError, OutOfMemory) as error:
        return CaseOutcome(case=pair.case, metrics=None, error=str(error))
    except MemoryError as error:
        message = OutOfMemory("There is not enough memory to compare a case.", where=pair.prediction,
                              got=str(error) or "MemoryError", hint="fewer processes: -np 1")  # fmt: skip
        return CaseOutcome(case=pair.case, metrics=None, error=str(message))
    metrics = CaseMetrics(
        reference_file=str(pair.reference), prediction_file=str(pair.prediction),
        overlaps=dict(zip(job.labels, counted, strict=True)), surfaces=surfaces,
    )  # fmt: skip
    return CaseOutcome(case=pair.case, metrics=metrics, error=None, warnings=_misplaced(reference, prediction))


def _surfaces(
    reference: LabelImage, prediction: LabelImage, job: Job, tolerance: float
) -> dict[LabelOrRegion, SurfaceAgreement]:
    return {
        label: surface_agreement(reference.labels, prediction.labels, labels_in(label), reference.spacing, tolerance,
                                 job.ignore)
        for label in job.labels
    }  # fmt: skip


def _misplaced(reference: LabelImage, prediction: LabelImage) -> tuple[str, ...]:
    """What nnU-Net passes over: the same shape at another place in space."""
    return tuple(
        f"the {one.name} of the prediction is {one.got}, that of the reference {one.expected}"
        for one in differences(reference, prediction)
    )


def measured_cases(jobs: Sequence[Job], processes: int) -> Iterator[CaseOutcome]:
    """The outcomes as they come, in any order.

    The processes are spawned, so a script that calls this needs `if __name__ == "__main__":`. When one of them dies
    nobody knows over which case: those that have no outcome yet are then measured one at a time.
    """
    lost: list[Job] = []
    pool = _pool(processes)
    try:
        running: dict[Future[CaseOutcome], Job] = {}
        for job in jobs:
            try:
                running[pool.submit(measured_case, job)] = job
            except BrokenProcessPool:
                lost.append(job)
        for future in as_completed(running):
            try:
                outcome = future.result()
            except BrokenProcessPool:
                lost.append(running[future])
            else:
                yield outcome
    finally:
        pool.shutdown(cancel_futures=True)
    while lost:
        yield from _until_one_dies(lost)


def _until_one_dies(jobs: list[Job]) -> Iterator[CaseOutcome]:
    """Takes jobs from the front and measures them in one process, up to the one over which it dies."""
    with _pool(1) as pool:
        while jobs:
            job = jobs.pop(0)
            try:
                yield pool.submit(measured_case, job).result()
            except BrokenProcessPool:
                error = WorkerDied("The process that compared a case ended by itself.", where=job.pair.prediction,
                                   got="a crash of the image library, or the system's killer for lack of memory",
                                   hint="open both files in a viewer; free some memory")  # fmt: skip
                yield CaseOutcome(case=job.pair.case, metrics=None, error=str(error))
                return


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), initializer=_leave_interrupts_to_parent)


def _leave_interrupts_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def processes_for(evaluation: Evaluation, *, surface: bool) -> int:
    """As many as there are CPUs, cases, and memory for: the largest reference decides."""
    free = available_memory()
    most = min(usable_cpus(), len(evaluation.pairs))
    if free is None or most == 1:
        return most
    return max(1, min(most, free // max(1, _case_bytes(evaluation, surface=surface))))


def _case_bytes(evaluation: Evaluation, *, surface: bool) -> int:
    """Memory that the largest case takes, by the headers of the references; one that cannot be read fails later."""
    from trtbuild.volume.io import reader_named

    reader, largest = reader_named(evaluation.reader), 0
    for pair in evaluation.pairs:
        try:
            header = reader.image_header([pair.reference], ("labels",))
        except InputError:
            continue
        if header is not None:
            each = header.voxel_bytes + COUNTING_BYTES + (SURFACE_BYTES if surface else 0)
            largest = max(largest, math.prod(header.shape) * each)
    return largest
