"""A GPU for tests that run on a real one, and that are proven on the fake one: the same test twice.

On a machine without a GPU the real one is skipped with the reason; `pytest -m gpu` runs nothing else.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from device_samples import check_unharmed
from fake_cuda import CUBIN, Cuda
from fake_kernels import give_kernels
from fake_onnxruntime import install

from trtbuild.errors import EngineError, MissingExtra
from trtbuild.runtime.device import check_device_usable, opened_device
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu
from trtbuild.runtime.nvrtc import kernels_cubin
from trtbuild.runtime.onnxruntime_cuda import usable_version

FAKE, REAL = "fake", "gpu"
BOTH = [FAKE, pytest.param(REAL, marks=pytest.mark.gpu)]
"""To be given to a fixture as `params`."""
FAKE_MEMORY = 1 << 30
STAGING = 1 << 16


def skip_without_gpu() -> None:
    """Skips where there is no driver, or no pycuda."""
    try:
        check_device_usable()
    except (EngineError, MissingExtra) as error:
        pytest.skip(" ".join(str(error).split()))


def skip_without_float32_engine() -> None:
    """Skips where no float32 network runs on the GPU: that is ONNX Runtime's, which computes without TF32."""
    skip_without_gpu()
    try:
        usable_version()
    except (EngineError, MissingExtra) as error:
        pytest.skip(" ".join(str(error).split()))


@contextmanager
def fake_place(memory: int = FAKE_MEMORY) -> Iterator[Cuda]:
    """The fake GPU with the kernels and ONNX Runtime's CUDA provider, which must be as it was in the end."""
    cuda = Cuda(memory=memory)
    give_kernels(cuda)
    with pytest.MonkeyPatch.context() as patch:
        install(patch, cuda)
        patch.setattr("trtbuild.runtime.nvrtc.kernels_cubin", lambda capability: CUBIN)
        yield cuda
        gc.collect()
        check_unharmed(cuda)


@contextmanager
def opened_place(kind: str) -> Iterator[Gpu]:
    """A `Gpu` on the fake or the real one."""
    if kind == REAL:
        skip_without_gpu()
        with opened_device() as device, opened_gpu(device, kernels_cubin(device.capability)) as gpu:
            yield gpu
    else:
        with fake_place(), opened_device() as device, opened_gpu(device, CUBIN, STAGING) as gpu:
            yield gpu
