"""Resampling beside nnU-Net's (skimage): CPU seconds and largest difference, interleaved.

    python benchmarks/resampling.py

CPU time is `time.process_time` of the whole process, all threads, so that threads cannot hide work. Writes
benchmarks/results/resampling.{jsonl,md}.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from threadpoolctl import threadpool_limits

from trtbuild.spec import Resampling
from trtbuild.volume.resampling import new_shape, resample

REPEATS = 7


@dataclass(frozen=True, kw_only=True)
class Job:
    """One resampling; `limit` is the share of nnU-Net's CPU time that it may take (from the project's issue)."""

    name: str
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    target: tuple[float, float, float]
    order: int
    limit: float


JOBS = (
    Job(
        name="3D order 3, 1 to 1.5 mm",
        shape=(160, 200, 170),
        spacing=(1, 1, 1),
        target=(1.5, 1.5, 1.5),
        order=3,
        limit=1 / 4,
    ),
    Job(
        name="3D order 3, 1.5 to 1 mm",
        shape=(100, 130, 110),
        spacing=(1.5, 1.5, 1.5),
        target=(1, 1, 1),
        order=3,
        limit=1 / 4,
    ),
    Job(
        name="separate z, order 3 in-plane",
        shape=(40, 256, 256),
        spacing=(5, 0.9, 0.9),
        target=(4, 0.7, 0.7),
        order=3,
        limit=1 / 3,
    ),
    Job(
        name="3D order 1, 1 to 1.5 mm",
        shape=(160, 200, 170),
        spacing=(1, 1, 1),
        target=(1.5, 1.5, 1.5),
        order=1,
        limit=1 / 2,
    ),
    Job(
        name="3D order 1, 1.5 to 1 mm",
        shape=(100, 130, 110),
        spacing=(1.5, 1.5, 1.5),
        target=(1, 1, 1),
        order=1,
        limit=1 / 2,
    ),
)


def cpu_seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of one call, and its result."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result


def run(job: Job) -> dict[str, Any]:
    """Interleaved repeats of one job."""
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    data = np.random.default_rng(0).normal(100, 30, size=(1, *job.shape)).astype(np.float32)
    grid = new_shape(job.shape, job.spacing, job.target)
    how = Resampling(
        method="spline", is_segmentation=False, order=job.order, order_z=0, separate_z="auto", anisotropy_threshold=3.0
    )
    theirs, ours, first = [], [], 0.0
    difference = 0.0
    for number in range(REPEATS + 1):
        a, expected = cpu_seconds(
            lambda: resample_data_or_seg_to_shape(
                data, np.array(grid), job.spacing, job.target, order=job.order, order_z=0, force_separate_z=None
            )
        )
        b, result = cpu_seconds(lambda: resample(data, grid, job.spacing, job.target, how))
        difference = max(difference, float(np.abs(result - expected).max() / np.ptp(data)))
        if number == 0:
            first = b  # builds the matrices
        else:
            theirs.append(a)
            ours.append(b)
    ratios = [b / a for a, b in zip(theirs, ours, strict=True)]
    return {
        **asdict(job),
        "nnunet_cpu_s": theirs,
        "trtbuild_cpu_s": ours,
        "first_call_cpu_s": first,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "difference_of_range": difference,
    }


def main() -> None:
    """Measures every job, writes the record and prints the table."""
    with threadpool_limits(1, user_api="blas"):  # as `predict` runs it
        machine, rows = describe(), [run(job) for job in JOBS]
    results = Path(__file__).resolve().parent / "results"
    results.mkdir(exist_ok=True)
    record = [json.dumps({"machine": machine})] + [json.dumps(row) for row in rows]
    (results / "resampling.jsonl").write_text("\n".join(record) + "\n")
    lines = [
        "# Resampling beside nnU-Net's",
        "",
        f"{machine['cpu']}, {machine['processors']} processors, {machine['date']}, commit {machine['commit']}, numpy "
        f"{machine['versions']['numpy']}, scikit-image {machine['versions']['scikit-image']}. {REPEATS} interleaved repeats, CPU time of all "
        "threads, median (min to max) of trtbuild / nnU-Net per repeat. The first call builds the matrices.",
        "",
        "| job | CPU time of nnU-Net's | limit | first call, CPU s | later, CPU s | nnU-Net, CPU s | difference / range |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['ratio']:.3f} ({row['ratio_min']:.3f} to {row['ratio_max']:.3f}) | {row['limit']:.2f} | {row['first_call_cpu_s']:.3f} | "
            f"{statistics.median(row['trtbuild_cpu_s']):.3f} | {statistics.median(row['nnunet_cpu_s']):.3f} | {row['difference_of_range']:.1e} |"
        )
    (results / "resampling.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
