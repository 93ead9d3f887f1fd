"""A case with a small network on a GPU, fake or real, and the same on the CPU.

As a program it segments the case on a GPU of its own and prints the labels' digest: `python gpu_samples.py fake|gpu`.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from gpu_places import opened_place
from numpy.typing import NDArray
from runner_samples import CHANNELS, make_record, small_unet, with_profile, write_model
from specs import make_spec

from trtbuild.runtime import Member, Prediction, Progress, Settings
from trtbuild.runtime.gpu.case import device_case, prediction_on_device
from trtbuild.runtime.gpu.prepare import prepared_on_device
from trtbuild.runtime.gpu.shared import DeviceEngine, Gpu, engine_from_runner
from trtbuild.runtime.gpu.sizes import DeviceCase
from trtbuild.runtime.onnxruntime import open_onnxruntime
from trtbuild.runtime.onnxruntime_cuda import open_onnxruntime_cuda
from trtbuild.runtime.predictor import Clock, prediction_from_prepared
from trtbuild.spec import ModelSpec, ZScore
from trtbuild.volume import prepared_from_array

SPEC = make_spec(channels=("T1", "T2"), normalization=(ZScore(masked=False),) * CHANNELS)
SHAPE, SPACING = (CHANNELS, 21, 30, 26), (1.2, 0.9, 1.0)
AXES = (0, 2)
BATCH = 4
SHARE = 2e-5
"""Of the voxels may differ: the limit of a float32 engine beside nnU-Net (tests/test_parity.py)."""


def case_data() -> NDArray[np.float32]:
    """(C, Z, Y, X), noise over waves."""
    z, y, x = np.meshgrid(*(np.linspace(0, 7, n) for n in SHAPE[1:]), indexing="ij")
    waves = np.stack([np.sin(z + channel) + np.cos(y * 1.3) * np.sin(x) for channel in range(CHANNELS)])
    return (waves + np.random.default_rng(0).normal(0, 0.2, SHAPE)).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class Placed:
    """The network on a GPU and on the CPU."""

    gpu: Gpu
    engines: tuple[DeviceEngine, ...]
    member: Member
    spec: ModelSpec = SPEC
    settings: Settings = field(default_factory=Settings)
    notes: list[str] = field(default_factory=list)

    def on_cpu(self) -> Prediction:
        prepared = prepared_from_array(case_data(), SPACING, self.spec)
        return prediction_from_prepared(prepared, self.member, self.settings, None, Clock())

    def on_device(self, progress: Progress | None = None, limit: int | None = None) -> Prediction:
        """Also prepared there, so that the host only has the image and the labels."""
        prepared = prepared_on_device(case_data(), SPACING, self.spec, self.gpu)
        return prediction_on_device(
            prepared, self.member, self.settings, self.engines, self.gpu, progress, self.notes.append, Clock(), limit
        )

    def case(self) -> DeviceCase:
        return device_case(
            prepared_from_array(case_data(), SPACING, self.spec), self.member, self.settings, self.engines
        )


@contextmanager
def placed(gpu: Gpu, folder: Path) -> Iterator[Placed]:
    """The small network in float32, opened in both."""
    model = write_model(folder / "small.onnx", small_unet(3, SPEC.patch))
    shape = (BATCH, CHANNELS, *SPEC.patch)
    record = with_profile(make_record("onnxruntime-cuda", batch=BATCH), shape)
    cpu = replace(record, backend="onnxruntime")
    with open_onnxruntime_cuda(record, model, gpu=gpu) as runner, open_onnxruntime(cpu, model, threads=2) as other:
        yield Placed(
            gpu=gpu,
            engines=(engine_from_runner(runner, record),),
            member=Member(spec=SPEC, runners=(other,), mirror_axes=AXES),
        )


def digest_on(kind: str) -> str:
    """Of the labels, on a GPU that is opened for it."""
    with tempfile.TemporaryDirectory() as folder, opened_place(kind) as gpu, placed(gpu, Path(folder)) as one:
        return hashlib.sha256(one.on_device().segmentation.tobytes()).hexdigest()


if __name__ == "__main__":
    print(digest_on(sys.argv[1]))
