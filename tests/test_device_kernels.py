"""Kernels, zeros and copies of parts on the device, on the fake pycuda."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from device_samples import check_unharmed, fake_gpu
from fake_cuda import CUBIN, Cuda

from trtbuild.errors import EngineError, OutOfMemory
from trtbuild.runtime.device import opened_device
from trtbuild.stitch.launches import shift


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    with fake_gpu(memory=1 << 20) as fake:
        yield fake
        check_unharmed(fake)


def test_copies_of_any_type_begin_where_they_are_told(cuda: Cuda) -> None:
    with opened_device() as device:
        stream, buffer = device.stream(), device.buffer(64)
        source, target = device.pinned((5,), np.uint16), device.pinned((7,), np.uint16)
        source.array[...] = [1, 2, 3, 4, 65535]
        stream.zero(buffer, 64)
        stream.copy_in(buffer, source.array, 6)
        stream.copy_out(target.array, buffer, 4)
        stream.synchronize()
        assert target.array.tolist() == [0, 1, 2, 3, 4, 65535, 0]


@pytest.mark.parametrize(("offset", "nbytes"), [(-1, 4), (13, 4), (16, 1), (0, 17)])
def test_what_leaves_a_buffer_is_refused(cuda: Cuda, offset: int, nbytes: int) -> None:
    with opened_device() as device:
        stream, buffer, host = device.stream(), device.buffer(16), device.pinned((nbytes,), np.uint8)
        for copy in (
            lambda: stream.copy_in(buffer, host.array, offset),
            lambda: stream.copy_out(host.array, buffer, offset),
        ):
            with pytest.raises(EngineError, match="larger than its device memory"):
                copy()
    assert cuda.faults == []


def test_zeros_stay_inside_and_a_buffer_that_was_given_back_is_refused(cuda: Cuda) -> None:
    with opened_device() as device:
        stream, buffer, host = device.stream(), device.buffer(16), device.pinned((4,))
        with pytest.raises(EngineError, match="larger than its device memory"):
            stream.zero(buffer, 17)
        buffer.close()
        for use in (
            lambda: stream.zero(buffer, 16),
            lambda: stream.copy_in(buffer, host.array),
            lambda: stream.copy_out(host.array, buffer),
        ):
            with pytest.raises(EngineError, match="given back"):
                use()


def test_free_memory_is_the_devices(cuda: Cuda) -> None:
    with opened_device() as device:
        device.buffer(1000)
        assert device.free_memory() == (1 << 20) - 1000


def test_a_kernel_runs_in_the_order_of_its_stream(cuda: Cuda) -> None:
    with opened_device() as device:
        module, stream, buffer, host = device.module(CUBIN), device.stream(), device.buffer(24), device.pinned((6,))
        host.array[...] = range(1, 7)
        launch = shift(buffer.address, kind="f32", heads=1, shape=(3, 1, 2), slices=1)
        stream.copy_in(buffer, host.array)
        arguments: Any = launch.arguments
        stream.launch(module.kernel(launch.kernel), launch.grid, launch.block, arguments)
        stream.copy_out(host.array, buffer)
        stream.synchronize()
        assert host.array.tolist() == [3, 4, 5, 6, 0, 0]


def test_a_kernel_that_is_not_there_or_was_given_back(cuda: Cuda) -> None:
    with opened_device() as device:
        module, stream = device.module(CUBIN), device.stream()
        with pytest.raises(EngineError, match="named symbol not found"):
            module.kernel("nothing")
        kernel = module.kernel("shift_f32")
        for _ in range(2):
            module.close()
        with pytest.raises(EngineError, match="given back") as caught:
            stream.launch(kernel, (1, 1, 1), (1, 1, 1), [])
        assert caught.value.where == "shift_f32"


def test_what_is_no_cubin_is_refused(cuda: Cuda) -> None:
    with opened_device() as device, pytest.raises(EngineError, match="kernel image is invalid"):
        device.module(b"PTX of another world")


def test_the_fake_gpu_notes_what_a_kernel_would_do_beside_its_memory(cuda: Cuda) -> None:
    with opened_device() as device:
        module, stream, buffer = device.module(CUBIN), device.stream(), device.buffer(24)
        launch = shift(buffer.address, kind="f32", heads=1, shape=(4, 1, 2), slices=1)
        arguments: Any = launch.arguments
        stream.launch(module.kernel(launch.kernel), launch.grid, launch.block, arguments)
        with pytest.raises(EngineError, match="illegal memory access"):
            stream.synchronize()
    assert len(cuda.faults) == 1
    cuda.faults.clear()


def test_no_memory_for_pinned_pages_is_an_error_of_its_own(cuda: Cuda) -> None:
    with opened_device() as device:
        cuda.allocations_left = 0
        with pytest.raises(OutOfMemory):
            device.pinned((4,), np.uint8)
