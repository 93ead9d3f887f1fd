"""What a run's memory will be, before each case starts; and what is done where it would not fit.

The rungs, in this order: cases one after the other instead of three in flight (`steps.flow`), a float16 accumulator
where the user set a limit, and a refusal that names the case. Without a limit there is no float16: what happens to be
free on the machine must not change a voxel. Everything is counted for the whole process tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from trtbuild.errors import OutOfMemory, TrtbuildError
from trtbuild.machine import available_memory, memory_in_use
from trtbuild.runtime import Settings
from trtbuild.runtime.memory import CaseBytes, CaseShape, case_bytes, window_bytes
from trtbuild.runtime.slabs import Accumulator
from trtbuild.steps.prediction.predictor import Predictor

if TYPE_CHECKING:
    from concurrent.futures import Future

    from trtbuild.spec import ModelSpec
    from trtbuild.volume.image import Header

RESERVE = 0.05
"""Of the free memory, left to the system where no limit is given."""
MARGIN = 0.1
"""By which a prediction may be too low: up to 9 % was seen (a cascade, in twenty measured runs)."""
HALF, ALONE = "float16 accumulator", "no other case beside it"
"""What is done to a case to make it fit, as it stands in its outcome."""


class Preparer(Protocol):
    """The part of a `flow.Source` that matters here."""

    @property
    def pids(self) -> tuple[int, ...]:
        """Its processes, besides this one."""

    def warm(self, specs: Sequence[ModelSpec]) -> Future[None]:
        """Imports what these models need."""


@dataclass(frozen=True, kw_only=True)
class CasePlan:
    """A case before it starts.

    `bytes` is None where its header does not say how large it is. `peak` is what the run is predicted to take at most
    while the case is in flight: before `Planner.in_flight` with no other case, then with its neighbours. `adapted` says
    what was done to make it fit.
    """

    case: str
    settings: Settings
    bytes: CaseBytes | None
    peak: int | None
    adapted: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Planner:
    """The memory of one run: `base` is what it takes without any case, `limit` what predictions may reach: the
    memory that it may take less `MARGIN`; None: not known.

    `settings` are those of every case, but for the accumulator, which is the first of `accumulators` that fits.
    """

    predictor: Predictor
    settings: Settings
    base: int
    limit: int | None
    accumulators: tuple[Accumulator, ...] = ("float32", "float16")

    def plan(self, case: str, header: Header | None, files: int) -> CasePlan:
        """The case with what makes it fit; None as its size where the header does not tell.

        Raises:
            OutOfMemory: it would not fit, whatever is done.
            InputError: a case of this size cannot be prepared.
        """
        if header is None:
            return CasePlan(case=case, settings=self.settings, bytes=None, peak=None)
        shape = CaseShape(
            shape=header.shape, spacing=header.spacing, voxel_bytes=header.voxel_bytes, files=max(1, files)
        )
        return self.plan_shape(case, shape)

    def plan_shape(self, case: str, shape: CaseShape) -> CasePlan:
        """`plan` for a case whose size is known otherwise."""
        peak = self.base
        for accumulator in self.accumulators:
            settings = replace(self.settings, accumulator=accumulator)
            needed = self._bytes(shape, settings)
            peak = self.base + needed.alone
            if self.limit is None or peak <= self.limit:
                adapted = (HALF,) if accumulator == "float16" else ()
                return CasePlan(case=case, settings=settings, bytes=needed, peak=peak, adapted=adapted)
        raise OutOfMemory(
            "The case needs more memory than there is.",
            expected=f"at most {_gigabytes(self.limit or 0)}, which is the limit less a margin of {MARGIN:.0%}",
            got=f"{_gigabytes(peak)} predicted, of which {_gigabytes(self.base)} without any case",
            where=f"{case}, {' x '.join(map(str, shape.shape))} voxels of "
            f"{' x '.join(f'{s:g}' for s in shape.spacing)} mm",
            hint=self._levers(),
        )

    def together(self, preparing: CasePlan | None, network: CasePlan | None, writing: CasePlan | None) -> int | None:
        """Predicted peak of the run with these in flight; None where the size of one of them is not known."""
        total = self.base
        for stage, plan in (("preparing", preparing), ("network", network), ("writing", writing)):
            if plan is not None and plan.bytes is None:
                return None
            total += 0 if plan is None else getattr(plan.bytes, stage)
        return total

    def fits(self, preparing: CasePlan | None, network: CasePlan | None, writing: CasePlan | None) -> bool:
        """Whether these may be in flight at once; a case of unknown size goes alone."""
        total = self.together(preparing, network, writing)
        return total is not None and (self.limit is None or total <= self.limit)

    def in_flight(
        self, preparing: CasePlan | None, network: CasePlan, writing: CasePlan | None, *, alone: bool
    ) -> CasePlan:
        """The plan of the case that goes into the network now, with the peak of the run meanwhile.

        Args:
            preparing: the case that is prepared beside it.
            network: its plan.
            writing: the case that is written beside it.
            alone: another one had to wait because it would not have fitted.
        """
        total = self.together(preparing, network, writing)
        peak = None if total is None or network.peak is None else max(total, network.peak)
        return replace(network, peak=peak, adapted=(*network.adapted, ALONE) if alone else network.adapted)

    def _bytes(self, shape: CaseShape, settings: Settings) -> CaseBytes:
        stages = [model.stages for model in self.predictor.models]
        return case_bytes(shape, stages, self.predictor.recipe, settings)

    def _levers(self) -> str:
        levers = ["raise --max-memory", "use a machine with more memory", "crop the image"]
        if "float16" not in self.accumulators:
            levers[0] = "allow a float16 accumulator by naming the limit yourself with --max-memory"
        if self.settings.probabilities:
            levers.insert(0, "leave --save_probabilities out")
        return "check the spacing in the file's header; " + ", ".join(levers[:-1]) + f" or {levers[-1]}"


def planner_of_run(predictor: Predictor, settings: Settings, max_memory: int | None, source: Preparer) -> Planner:
    """Measures what the opened run takes now, once both processes have loaded what a case needs.

    Args:
        predictor: opened.
        settings: of every case.
        max_memory: the user's limit in bytes for the whole process tree; None takes what is free now.
        source: reads and prepares the cases.
    """
    from trtbuild.volume.io import reader_named

    reader_named(predictor.spec.reader)  # its library is loaded before the first header is read
    with suppress(TrtbuildError):  # the first case meets it again, and is failed by name
        source.warm([model.stages[0].spec for model in predictor.models]).result()
    used = memory_in_use(source.pids)
    free = available_memory()
    limit = max_memory
    if limit is None and free is not None:
        limit = used + int((1 - RESERVE) * free)
    if limit is not None:
        limit = int(limit / (1 + MARGIN))
    return Planner(
        predictor=predictor,
        settings=settings,
        base=used + host_growth(predictor),
        limit=limit,
        accumulators=("float32",) if max_memory is None else ("float32", "float16"),
    )


def host_growth(predictor: Predictor) -> int:
    """What the engines will take beyond what they hold already, once they have run: activations, without windows."""
    total = 0
    for model in predictor.models:
        runners = [(stage, fold) for stage in model.stages for fold in range(len(stage.runners))]
        for (stage, fold), record in zip(runners, model.records, strict=True):
            total += max(0, (record.memory.host or 0) - window_bytes(stage, fold))
    return total


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.3f} MB"
