"""Chooses the settings of an engine by a short measurement: the simplest ones unless others are clearly faster.

Knows runners only by their protocol, and the time by the clock it is given.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import EngineError
from trtbuild.spec import BuildRecord

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner

Options = Mapping[str, str | int | float | bool]
"""A backend's own settings, as they stand in a BuildRecord."""

# A challenger must be 3 % faster per patch: on a quiet two-core machine all sensible settings of a 64³ PlainConvUNet
# lay within 3 % of each other, and the simplest takes the least memory.
GAIN = 0.03
# All challengers together. A patch of nnU-Net's default size takes seconds on a few cores, and then is not measured.
SECONDS = 6.0
# One measurement: about so many seconds, that the start and the end of a stream weigh little. And how many of them.
RUN = 0.25
ROUNDS = (2, 5)


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One challenger beside the best so far: how many times as fast per patch, or why it was not measured."""

    options: Options
    speed: float | None
    skipped: str | None

    def text(self) -> str:
        settings = ", ".join(f"{key} {self.options[key]}" for key in ("streams", "batch"))
        return f"{settings}: {self.skipped if self.speed is None else f'{self.speed:.2f}x'}"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """The chosen record, and every trial in order."""

    record: BuildRecord
    trials: tuple[Trial, ...]

    def text(self) -> str:
        """One line for people: what was tried, and how fast it was beside the best before it."""
        return "; ".join(trial.text() for trial in self.trials) or "nothing to choose from"


def fastest(
    records: Sequence[BuildRecord],
    open_engine: Callable[[BuildRecord], Runner],
    *,
    seconds: float = SECONDS,
    memory: tuple[int, int] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Tuning:
    """The record whose settings take the least time per patch.

    Args:
        records: the simplest settings first; it stays unless another is more than `GAIN` faster.
        open_engine: opens a record.
        seconds: time for all challengers. One for which two rounds do not fit into what is left is not tried.
        memory: (bytes that the first record needs, bytes that are free). A challenger whose patches in flight would
            take more than half of what is free is not tried.
        clock: monotonic seconds.

    Two engines are open at once, the best so far and its challenger, and take turns, so that a slow spell of the
    machine hits both.
    """
    best, trials = records[0], list[Trial]()
    runner = open_engine(best)
    try:
        each = _seconds_per_patch(runner, clock)
        end = clock() + seconds
        for number, record in enumerate(records[1:], start=1):
            left = end - clock()
            reason = _too_large(record, records[0], memory) or _too_slow(record, best, each, left)
            other = reason or _started(open_engine, record, clock)
            if isinstance(other, str):
                trials.append(Trial(options=record.options, speed=None, skipped=other))
                continue
            with ExitStack() as loser:
                loser.callback(other.close)
                ours, theirs = _duel(runner, other, left / (len(records) - number), clock)
                trials.append(Trial(options=record.options, speed=ours / theirs, skipped=None))
                if theirs < (1 - GAIN) * ours:
                    loser.pop_all()
                    loser.callback(runner.close)
                    best, runner, each = record, other, theirs
    finally:
        runner.close()
    return Tuning(record=best, trials=tuple(trials))


def _started(
    open_engine: Callable[[BuildRecord], Runner], record: BuildRecord, clock: Callable[[], float]
) -> Runner | str:
    """The challenger after its first run, or why it cannot: too little memory, or a graph that holds batch 1."""
    with ExitStack() as stack:
        try:
            runner = open_engine(record)
            stack.callback(runner.close)
            _seconds_per_patch(runner, clock)
        except EngineError as error:
            return " ".join(str(error).split())
        stack.pop_all()
        return runner


def _duel(runner: Runner, other: Runner, share: float, clock: Callable[[], float]) -> tuple[float, float]:
    """Both in turn until `share` seconds are over: the least seconds per patch of each."""
    start = clock()
    ours, theirs = [_seconds_per_patch(runner, clock)], [_seconds_per_patch(other, clock)]
    while len(ours) < ROUNDS[0] or (len(ours) < ROUNDS[1] and clock() - start < share):
        ours.append(_seconds_per_patch(runner, clock, min(ours)))
        theirs.append(_seconds_per_patch(other, clock, min(theirs)))
    return min(ours), min(theirs)


def _seconds_per_patch(runner: Runner, clock: Callable[[], float], expected: float = RUN) -> float:
    """Time per patch of a stream that goes round all lanes as often as fits into `RUN`, at least once."""
    info = runner.describe()
    in_flight = info.parallel * info.batch
    rounds = max(1, int(RUN / max(expected * in_flight, RUN / 100)))
    batches = [noise(info.batch, info.inputs.shape)] * (info.parallel * rounds)
    start = clock()
    for _ in runner.stream(batches):
        pass
    return (clock() - start) / (in_flight * rounds)


def noise(batch: int, shape: tuple[int | str, ...]) -> NDArray[np.float32]:
    """A batch like normalised intensities: standard normal, always the same."""
    return np.random.default_rng(0).standard_normal((batch, *map(int, shape[1:])), dtype=np.float32)


def _in_flight(record: BuildRecord) -> int:
    return int(record.options["streams"]) * int(record.options["batch"])


def _too_large(record: BuildRecord, first: BuildRecord, memory: tuple[int, int] | None) -> str | None:
    if memory is None:
        return None
    needs = memory[0] * _in_flight(record) // _in_flight(first)
    return f"may need {needs} bytes of {memory[1]} free" if needs > memory[1] // 2 else None


def _too_slow(record: BuildRecord, best: BuildRecord, each: float, left: float) -> str | None:
    """Two rounds of both, and the challenger's first run, at the speed of the best so far."""
    needs = each * (ROUNDS[0] * _in_flight(best) + (ROUNDS[0] + 1) * _in_flight(record))
    return f"would take {needs:.1f} s, {left:.1f} s are left" if needs > left else None
