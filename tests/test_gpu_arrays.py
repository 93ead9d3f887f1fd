"""Images that torch and CuPy hold on a real GPU become labels there; on the fake GPU the same test with a stand-in.

What an array may look like and what is refused is for `test_device_array.py` and `test_device_entry.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_arrays import Interface, OnCpu, Shared, on_gpu
from gpu_places import FAKE, REAL, opened_place, skip_without_float32_engine
from gpu_samples import SHARE, SPACING, Placed, case_data, placed
from numpy.typing import NDArray

from trtbuild.runtime.gpu.entry import prediction_from_device_array
from trtbuild.runtime.gpu.labels import DeviceLabels
from trtbuild.runtime.on_device import OnDevice


@dataclass(frozen=True, kw_only=True)
class Library:
    """Who holds the image: `image` puts it on the GPU, `host` reads the labels."""

    image: Callable[[NDArray[Any]], Any]
    host: Callable[[DeviceLabels], NDArray[Any]]


@contextmanager
def library(name: str, one: Placed) -> Iterator[Library]:
    if name == "torch":
        torch = pytest.importorskip("torch")
        if not torch.cuda.is_available():
            pytest.skip("this torch has no CUDA")
        yield Library(
            image=lambda data: torch.from_numpy(data).cuda(),
            host=lambda labels: torch.from_dlpack(labels).cpu().numpy(),
        )
    elif name == "cupy":
        cupy = pytest.importorskip("cupy")
        yield Library(image=cupy.asarray, host=lambda labels: cupy.asnumpy(cupy.asarray(labels)))
    else:
        with ExitStack() as stack:
            kind = {"fake dlpack": Shared, "fake interface": Interface}[name]
            yield Library(
                image=lambda data: kind(array=stack.enter_context(on_gpu(data, one.gpu))),
                host=lambda labels: np.from_dlpack(OnCpu(shared=labels)).copy(),
            )


PLACES = {"fake dlpack": FAKE, "fake interface": FAKE, "torch": REAL, "cupy": REAL}


@pytest.fixture
def one(name: str, tmp_path: Path) -> Iterator[Placed]:
    if PLACES[name] == REAL:
        skip_without_float32_engine()
    with opened_place(PLACES[name]) as gpu, placed(gpu, tmp_path) as case:
        yield case


every = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.gpu] if at == REAL else []) for name, at in PLACES.items()]
)


@every
def test_the_labels_are_those_of_the_cpu(name: str, one: Placed) -> None:
    place = OnDevice(gpu=one.gpu, engines=one.engines, limit=None)
    member, expected = replace(one.member, device=place), one.on_cpu().segmentation
    with library(name, one) as held:
        image = held.image(case_data())
        for _ in range(2):
            found = prediction_from_device_array(image, SPACING, member, one.settings)
            labels = held.host(found.labels)
            assert (labels.shape, labels.dtype) == (expected.shape, expected.dtype)
            assert np.count_nonzero(labels != expected) <= max(2, SHARE * expected.size)
            assert found.warnings == ()
            found.labels.close()


@every
def test_an_image_in_another_order_of_axes_is_read_where_it_is(name: str, one: Placed) -> None:
    place = OnDevice(gpu=one.gpu, engines=one.engines, limit=None)
    member, expected = replace(one.member, device=place), one.on_cpu().segmentation
    turned = np.ascontiguousarray(case_data().transpose(0, 3, 2, 1))
    with library(name, one) as held:
        there = held.image(turned)
        if isinstance(there, (Shared, Interface)):
            image = type(there)(array=there.array.transpose(0, 3, 2, 1))
        else:
            image = there.transpose(1, 3) if name == "torch" else there.transpose(0, 3, 2, 1)
        found = prediction_from_device_array(image, SPACING, member, one.settings)
        assert np.count_nonzero(held.host(found.labels) != expected) <= max(2, SHARE * expected.size)
        found.labels.close()
