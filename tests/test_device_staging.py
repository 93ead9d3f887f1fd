"""Copies through page-locked memory: any array and any type, in pieces, with the host and the device at once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from device_samples import check_unharmed, fake_gpu
from fake_cuda import CUBIN, Cuda, LaunchError

from trtbuild.errors import EngineError
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu.event import Event
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu

STAGING = 96
"""Bytes: halves of 48."""


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test."""
    with fake_gpu() as fake:
        yield fake
        check_unharmed(fake)


@pytest.fixture
def gpu(cuda: Cuda) -> Iterator[Gpu]:
    with opened_device() as device, opened_gpu(device, CUBIN, STAGING) as opened:
        yield opened


def back(gpu: Gpu, like: Any, buffer: Any, offset: int = 0) -> Any:
    found = np.empty_like(like, order="C")
    gpu.download(found, buffer, offset)
    return found


@pytest.mark.parametrize("count", [1, 11, 12, 13, 24, 25, 36, 100])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.float64, np.int16])
def test_an_array_goes_there_and_comes_back(gpu: Gpu, count: int, dtype: Any) -> None:
    array = np.arange(1, count + 1).astype(dtype)
    buffer = gpu.device.buffer(array.nbytes + 16)
    gpu.upload(buffer, array, offset=16)
    np.testing.assert_array_equal(back(gpu, array, buffer, 16), array)
    gpu.upload(buffer, array[::-1])
    np.testing.assert_array_equal(back(gpu, array, buffer), array[::-1])
    buffer.close()


@pytest.mark.parametrize("given", [np.int64, np.float64, np.float16, np.bool_])
def test_numbers_are_rounded_on_the_way_as_numpy_does_it(gpu: Gpu, given: Any) -> None:
    array = (np.random.default_rng(0).standard_normal((5, 7)) * 12345.678).astype(given)
    buffer = gpu.device.buffer(4 * array.size)
    gpu.upload(buffer, array, dtype=np.float32)
    np.testing.assert_array_equal(back(gpu, array.astype(np.float32), buffer), array.astype(np.float32))
    buffer.close()


def test_an_array_with_gaps_goes_there_and_is_not_filled(gpu: Gpu) -> None:
    array = np.arange(60, dtype=np.float32).reshape(5, 12)[:, ::2]
    buffer = gpu.device.buffer(array.nbytes)
    gpu.upload(buffer, array)
    np.testing.assert_array_equal(back(gpu, array, buffer), array)
    with pytest.raises(EngineError, match="has gaps"):
        gpu.download(array, buffer)
    buffer.close()


def test_an_empty_array_is_none(gpu: Gpu) -> None:
    buffer = gpu.device.buffer(4)
    empty = np.empty((0, 3), dtype=np.float32)
    gpu.upload(buffer, empty)
    gpu.download(empty, buffer)
    buffer.close()


@pytest.mark.parametrize("how", ["upload", "download"])
def test_what_does_not_fit_is_refused(gpu: Gpu, how: str) -> None:
    buffer = gpu.device.buffer(100)
    with pytest.raises(EngineError, match="larger than its device memory"):
        getattr(gpu, how)(*(buffer, np.zeros(26, np.float32))[:: 1 if how == "upload" else -1])
    gpu.stream.synchronize()
    gpu.upload(buffer, np.ones(25, np.float32))
    assert back(gpu, np.ones(25, np.float32), buffer).all()
    buffer.close()


@pytest.mark.parametrize("how", ["upload", "download"])
def test_the_device_copies_while_the_host_does(gpu: Gpu, cuda: Cuda, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the host has waited for a half, the copy of the other is still to be done."""
    left, wait, queue = list[int](), Event.wait, cuda.streams[gpu.stream.handle]

    def waited(event: Event) -> None:
        wait(event)
        left.append(len(queue.work))

    array, buffer = np.arange(60, dtype=np.float32), gpu.device.buffer(240)
    monkeypatch.setattr(Event, "wait", waited)
    getattr(gpu, how)(*(buffer, array)[:: 1 if how == "upload" else -1])
    assert len(left) == 5
    assert all(left[2:] if how == "upload" else left[:-1])
    buffer.close()


def test_what_the_copies_took_is_given_back_with_the_gpu(cuda: Cuda) -> None:
    """Though the device stays open."""
    with opened_device() as device:
        with opened_gpu(device, CUBIN, STAGING):
            assert cuda.events
        assert cuda.leaks() == []


def test_a_gpu_that_fails_meanwhile_is_told(gpu: Gpu, cuda: Cuda) -> None:
    array, buffer = np.arange(60, dtype=np.float32), gpu.device.buffer(240)
    for copy in (lambda: gpu.upload(buffer, array), lambda: gpu.download(array, buffer)):
        cuda.fail_next = LaunchError("an illegal memory access was encountered")
        with pytest.raises(EngineError, match="illegal memory access"):
            copy()
    gpu.stream.synchronize()
    buffer.close()
