"""The way back slab by slab, in half precision, by torch's rules and in blocks, against nnU-Net and the whole."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from specs import make_spec, spline
from test_back import REGIONS, grid_for, many, reference

from trtbuild.errors import ModelError
from trtbuild.spec import Labels, ModelSpec, Resampling
from trtbuild.volume import CaseGrid
from trtbuild.volume.back import (
    empty_segmentation,
    first_needed,
    label_slices,
    probabilities_bytes,
    probabilities_from_logits,
    probability_block,
    ready_slices,
    segmentation_from_logits,
    way_back,
    way_back_bytes,
)

CLOSE = 1e-5
"""Values of this relative difference may change places: float32 against float64, three interpolations."""

CASES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "finer": ((21, 26, 37), (31, 50, 71), {}),
    "coarser, a box along x reads more than 16 voxels": ((40, 29, 90), (9, 13, 17), {}),
    "separate z": ((7, 20, 18), (33, 31, 27), {"spacing": (5.0, 1.0, 1.0)}),
    "separate x": ((20, 18, 7), (31, 27, 33), {"spacing": (1.0, 1.0, 5.0)}),
    "one slice": ((1, 20, 35), (1, 31, 47), {"spacing": (999.0, 1.0, 1.0)}),
    "one column": ((9, 8, 1), (13, 9, 1), {}),
    "no resampling": ((9, 11, 16), (9, 11, 16), {}),
}
TORCH = Resampling(
    method="torch", is_segmentation=False, order=1, order_z=0, separate_z="auto", anisotropy_threshold=3.0
)


def rough_and_smooth(heads: int, shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Logits with flat parts, where one class is far above the others, and parts where many compete."""
    rng = np.random.default_rng(seed)
    coarse = [max(1, n // 6) for n in shape]
    logits = np.empty((heads, *shape), dtype=np.float32)
    for channel in logits:
        blobs = ndimage.zoom(rng.normal(0, 6, coarse), [n / c for n, c in zip(shape, coarse, strict=True)], order=1)
        channel[...] = np.clip(blobs, -8, 8) + rng.normal(0, 0.3, shape)
    return logits


def resampled_by_nnunet(logits: NDArray[Any], grid: CaseGrid, how: Resampling) -> NDArray[np.float64]:
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

    if how.method == "torch":
        result = resample_torch_fornnunet(logits.astype(np.float32), grid.cropped, grid.target, grid.spacing)
        return np.asarray(result, dtype=np.float64)
    wide = logits.astype(np.float64)
    orders = {"order": how.order, "order_z": how.order_z, "force_separate_z": None}
    shape = np.array(grid.cropped)
    return np.asarray(resample_data_or_seg_to_shape(wide, shape, grid.target, grid.spacing, **orders))


def assert_labels_fit(ours: NDArray[Any], values: NDArray[np.float64], spec: ModelSpec, grid: CaseGrid) -> None:
    """Every label is one that float64 values allow: its value is the largest, or (regions) above 0, but for `CLOSE`."""
    inside = ours.transpose(np.argsort(spec.transpose_backward))[grid.box]
    scale = CLOSE * np.abs(values).max()
    if spec.labels.decision == "argmax":
        head = np.searchsorted(spec.labels.values, inside)
        assert (values.max(0) - np.take_along_axis(values, head[None], 0)[0]).max() <= scale
        return
    sure = (np.abs(values) > scale).all(0)
    expected = np.zeros(grid.cropped, dtype=np.int64)
    for value, channel in zip(spec.labels.values, values, strict=True):
        expected[channel > 0] = value
    np.testing.assert_array_equal(inside[sure], expected[sure])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("labels", [many(14), REGIONS], ids=["14 labels", "regions"])
@pytest.mark.parametrize(
    "how",
    [spline(1), spline(1, order_z=1), spline(0), spline(0, order_z=1), TORCH],
    ids=["linear", "linear, z too", "nearest", "nearest, z linear", "torch"],
)
def test_labels_are_nnunets_for_every_linear_way(case: str, kind: str, labels: Labels, how: Resampling) -> None:
    resampled, cropped, spacing = CASES[case]
    spec = make_spec(
        labels=labels, resample_probabilities=how, transpose_forward=(2, 0, 1), transpose_backward=(1, 2, 0)
    )
    grid = grid_for(resampled, cropped, **spacing)
    logits = rough_and_smooth(labels.heads, resampled, seed=9).astype(kind)
    assert way_back(grid, spec).streams
    ours = segmentation_from_logits(logits, grid, spec, threads=2)
    assert_labels_fit(ours, resampled_by_nnunet(logits, grid, how), spec, grid)


@given(
    resampled=st.tuples(*[st.integers(1, 24)] * 3),
    cropped=st.tuples(*[st.integers(1, 40)] * 3),
    heads=st.integers(1, 40),
    regions=st.booleans(),
    half=st.booleans(),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_labels_fit_float64_for_any_shape(resampled, cropped, heads, regions, half, seed) -> None:  # type: ignore[no-untyped-def]
    labels = replace(many(heads), decision="regions", values=tuple(range(1, heads + 1))) if regions else many(heads)
    spec, grid = make_spec(labels=labels), grid_for(resampled, cropped, target=(1.0, 1.0, 1.0))
    logits = rough_and_smooth(heads, resampled, seed).astype(np.float16 if half else np.float32)
    ours = segmentation_from_logits(logits, grid, spec, threads=1)
    assert_labels_fit(ours, resampled_by_nnunet(logits, grid, spec.resample_probabilities), spec, grid)


def test_300_labels_are_nnunets() -> None:
    labels = replace(many(300), values=(*range(299), 65535))
    spec, grid = make_spec(labels=labels), grid_for((6, 7, 8), (9, 13, 11))
    logits = np.random.default_rng(2).normal(size=(300, 6, 7, 8)).astype(np.float32)
    logits[299] += 1
    ours = segmentation_from_logits(logits, grid, spec, threads=2)
    assert ours.dtype == np.uint16
    np.testing.assert_array_equal(ours, reference(logits, grid, spec)[0])
    assert ours.max() == 65535


def test_a_label_beyond_uint16_is_refused() -> None:
    with pytest.raises(ModelError, match="65535"):
        way_back(grid_for((2, 2, 2), (2, 2, 2)), make_spec(labels=replace(many(3), values=(0, 1, 65536))))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("how", [spline(1), spline(3), TORCH], ids=["linear", "cubic", "torch"])
def test_slab_by_slab_from_a_rolling_buffer_gives_the_same_bytes(case: str, kind: str, how: Resampling) -> None:
    resampled, cropped, spacing = CASES[case]
    spec, grid = make_spec(labels=many(4), resample_probabilities=how), grid_for(resampled, cropped, **spacing)
    logits = rough_and_smooth(4, resampled, seed=1).astype(kind)
    way, full = way_back(grid, spec), empty_segmentation(grid, spec)
    out, done, base, rng = full[grid.box], 0, 0, np.random.default_rng(4)
    finished = 0
    while finished < resampled[0]:
        finished = min(resampled[0], finished + int(rng.integers(1, 6)))
        buffer = np.full((4, finished - base + 3, resampled[1] + 2, resampled[2]), np.nan, dtype=kind)
        buffer[:, 2:-1, 1:-1] = logits[:, base:finished]  # a view with padding on all sides but x
        ready = ready_slices(way, finished)
        label_slices(buffer[:, 2:-1, 1:-1], base, way, out, done, ready, 2)
        done, base = ready, min(first_needed(way, ready), finished)
    assert done == cropped[0]
    assert full.tobytes() == segmentation_from_logits(logits, grid, spec, threads=1).tobytes()
    assert base > 0 or not way.streams or resampled[0] == 1


def test_logits_that_lack_a_needed_slice_or_do_not_fit_are_refused() -> None:
    spec, grid = make_spec(labels=many(3)), grid_for((10, 8, 8), (20, 8, 8))
    way, out = way_back(grid, spec), empty_segmentation(grid, spec)[grid.box]
    logits = np.zeros((3, 10, 8, 8), dtype=np.float32)
    ready = ready_slices(way, 5)
    label_slices(logits[:, :5], 0, way, out, 0, ready, 1)
    with pytest.raises(ModelError, match="lack"):
        label_slices(logits[:, :5], 0, way, out, 0, ready + 1, 1)
    with pytest.raises(ModelError, match="lack"):
        label_slices(logits[:, 5:], 5, way, out, ready - 1, 20, 1)
    with pytest.raises(ModelError, match="fit"):
        label_slices(logits[:2], 0, way, out, 0, 1, 1)
    with pytest.raises(ModelError, match="fit"):
        label_slices(logits[:, :, 1:], 0, way, out, 0, 1, 1)
    with pytest.raises(ModelError, match="rows"):
        label_slices(np.zeros((3, 10, 8, 16), dtype=np.float32)[..., ::2], 0, way, out, 0, 1, 1)
    with pytest.raises(ModelError, match="rows"):
        label_slices(logits[:, ::-1], 0, way, out, 0, 1, 1)
    with pytest.raises(ModelError, match="type"):
        label_slices(logits.astype(np.float64), 0, way, out, 0, 1, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize("turn", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_the_labels_may_lie_in_memory_in_any_order(turn: tuple[int, int, int]) -> None:
    spec, grid = make_spec(labels=many(5)), grid_for((9, 10, 11), (17, 13, 19))
    way, logits = way_back(grid, spec), rough_and_smooth(5, (9, 10, 11), seed=3)
    expected = np.zeros(grid.cropped, dtype=np.uint8)
    label_slices(logits, 0, way, expected, 0, 17, 1)
    memory = np.zeros([2 * grid.cropped[axis] for axis in turn], dtype=np.uint8)
    view = memory[::-2, ::2, 1::2].transpose(np.argsort(turn))
    label_slices(logits, 0, way, view, 0, 17, 3)
    np.testing.assert_array_equal(view, expected)


def test_without_resampling_the_grids_must_be_equal() -> None:
    none = replace(TORCH, method="none")
    spec = make_spec(labels=many(3), resample_probabilities=none)
    logits = rough_and_smooth(3, (5, 6, 7), seed=5)
    ours = segmentation_from_logits(logits, grid_for((5, 6, 7), (5, 6, 7)), spec, threads=1)
    np.testing.assert_array_equal(ours[2:7, 2:8, 2:9], logits.argmax(0))
    with pytest.raises(ModelError, match="no_resampling_hack"):
        way_back(grid_for((5, 6, 7), (5, 6, 8)), spec)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("labels", [many(3), REGIONS], ids=["3 labels", "regions"])
@pytest.mark.parametrize("how", [spline(1), spline(3), spline(2, order_z=3), TORCH], ids=str)
@pytest.mark.parametrize("kind", ["float32", "float16"])
def test_blocks_of_probabilities_are_those_of_the_whole(case: str, labels: Labels, how: Resampling, kind: str) -> None:
    resampled, cropped, spacing = CASES[case]
    spec, grid = make_spec(labels=labels, resample_probabilities=how), grid_for(resampled, cropped, **spacing)
    logits = np.random.default_rng(6).normal(0, 3, size=(labels.heads, *resampled)).astype(kind)
    values = resampled_by_nnunet(logits, grid, how)
    soft = 1 / (1 + np.exp(-values))
    if labels.decision == "argmax":
        soft = np.exp(values - values.max(0))
        soft /= soft.sum(0)
    way = way_back(grid, spec)
    for part in (slice(None), slice(0, 1), slice(2, 30)):
        block = (part, slice(None), slice(1, None)) if part.start else (part, slice(0, 9), slice(None, -1))
        ours = probability_block(logits, way, block, 2)
        assert ours.dtype == np.float32
        np.testing.assert_allclose(ours, soft[(slice(None), *block)], atol=2e-5)
    whole = probabilities_from_logits(logits, grid, spec, threads=2)
    np.testing.assert_allclose(whole[(slice(None), *grid.box)], soft, atol=2e-5)


def test_the_bytes_that_are_stated_are_those_that_numpy_takes() -> None:
    for how, kind in [(spline(1), "float32"), (spline(1), "float16"), (spline(3), "float32"), (spline(3), "float16")]:
        spec = make_spec(labels=many(12), resample_probabilities=how)
        grid = grid_for((20, 60, 60), (60, 140, 130))
        logits = np.zeros((12, 20, 60, 60), dtype=kind)
        for work, stated in [
            (segmentation_from_logits, way_back_bytes),
            (probabilities_from_logits, probabilities_bytes),
        ]:
            work(logits, grid, spec, threads=1)  # compiles and builds the matrices
            tracemalloc.start()
            work(logits, grid, spec, threads=1)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert 0.8 * stated(grid, spec, 1) < peak < 1.05 * stated(grid, spec, 1) + 2**18, (how, kind, work)


def test_a_case_compiles_nothing_after_the_loops_are_loaded() -> None:
    from trtbuild.runtime.warm import loops_loading
    from trtbuild.stitch import accumulate
    from trtbuild.volume.back import interpolate

    for labels in (many(5), many(300), REGIONS):
        spec = make_spec(labels=labels)
        with loops_loading(spec):
            pass
        loops = [interpolate.label_slab, interpolate.value_slab, accumulate._add_window, accumulate._add_half_window]
        before = [len(loop.signatures) for loop in loops]
        for case, kind in [(case, kind) for case in CASES for kind in ("float32", "float16")]:
            resampled, cropped, spacing = CASES[case]
            grid = grid_for(resampled, cropped, **spacing)
            total = accumulate.empty_accumulator((labels.heads, *resampled), kind)  # type: ignore[arg-type]
            weights = tuple(np.ones(n, dtype=np.float32) for n in resampled)
            window = np.zeros((labels.heads, *resampled), dtype=np.float32)
            accumulate.add_window(total, window, weights, (0, 0, 0), (False, True, False))  # type: ignore[arg-type]
            segmentation_from_logits(total, grid, spec, threads=2)
            segmentation_from_logits(total[:, :, ::1], grid, spec, threads=2)
            probability_block(total, way_back(grid, spec), (slice(0, 1), slice(None), slice(None)))
        assert [len(loop.signatures) for loop in loops] == before


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["generic", "haswell"])
def test_the_loops_give_the_same_labels_on_a_simpler_processor(processor: str, tmp_path: Any) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "import numpy as np, hashlib; from test_back_streamed import *\n"
        "for case in CASES:\n"
        "  for kind in ('float32', 'float16'):\n"
        "    resampled, cropped, spacing = CASES[case]\n"
        "    logits = rough_and_smooth(9, resampled, seed=8).astype(kind)\n"
        "    grid, spec = grid_for(resampled, cropped, **spacing), make_spec(labels=many(9))\n"
        "    labels = segmentation_from_logits(logits, grid, spec, threads=1)\n"
        "    print(hashlib.sha256(labels.tobytes()).hexdigest())\n"
    )
    outputs = []
    for changes in ({}, {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **changes}
        )
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]
