"""Cases for the device path: small models and images, on a fake GPU whose kernels are compiled for the host."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from fake_cuda import CUBIN, Cuda, installed
from fake_engine import FakeEngine, device_engine
from fake_kernels import give_kernels
from numpy.typing import NDArray
from specs import make_spec, spline
from test_tiles import image

from trtbuild.runtime import Member, Prediction, Progress, Settings
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu import case as pipeline
from trtbuild.runtime.gpu import plan as planner
from trtbuild.runtime.gpu.plan import DevicePlan
from trtbuild.runtime.gpu.prepare import DevicePrepared
from trtbuild.runtime.gpu.shared import DeviceEngine, Gpu, opened_gpu
from trtbuild.runtime.gpu.sizes import DeviceCase
from trtbuild.runtime.predictor import Clock, prediction_from_prepared
from trtbuild.runtime.slabs import Accumulator
from trtbuild.spec import Labels, ModelSpec, NoNormalization
from trtbuild.volume import Prepared, prepared_from_array
from trtbuild.volume.back import Logits

MEMORY = 1 << 28
SMALL_STAGING = 1 << 10
"""Bytes: every image and every slab of the tests goes through it in pieces."""
REGIONS = Labels(
    decision="regions", values=(1, 2, 3), names={"background": (0,), "whole": (1, 2), "core": (2,), "rim": (3,)},
    foreground=(1, 2, 3), ignore=None,
)  # fmt: skip
WIDE = Labels(
    decision="argmax", values=(0, 300, 2), names={"background": (0,), "a": (300,), "b": (2,)}, foreground=(300, 2),
    ignore=None,
)  # fmt: skip
PLAIN = make_spec(normalization=(NoNormalization(),))
FLAT = make_spec(normalization=(NoNormalization(),), patch=(8, 12), spacing=(1.0, 1.0), configuration="2d")


@dataclass(frozen=True, kw_only=True)
class Example:
    """A case: the image's shape and spacing, the model, and how it runs."""

    shape: tuple[int, ...] = (1, 19, 26, 23)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    spec: ModelSpec = PLAIN
    folds: int = 1
    axes: tuple[int, ...] = ()
    batch: int = 4
    smallest: int = 1
    rim: int = 0
    kind: str = "float32"
    settings: Settings = field(default_factory=Settings)

    def data(self) -> NDArray[np.float32]:
        """The image as read."""
        data = image(self.shape)
        if self.rim:
            data[:, : self.rim], data[:, :, -self.rim :], data[..., : self.rim + 1] = 0, 0, 0
        return data

    def prepared(self) -> Prepared:
        return prepared_from_array(self.data(), self.spacing, self.spec)


TURNED = {"transpose_forward": (2, 0, 1), "transpose_backward": (1, 2, 0)}
EXAMPLES = {
    "3D": Example(),
    "2D": Example(spec=FLAT, batch=3),
    "2D, many slices in a call": Example(spec=FLAT, shape=(1, 19, 8, 12), batch=8, axes=(0, 1)),
    "mirrored": Example(axes=(0, 1, 2), batch=8),
    "mirrored, flips in parts": Example(axes=(0, 2), batch=3),
    "mirrored, several windows in a call": Example(axes=(1,), batch=7, folds=2),
    "folds": Example(folds=3, batch=5),
    "transposed": Example(spec=replace(PLAIN, **TURNED), rim=2, spacing=(1.3, 0.8, 1.1)),
    "transposed 2D": Example(spec=replace(FLAT, **TURNED), rim=3, spacing=(1.3, 0.8, 1.1)),
    "resampled": Example(spacing=(2.2, 0.7, 1.4)),
    "finer than the image": Example(spacing=(0.4, 0.6, 0.5)),
    "smaller than the patch": Example(shape=(1, 3, 5, 31), folds=2, axes=(0, 1, 2), batch=3),
    "smaller in every axis": Example(shape=(1, 5, 7, 6), spacing=(1.5, 1.0, 0.7)),
    "one window": Example(shape=(1, 8, 12, 10)),
    "two channels": Example(spec=replace(PLAIN, channels=("T1", "T2"), normalization=(NoNormalization(),) * 2),
                            shape=(2, 12, 13, 11)),
    "regions": Example(spec=replace(PLAIN, labels=REGIONS), spacing=(1.4, 0.9, 1.2), rim=2),
    "labels above 255": Example(spec=replace(PLAIN, labels=WIDE), rim=1, spacing=(1.4, 0.9, 1.2)),
    "a batch that engines need": Example(batch=4, smallest=3, axes=(0,)),
    "float16 sums": Example(folds=2, axes=(0,), settings=Settings(accumulator="float16")),
    "float16 engines": Example(folds=2, axes=(2,), kind="float16"),
    "float16 engines and sums": Example(axes=(2,), kind="float16", settings=Settings(accumulator="float16")),
    "long steps": Example(settings=Settings(step_size=1.0), shape=(1, 33, 12, 25)),
    "no mirroring": Example(axes=(0, 1, 2), settings=Settings(mirroring=False)),
}  # fmt: skip


SPLINE = replace(PLAIN, resample_probabilities=spline(3))


@dataclass(frozen=True, kw_only=True, eq=False)
class Bench:
    """A case with its engines on an opened fake GPU."""

    prepared: Prepared | DevicePrepared
    member: Member
    settings: Settings
    runners: tuple[FakeEngine, ...]
    gpu: Gpu
    cuda: Cuda
    activations: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def engines(self) -> list[DeviceEngine]:
        return [device_engine(runner, self.activations) for runner in self.runners]

    @property
    def case(self) -> DeviceCase:
        return pipeline.device_case(self.prepared, self.member, self.settings, self.engines)

    def on_cpu(self) -> Prediction:
        assert isinstance(self.prepared, Prepared)
        return prediction_from_prepared(self.prepared, self.member, self.settings, None, Clock())

    def on_device(self, progress: Progress | None = None, limit: int | None = None) -> Prediction:
        return pipeline.prediction_on_device(
            self.prepared, self.member, self.settings, self.engines, self.gpu, progress, self.notes.append, Clock(),
            limit,
        )  # fmt: skip

    def logits_on_device(self, limit: int | None = None) -> Logits:
        return pipeline.case_logits_on_device(
            self.prepared, self.member, self.settings, self.engines, self.gpu, None, self.notes.append, limit
        )

    def plans(self, *accumulators: Accumulator) -> tuple[DevicePlan, ...]:
        return tuple(planner.device_plans(self.case, accumulators or ("float32",)))

    def every_plan(self) -> Iterator[DevicePlan]:
        """Also those that take no less memory than a better one."""
        return planner.candidate_plans(self.case, (self.settings.accumulator,))

    def with_plan(self, plan: DevicePlan, progress: Progress | None = None) -> Prediction:
        return pipeline.labels_on_device(
            self.prepared, self.case, plan, self.settings, self.engines, self.gpu, progress, self.notes.append, Clock()
        )


@contextmanager
def fake_gpu(memory: int = MEMORY) -> Iterator[Cuda]:
    """A fake GPU with the kernels, in place of pycuda."""
    cuda = Cuda(memory=memory)
    give_kernels(cuda)
    with pytest.MonkeyPatch.context() as patch:
        for name, module in installed(cuda).items():
            patch.setitem(sys.modules, name, module)
        patch.setattr("trtbuild.runtime.device.no_driver", lambda: None)
        yield cuda


def check_unharmed(cuda: Cuda) -> None:
    """Nothing went wrong in silence, and nothing is left."""
    assert cuda.faults == []
    assert cuda.leaks() == []
    assert cuda.stack() == []


@contextmanager
def opened_bench(cuda: Cuda, example: Example, activations: int = 0) -> Iterator[Bench]:
    """The example's engines on the fake GPU."""
    spec = example.spec
    with ExitStack() as stack:
        device = stack.enter_context(opened_device())
        gpu = stack.enter_context(opened_gpu(device, CUBIN, SMALL_STAGING))
        sizes = {"batch": example.batch, "smallest": example.smallest}
        runners = tuple(FakeEngine(spec, cuda, fold=n, kind=example.kind, **sizes) for n in range(example.folds))
        yield Bench(
            prepared=example.prepared(), settings=example.settings, runners=runners, gpu=gpu, cuda=cuda,
            member=Member(spec=spec, runners=runners, mirror_axes=example.axes), activations=activations,
        )  # fmt: skip


def assert_same(found: Prediction, expected: Prediction) -> None:
    """The same labels, in the same type, and probabilities up to the exponential's rounding."""
    assert found.segmentation.dtype == expected.segmentation.dtype
    assert found.segmentation.flags.c_contiguous
    assert len(np.unique(expected.segmentation)) > 1, "one label everywhere would hide every error"
    np.testing.assert_array_equal(found.segmentation, expected.segmentation)
    assert (found.probabilities is None) == (expected.probabilities is None)
    if found.probabilities is not None and expected.probabilities is not None:
        np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0, atol=2e-6)
