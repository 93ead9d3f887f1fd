"""Patches through a network -> ranges and histograms of its tensors, in bounded memory.

Two passes. The first takes the largest |x| of every tensor, reduced in the graph. The second counts |x| of the sources
of the targets into 2048 fixed bins: the sources are packed into groups of at most `budget_bytes`, the graph is cut to
one group at a time, and its outputs are counted and dropped patch after patch. A failure stops the observation: a
calibration on fewer patches than asked for would be another one.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trtbuild_calibration.errors import CalibrationError
from trtbuild_calibration.histogram import Histogram, add
from trtbuild_calibration.network import MaximaPass, Network, OutputsPass, Patches, Target, check_targets, pack
from trtbuild_calibration.observation_state import State, damaged_state, new_state, read_state, write_state

BUDGET = 300 << 20
"""Bytes of outputs at a time: one forward pass of a 128³ network takes 1.5 to 1.9 GB by itself."""
INTERVAL = 10.0
"""Seconds between two writes of the state."""
THREADS = 2
"""That count; the result does not depend on it."""

Phase = Literal["maxima", "histograms"]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """After each forward pass.

    Attributes:
        phase: what this pass was for.
        done, total: forward passes, over both phases.
        seconds_left: estimated from the passes of this phase in this run.
    """

    phase: Phase
    done: int
    total: int
    seconds_left: float


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What was seen.

    Attributes:
        ranges: largest |x| of every tensor that the network reports.
        histograms: target -> |x| of its sources together.
        patches: how many were seen, which is all of them.
    """

    ranges: Mapping[str, float]
    histograms: Mapping[str, Histogram] = field(repr=False)
    patches: int


def observe(
    network: Network,
    targets: Sequence[Target],
    patches: Patches,
    *,
    budget_bytes: int = BUDGET,
    state: Path | None = None,
    fingerprint: Mapping[str, Any],
    progress: Callable[[Progress], None] = lambda _: None,
) -> Observation:
    """Runs all patches through the network.

    Args:
        network: opened once for the maxima and once for each group of outputs, one at a time.
        targets: at least one source each.
        patches: read one at a time, once for each pass.
        budget_bytes: of outputs of one pass; a tensor that is larger goes alone.
        state: file from which an interrupted observation goes on, to the bit. It stays when all is done, so that
            asking again costs nothing; who no longer needs it deletes it.
        fingerprint: plain JSON values that say what is observed; a state with other ones is an error.
        progress: called after each forward pass; what it raises ends the observation, which can be resumed.

    Raises:
        CalibrationError: nothing to observe, an unknown tensor, a value that is not finite, an output of another name
            or type, two passes that contradict each other, a damaged or foreign state. Errors of a patch name it.
    """
    sizes = network.sizes()
    if not len(patches):
        raise CalibrationError("There are no patches to observe.", hint="give at least one preprocessed case")
    check_targets(targets, sizes)
    groups = pack(targets, sizes, budget_bytes)
    job = _Job(
        targets=tuple(targets),
        patches=patches,
        groups=groups,
        path=state,
        fingerprint={
            "observation": dict(fingerprint),
            "targets": [[target.name, *target.sources] for target in targets],
            "patches": len(patches),
            "groups": [list(group) for group in groups],
        },
        progress=progress,
    )
    seen = _run_histograms(network, job, _run_maxima(network, job, _start(job)))
    tops = _tops(targets, seen.maxima)
    histograms = {
        target.name: Histogram(top=top, counts=counts)
        for target, top, counts in zip(targets, tops, seen.counts, strict=True)
    }
    return Observation(ranges=dict(seen.maxima), histograms=histograms, patches=len(patches))


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What stays the same from the first pass to the last."""

    targets: tuple[Target, ...]
    patches: Patches
    groups: tuple[tuple[str, ...], ...]
    path: Path | None
    fingerprint: Mapping[str, Any]
    progress: Callable[[Progress], None]

    @property
    def sources(self) -> set[str]:
        return {source for target in self.targets for source in target.sources}

    @property
    def total(self) -> int:
        return len(self.patches) * (1 + len(self.groups))

    def write(self, seen: State) -> None:
        if self.path is not None:
            write_state(self.path, seen, self.fingerprint)


def _start(job: _Job) -> State:
    """Where an interrupted observation stands, or nothing seen.

    Raises:
        CalibrationError: the state is damaged or foreign.
    """
    if job.path is None or not job.path.exists():
        return new_state(len(job.targets))
    seen = read_state(job.path, job.fingerprint, len(job.targets))
    if seen.passes > job.total or (seen.passes and not job.sources <= seen.maxima.keys()):
        raise damaged_state(job.path, f"{seen.passes} passes, {len(seen.maxima)} tensors")
    return seen


def _run_maxima(network: Network, job: _Job, seen: State) -> State:
    """The first pass, from the patch on where `seen` stands."""
    if seen.passes >= len(job.patches):
        return seen
    with network.maxima() as run:
        return _each(job, seen, "maxima", len(job.patches), partial(_with_maxima, run, job))


def _run_histograms(network: Network, job: _Job, seen: State) -> State:
    """The second pass, group after group, from where `seen` stands."""
    tops = _tops(job.targets, seen.maxima)
    for number, group in enumerate(job.groups):
        end = len(job.patches) * (2 + number)
        if seen.passes < end:
            with network.outputs(group) as run:
                seen = _each(job, seen, "histograms", end, partial(_with_counts, run, job, tops, group))
    return seen


def _each(job: _Job, seen: State, phase: Phase, end: int, step: Callable[[State], State]) -> State:
    """Steps through the patches that are left of one opened graph; the state is written now and then, and at the end.

    It is written as well when something stops the loop, Ctrl-C included: a step is either in `seen` whole, or not.
    """
    began = written = time.monotonic()
    first = seen.passes
    try:
        while seen.passes < end:
            seen = step(seen)
            now = time.monotonic()
            left = (now - began) / (seen.passes - first) * (job.total - seen.passes)
            job.progress(Progress(phase=phase, done=seen.passes, total=job.total, seconds_left=left))
            if now - written >= INTERVAL:
                job.write(seen)
                written = now
    finally:
        job.write(seen)
    return seen


def _with_maxima(run: MaximaPass, job: _Job, seen: State) -> State:
    index = seen.passes
    found = {name: float(value) for name, value in run(job.patches[index]).items()}
    for name, value in found.items():
        if not 0 <= value < math.inf:
            raise _bad(name, index, "A tensor is not finite.", "a finite largest |x|", value)
    differing = (found.keys() ^ seen.maxima.keys()) if seen.passes else (job.sources - found.keys())
    if differing:
        name = min(differing)
        raise _bad(name, index, "The network reports other tensors than it should.", "the same ones each time", name)
    maxima = {name: max(seen.maxima.get(name, 0.0), value) for name, value in found.items()}
    return State(passes=index + 1, maxima=maxima, counts=seen.counts)


def _with_counts(run: OutputsPass, job: _Job, tops: Sequence[float], group: Sequence[str], seen: State) -> State:
    index = seen.passes % len(job.patches)
    outputs = run(job.patches[index])
    counts = seen.counts.copy()
    for name in group:
        values = _output(outputs, name, index)
        for row, (target, top) in enumerate(zip(job.targets, tops, strict=True)):
            for _ in range(target.sources.count(name)):
                _add(values, top, counts[row], name, index)
    return State(passes=seen.passes + 1, maxima=seen.maxima, counts=counts)


def _output(outputs: Mapping[str, NDArray[Any]], name: str, index: int) -> NDArray[np.float32]:
    values = outputs.get(name)
    if values is None:
        raise _bad(name, index, "The network did not return a tensor.", name, ", ".join(outputs) or "nothing")
    if not isinstance(values, np.ndarray) or values.dtype != np.float32 or not values.size:
        got = f"{getattr(values, 'dtype', type(values).__name__)} {getattr(values, 'shape', '')}"
        raise _bad(name, index, "The network returned something else than activations.", "float32 values", got)
    return values


def _add(values: NDArray[np.float32], top: float, counts: NDArray[np.int64], name: str, index: int) -> None:
    try:
        add(values, top, counts, threads=THREADS)
    except CalibrationError as error:
        raise _bad(name, index, error.what, error.expected, error.got, error.hint) from error


def _tops(targets: Sequence[Target], maxima: Mapping[str, float]) -> list[float]:
    return [max(maxima[source] for source in target.sources) for target in targets]


def _bad(name: str, index: int, what: str, expected: object, got: object, hint: str | None = None) -> CalibrationError:
    return CalibrationError(what, expected=expected, got=got, where=f"tensor {name}, patch {index}", hint=hint)
