"""What a case on a GPU takes of the host's memory: the planner's sums against NumPy's own count.

The fake GPU's memory is host memory, so it is taken from the system here, where NumPy's count does not see it.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import fake_cuda
import numpy as np
import pytest
from device_samples import check_unharmed, fake_gpu
from fake_cuda import CUBIN
from fake_engine import FakeEngine, device_engine
from numpy.typing import NDArray
from specs import spline
from test_planning import LIMIT, SOFT, member, spec_of, traced

from trtbuild.runtime import Member, Recipe, Settings, prediction_from_models
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu.prepare_plan import bytes_on_device
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu
from trtbuild.runtime.memory import CaseShape, case_bytes
from trtbuild.runtime.on_device import OnDevice, prepared_for_member
from trtbuild.spec import ModelSpec
from trtbuild.volume import prepared_from_array

STAGING = 1 << 14
"""Bytes: the fake copies all of it at once."""
SHAPE, SPACING = (60, 70, 64), (1.0, 1.0, 1.0)
CASE = CaseShape(shape=SHAPE, spacing=SPACING, voxel_bytes=2)
ONE = Recipe(weights=(1.0,))
PLAIN = Settings(threads=1)


class Untraced:
    """NumPy, but for `full`, whose memory is not counted."""

    def full(self, size: int, value: int, dtype: Any) -> NDArray[Any]:
        array: NDArray[Any] = np.frombuffer(mmap.mmap(-1, size), dtype)
        array[...] = value
        return array

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    monkeypatch.setattr(fake_cuda, "np", Untraced())
    with fake_gpu() as cuda:
        with opened_device() as device, opened_gpu(device, CUBIN, STAGING) as opened:
            yield opened
        check_unharmed(cuda)


class InPlace(FakeEngine):
    """Takes no memory of its own, as a network on a GPU takes none of the host."""

    def enqueue(self, source: int, target: int, stream: int, batch: int) -> None:
        def compute() -> None:
            patches = self._array(source, (batch, self.channels, *self.patch))
            logits = self._array(target, (batch, self.heads, *self.patch))
            for head in range(self.heads):
                np.multiply(patches[:, 0], 2 * head, out=logits[:, head])
                np.subtract(logits[:, head], head * head, out=logits[:, head])

        self.cuda.run_on(stream, compute, {source, target})


def on_gpu(spec: ModelSpec, gpu: Gpu, limit: int | None = None) -> Member:
    runner = InPlace(spec, gpu.device.cuda, batch=1)
    place = OnDevice(gpu=gpu, engines=(device_engine(runner),), limit=limit)
    return Member(spec=spec, runners=(runner,), mirror_axes=(), device=place)


SMALL = {"patch": (16, 40, 40)}
FINE = spec_of(heads=6, spacing=(0.9, 1.1, 1.0), **SMALL)
COARSE = spec_of(heads=6, **SMALL)
CASCADE = [spec_of(heads=3, spacing=(2.0, 2.0, 2.0), **SMALL), spec_of(heads=3, previous_stage="3d_lowres", **SMALL)]
CASES: dict[str, tuple[list[list[ModelSpec]], Recipe, Settings]] = {
    "labels": ([[COARSE]], ONE, PLAIN),
    "float16": ([[COARSE]], ONE, replace(PLAIN, accumulator="float16")),
    "probabilities": ([[COARSE]], ONE, replace(PLAIN, probabilities=True)),
    "logits resampled with a spline": ([[replace(COARSE, resample_probabilities=spline(3))]], ONE, PLAIN),
    "an ensemble": ([[COARSE], [FINE]], SOFT, PLAIN),
    "an ensemble in float16": ([[COARSE], [FINE]], SOFT, replace(PLAIN, accumulator="float16")),
    "votes": ([[COARSE], [FINE]], replace(SOFT, vote="hard"), PLAIN),
    "a cascade": ([CASCADE], ONE, PLAIN),
    "a second stage": ([CASCADE[1:]], ONE, PLAIN),
    "2-D": ([[spec_of(heads=6, patch=(64, 64), spacing=(1.1, 1.2), configuration="2d")]], ONE, PLAIN),
}


def measured(models: Sequence[tuple[Member, ...]], recipe: Recipe, settings: Settings) -> int:
    """NumPy's count for a case that is prepared where the network runs, with the image and the labels of an earlier
    stage that are kept for it."""
    array = np.random.default_rng(0).uniform(1, 2.4, size=(1, *SHAPE)).astype(np.float32)
    given = models[0][0].spec.previous_stage is not None
    previous = (array[0] > 2).astype(np.uint8) if given else None

    def run(image: NDArray[np.float32], before: NDArray[Any] | None) -> None:
        def prepare(model: int, stage: int, labels: NDArray[Any] | None) -> Any:
            return prepared_for_member(image, SPACING, models[model][stage], before if given else labels)

        prediction_from_models(models, prepare, recipe, settings, None)

    run(array[:, :20, :20, :20], None if previous is None else previous[:20, :20, :20])  # loads the compiled loops
    kept = 0 if previous is None else previous.nbytes
    return array.nbytes + kept + traced(lambda: run(array, previous))


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_in_the_network_are_those_that_numpy_counts(gpu: Gpu, name: str) -> None:
    specs, recipe, settings = CASES[name]
    models = [tuple(on_gpu(spec, gpu) for spec in stages) for stages in specs]
    found = measured(models, recipe, settings)
    predicted = case_bytes(CASE, models, recipe, settings).network
    assert found * (1 - LIMIT) < predicted < found * (1 + LIMIT), f"{predicted / found:.2f}"


@pytest.mark.parametrize("enough", [True, False])
def test_a_limit_that_is_too_small_to_prepare_there_counts_on_the_host(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch, enough: bool
) -> None:
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    spec = spec_of(heads=3, spacing=(2.0, 2.0, 2.0), **SMALL)
    models = [(on_gpu(spec, gpu, bytes_on_device(SHAPE, SPACING, spec) - (not enough)),)]
    found, predicted = measured(models, ONE, PLAIN), case_bytes(CASE, models, ONE, PLAIN).network
    assert found * (1 - LIMIT) < predicted < found * (1 + LIMIT), f"{predicted / found:.2f}"


def test_a_member_on_a_cpu_beside_one_on_a_gpu_counts_as_ever(gpu: Gpu) -> None:
    """Then another process prepares all cases, and its arrays are held until both have run."""
    with ExitStack() as stack:
        models = [(on_gpu(COARSE, gpu),), (member(FINE, stack),)]
        array = np.random.default_rng(0).uniform(1, 2.4, size=(1, *SHAPE)).astype(np.float32)

        def run(image: NDArray[np.float32]) -> int:
            first = [prepared_from_array(image, SPACING, stages[0].spec) for stages in models]
            peak = traced(
                lambda: prediction_from_models(models, lambda model, stage, labels: first[model], SOFT, PLAIN, None)
            )
            return peak + sum(each.data.nbytes for each in first)

        run(array[:, :20, :20, :20])
        found, predicted = run(array), case_bytes(CASE, models, SOFT, PLAIN)
        assert found * (1 - LIMIT) < predicted.network < found * (1 + LIMIT)
        alone = [(member(COARSE, stack),), (member(FINE, stack),)]
        assert predicted.preparing == case_bytes(CASE, alone, SOFT, PLAIN).preparing


def test_what_is_only_read_takes_the_image_on_both_sides(gpu: Gpu) -> None:
    image, labels = 4 * CASE.voxels, CASE.voxels
    one = case_bytes(CASE, [(on_gpu(COARSE, gpu),)], ONE, PLAIN)
    assert one.preparing == 2 * image
    given = case_bytes(CASE, [(on_gpu(CASCADE[1], gpu),)], ONE, PLAIN)
    assert given.preparing == 2 * (image + labels)
    with ExitStack() as stack:
        on_cpu = case_bytes(CASE, [(member(COARSE, stack),)], ONE, PLAIN)
    assert one.network < on_cpu.network / 2, "no accumulator, no windows"
    assert one.writing == on_cpu.writing


def test_a_coarser_accumulator_helps_the_host_only_where_logits_come_back(gpu: Gpu) -> None:
    half = replace(PLAIN, accumulator="float16")
    one = [(on_gpu(COARSE, gpu),)]
    assert case_bytes(CASE, one, ONE, half) == case_bytes(CASE, one, ONE, PLAIN)
    assert case_bytes(CASE, one * 2, SOFT, half).network < case_bytes(CASE, one * 2, SOFT, PLAIN).network
