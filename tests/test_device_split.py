"""One case on several (fake) GPUs: logits, labels and errors are those of one, whoever ends first."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from device_samples import EXAMPLES, MEMORY, SMALL_STAGING, SPLINE, Example, assert_same, check_unharmed, fake_gpu
from fake_cuda import CUBIN, Cuda
from fake_engine import FakeEngine, device_engine
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from specs import make_spec
from test_tiles import image

from trtbuild.errors import Cancelled, EngineError, NonFinite, OutOfMemory
from trtbuild.runtime import Member, Prediction, Progress
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu import parallel as device_parallel
from trtbuild.runtime.gpu.prepare import DevicePrepared, prepared_on_device
from trtbuild.runtime.gpu.shared import opened_gpu
from trtbuild.runtime.gpu.split import case_logits_on_devices, prediction_on_devices
from trtbuild.runtime.gpu.split_parts import parts_of_case
from trtbuild.runtime.on_device import OnDevice
from trtbuild.runtime.predictor import Clock, case_logits, prediction_from_prepared
from trtbuild.runtime.tiles import TilePlan, tile_plan
from trtbuild.volume import Prepared, prepared_from_array
from trtbuild.volume.back import Logits

PATIENCE = 60.0
LONG = Example(shape=(1, 40, 14, 13), axes=(1,), folds=2)
"""Nine rows of windows."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A case with engines of its own on each of several opened GPUs."""

    example: Example
    places: tuple[OnDevice, ...]
    runners: tuple[tuple[FakeEngine, ...], ...]
    notes: list[str] = field(default_factory=list)

    @property
    def member(self) -> Member:
        return Member(spec=self.example.spec, runners=self.runners[0], mirror_axes=self.example.axes)

    def on_cpu(self) -> Prediction:
        return prediction_from_prepared(self.example.prepared(), self.member, self.example.settings, None, Clock())

    def cpu_logits(self) -> Logits:
        return case_logits(self.example.prepared(), self.member, self.example.settings, None)

    def split(self, progress: Progress | None = None, prepared: Prepared | DevicePrepared | None = None) -> Prediction:
        return prediction_on_devices(
            prepared or self.example.prepared(), self.member, self.example.settings, self.places, progress,
            self.notes.append, Clock(),
        )  # fmt: skip

    def split_logits(self) -> Logits:
        return case_logits_on_devices(
            self.example.prepared(), self.member, self.example.settings, self.places, None, self.notes.append
        )

    @property
    def tiles(self) -> list[int]:
        """That each GPU's first fold has computed."""
        return [sum(runners[0].batches) for runners in self.runners]

    @property
    def seams(self) -> NDArray[np.bool_]:
        """(Z,) where more than one GPU has windows."""
        count = np.zeros(self.example.prepared().data.shape[1], dtype=int)
        for part in parts_of_case(_plan(self.example), self.example.spec, len(self.places)):
            count[part.first : part.last] += 1
        return count > 1


Opened = Callable[..., Bench]


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """Several fake GPUs, which must be as they were after the test."""
    with fake_gpu() as fake:
        fake.gpus = 8
        yield fake
        check_unharmed(fake)


@pytest.fixture
def bench(cuda: Cuda) -> Iterator[Opened]:
    """Opens GPUs; each has memory, a stream, kernels and engines of its own."""
    with ExitStack() as stack:

        def opened(example: Example, count: int = 2, limit: int | None = None) -> Bench:
            sizes = {"batch": example.batch, "smallest": example.smallest}
            places, all_runners = [], []
            for number in range(count):
                gpu = stack.enter_context(opened_gpu(stack.enter_context(opened_device(number)), CUBIN, SMALL_STAGING))
                runners = tuple(
                    FakeEngine(example.spec, cuda, fold=fold, kind=example.kind, **sizes)
                    for fold in range(example.folds)
                )
                places.append(OnDevice(gpu=gpu, engines=tuple(map(device_engine, runners)), limit=limit))
                all_runners.append(runners)
            return Bench(example=example, places=tuple(places), runners=tuple(all_runners))

        yield opened


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", EXAMPLES)
def test_logits_are_those_of_one_gpu_and_differ_by_rounding_at_seams(bench: Opened, name: str, count: int) -> None:
    one = bench(EXAMPLES[name], count)
    expected, found = one.cpu_logits(), one.split_logits()
    assert found.dtype == expected.dtype
    seams = one.seams
    np.testing.assert_array_equal(found[:, ~seams], expected[:, ~seams])
    terms = 8 * len(_plan(one.example).flips) * one.example.folds  # that a voxel adds up
    bound = terms * np.finfo(found.dtype).eps * np.abs(expected).max()  # half of it on each side: each addition rounds
    assert np.abs(found[:, seams].astype(np.float64) - expected[:, seams]).max(initial=0) <= bound
    assert one.notes == []


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("name", EXAMPLES)
def test_labels_are_those_of_the_cpu(bench: Opened, name: str, count: int) -> None:
    """In float32 no voxel of these cases is so near to a tie that the rounding at a seam would show; in float16 a few
    are, as between any two orders of additions."""
    one = bench(EXAMPLES[name], count)
    found, expected = one.split(), one.on_cpu()
    if one.example.settings.accumulator == "float16":
        assert found.segmentation.dtype == expected.segmentation.dtype
        assert np.mean(found.segmentation != expected.segmentation) < 1e-3
    else:
        assert_same(found, expected)
    rows = [tiles for tiles in one.tiles if tiles]
    assert len(rows) == min(count, len(_plan(one.example).rows))
    assert list(found.seconds)[-2:] == ["network", "back"]


def _plan(example: Example) -> TilePlan:
    axes = example.axes if example.settings.mirroring else ()
    return tile_plan(example.prepared().data.shape[1:], example.spec, axes, example.settings.step_size)


@pytest.mark.parametrize("example", [LONG, replace(LONG, spec=SPLINE)])
def test_probabilities_come_with_the_labels(bench: Opened, example: Example) -> None:
    one = bench(replace(example, settings=replace(example.settings, probabilities=True)), 3)
    assert_same(one.split(), one.on_cpu())


def test_every_window_is_computed_once_and_the_gpus_have_as_many(bench: Opened) -> None:
    one = bench(LONG, 4)
    one.split()
    plan = _plan(LONG)
    row = plan.rows[0][1]
    assert sum(one.tiles) == len(plan)
    assert one.tiles == [2 * row, 2 * row, 2 * row, 3 * row]


@pytest.mark.parametrize("last", [0, 1])
def test_it_does_not_matter_which_gpu_ends_last(bench: Opened, monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """One GPU begins its first call only when the other has begun its last."""
    one = bench(LONG)
    expected = one.split_logits()
    calls = len(one.runners[1 - last][-1].batches)
    for runners in one.runners:
        for runner in runners:
            runner.batches.clear()
    ended = threading.Event()
    first, other = one.runners[last][0], one.runners[1 - last][-1]
    enqueue = FakeEngine.enqueue

    def ordered(self: FakeEngine, source: int, target: int, stream: int, batch: int) -> None:
        if self is first and not self.batches:
            assert ended.wait(PATIENCE)
        enqueue(self, source, target, stream, batch)
        if self is other and len(self.batches) == calls:
            ended.set()

    monkeypatch.setattr(FakeEngine, "enqueue", ordered)
    np.testing.assert_array_equal(one.split_logits(), expected)


def test_a_case_that_was_prepared_on_the_first_gpu_is_shared_and_closed(bench: Opened, cuda: Cuda) -> None:
    one = bench(LONG)
    prepared = prepared_on_device(LONG.data(), LONG.spacing, LONG.spec, one.places[0].gpu)
    assert_same(one.split(prepared=prepared), one.on_cpu())
    assert prepared.image.closed
    one.runners[1][0].fail_at = len(one.runners[1][0].batches)
    again = prepared_on_device(LONG.data(), LONG.spacing, LONG.spec, one.places[0].gpu)
    with pytest.raises(EngineError):
        one.split(prepared=again)
    assert again.image.closed


def test_a_case_of_one_row_runs_on_the_first_gpu_as_ever(bench: Opened) -> None:
    """The labels are made there: the host tells that it begins to."""
    one = bench(EXAMPLES["one window"])
    seen: list[tuple[str, int, int]] = []
    assert_same(one.split(lambda stage, done, total: seen.append((stage, done, total))), one.on_cpu())
    assert ("back", 0, 1) not in seen
    assert one.tiles == [1, 0]
    np.testing.assert_array_equal(one.split_logits(), one.cpu_logits())


# ---- progress


def test_progress_counts_the_tiles_of_all_gpus(bench: Opened) -> None:
    one = bench(LONG)
    seen: list[tuple[str, int, int]] = []
    one.split(lambda stage, done, total: seen.append((stage, done, total)))
    total = 2 * len(_plan(LONG))
    counts = [done for stage, done, _ in seen if stage == "network"]
    assert counts == sorted(counts)
    assert counts[-1] == total
    assert {of for stage, _, of in seen if stage == "network"} == {total}
    assert seen[-2:] == [("back", 0, 1), ("back", 1, 1)]


@pytest.mark.parametrize("ticks", [1, 2, 3])
def test_a_caller_that_says_stop_ends_all_gpus(bench: Opened, ticks: int) -> None:
    one = bench(LONG)
    left = ticks

    def progress(stage: str, done: int, total: int) -> bool:
        nonlocal left
        left -= 1
        return left > 0

    with pytest.raises(Cancelled):
        one.split(progress)
    _check_ended()
    assert_same(one.split(), one.on_cpu())


def test_what_progress_raises_is_raised(bench: Opened) -> None:
    def progress(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    one = bench(LONG)
    with pytest.raises(KeyboardInterrupt):
        one.split(progress)
    _check_ended()


def _check_ended() -> None:
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("trtbuild")]


# ---- faults


@pytest.mark.parametrize("broken", [0, 1])
def test_a_gpu_that_fails_is_named_and_stops_the_others(
    bench: Opened, monkeypatch: pytest.MonkeyPatch, broken: int
) -> None:
    """The other one begins when the error is known, and ends at its first progress."""
    one = bench(LONG)
    expected, other = one.split(), one.runners[1 - broken]
    calls = [len(runner.batches) for runner in other]
    for runner in (*one.runners[0], *one.runners[1]):
        runner.batches.clear()
    one.runners[broken][0].fail_at = 1
    known = threading.Event()
    enqueue, named = FakeEngine.enqueue, device_parallel.named_error

    def waiting(self: FakeEngine, source: int, target: int, stream: int, batch: int) -> None:
        assert self not in other or known.wait(PATIENCE)
        enqueue(self, source, target, stream, batch)

    def noted(error: BaseException, name: str) -> BaseException:
        known.set()  # nobody is told anything before the error stands where all look
        return named(error, name)

    parts = parts_of_case(_plan(LONG), LONG.spec, 2)
    with monkeypatch.context() as patch:
        patch.setattr(FakeEngine, "enqueue", waiting)
        patch.setattr(device_parallel, "named_error", noted)
        with pytest.raises(EngineError, match="TensorRT failed") as caught:
            one.split()
    assert f"GPU {broken}, slices {parts[broken].first} to {parts[broken].last}" in str(caught.value.where)
    assert sum(len(runner.batches) for runner in other) < sum(calls)
    _check_ended()
    assert_same(one.split(), expected)


def test_a_network_that_gives_nan_on_one_gpu_stops_the_case(bench: Opened) -> None:
    """The voxel of which it makes NaN is in windows of the second alone; they are named as on the first alone."""
    voxels = image(LONG.shape)
    voxels[0, 30, 3, 3] = 1e6
    prepared = prepared_from_array(voxels, LONG.spacing, LONG.spec)
    texts = []
    for count in (1, 2):
        one = bench(LONG, count)
        for runner in (runner for runners in one.runners for runner in runners):
            runner.poison = 1e5
        with pytest.raises(NonFinite) as caught:
            one.split(prepared=prepared)
        texts.append(str(caught.value.where))
    assert isinstance(caught.value.__cause__, NonFinite)
    assert texts[1] == f"GPU 1, slices 16 to 40: {texts[0]}"


def test_a_case_that_holds_nan_is_refused(bench: Opened) -> None:
    one = bench(LONG)
    prepared = LONG.prepared()
    prepared.data[0, 30, 3, 3] = np.nan
    with pytest.raises(NonFinite, match="The prepared case holds NaN"):
        one.split(prepared=prepared)


def test_a_gpu_without_memory_begins_again_with_less_and_says_so(
    bench: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    one = bench(LONG)
    one.runners[1][0].out_of_memory = 1
    assert_same(one.split(), one.on_cpu())
    (note,) = one.notes
    assert "begins again" in note


def test_a_gpu_that_has_too_little_memory_for_its_part_fails_the_case(bench: Opened) -> None:
    one = bench(LONG, limit=1000)
    with pytest.raises(OutOfMemory, match="slices"):
        one.split()
    _check_ended()
    assert MEMORY > 1000


# ---- parts


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 20), st.integers(1, 20)),
    patch=st.tuples(st.integers(1, 12), st.integers(1, 9), st.integers(1, 9)),
    step=st.sampled_from([0.3, 0.5, 0.75, 1.0]),
    count=st.integers(1, 9),
    flat=st.booleans(),
)
def test_parts_share_out_all_rows_and_their_weights_add_up(
    size: tuple[int, int, int], patch: tuple[int, int, int], step: float, count: int, flat: bool
) -> None:
    patch = tuple(max(2, edge) for edge in patch)  # type: ignore[assignment]  # three of them
    spec = make_spec(patch=patch[1:], spacing=(1.0, 1.0), configuration="2d") if flat else make_spec(patch=patch)
    plan = tile_plan(size, spec, (0,), step)
    parts = parts_of_case(plan, spec, count)
    assert 1 <= len(parts) <= min(count, len(plan.rows))
    sizes = [len(part.tiles.rows) for part in parts]
    assert sum(sizes) == len(plan.rows)
    assert max(sizes) - min(sizes) <= 1
    starts = [part.first + start for part in parts for start, _ in part.tiles.rows]
    assert starts == [start for start, _ in plan.rows]
    assert sum(len(part.tiles) for part in parts) == len(plan)
    total = np.zeros(plan.grid.shape[0])
    for part in parts:
        assert (part.weights > 0).all()
        total[part.first : part.last] += part.weights
    np.testing.assert_allclose(total, 1, rtol=0, atol=1e-6)
