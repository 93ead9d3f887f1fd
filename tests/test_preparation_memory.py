"""The bytes that preparing a case takes, as predicted and as NumPy allocates them."""

from __future__ import annotations

import dataclasses
import tracemalloc

import numpy as np
import pytest
from specs import make_spec, spline

from trtbuild.spec import CT, ModelSpec, Resampling, ZScore
from trtbuild.volume import prepared_from_array
from trtbuild.volume.preparation.memory import preparation_bytes

LIMIT = 0.1  # of the measured peak
CLIPPED = CT(lower=-1, upper=1, mean=0, std=1)
TWO = {"channels": ("a", "b"), "normalization": (ZScore(masked=True),) * 2}
TORCH = Resampling(
    method="torch", is_segmentation=False, order=1, order_z=0, separate_z="auto", anisotropy_threshold=3.0
)
TORCH_LABELS = dataclasses.replace(TORCH, is_segmentation=True)
ISO, ANISO = (1.0, 1.0, 1.0), (5.0, 0.9, 0.9)
CASES: dict[str, tuple[tuple[int, int, int], tuple[float, float, float], ModelSpec]] = {
    "downsampled": ((120, 100, 110), ISO, make_spec(spacing=(1.5, 1.5, 1.5))),
    "upsampled, two masked channels": ((80, 90, 70), ISO, make_spec(spacing=(0.7, 0.8, 0.9), **TWO)),
    "same spacing": ((100, 90, 95), ISO, make_spec(normalization=(CLIPPED,))),
    "same spacing, masked": ((100, 90, 95), ISO, make_spec(**TWO)),
    "slices": ((30, 200, 180), ANISO, make_spec(spacing=(4.0, 0.7, 0.7), normalization=(CLIPPED,))),
    "slices, order_z 1": (
        (30, 200, 180), ANISO, make_spec(spacing=(4.0, 0.7, 0.7), resample_data=spline(3, order_z=1))
    ),
    "torch, transposed": (
        (90, 80, 100), (1.0, 1.5, 1.0),
        make_spec(
            transpose_forward=(1, 2, 0), transpose_backward=(2, 0, 1), resample_data=TORCH,
            resample_segmentation=TORCH_LABELS,
        ),
    ),
    "2-D": ((40, 150, 160), (3.0, 1.0, 1.0), make_spec(patch=(8, 8), spacing=(0.8, 0.8))),
    "no resampling": (
        (80, 90, 70), ISO, make_spec(spacing=(0.7, 0.8, 0.9), resample_data=dataclasses.replace(TORCH, method="none"))
    ),
    "labels of order 3": (
        (80, 90, 70), ISO, make_spec(spacing=(0.7, 0.8, 0.9), resample_segmentation=spline(3, is_segmentation=True))
    ),
}  # fmt: skip


@pytest.mark.parametrize("cascade", [False, True], ids=["one stage", "cascade"])
@pytest.mark.parametrize("name", CASES)
def test_the_prediction_is_within_a_tenth_of_the_measured_peak(name: str, cascade: bool) -> None:
    shape, spacing, spec = CASES[name]
    if cascade and spec.resample_data.method != "none":
        spec = dataclasses.replace(spec, previous_stage="3d_lowres")
    rng = np.random.default_rng(0)
    data = rng.normal(size=(len(spec.channels), *shape)).astype(np.float32)
    data[:, 5:20, 30:40, 50:60] = 0  # a hole, which is not cropped
    previous = rng.integers(0, 3, shape).astype(np.uint8) if spec.previous_stage else None
    small = (slice(None), slice(9), slice(9), slice(9))
    prepared_from_array(data[small], spacing, spec, previous[small[1:]] if previous is not None else None)  # compiles
    tracemalloc.start()
    prepared_from_array(data, spacing, spec, previous)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    predicted = preparation_bytes(shape, spacing, spec, previous is not None)
    assert abs(predicted - peak) <= LIMIT * peak, f"{predicted / peak:.3f} of {peak / 2**20:.1f} MiB"


def test_a_resampled_channel_costs_its_result_and_little_more_than_itself() -> None:
    """Neither a float64 copy nor a volume between two axes is held: at most 1.5 channels besides the result."""
    shape, spec = (300, 400, 400), make_spec(spacing=(1.5, 1.5, 1.5))
    result = 4 * 160 * 213 * 213
    assert preparation_bytes(shape, (0.8, 0.8, 0.8), spec, False) < result + 1.5 * 4 * 300 * 400 * 400
