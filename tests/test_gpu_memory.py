"""A GPU's memory: what a case takes beside its plan, what happens without enough, and two processes at once.

`pytest -m gpu` runs this on a real one; on the fake GPU it shows that the tests themselves work.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from gpu_places import BOTH, REAL, opened_place, skip_without_float32_engine
from gpu_samples import SHARE, Placed, digest_on, placed

from trtbuild.errors import OutOfMemory
from trtbuild.runtime.gpu.plan import GRAIN, device_plans

HERE = Path(__file__).parent


@pytest.fixture(params=BOTH)
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == REAL:
        skip_without_float32_engine()
    return str(request.param)


@pytest.fixture
def one(kind: str, tmp_path: Path) -> Iterator[Placed]:
    with opened_place(kind) as gpu, placed(gpu, tmp_path) as case:
        yield case


def differing(found: np.ndarray, expected: np.ndarray) -> int:
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert len(np.unique(expected)) > 1, "one label everywhere would hide every error"
    return int(np.count_nonzero(found != expected))


def test_the_labels_are_those_of_the_cpu(one: Placed) -> None:
    found, expected = one.on_device().segmentation, one.on_cpu().segmentation
    assert differing(found, expected) <= max(2, SHARE * expected.size)
    assert one.notes == []


def test_cases_that_follow_give_the_same_bits(one: Placed) -> None:
    first = one.on_device().segmentation
    assert all(np.array_equal(one.on_device().segmentation, first) for _ in range(2))


def test_a_case_takes_no_more_memory_than_was_planned(one: Placed) -> None:
    one.on_device()  # the engine has its activations now, which are not the case's
    plan = next(device_plans(one.case(), ("float32",)))
    before = one.gpu.device.free_memory()
    free: list[int] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "network":
            free.append(one.gpu.device.free_memory())

    one.on_device(progress)
    taken = before - min(free)
    assert taken <= plan.nbytes
    assert taken >= sum(plan.buffers.values()) - GRAIN * len(plan.buffers), "the planner counts what is not there"
    assert before - one.gpu.device.free_memory() < GRAIN, "all of it was given back"


def test_a_limit_that_nothing_fits_is_an_error_and_leaves_nothing(one: Placed) -> None:
    one.on_device()
    before = one.gpu.device.free_memory()
    with pytest.raises(OutOfMemory) as caught:
        one.on_device(limit=1000)
    assert caught.value.hint
    assert before - one.gpu.device.free_memory() < GRAIN
    assert differing(one.on_device().segmentation, one.on_cpu().segmentation) <= 2


def test_a_small_limit_takes_a_smaller_plan(one: Placed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)  # the case is small: plans differ by bytes
    plans = list(device_plans(one.case(), ("float32", "float16")))
    assert len(plans) > 2
    activations = one.gpu.contexts.wanted + sum(engine.activations for engine in one.engines)  # taken or not
    for plan in (plans[1], plans[-1]):
        found, expected = one.on_device(limit=plan.nbytes + activations).segmentation, one.on_cpu().segmentation
        assert differing(found, expected) <= max(2, 5e-3 * expected.size)  # float16 sums


def test_two_processes_share_a_gpu(kind: str) -> None:
    expected = digest_on(kind)
    command = [sys.executable, str(HERE / "gpu_samples.py"), kind]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        output, said = process.communicate(timeout=240)
        assert process.returncode == 0, said
        assert output.split()[-1] == expected
