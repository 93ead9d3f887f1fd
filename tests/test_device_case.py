"""Whole cases on the fake GPU, with the kernels compiled for the host: the labels are those of the CPU path."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from device_samples import (
    EXAMPLES,
    MEMORY,
    REGIONS,
    SPLINE,
    Bench,
    Example,
    assert_same,
    check_unharmed,
    fake_gpu,
    opened_bench,
)
from fake_cuda import Cuda, LaunchError
from test_tiles import record

from trtbuild.errors import Cancelled, EngineError, NonFinite, OutOfMemory
from trtbuild.runtime import Settings
from trtbuild.runtime.gpu.case import NOT_LINEAR
from trtbuild.runtime.gpu.pace import PACE
from trtbuild.runtime.gpu.shared import engine_from_runner
from trtbuild.runtime.predictor import case_logits
from trtbuild.spec import Memory
from trtbuild.volume import Prepared

Opened = Callable[..., Bench]


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test."""
    with fake_gpu() as fake:
        yield fake
        check_unharmed(fake)


@pytest.fixture
def bench(cuda: Cuda) -> Iterator[Opened]:
    with ExitStack() as stack:
        yield lambda example, activations=0: stack.enter_context(opened_bench(cuda, example, activations))


@pytest.fixture
def small_grains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans differ by bytes, as those of real cases do by megabytes."""
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.SLAB_BYTES", 2000)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_case_has_the_labels_of_the_cpu_path(bench: Opened, name: str) -> None:
    one = bench(EXAMPLES[name])
    expected = one.on_cpu()
    assert_same(one.on_device(), expected)
    assert one.notes == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_plan_gives_the_same_labels(bench: Opened, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.SLAB_BYTES", 2000)
    one = bench(EXAMPLES[name])
    expected = one.on_cpu()
    plans = list(one.every_plan())
    assert {plan.labels for plan in plans} == {"whole", "slabs"}
    for plan in plans:
        assert_same(one.with_plan(plan), expected)


@pytest.mark.parametrize("name", ["3D", "2D", "transposed", "regions", "smaller than the patch", "folds"])
def test_probabilities_come_with_the_labels(bench: Opened, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.SLAB_BYTES", 3 * 4 * 26 * 23 * 3)  # three slices of most cases
    example = EXAMPLES[name]
    one = bench(replace(example, settings=replace(example.settings, probabilities=True)))
    expected = one.on_cpu()
    for plan in one.every_plan():
        assert_same(one.with_plan(plan), expected)


@pytest.mark.parametrize("accumulator", ["float32", "float16"])
@pytest.mark.parametrize("spec", [SPLINE, replace(SPLINE, labels=REGIONS)])
def test_a_way_back_that_is_not_linear_ends_on_the_host_and_says_so(bench: Opened, spec, accumulator) -> None:  # type: ignore[no-untyped-def]
    settings = Settings(accumulator=accumulator, probabilities=True)
    one = bench(Example(spec=spec, spacing=(1.4, 0.7, 1.2), axes=(0, 2), folds=2, settings=settings))
    found, expected = one.on_device(), one.on_cpu()
    np.testing.assert_array_equal(found.segmentation, expected.segmentation)
    np.testing.assert_array_equal(found.probabilities, expected.probabilities)  # of the very same logits
    assert one.notes == [NOT_LINEAR]


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_logits_are_those_of_the_cpu_bit_for_bit(bench: Opened, name: str) -> None:
    one = bench(EXAMPLES[name])
    found, expected = one.logits_on_device(), case_logits(one.prepared, one.member, one.settings, None)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
    assert one.notes == [], "they were asked for"


def test_logits_of_one_type_whatever_the_memory(bench: Opened, small_grains: None) -> None:
    one = bench(EXAMPLES["mirrored"])
    one.runners[0].out_of_memory = 1
    assert one.logits_on_device(limit=MEMORY).dtype == np.float32
    assert len(one.notes) == 1
    with pytest.raises(OutOfMemory):
        one.logits_on_device(limit=1000)


def test_cases_follow_one_another_on_one_gpu(bench: Opened) -> None:
    one = bench(EXAMPLES["mirrored"])
    expected = one.on_cpu()
    for _ in range(3):
        assert_same(one.on_device(), expected)


def test_mirror_flips_and_windows_fill_the_batch(bench: Opened) -> None:
    one = bench(EXAMPLES["2D, many slices in a call"])
    one.on_device()
    assert set(one.runners[0].batches[:-1]) == {8}, "4 flips of 2 slices"
    assert sum(one.runners[0].batches) == 19 * 4


def test_progress_counts_every_tile_once_and_ends(bench: Opened) -> None:
    one = bench(replace(EXAMPLES["mirrored"], batch=3, folds=2))
    seen: list[tuple[str, int, int]] = []
    one.on_device(lambda stage, done, total: seen.append((stage, done, total)))
    total = 2 * len(one.case.tiles)
    counts = [done for stage, done, _ in seen if stage == "network"]
    assert counts == sorted(set(counts))
    assert {of for stage, _, of in seen if stage == "network"} == {total}
    assert seen[-2:] == [("network", total, total), ("back", 1, 1)]
    assert max(np.diff([0, *counts])) <= PACE * 3


# --- faults


def idle(cuda: Cuda) -> bool:
    return not any(queue.work for queue in cuda.streams.values())


def given_back(one: Bench) -> bool:
    """Only what outlives a case is left."""
    return one.cuda.live == {} and len(one.cuda.pinned) == 1 and idle(one.cuda)


@pytest.mark.parametrize("stop_at", range(6))
@pytest.mark.parametrize("kind", [Cancelled, KeyboardInterrupt])
def test_a_case_that_is_stopped_leaves_nothing(bench: Opened, stop_at: int, kind: type[BaseException]) -> None:
    one = bench(replace(EXAMPLES["mirrored"], batch=2, folds=2))
    calls = 0

    def progress(stage: str, done: int, total: int) -> bool:
        nonlocal calls
        calls += 1
        if calls > stop_at and kind is KeyboardInterrupt:
            raise KeyboardInterrupt
        return calls <= stop_at

    with pytest.raises(kind):
        one.on_device(progress)
    assert calls == stop_at + 1
    assert given_back(one)
    assert_same(one.on_device(), one.on_cpu())


@pytest.mark.parametrize("fail_at", [0, 1, 7, 30])
def test_an_engine_that_fails_in_the_middle(bench: Opened, fail_at: int) -> None:
    one = bench(replace(EXAMPLES["mirrored"], batch=3, folds=2))
    one.runners[1].fail_at = fail_at
    with pytest.raises(EngineError, match="as the test wants it"):
        one.on_device()
    assert given_back(one)
    assert one.notes == [], "only a lack of memory begins a case again"


@pytest.mark.parametrize("at", [1, 3])
def test_a_gpu_that_fails_in_the_middle(bench: Opened, cuda: Cuda, at: int) -> None:
    one = bench(EXAMPLES["mirrored"])
    calls = 0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            cuda.fail_next = LaunchError("an illegal memory access was encountered")

    with pytest.raises(EngineError, match="illegal memory access"):
        one.on_device(progress)
    assert given_back(one)


@pytest.mark.parametrize("accumulator", ["float32", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_network_that_returns_nan_is_named_with_its_window(bench: Opened, accumulator, value: float) -> None:  # type: ignore[no-untyped-def]
    one = bench(Example(axes=(0, 2), folds=2, batch=6, settings=Settings(accumulator=accumulator)))
    one.runners[1].bad_at, one.runners[1].bad_value = 4, value
    with pytest.raises(NonFinite) as caught:
        one.on_device()
    last = [group.first + group.size - 1 for row in one.plans(accumulator)[0].groups for group in row][4]
    bad = list(one.case.tiles)[last]
    axes = ", ".join(axis for axis, flip in zip("zyx", bad.flip, strict=True) if flip)
    where = f"window at {bad.start} (z, y, x of the padded grid), mirrored along {axes or 'no axis'}"
    assert where in str(caught.value)
    assert given_back(one)


def test_the_window_of_a_nan_is_the_one_that_the_cpu_names(bench: Opened) -> None:
    one = bench(Example(axes=(1,), folds=3, batch=4))
    for number, runner in enumerate(one.runners):
        runner.poison = np.inf if number == 0 else float(np.partition(one.prepared.data.ravel(), -3)[-3])
    messages = []
    for run in (one.on_cpu, one.on_device):
        with pytest.raises(NonFinite) as caught:
            run()
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_logit_beyond_float16_stops_a_float16_sum(bench: Opened) -> None:
    one = bench(Example(settings=Settings(accumulator="float16")))
    one.runners[0].bad_at, one.runners[0].bad_value = 2, 1e30
    with pytest.raises(NonFinite, match="float16"):
        one.on_device()


def test_a_case_with_nan_is_refused_before_it_goes_to_the_gpu(bench: Opened) -> None:
    one = bench(EXAMPLES["3D"])
    data = one.prepared.data.copy()
    data[0, 3, 4, 5] = np.nan
    with pytest.raises(NonFinite, match="prepared case"):
        replace(one, prepared=Prepared(data=data, grid=one.prepared.grid)).on_device()
    assert given_back(one)


def test_folds_that_do_not_fit_each_other_are_refused(bench: Opened) -> None:
    one = bench(replace(EXAMPLES["folds"], batch=4))
    one.runners[0].largest, one.runners[1].smallest = 2, 3
    with pytest.raises(EngineError, match="do not fit each other"):
        one.on_device()


def test_an_engine_with_other_numbers_is_refused(bench: Opened) -> None:
    one = bench(EXAMPLES["3D"])
    info = one.runners[0].describe()
    one.runners[0]._info = replace(info, outputs=replace(info.outputs, dtype="int8"))
    with pytest.raises(EngineError, match="do not know the type") as caught:
        one.on_device()
    assert caught.value.got == "int8"


def test_an_engine_is_what_its_record_says(bench: Opened) -> None:
    one = bench(EXAMPLES["3D"])
    memory = Memory(host=None, device_per_batch={"4": 1000, "1": 300}, measured=False)
    engine = engine_from_runner(one.runners[0], replace(record(one.member.spec, batch=4), memory=memory))
    assert (engine.smallest, engine.largest, engine.activations) == (1, 4, 1000)
    assert engine.kinds == ("f32", "f32")


# --- memory


ALLOCATIONS = 6
"""Of a case: image, tables, patches, logits, accumulator, labels."""


@pytest.mark.parametrize("at", range(ALLOCATIONS))
def test_memory_that_is_short_once_costs_a_second_run_and_is_told(
    bench: Opened, cuda: Cuda, small_grains: None, at: int
) -> None:
    one = bench(EXAMPLES["mirrored"])
    expected = one.on_cpu()
    cuda.allocations_left, cuda.recovers = at, True
    assert_same(one.on_device(), expected)
    assert len(one.notes) == 1
    assert "begins again" in one.notes[0]


@pytest.mark.parametrize("at", range(ALLOCATIONS))
def test_memory_that_stays_short_is_an_error_and_leaves_nothing(
    bench: Opened, cuda: Cuda, small_grains: None, at: int
) -> None:
    one = bench(EXAMPLES["mirrored"])
    cuda.allocations_left = at
    with pytest.raises(OutOfMemory) as caught:
        one.on_device()
    assert caught.value.hint
    assert len(one.notes) >= 1
    assert given_back(one)
    cuda.allocations_left = None
    assert_same(one.on_device(), one.on_cpu())


def test_there_are_no_more_allocations(bench: Opened, cuda: Cuda) -> None:
    one = bench(EXAMPLES["mirrored"])
    cuda.allocations_left = ALLOCATIONS
    one.on_device()
    assert one.notes == []


def test_a_gpu_without_memory_cannot_be_opened(cuda: Cuda) -> None:
    cuda.allocations_left = 0
    with pytest.raises(OutOfMemory), opened_bench(cuda, EXAMPLES["3D"]):
        pass


def test_an_engine_that_finds_no_memory_gets_more_of_it(bench: Opened, small_grains: None) -> None:
    one = bench(EXAMPLES["folds"])
    expected = one.on_cpu()
    one.runners[2].out_of_memory = 2
    assert_same(one.on_device(), expected)
    assert len(one.notes) == 2
