"""The kernels on a GPU, by the same checks as on the host; and that this harness itself can find a fault.

`pytest -m gpu` runs what needs a GPU; on a machine without one those tests are skipped with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from device_samples import fake_gpu
from fake_cuda import CUBIN
from gpu_host import GpuHost
from kernel_checks import FIXED, Check
from preparation_checks import check_preparation

from trtbuild.nvinfer import no_driver
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu
from trtbuild.runtime.nvrtc import kernels_cubin
from trtbuild.stitch.launches import shift

CHECKS: dict[str, Check] = {**FIXED, "preparation": check_preparation}


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    reason = no_driver()
    if reason is not None:
        pytest.skip(reason)
    with opened_device() as device, opened_gpu(device, kernels_cubin(device.capability)) as opened:
        yield opened


@pytest.mark.gpu
@pytest.mark.parametrize("name", CHECKS)
def test_the_kernels_give_the_same_on_a_gpu(gpu: Gpu, name: str) -> None:
    CHECKS[name](GpuHost(gpu=gpu))
    CHECKS[name](GpuHost(gpu=gpu, geometry=((2, 3, 1), (33, 5, 2))))


@pytest.mark.parametrize("name", FIXED)
def test_the_harness_moves_everything_there_and_back(name: str) -> None:
    with fake_gpu(memory=1 << 26), opened_device() as device, opened_gpu(device, CUBIN, 1 << 16) as opened:
        FIXED[name](GpuHost(gpu=opened))


def test_the_harness_finds_a_write_beside_an_array() -> None:
    with fake_gpu(memory=1 << 26), opened_device() as device, opened_gpu(device, CUBIN, 1 << 16) as opened:
        host = GpuHost(gpu=opened)
        total = host.put(np.ones((1, 2, 3, 4), dtype=np.float32))
        with pytest.raises(AssertionError, match="beside"):
            host.run(shift(int(total.ctypes.data), kind="f32", heads=1, shape=(3, 3, 4), slices=3))
