"""Preparation on a real GPU against `prepared_from_array`; one case on the fake GPU shows that the test works.

`test_device_prepare.py` has the same checks and many more on the fake GPU, with what it takes and gives back there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from gpu_places import BOTH, FAKE, opened_place
from preparation_checks import HOWS
from specs import make_spec
from test_device_prepare import ISO, SCHEMES, TOLERANCE, case_of, on_host

from trtbuild.errors import InputError
from trtbuild.runtime.gpu.prepare import prepared_on_device
from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.spec import ModelSpec, NoNormalization, ZScore
from trtbuild.volume import prepared_from_array

on_gpu = pytest.mark.parametrize("gpu", BOTH[1:], indirect=True)
on_fake = pytest.mark.parametrize("gpu", [FAKE], indirect=True)


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    with opened_place(request.param) as opened:
        yield opened


def check(data: Any, spacing: tuple[float, ...], spec: ModelSpec, gpu: Gpu) -> None:
    expected, before = prepared_from_array(data, spacing, spec), gpu.device.free_memory()
    prepared = prepared_on_device(data, spacing, spec, gpu)
    try:
        assert (prepared.grid, prepared.shape) == (expected.grid, expected.data.shape)
        found = on_host(prepared, gpu).data
    finally:
        prepared.close()
    for ours, theirs in zip(found, expected.data, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE * max(1.0, float(np.ptp(theirs))))
    assert before - gpu.device.free_memory() < 2 << 20, "all memory was given back"


def resized(how: str) -> ModelSpec:
    return make_spec(
        channels=("a", "b"), normalization=(ZScore(masked=True), NoNormalization()), resample_data=HOWS[how][0],
        spacing=(0.8 * HOWS[how][1][0], 1.3, 0.7), transpose_forward=(2, 0, 1), transpose_backward=(1, 2, 0),
    )  # fmt: skip


@on_gpu
@pytest.mark.parametrize("shape", [(13, 11, 12), (1, 40, 33), (71, 64, 90)])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_normalisation(gpu: Gpu, name: str, shape: tuple[int, int, int]) -> None:
    check(case_of(shape), ISO, make_spec(normalization=(SCHEMES[name],)), gpu)


@on_gpu
@pytest.mark.parametrize("how", HOWS)
def test_every_resampling_of_turned_axes(gpu: Gpu, how: str) -> None:
    spacing = HOWS[how][1]
    read = tuple(spacing[(2, 0, 1).index(axis)] for axis in range(3))
    check(case_of((40, 52, 47), channels=2), read, resized(how), gpu)


@on_fake
def test_the_check_works(gpu: Gpu) -> None:
    how = next(iter(HOWS))
    spacing = HOWS[how][1]
    check(case_of((12, 9, 11), channels=2), tuple(spacing[(2, 0, 1).index(axis)] for axis in range(3)), resized(how),
          gpu)  # fmt: skip


@pytest.mark.parametrize("gpu", BOTH, indirect=True)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_stop_the_case(gpu: Gpu, value: float) -> None:
    data = case_of((12, 9, 11))
    data[0, 5, 4, 3] = value
    with pytest.raises(InputError, match="NaN or infinity"):
        prepared_on_device(data, ISO, make_spec(), gpu)
