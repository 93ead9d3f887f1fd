"""The kernels of the preparation, compiled for the host, against the functions that define them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from host_kernels import FLAGS, HostKernels, address, host_kernels, host_library
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import Host, same_bits
from preparation_checks import (
    HOWS,
    TYPES,
    Resized,
    box_of,
    check_convert,
    check_preparation,
    extremes_of,
    first_of,
    image_of,
    mask_of,
    moments,
    normalized,
    on_host,
    spots,
)
from scipy import ndimage
from specs import make_spec, spline

from trtbuild.runtime.nvrtc import kernels_source
from trtbuild.spec import CT, NoNormalization, Normalization, RescaleTo01, RGBTo01, ZScore
from trtbuild.stitch import preparation_launches as prep
from trtbuild.volume import prepared_from_array
from trtbuild.volume.preparation.crop import filled_nonzero_mask, nonzero_box
from trtbuild.volume.preparation.normalize import normalized_channel
from trtbuild.volume.resampling.axis import axis_matrix
from trtbuild.volume.resampling.image import coarse_axis, resample

SEEDS = st.integers(0, 2**32 - 1)
ORDERS = st.sampled_from(list(itertools.permutations(range(3))))
HOSTS = st.builds(
    lambda g, b: Host(kernels=host_kernels(), geometry=g, backwards=b),
    st.sampled_from([None, ((2, 2, 2), (3, 2, 2)), ((1, 1, 1), (1, 1, 1))]),
    st.booleans(),
)


def sides(smallest: int, largest: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*[st.integers(smallest, largest)] * 3)


# --- types and values


@given(host=HOSTS, kind=st.sampled_from(list(TYPES)), forward=ORDERS)
@settings(max_examples=40, deadline=None)
def test_numbers_become_the_floats_that_numpy_makes_of_them(
    host: Host, kind: prep.Stored, forward: tuple[int, ...]
) -> None:
    check_convert(host, kind, forward)


@given(host=HOSTS, shape=sides(1, 9), bad=st.integers(0, 3), forward=ORDERS, seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_the_first_slice_that_is_not_finite_is_found(
    host: Host, shape: tuple[int, int, int], bad: int, forward: tuple[int, ...], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(2, *shape)).astype(np.float32)
    for _ in range(bad):
        values[(1, *(int(rng.integers(n)) for n in shape))] = rng.choice([np.nan, np.inf, -np.inf])
    view, image = on_host(host, values, forward)
    hit = np.flatnonzero(~np.isfinite(view[1]).all(axis=(1, 2)))
    assert first_of(host, image.channel(0)) is None
    assert first_of(host, image.channel(1)) == (int(hit[0]) if len(hit) else None)


# --- crop and mask


@given(host=HOSTS, shape=sides(1, 9), channels=st.integers(1, 3), share=st.sampled_from([0.0, 0.005, 0.05, 1.0]),
       forward=ORDERS, seed=SEEDS)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_the_box_is_that_of_the_nonzero_voxels(
    host: Host, shape: tuple[int, int, int], channels: int, share: float, forward: tuple[int, ...], seed: int
) -> None:
    view, image = on_host(host, spots(seed, channels, shape, share), forward)
    assert box_of(host, image) == nonzero_box(view)


@given(host=HOSTS, shape=sides(1, 9), channels=st.integers(1, 2), share=st.floats(0.2, 0.9), forward=ORDERS, seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_the_mask_has_its_holes_filled(
    host: Host, shape: tuple[int, int, int], channels: int, share: float, forward: tuple[int, ...], seed: int
) -> None:
    view, image = on_host(host, spots(seed, channels, shape, share), forward)
    state = mask_of(host, image)
    np.testing.assert_array_equal(state != prep.OUTSIDE, filled_nonzero_mask(view))
    np.testing.assert_array_equal(state != prep.OUTSIDE, ndimage.binary_fill_holes((view != 0).any(axis=0)))


def test_a_winding_passage_is_outside() -> None:
    """A spiral needs a round per turn; its end is outside though no line from a face reaches it."""
    wall = np.ones((1, 3, 15, 15), dtype=np.float32)
    low, high, y, x = 1, 13, 1, 0
    while low < high:
        for stop in ((low, high), (high, high), (high, low), (low + 2, low)):
            while (y, x) != stop:
                wall[0, 1, y, x] = 0
                y, x = y + np.sign(stop[0] - y), x + np.sign(stop[1] - x)
        wall[0, 1, y, x] = 0
        low, high = low + 2, high - 2
    host = Host(kernels=host_kernels())
    _, image = on_host(host, wall)
    state = mask_of(host, image)
    assert (state[wall[0] == 0] == prep.OUTSIDE).sum() > 30
    np.testing.assert_array_equal(state != prep.OUTSIDE, ndimage.binary_fill_holes(wall[0] != 0))


# --- statistics and normalisation


@given(host=HOSTS, shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 30)), forward=ORDERS,
       masked=st.booleans(), seed=SEEDS)  # fmt: skip
@settings(max_examples=50, deadline=None)
def test_mean_and_deviation_are_those_of_float64(
    host: Host, shape: tuple[int, int, int], forward: tuple[int, ...], masked: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    view, image = on_host(host, rng.normal(1e4, 3, size=(2, *shape)).astype(np.float32), forward)
    mask = host.put(rng.integers(0, 3, size=view.shape[1:]).astype(np.uint8))
    inside = view[1][mask != prep.OUTSIDE if masked else np.ones(mask.shape, dtype=bool)].astype(np.float64)
    count, mean, deviation = moments(host, image.channel(1), address(mask) if masked else 0)
    assert count == inside.size
    if inside.size:
        assert mean == pytest.approx(inside.mean(), rel=1e-13)
        assert deviation == pytest.approx(inside.std(), rel=1e-9, abs=1e-9)


def test_many_columns_are_folded_more_than_once() -> None:
    values = np.arange(1, 70001, dtype=np.float64)
    host = Host(kernels=host_kernels())
    sums, scratch = host.put(values), host.put(np.zeros_like(values))
    steps = prep.folds(address(sums), address(scratch), len(values))
    for launch in steps:
        host.run(launch)
    assert len(steps) >= 3
    assert sums[0] == values.sum()


SCHEMES: dict[str, Normalization] = {
    "ct": CT(lower=-90.5, upper=120.25, mean=17.3, std=41.7),
    "ct without deviation": CT(lower=-90.5, upper=120.25, mean=17.3, std=0.0),
    "rescale": RescaleTo01(),
    "rgb": RGBTo01(),
    "none": NoNormalization(),
}


@pytest.mark.parametrize("forward", [(0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("name", SCHEMES)
def test_normalised_bit_for_bit(name: str, forward: tuple[int, ...]) -> None:
    rng = np.random.default_rng(4)
    values = rng.uniform(0, 255, (2, 5, 6, 7)) if name == "rgb" else rng.normal(0, 90, (2, 5, 6, 7))
    values[1, 0, 0, 0] = 0 if name == "rgb" else -0.0
    host = Host(kernels=host_kernels())
    view, image = on_host(host, values.astype(np.float32), forward)
    ours = normalized(host, image.channel(1), SCHEMES[name], 0)
    same_bits(ours, normalized_channel(view[1], SCHEMES[name], None, "channel"))


@pytest.mark.parametrize("masked", [False, True])
def test_a_z_score_differs_by_the_rounding_of_its_mean(masked: bool) -> None:
    host = Host(kernels=host_kernels())
    view, image = on_host(host, spots(5, 1, (9, 17, 15), 0.5), (1, 0, 2))
    mask = mask_of(host, image) if masked else None
    scheme = ZScore(masked=masked)
    ours = normalized(host, image, scheme, 0 if mask is None else address(mask))
    theirs = normalized_channel(view[0], scheme, None if mask is None else mask != prep.OUTSIDE, "channel")
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)  # float32 sums of NumPy against float64
    if mask is not None:
        same_bits(ours[mask == prep.OUTSIDE], view[0][mask == prep.OUTSIDE])


def test_an_empty_mask_and_a_constant_image_stay_finite() -> None:
    host = Host(kernels=host_kernels())
    view, image = on_host(host, np.full((1, 3, 4, 5), 7, dtype=np.float32))
    everywhere = host.put(np.full(image.shape, prep.OUTSIDE, dtype=np.uint8))
    same_bits(normalized(host, image, ZScore(masked=True), address(everywhere)), view[0])
    for scheme in (ZScore(masked=False), RescaleTo01()):
        same_bits(normalized(host, image, scheme, 0), np.zeros(image.shape, dtype=np.float32))


# --- ranges and resampling


@given(host=HOSTS, shape=sides(1, 8), forward=ORDERS, axis=st.sampled_from([None, 0, 1, 2]), seed=SEEDS)
@settings(max_examples=60, deadline=None)
def test_ranges_are_exact(
    host: Host, shape: tuple[int, int, int], forward: tuple[int, ...], axis: int | None, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    values = (rng.normal(size=(1, *shape)) * 10.0 ** rng.integers(-38, 38, size=(1, *shape))).astype(np.float32)
    view, image = on_host(host, values, forward)
    low, high = extremes_of(host, image, axis)
    across = tuple(a for a in range(3) if a != axis)
    np.testing.assert_array_equal(low, view[0].min(axis=across).reshape(-1))
    np.testing.assert_array_equal(high, view[0].max(axis=across).reshape(-1))


@given(name=st.sampled_from(list(HOWS)), host=HOSTS, old=sides(1, 11), new=sides(1, 15), seed=SEEDS)
@settings(max_examples=100, deadline=None)
def test_resampled_as_the_images_are(
    name: str, host: Host, old: tuple[int, int, int], new: tuple[int, int, int], seed: int
) -> None:
    how, spacing = HOWS[name]
    channel = np.random.default_rng(seed).normal(0, 5, size=old).astype(np.float32)
    target = (1.0, 1.0, 1.0)
    ours = Resized(host=host).resampled(channel, new, coarse_axis(spacing, target, how), how)
    theirs = resample(channel[None], new, spacing, target, how)[0]
    tolerance = 2e-6 * max(float(np.ptp(channel)), float(np.abs(channel).max()))  # two float32 sums of 40 products
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


def test_a_long_axis_reads_a_narrow_band() -> None:
    starts, entries = prep.packed_operator(axis_matrix(300, 411, 3))
    assert entries.shape[0] < 50
    assert starts.min() == 0
    assert int(starts.max()) + len(entries) == 300
    assert entries.sum(axis=0) == pytest.approx(1.0, abs=1e-6)


def test_resampling_equals_scipys_zoom_in_float64() -> None:
    channel = np.random.default_rng(9).normal(size=(60, 9, 70)).astype(np.float32)
    ours = Resized(host=Host(kernels=host_kernels())).resampled(channel, (83, 14, 41), None, spline(3))
    zoom = [n / o for n, o in zip((83, 14, 41), channel.shape, strict=True)]
    exact = ndimage.zoom(channel.astype(np.float64), zoom, order=3, mode="nearest", grid_mode=True)
    exact = np.clip(exact, channel.min(), channel.max())
    np.testing.assert_allclose(ours, exact, rtol=0, atol=2e-6 * float(np.ptp(channel)))


# --- all of it


@pytest.mark.parametrize("name", ["order 3", "separate z"])
@pytest.mark.parametrize(
    "schemes", [(ZScore(masked=True), CT(lower=-50, upper=150, mean=90, std=40)), (RescaleTo01(),)]
)
def test_a_whole_preparation(name: str, schemes: tuple[Normalization, ...]) -> None:
    how, spacing = HOWS[name]
    forward = (2, 0, 1)
    read_spacing = tuple(spacing[forward.index(axis)] for axis in range(3))
    spec = make_spec(
        channels=tuple(f"c{i}" for i in range(len(schemes))),
        normalization=schemes,
        resample_data=how,
        spacing=(0.8 * spacing[0], 1.3, 0.7),
        transpose_forward=forward,
        transpose_backward=(1, 2, 0),
    )
    values = np.zeros((len(schemes), 14, 16, 12), dtype=np.float32)
    values[:, 2:11, 3:16, 1:10] = spots(8, len(schemes), (9, 13, 9), 0.7)
    expected = prepared_from_array(values, read_spacing, spec)
    host = Host(kernels=host_kernels())
    view, image = on_host(host, values, forward)
    box = box_of(host, image)
    assert box == expected.grid.box
    cropped = image_of(view[(slice(None), *box)])
    mask = mask_of(host, cropped)
    grid, resized = expected.grid, Resized(host=host)
    for index, scheme in enumerate(schemes):
        masked = isinstance(scheme, ZScore) and scheme.masked
        channel = normalized(host, cropped.channel(index), scheme, address(mask) if masked else 0)
        ours = resized.resampled(channel, grid.resampled, coarse_axis(grid.spacing, grid.target, how), how)
        np.testing.assert_allclose(ours, expected.data[index], rtol=0, atol=2e-5)


# --- the checks can fail

MUTANTS = {
    "bytes without a sign": ("CONVERT(convert_i8, signed char)", "CONVERT(convert_i8, u8)"),
    "channels that lie over one another": ("out[c * voxels + into]", "out[into]"),
    "infinity is a number": (
        "!finite(image[place(v, z, y, x)])",
        "image[place(v, z, y, x)] != image[place(v, z, y, x)]",
    ),
    "the slice of NaN is any": ("lower(first, (int)z)", "first[0] = 0"),
    "the last slice is cut off": ("lower(box + 3 + axis, -ends[axis]);", "lower(box + 3 + axis, 1 - ends[axis]);"),
    "one channel of the mask": (
        "place(v, z, y, x)] != 0.0f;\n        const bool face",
        "place(v, z, y, x)] != 0.0f && c == 0;\n        const bool face",
    ),
    "faces are holes": ("hit ? FOREGROUND : face ? OUTSIDE : HOLE", "hit ? FOREGROUND : HOLE"),
    "forwards only": ("for (int turn = 0; turn < 2; ++turn)", "for (int turn = 0; turn < 1; ++turn)"),
    "walls leak": ("reached = voxel == OUTSIDE;", "reached |= voxel == OUTSIDE;"),
    "deviation not squared": ("power == 1 ? value : value * value", "value"),
    "mask ignored by the sums": ("if (mask && mask[", "if (false && mask["),
    "mask ignored by the scores": ("out[into] = mask && mask[into] == OUTSIDE ? value :", "out[into] ="),
    "the last sums are left out": ("for (i64 at = i; at < n; at += m)", "for (i64 at = i; at < n - m; at += m)"),
    "negative floats unordered": ("bits ^ ((bits >> 31) & 0x7FFFFFFF)", "bits"),
    "range of the wrong slice": ("axis == 0 ? z : axis == 1 ? y : x;", "axis == 0 ? y : axis == 1 ? z : x;"),
    "nothing is clipped": ("value = value < low ? low : value > high ? high : value;", ""),
    "entries of the wrong stride": ("entries[(i64)k * rows + i]", "entries[(i64)i * band + k]"),
    "start missing": ("line + starts[i] * step;", "line;"),
    "step of the wrong axis": ("axis == 0 ? slice : axis == 1 ? row : 1", "axis == 0 ? slice : 1"),
}


def test_the_checks_pass_without_a_change() -> None:
    check_preparation(Host(kernels=host_kernels()))


@pytest.mark.parametrize("name", MUTANTS)
def test_a_change_is_found(name: str) -> None:
    old, new = MUTANTS[name]
    source = kernels_source()
    assert source.count(old) == 1, "the source has changed: the mutant must follow"
    library = host_library(source.replace(old, new), (*FLAGS, "-O0", "-w"))
    with pytest.raises(AssertionError):
        check_preparation(Host(kernels=HostKernels(library)))
