"""The memory planner: it counts what is allocated, and what it chooses fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from device_samples import EXAMPLES, FLAT, PLAIN, SPLINE, Example, assert_same, check_unharmed, fake_gpu, opened_bench
from fake_cuda import Cuda
from hypothesis import given
from hypothesis import strategies as st

from trtbuild.errors import OutOfMemory
from trtbuild.runtime import Settings, tile_plan
from trtbuild.runtime.gpu.attempts import IN_HALF
from trtbuild.runtime.gpu.plan import GRAIN, fitting_plan, joined_rows
from trtbuild.runtime.gpu.tables import Group, groups_of_row, tables_of_case, windows_of_group
from trtbuild.runtime.slabs import Row, rows_of_plan


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test."""
    with fake_gpu() as fake:
        yield fake
        check_unharmed(fake)


@pytest.fixture
def small_grains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans differ by bytes, as those of real cases do by megabytes."""
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.SLAB_BYTES", 2000)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.parametrize("probabilities", [False, True])
def test_what_is_counted_is_what_is_allocated(cuda: Cuda, name: str, probabilities: bool) -> None:
    example = EXAMPLES[name]
    settings = replace(example.settings, probabilities=probabilities)
    with opened_bench(cuda, replace(example, settings=settings)) as one:
        plans = list(one.every_plan())
        for plan in (plans[0], plans[-1]):
            cuda.peak = 0
            one.with_plan(plan)
            assert cuda.peak == sum(plan.buffers.values())
            assert plan.nbytes % GRAIN == 0
            assert 0 <= plan.nbytes - cuda.peak < GRAIN * len(plan.buffers)


def test_plans_shrink_and_keep_what_is_best_for_longest(cuda: Cuda, small_grains: None) -> None:
    with opened_bench(cuda, replace(EXAMPLES["mirrored"], batch=16)) as one:
        plans = one.plans("float32", "float16")
        assert [plan.nbytes for plan in plans] == sorted({plan.nbytes for plan in plans}, reverse=True)
        assert (plans[0].batch, plans[0].labels, plans[0].accumulator) == (16, "whole", "float32")
        assert (plans[-1].batch, plans[-1].labels, plans[-1].accumulator) == (1, "slabs", "float16")
        halves = [plan.accumulator == "float16" for plan in plans]
        assert halves == sorted(halves), "a smaller batch before a sum with fewer bits"


def test_a_gpu_that_just_holds_a_plan_runs_it(cuda: Cuda, small_grains: None) -> None:
    with opened_bench(cuda, EXAMPLES["mirrored"]) as one:
        expected = one.on_cpu()
        for plan in one.plans():
            cuda.memory, cuda.peak = plan.nbytes, 0
            assert_same(one.on_device(), expected)
            assert cuda.peak == plan.nbytes
        assert one.notes == []


def test_where_nothing_fits_it_says_what_would(cuda: Cuda, small_grains: None) -> None:
    with opened_bench(cuda, EXAMPLES["mirrored"]) as one:
        cuda.memory = one.plans()[-1].nbytes - 1
        with pytest.raises(OutOfMemory) as caught:
            one.on_device()
        assert "for the smallest plan (batch 1, float32 accumulator, labels slab by slab" in str(caught.value)
        assert levers(caught.value) == (True, True, False)
        with pytest.raises(OutOfMemory) as caught:
            one.on_device(limit=100)
        assert levers(caught.value) == (False, False, True), "the limit is what is short"
        cuda.memory = 1000
        with pytest.raises(OutOfMemory) as caught:
            one.on_device(limit=1 << 20)
        assert levers(caught.value) == (False, True, False), "a limit is named already, and not reached"
        assert cuda.live == {}


def test_logits_of_members_are_not_promised_float16(cuda: Cuda, small_grains: None) -> None:
    with opened_bench(cuda, EXAMPLES["mirrored"]) as one:
        for memory, limit, expected in ((1000, None, (False, True, False)), (1 << 20, 1000, (False, False, True))):
            cuda.memory = memory
            with pytest.raises(OutOfMemory) as caught:
                one.logits_on_device(limit=limit)
            assert levers(caught.value) == expected


def levers(error: OutOfMemory) -> tuple[bool, bool, bool]:
    """Whether the message names float16, other programs, and the limit that there is."""
    text = str(error)
    assert "--max-memory" not in text, "that is the host's"
    half = "allow a float16 accumulator by naming the limit yourself with --max-device-memory"
    return half in text, "close other programs" in text, "raise --max-device-memory" in text


def test_float16_only_where_the_user_named_a_limit(cuda: Cuda, small_grains: None) -> None:
    with opened_bench(cuda, EXAMPLES["mirrored"]) as one:
        least = one.plans()[-1].nbytes
        assert_same(one.on_device(limit=least), one.on_cpu())
        assert one.notes == []
        half = replace(one, settings=Settings(accumulator="float16"), notes=[])
        assert_same(one.on_device(limit=least - 1), half.on_cpu())
        assert one.notes == [IN_HALF]
        half.on_device(limit=least - 1)
        assert half.notes == [], "it was asked for"
        cuda.memory = least - 1
        with pytest.raises(OutOfMemory):
            one.on_device()


def test_float16_that_comes_with_a_new_beginning_is_told_too(cuda: Cuda, small_grains: None) -> None:
    with opened_bench(cuda, EXAMPLES["mirrored"]) as one:
        one.runners[0].out_of_memory = 1
        half = replace(one, settings=Settings(accumulator="float16"))
        assert_same(one.on_device(limit=one.plans()[-1].nbytes), half.on_cpu())
        assert len(one.notes) == 2
        assert "begins again" in one.notes[0]
        assert one.notes[1] == IN_HALF


def test_a_limit_is_kept(cuda: Cuda, small_grains: None) -> None:
    with opened_bench(cuda, EXAMPLES["mirrored"]) as one:
        for plan in one.plans("float32", "float16"):
            cuda.peak = 0
            one.on_device(limit=plan.nbytes)
            assert cuda.peak == plan.nbytes


def test_activations_are_counted_until_the_engines_have_them(cuda: Cuda, small_grains: None) -> None:
    with opened_bench(cuda, EXAMPLES["folds"], activations=1000) as one:
        best, second = one.plans()[:2]
        cuda.memory = best.nbytes + 3 * 1000 - 1
        for expected in (second, best):  # the second case finds the engines warm
            cuda.peak = 0
            one.on_device()
            assert cuda.peak == expected.nbytes


def test_activations_count_against_a_limit_whenever_they_were_taken(cuda: Cuda, small_grains: None) -> None:
    """Whether a case is summed in float16 must not depend on which case was the first."""
    with opened_bench(cuda, EXAMPLES["folds"], activations=1000) as one:
        one.gpu.contexts.reserve(500)
        least = one.plans()[-1].nbytes
        for _ in range(2):
            one.notes.clear()
            one.on_device(limit=least + 3500)
            assert one.notes == []
            one.on_device(limit=least + 3499)
            assert one.notes == [IN_HALF]


def test_what_is_left_after_a_plan_that_fits_is_smaller(cuda: Cuda, small_grains: None) -> None:
    with opened_bench(cuda, EXAMPLES["mirrored"]) as one:
        plans = one.plans()
        left = iter(plans)
        assert fitting_plan(left, plans[1].nbytes, 0) is plans[1]
        assert tuple(left) == plans[2:]


def test_the_sum_does_not_grow_with_the_image(cuda: Cuda) -> None:
    sizes = set()
    for length in (30, 300):
        with opened_bench(cuda, Example(shape=(1, length, 12, 10), spacing=(0.5, 1.0, 1.0))) as one:
            plan = one.plans()[0]
            sizes.add((plan.buffers["accumulator"], plan.buffers["patches"], plan.buffers["logits"]))
    assert len(sizes) == 1


def test_logits_that_leave_at_once_keep_one_row(cuda: Cuda) -> None:
    with opened_bench(cuda, Example(spec=SPLINE, shape=(1, 60, 12, 10), spacing=(0.7, 1.0, 1.0))) as one:
        assert one.plans()[0].depth == PLAIN.patch[0]


# --- calls and tables


@given(
    windows=st.integers(1, 30), flips=st.sampled_from([1, 2, 4, 8]), largest=st.integers(1, 20), data=st.data(),
    before=st.integers(0, 5), at=st.integers(0, 50),
)  # fmt: skip
def test_calls_hold_every_tile_once_in_order(
    windows: int, flips: int, largest: int, data: st.DataObject, before: int, at: int
) -> None:
    smallest = data.draw(st.integers(1, largest))
    row = Row(start=0, stop=1, tiles=windows * flips, final=1, keep=1)
    groups = groups_of_row(row, before * flips, at, flips, smallest, largest)
    tiles = [tile for group in groups for tile in range(group.first, group.first + group.size)]
    assert tiles == list(range(before * flips, (before + windows) * flips))
    assert all(smallest <= group.batch <= largest for group in groups)
    assert all(group.batch == max(group.size, smallest) for group in groups)
    assert [group.at for group in groups] == list(at + np.cumsum([0, *(group.batch for group in groups)])[:-1])
    for group in groups:
        parts = list(windows_of_group(group, flips))
        assert sum(count for _, count in parts) == group.size
        assert all(first // flips == (first + count - 1) // flips for first, count in parts), "one window per blend"
        if largest >= flips:
            assert all(count == flips for _, count in parts), "all flips of a window in one blend"


def test_slices_of_a_2d_model_fill_a_call_and_rows_that_overlap_do_not() -> None:
    plan = tile_plan((10, 8, 12), FLAT, (0,), 0.5)
    rows = rows_of_plan(plan, 1, lambda final: final)
    joined = joined_rows(rows, 6)
    assert [(row.start, row.stop, row.tiles, row.final, row.keep) for row in joined] == [
        (0, 3, 6, 3, 3), (3, 6, 6, 6, 6), (6, 9, 6, 9, 9), (9, 10, 2, 10, 10),
    ]  # fmt: skip
    overlapping = rows_of_plan(tile_plan((40, 12, 10), PLAIN, (), 0.5), 8, lambda final: final)
    assert joined_rows(overlapping, 100) == overlapping


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_tables_are_as_long_as_is_counted(cuda: Cuda, name: str) -> None:
    with opened_bench(cuda, EXAMPLES[name]) as one:
        case, plan = one.case, one.plans()[0]
        starts = tuple(sorted({tile.start[axis] for tile in case.tiles}) for axis in range(3))
        weights = [{s: np.full(n, s, np.float32) for s in axis} for axis, n in zip(starts, case.patch, strict=True)]
        calls = [group for row in plan.groups for group in row]
        tables = tables_of_case(case.tiles, calls, weights, case.way)
        assert len(tables.content) == plan.buffers["tables"]
        for axis, places in zip(weights, tables.weights, strict=True):
            for start, place in places.items():
                part = tables.content[place : place + 4 * len(axis[start])]
                assert np.array_equal(part.view(np.float32), axis[start])


def test_a_call_that_must_be_larger_repeats_its_last_tile(cuda: Cuda) -> None:
    with opened_bench(cuda, EXAMPLES["mirrored"]) as one:
        calls = [Group(first=3, size=2, batch=5, at=0)]
        weights = [{tile.start[axis]: np.ones(1, np.float32) for tile in one.case.tiles} for axis in range(3)]
        tables = tables_of_case(one.case.tiles, calls, weights, one.case.way)
        rows = tables.content[tables.tiles :][: 5 * 16].view(np.int32).reshape(5, 4)
        tiles = [list(one.case.tiles)[n] for n in (3, 4, 4, 4, 4)]
        assert [tuple(row[:3]) for row in rows] == [tile.start for tile in tiles]
        assert [row[3] for row in rows] == [4 * f[2] + 2 * f[1] + f[0] for f in (tile.flip for tile in tiles)]
