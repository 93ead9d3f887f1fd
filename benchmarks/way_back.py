"""The way back (resample, decide, paste) beside nnU-Net's: wall seconds, interleaved, and the labels that differ.

    python benchmarks/way_back.py

nnU-Net's side is `convert_predicted_logits_to_segmentation_with_correct_shape`, with its default number of torch
threads and with the number given here in turns; the fastest run counts. Ours is `segmentation_from_logits`, compiled
code loaded; compiling and loading are measured apart, in processes of their own. Two kinds of logits: smooth random
fields, where many classes compete in every place (the worst for us), and ellipsoids in a background, which is what a
segmentation looks like. Writes benchmarks/results/way_back.{jsonl,md}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
from machine import describe
from numpy.typing import NDArray
from scipy import ndimage

from trtbuild.spec import Labels, ModelSpec, Resampling, ZScore
from trtbuild.volume import CaseGrid
from trtbuild.volume.back import segmentation_from_logits, way_back_bytes

NETWORK, IMAGE = (100, 133, 133), (150, 256, 256)
MODEL_SPACING = 1.5
LIMITS = {3: 15, 60: 25}
"""How many times faster it must be, from the project's issue."""
REPEATS = {3: 5, 14: 3, 60: 2}
FIRST_CALL = """
import time; started = time.perf_counter()
from way_back import grid_and_spec, smooth
from trtbuild.volume.back import segmentation_from_logits
imported, logits = time.perf_counter(), smooth(3, (5, 133, 133), 0)
grid, spec = grid_and_spec(3, (5, 133, 133), (8, 256, 256))
begun = time.perf_counter(); segmentation_from_logits(logits, grid, spec, threads=1); print(time.perf_counter() - begun)
"""


def smooth(classes: int, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Random fields with a correlation length of 12 voxels, standard deviation 4."""
    rng = np.random.default_rng(seed)
    coarse = [max(2, n // 12) for n in shape]
    fields = (rng.normal(0, 4, coarse).astype(np.float32) for _ in range(classes))
    zooms = [n / c for n, c in zip(shape, coarse, strict=True)]
    return np.stack([ndimage.zoom(field, zooms, order=3) for field in fields])


def ellipsoids(classes: int, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """One ellipsoid per class but the first, logits from -9 to 9 across its edge with noise, and the background."""
    rng = np.random.default_rng(seed)
    logits = np.empty((classes, *shape), dtype=np.float32)
    axes = np.ogrid[tuple(slice(0, n) for n in shape)]
    for channel in logits[1:]:
        centre, radius = rng.uniform(0.15, 0.85, 3) * shape, np.maximum(3, rng.uniform(0.03, 0.14, 3) * shape)
        distance = np.sqrt(sum(((a - c) / r) ** 2 for a, c, r in zip(axes, centre, radius, strict=True)))
        coarse = [max(1, n // 4) for n in shape]
        zooms = [n / c for n, c in zip(shape, coarse, strict=True)]
        noise = ndimage.zoom(rng.normal(0, 0.7, coarse).astype(np.float32), zooms, order=1)
        channel[...] = np.clip((1 - distance) * radius.min() * 2, -9, 9) - 1 + noise
    logits[0] = 1 - np.clip(logits[1:].max(axis=0), -9, 9)
    return logits


def grid_and_spec(classes: int, network: tuple[int, ...], image: tuple[int, ...]) -> tuple[CaseGrid, ModelSpec]:
    """A case without a rim of zeros, and a model with nnU-Net's defaults."""
    spacing = tuple(MODEL_SPACING * n / i for n, i in zip(network, image, strict=True))
    z, y, x = (slice(0, n) for n in image)
    grid = CaseGrid(shape=image, box=(z, y, x), spacing=spacing, target=(MODEL_SPACING,) * 3, resampled=network)

    def spline(order: int, *, is_segmentation: bool = False) -> Resampling:
        return Resampling(
            method="spline",
            is_segmentation=is_segmentation,
            order=order,
            order_z=0,
            separate_z="auto",
            anisotropy_threshold=3.0,
        )

    numbers = tuple(range(classes))
    spec = ModelSpec(
        dataset="Dataset000_WayBack",
        plans="nnUNetPlans",
        configuration="3d_fullres",
        trainer="nnUNetTrainer",
        channels=("CT",),
        previous_stage=None,
        patch=(64, 64, 64),
        spacing=(MODEL_SPACING,) * 3,
        transpose_forward=(0, 1, 2),
        transpose_backward=(0, 1, 2),
        normalization=(ZScore(masked=False),),
        resample_data=spline(3),
        resample_segmentation=spline(1, is_segmentation=True),
        resample_probabilities=spline(1),
        labels=Labels(decision="argmax", values=numbers, names={}, foreground=numbers[1:], ignore=None),
        reader="SimpleITKIO",
        file_ending=".nii.gz",
    )
    return grid, spec


def by_nnunet(logits: NDArray[np.float32], grid: CaseGrid, threads: int | None) -> NDArray[Any]:
    """nnU-Net's own way back; `threads` None is its default."""
    import torch
    from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    labels = LabelManager({f"label{n}" if n else "background": n for n in range(len(logits))}, None)
    resampling = partial(resample_data_or_seg_to_shape, is_seg=False, order=1, order_z=0, force_separate_z=None)
    properties = {
        "spacing": grid.spacing,
        "shape_after_cropping_and_before_resampling": grid.cropped,
        "shape_before_cropping": grid.shape,
        "bbox_used_for_cropping": [[s.start, s.stop] for s in grid.box],
    }
    result: NDArray[Any] = convert_predicted_logits_to_segmentation_with_correct_shape(
        torch.from_numpy(logits),
        SimpleNamespace(transpose_forward=[0, 1, 2], transpose_backward=[0, 1, 2]),
        SimpleNamespace(spacing=grid.target, resampling_fn_probabilities=resampling),
        labels,
        properties,
        False,
        *(() if threads is None else (threads,)),
    )
    return np.asarray(result)


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of one call, and its result."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def run(classes: int, make: Callable[..., NDArray[np.float32]], threads: int, repeats: int) -> dict[str, Any]:
    """Interleaved repeats of one kind of logits; after each of nnU-Net's runs five of ours, the fastest counts."""
    logits = make(classes, NETWORK, 0)
    grid, spec = grid_and_spec(classes, NETWORK, IMAGE)
    halves = logits.astype(np.float16)
    theirs, ours, ours_half = [], [], []
    expected = result = result_half = np.empty(0)
    segmentation_from_logits(logits, grid, spec, threads=threads)
    segmentation_from_logits(halves, grid, spec, threads=threads)
    for number in range(repeats):
        chosen = threads if number % 2 else None
        taken, expected = seconds(partial(by_nnunet, logits, grid, chosen))
        theirs.append(taken)
        mine = [seconds(lambda: segmentation_from_logits(logits, grid, spec, threads=threads)) for _ in range(5)]
        half = [seconds(lambda: segmentation_from_logits(halves, grid, spec, threads=threads)) for _ in range(5)]
        ours.append(min(taken for taken, _ in mine))
        ours_half.append(min(taken for taken, _ in half))
        result, result_half = mine[0][1], half[0][1]
    return {
        "logits": make.__name__,
        "classes": classes,
        "threads": threads,
        "nnunet_s": theirs,
        "trtbuild_s": ours,
        "trtbuild_float16_s": ours_half,
        "ratio": min(theirs) / min(ours),
        "ratio_of_each_turn": [a / b for a, b in zip(theirs, ours, strict=True)],
        "limit": LIMITS.get(classes),
        "voxels": int(expected.size),
        "differing": int(np.count_nonzero(result != expected)),
        "differing_float16": int(np.count_nonzero(result_half != expected)),
        "bytes_besides_logits": way_back_bytes(grid, spec, threads),
    }


def first_calls() -> dict[str, float]:
    """Seconds of the first call in a new process: with an empty cache of compiled code, and from that cache."""
    here = Path(__file__).resolve().parent
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "NUMBA_CACHE_DIR": cache, "PYTHONPATH": str(here)}

        def once() -> float:
            done = subprocess.run(
                [sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True, check=True
            )
            return float(done.stdout)

        return {"compiling_s": once(), "loading_s": min(once() for _ in range(3))}


def _table(machine: dict[str, Any], first: dict[str, float], rows: list[dict[str, Any]]) -> list[str]:
    voxels = " x ".join(map(str, IMAGE))
    lines = [
        "# The way back beside nnU-Net's",
        "",
        f"{machine['cpu']}, {machine['processors']} processors, {machine['date']}, commit {machine['commit']}, numpy "
        f"{machine['versions']['numpy']}, numba {machine['versions']['numba']}, scikit-image "
        f"{machine['versions']['scikit-image']}. Logits {' x '.join(map(str, NETWORK))} to an image of {voxels}, "
        f"{rows[0]['threads']} threads, interleaved runs, fastest of each side. First call of a new process: "
        f"{first['compiling_s']:.1f} s where the loops must be compiled, {first['loading_s']:.2f} s from the cache; not "
        "in the table.",
        "",
        "| logits | classes | nnU-Net, s | trtbuild, s | times faster (of each turn) | limit | float16 logits, s | "
        "differing voxels, float16 | MB besides the logits |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        turns = ", ".join(f"{ratio:.0f}" for ratio in row["ratio_of_each_turn"])
        lines.append(
            f"| {row['logits']} | {row['classes']} | {min(row['nnunet_s']):.2f} | {min(row['trtbuild_s']):.4f} | "
            f"{row['ratio']:.0f} ({turns}) | {row['limit'] or ''} | {min(row['trtbuild_float16_s']):.4f} | "
            f"{row['differing']}, {row['differing_float16']} of {row['voxels']} | "
            f"{row['bytes_besides_logits'] / 1e6:.1f} |"
        )
    return lines


@click.command()
@click.option("--classes", multiple=True, type=int, default=(3, 14, 60), show_default=True)
@click.option("--threads", type=int, default=2, show_default=True)
@click.option("--repeats", type=int, help="Turns of each kind of logits; by default fewer for more classes.")
def main(classes: tuple[int, ...], threads: int, repeats: int | None) -> None:
    """Measures, writes the record and prints the table."""
    machine, first = describe(), first_calls()
    rows = [
        run(number, make, threads, repeats or REPEATS.get(number, 2))
        for number in classes
        for make in (ellipsoids, smooth)
    ]
    results = Path(__file__).resolve().parent / "results"
    results.mkdir(exist_ok=True)
    records = [{"machine": machine}, {"first_call": first}, *rows]
    (results / "way_back.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    lines = _table(machine, first, rows)
    (results / "way_back.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
