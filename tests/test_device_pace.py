"""The host behind the device: it waits for what it needs, and the device has work meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from device_samples import EXAMPLES, Bench, assert_same, check_unharmed, fake_gpu, opened_bench
from fake_cuda import Cuda, LaunchError
from test_device_mutants import check_labels, check_logits, check_nan, check_stop, mutated

from trtbuild.errors import Cancelled, EngineError, NonFinite
from trtbuild.runtime.device import Device, opened_device
from trtbuild.runtime.gpu.pace import PACE

LONG = replace(EXAMPLES["folds"], shape=(1, 19, 40, 23), batch=2)
"""Rows of more calls than two marks are apart."""


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test."""
    with fake_gpu() as fake:
        yield fake
        check_unharmed(fake)


@pytest.fixture
def device(cuda: Cuda) -> Iterator[Device]:
    with opened_device() as opened:
        yield opened


# --- events


def test_an_event_is_reached_when_the_work_before_it_is_done(device: Device) -> None:
    stream, event, buffer, target = device.stream(), device.event(), device.buffer(8), device.pinned((2,))
    event.wait()  # of nothing
    target.array[...] = 5
    stream.zero(buffer, 8)
    stream.copy_out(target.array[:1], buffer)
    stream.mark(event)
    stream.copy_out(target.array[1:], buffer, 4)
    event.wait()
    assert target.array.tolist() == [0, 5], "what is behind it goes on"
    stream.mark(event)
    event.wait()
    assert target.array.tolist() == [0, 0], "it was put behind all of it"
    event.close()
    event.close()
    for use in (event.wait, lambda: stream.mark(event)):
        with pytest.raises(EngineError, match="given back"):
            use()


def test_a_failure_of_the_work_is_told_at_the_event(device: Device, cuda: Cuda) -> None:
    stream, event = device.stream(), device.event()
    stream.mark(event)
    cuda.fail_next = LaunchError("an illegal memory access was encountered")
    with pytest.raises(EngineError, match="illegal memory access"):
        event.wait()


# --- rows


def works_left(bench: Bench, patch: pytest.MonkeyPatch) -> list[int]:
    """What the device still has to do when the host has waited for a mark, and reports."""
    left, queue = list[int](), bench.cuda.streams[bench.gpu.stream.handle]
    patch.setattr("trtbuild.runtime.gpu.pace.tell", lambda *_: left.append(len(queue.work)))
    return left


@pytest.mark.parametrize("name", ["3D", "2D", "mirrored", "long"])
def test_the_device_has_work_when_the_host_comes_back(cuda: Cuda, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened_bench(cuda, LONG if name == "long" else EXAMPLES[name]) as bench:
        left = works_left(bench, monkeypatch)
        bench.on_device()
        assert len(left) >= len(bench.plans()[0].rows)
        assert all(left[:-1])
        assert left[-1] == 0


def test_the_host_is_never_further_ahead_than_two_marks(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a case that is stopped ends soon."""
    with opened_bench(cuda, LONG) as bench:
        assert len(bench.plans()[0].groups[0]) * len(bench.engines) > 2 * PACE
        begun: list[int] = []
        monkeypatch.setattr("trtbuild.runtime.gpu.pace.tell", lambda *_: begun.append(calls_of(bench)))
        bench.on_device()
        assert PACE + 1 < begun[0] <= 2 * PACE + 1, "the first mark is waited for when the second is there"


def calls_of(bench: Bench) -> int:
    return sum(len(runner.batches) for runner in bench.runners)


@pytest.mark.parametrize("stop_at", [0, 1, 3])
def test_a_case_that_is_stopped_in_a_row_leaves_nothing(cuda: Cuda, stop_at: int) -> None:
    with opened_bench(cuda, LONG) as bench:
        check_stopped(bench, stop_at)
        assert_same(bench.on_device(), bench.on_cpu())


def check_stopped(bench: Bench, stop_at: int) -> None:
    seen, events = list[int](), bench.cuda.events

    def progress(stage: str, done: int, total: int) -> bool:
        seen.append(done)
        return len(seen) <= stop_at

    with pytest.raises(Cancelled):
        bench.on_device(progress)
    assert bench.cuda.live == {}
    assert bench.cuda.events == events
    assert not bench.cuda.streams[bench.gpu.stream.handle].work


@pytest.mark.parametrize("at", [0, 30, 47])
def test_what_is_not_finite_stops_the_case_at_its_row(cuda: Cuda, at: int) -> None:
    with opened_bench(cuda, LONG) as bench:
        check_bad_call(bench, at)
        assert_same(bench.on_device(), bench.on_cpu())  # the next case is told nothing of it


def check_bad_call(bench: Bench, at: int) -> None:
    bench.runners[0].bad_at = at
    with pytest.raises(NonFinite, match="window at"):
        bench.on_device()
    rows = [len(row) for row in bench.plans()[0].groups]
    begun = next(sum(rows[: n + 1]) for n in range(len(rows)) if sum(rows[: n + 1]) > at)
    assert len(bench.runners[0].batches) == min(begun + 1, sum(rows)), "its row, and the first call of the next"


# --- mistakes


MUTANTS = {
    "a row that is not waited for": ("rows", "pace.wait(left=0 if last else 1)", "pace.wait(left=1)"),
    "the status before the sums": ("rows", "last = call is calls[-1]", "last = call is calls[0]"),
    "the status of nothing": ("rows", "run.gpu.stream.copy_out(_status(run), ", "str("),
    "the same tiles again": ("rows", "_begin(run, behind)", "_begin(run, call)"),
    "a mark that is not waited for": ("pace", "            event.wait()\n", ""),
    "a mark before the work": ("pace", "self._gpu.stream.mark(self._marked[-1][0])", "str()"),
    "events left to the garbage collector": ("pace", "self._events.pop().close()", "self._events.pop()._device.forget"),
    "nobody is told": ("pace", 'tell(self._progress, "network", done, self._total)', "str()"),
    "a wait for everything": ("pace", "event.wait()", "self._gpu.stream.synchronize()"),
}  # fmt: skip
"""What is wrong, in which module of the device path, and what is replaced by what."""


def battery() -> None:
    """Raises where anything is wrong."""
    for name in ("folds", "mirrored, several windows in a call", "2D, many slices in a call"):
        check_labels(name)
    check_logits(LONG)
    check_nan()
    check_stop()
    with fake_gpu() as cuda:
        with opened_bench(cuda, LONG) as bench, pytest.MonkeyPatch.context() as patch:
            check_bad_call(bench, 30)
            check_stopped(bench, 1)
            left = works_left(bench, patch)
            bench.runners[0].bad_at = None
            bench.on_device()
            assert all(left[:-1])
            assert len(left) > len(bench.plans()[0].rows)
        check_unharmed(cuda)


def test_without_a_mistake_nothing_is_noticed() -> None:
    battery()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_is_noticed(name: str) -> None:
    with mutated(*MUTANTS[name]), pytest.raises((Exception, pytest.fail.Exception)):
        battery()
