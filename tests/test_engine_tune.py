"""The choice of settings, with engines whose speed is made up and a clock that only they move."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from runner_samples import make_record

from trtbuild.engine.onnxruntime import onnxruntime_candidates
from trtbuild.engine.openvino import openvino_candidates
from trtbuild.engine.tune import ROUNDS, Tuning, fastest
from trtbuild.errors import EngineError, OutOfMemory
from trtbuild.runtime.null import NullRunner, null_info
from trtbuild.runtime.runner import Batch, RunnerInfo
from trtbuild.spec import BuildRecord

MEBIBYTE = 2**20


@dataclass
class Bench:
    """Seconds per patch by (streams, batch); a list is used up run by run. Counts what is open."""

    speeds: dict[tuple[int, int], Any]
    now: float = 0.0
    open_now: int = 0
    most_open: int = 0
    opened: list[tuple[int, int]] = field(default_factory=list)

    def clock(self) -> float:
        return self.now

    def open(self, record: BuildRecord) -> NullRunner:
        key = (int(record.options["streams"]), int(record.options["batch"]))
        if isinstance(self.speeds[key], EngineError):
            raise self.speeds[key]
        self.opened.append(key)
        self.open_now += 1
        self.most_open = max(self.most_open, self.open_now)
        return _Timed(null_info(record), self, key)

    def tune(self, *keys: tuple[int, int], **limits: Any) -> Tuning:
        records = [make_record("null", streams=streams, batch=batch, threads=8) for streams, batch in keys]
        return fastest(records, self.open, clock=self.clock, **limits)


class _Timed(NullRunner):
    def __init__(self, info: RunnerInfo, bench: Bench, key: tuple[int, int]) -> None:
        super().__init__(info)
        self.bench, self.key = bench, key

    def answer(self, batch: Batch) -> Batch:
        speed = self.bench.speeds[self.key]
        each = speed.pop(0) if isinstance(speed, list) else speed
        if isinstance(each, Exception):
            raise each
        self.bench.now += each * len(batch)
        return super().answer(batch)

    def close(self) -> None:
        self.bench.open_now -= 1
        super().close()


@pytest.fixture(autouse=True)
def _eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtbuild.runtime.fit.usable_cpus", lambda: 8)


def chosen(tuning: Tuning) -> tuple[Any, Any]:
    return tuning.record.options["streams"], tuning.record.options["batch"]


@pytest.mark.parametrize(
    ("other", "winner"), [(0.2, (1, 1)), (0.1, (1, 1)), (0.0971, (1, 1)), (0.0969, (2, 1)), (0.05, (2, 1))]
)
def test_the_simplest_stays_unless_another_is_three_percent_faster(other: float, winner: tuple[int, int]) -> None:
    bench = Bench({(1, 1): 0.1, (2, 1): other})
    assert chosen(bench.tune((1, 1), (2, 1))) == winner
    assert bench.open_now == 0


def test_challengers_meet_the_best_so_far_and_two_engines_are_open_at_most() -> None:
    bench = Bench({(1, 1): 0.1, (2, 1): 0.08, (4, 1): 0.079, (8, 1): 0.06, (1, 2): 0.07})
    tuning = bench.tune((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), seconds=100)
    assert chosen(tuning) == (8, 1)
    assert [round(trial.speed or 0, 3) for trial in tuning.trials] == [1.25, 1.013, 1.333, 0.857]
    assert (bench.most_open, bench.open_now) == (2, 0)
    assert len(bench.opened) == 5


def test_one_slow_spell_does_not_decide() -> None:
    slow_first = [0.1, 0.1, 0.9] + [0.1] * 1000
    bench = Bench({(1, 1): slow_first, (2, 1): 0.099})
    assert chosen(bench.tune((1, 1), (2, 1), seconds=20)) == (1, 1)


@pytest.mark.parametrize("each", [0.0001, 0.01, 0.2, 0.5])
def test_the_time_limit_holds(each: float) -> None:
    bench = Bench(dict.fromkeys([(1, 1), (2, 1), (4, 1), (1, 2)], each))
    tuning = bench.tune((1, 1), (2, 1), (4, 1), (1, 2), seconds=4.0)
    assert bench.now < 4.0 + 2.0  # the simplest settings' own first run, and one started measurement, come on top
    assert tuning.trials[0].speed == pytest.approx(1)
    assert (tuning.trials[1].skipped is None) is (each < 0.2)


def test_a_network_too_slow_to_measure_keeps_the_simplest_settings_and_says_so() -> None:
    bench = Bench({(1, 1): 3.0, (2, 1): 0.1})
    tuning = bench.tune((1, 1), (2, 1), seconds=4.0)
    assert chosen(tuning) == (1, 1)
    assert bench.opened == [(1, 1)]
    assert tuning.trials[0].speed is None
    assert "would take" in tuning.text()
    assert "streams 2, batch 1" in tuning.text()


def test_settings_that_may_not_fit_into_memory_are_not_tried() -> None:
    bench = Bench({(1, 1): 0.1, (2, 1): 0.05, (8, 1): 0.01})
    tuning = bench.tune((1, 1), (2, 1), (8, 1), memory=(100 * MEBIBYTE, 1000 * MEBIBYTE))
    assert chosen(tuning) == (2, 1)
    assert (8, 1) not in bench.opened
    assert "bytes" in str(tuning.trials[1].skipped)


def test_settings_that_the_backend_refuses_are_passed_over_with_the_reason() -> None:
    bench = Bench({(1, 1): 0.1, (1, 2): EngineError("The graph holds batch 1."), (2, 1): 0.05})
    tuning = bench.tune((1, 1), (1, 2), (2, 1))
    assert chosen(tuning) == (2, 1)
    assert "streams 1, batch 2: The graph holds batch 1." in tuning.text()


def test_a_challenger_that_fails_in_its_first_run_is_closed_and_passed_over() -> None:
    bench = Bench({(1, 1): 0.01, (8, 1): [OutOfMemory("No memory.")], (2, 1): 0.005})
    tuning = bench.tune((1, 1), (8, 1), (2, 1))
    assert chosen(tuning) == (2, 1)
    assert tuning.trials[0].skipped == "No memory."
    assert bench.open_now == 0


@pytest.mark.parametrize("when", [1, 3])
def test_an_engine_that_breaks_later_is_an_error_and_all_are_closed(when: int) -> None:
    bench = Bench({(1, 1): 0.1, (2, 1): [*[0.1] * 2 * when, OSError("gone")]})
    with pytest.raises(OSError, match="gone"):
        bench.tune((1, 1), (2, 1), seconds=20)
    assert bench.open_now == 0


def test_with_one_candidate_there_is_nothing_to_choose() -> None:
    tuning = Bench({(1, 1): 0.1}).tune((1, 1))
    assert chosen(tuning) == (1, 1)
    assert tuning.text() == "nothing to choose from"
    assert ROUNDS[0] >= 2


@pytest.mark.parametrize(
    ("threads", "streams"), [(1, [1]), (2, [1, 2]), (3, [1, 3]), (4, [1, 2, 4]), (6, [1, 2, 6]), (16, [1, 2, 4, 8, 16])]
)
def test_openvino_candidates_share_the_threads_evenly_and_start_with_the_simplest(
    threads: int, streams: list[int]
) -> None:
    candidates = openvino_candidates(threads)
    assert candidates[0] == {"threads": threads, "streams": 1, "batch": 1}
    assert [c["streams"] for c in candidates if c["batch"] == 1] == streams
    assert [c for c in candidates if c["batch"] != 1] == [{"threads": threads, "streams": 1, "batch": 2}]


def test_onnxruntime_candidates_are_one_call_at_a_time() -> None:
    assert [(c["threads"], c["streams"], c["batch"]) for c in onnxruntime_candidates(4)] == [(4, 1, 1), (4, 1, 2)]
