"""Histograms beside np.histogram; entropy beside the golden values and beside its definition in plain Python."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild_calibration import BINS, CalibrationError, Histogram, scale_of, threshold, thresholds
from trtbuild_calibration import histogram as module
from trtbuild_calibration.histogram import EXCESS, add

GOLDEN = json.loads((Path(__file__).parent / "data/entropy_golden.json").read_text())


def histogram_of(values: np.ndarray) -> Histogram:
    top = float(np.abs(values).max())
    counts = np.zeros(BINS, np.int64)
    add(values.astype(np.float32), top, counts)
    return Histogram(top=top, counts=counts)


def numpy_counts(values: np.ndarray, top: float) -> np.ndarray:
    return np.histogram(np.abs(values.astype(np.float64)), BINS, (0, top))[0]


def views(values: np.ndarray) -> dict[str, np.ndarray]:
    """The same shape of memory seen in many ways."""
    cube = values.reshape(4, 6, 10, -1)
    return {
        "contiguous": cube,
        "fortran": np.asfortranarray(cube),
        "transposed": cube.transpose(2, 0, 3, 1),
        "every second": cube[:, ::2, :, ::2],
        "backwards": cube[::-1, :, ::-1],
        "broadcast": np.broadcast_to(cube[:, :1], cube.shape),
        "one value": cube[0, 0, 0, :1],
        "no axis": cube[1, 2, 3, 0],
        "strided line": values[::3],
    }


@pytest.mark.parametrize("kind", list(views(np.zeros(240, np.float32))))
@pytest.mark.parametrize("threads", [1, 2])
def test_counts_are_numpys_whatever_the_strides(kind: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 50)
    values = np.asarray(views(np.random.default_rng(0).standard_normal(4800).astype(np.float32))[kind])
    top = float(np.abs(values).max())
    counts = np.full(BINS, 3, np.int64)
    assert add(values, top, counts, threads=threads) == top
    np.testing.assert_array_equal(counts - 3, numpy_counts(values, top))


@given(
    values=st.lists(st.floats(0, 1, width=32), min_size=1, max_size=60),
    scale=st.floats(2.0**-100, 2.0**100, width=32),
)
@settings(max_examples=300, deadline=None)
def test_counts_are_numpys_for_any_float32(values: list[float], scale: float) -> None:
    array = (np.array(values, np.float32) * np.float32(scale)).astype(np.float32)
    top = float(array.max())
    if top == 0 or not math.isfinite(top):
        return
    edges = (np.arange(BINS + 1) * (top / BINS)).astype(np.float32)
    around = np.concatenate([edges, np.nextafter(edges, np.float32(0)), np.nextafter(edges, np.float32(np.inf)), array])
    around = around[around <= top]
    counts = np.zeros(BINS, np.int64)
    add(around, top, counts)
    np.testing.assert_array_equal(counts, numpy_counts(around, top))


def test_a_large_tensor_counts_the_same_in_two_threads() -> None:
    values = np.random.default_rng(1).standard_normal((3, 1 << 20)).astype(np.float32)
    top = float(np.abs(values).max())
    one, two = np.zeros(BINS, np.int64), np.zeros(BINS, np.int64)
    add(values, top, one, threads=1)
    add(values, top, two, threads=2)
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, numpy_counts(values, top))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("threads", [1, 2])
def test_values_that_are_not_finite_are_refused(bad: float, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART", 5)
    for place in (0, 9, 18):
        values = np.ones(19, np.float32)
        values[place] = bad
        with pytest.raises(CalibrationError, match="NaN or infinite"):
            add(values, 1.0, np.zeros(BINS, np.int64), threads=threads)


def test_values_above_the_top_are_bounded() -> None:
    counts = np.zeros(BINS, np.int64)
    add(np.array([1, 1 + EXCESS / 2], np.float32), 1.0, counts)
    assert counts[-1] == counts.sum() == 2
    with pytest.raises(CalibrationError, match="larger than in the first pass"):
        add(np.array([1 + 2 * EXCESS], np.float32), 1.0, counts)
    add(np.zeros(5, np.float32), 0.0, counts)
    assert counts[0] == 5
    with pytest.raises(CalibrationError, match="larger than in the first pass"):
        add(np.array([1e-30], np.float32), 0.0, counts)
    assert add(np.zeros((3, 0), np.float32), 1.0, counts) == 0
    with pytest.raises(CalibrationError, match="another type"):
        add(np.zeros(5), 1.0, counts)


def test_a_malformed_histogram_is_refused() -> None:
    for counts in (np.zeros(10, np.int64), np.zeros(BINS), np.full(BINS, -1, np.int64)):
        with pytest.raises(CalibrationError, match="malformed"):
            Histogram(top=1.0, counts=counts)
    for top in (-1.0, math.nan, math.inf):
        with pytest.raises(CalibrationError, match="wrong top"):
            Histogram(top=top, counts=np.zeros(BINS, np.int64))


@pytest.mark.parametrize("number", range(len(GOLDEN)))
def test_entropy_equals_the_golden_values(number: int) -> None:
    golden = GOLDEN[number]
    found = threshold(Histogram(top=golden["top"], counts=np.array(golden["counts"], np.int64)), "entropy")
    assert found.bins == golden["bins"]
    assert found.amax == pytest.approx(golden["threshold"], rel=1e-9, abs=0)


def test_there_are_fifty_golden_values() -> None:
    assert len(GOLDEN) == 50


def brute_entropy(counts: np.ndarray, first: int, levels: int) -> list[float]:
    """The definition, step by step, in float64: one divergence per candidate."""
    found = []
    for i in range(first, len(counts) + 1):
        p = counts[:i].astype(np.float64)
        p[-1] += counts[i:].sum()
        q = np.zeros(i)
        edges = np.linspace(0, i, levels + 1)
        for low, high in itertools.pairwise(edges):
            inside = [k for k in range(i) if low <= k < high]
            filled = [k for k in inside if counts[k] > 0]
            for k in filled:
                q[k] = sum(int(counts[j]) for j in inside) / len(filled)
        if ((q == 0) & (p > 0)).any():
            found.append(math.inf)
            continue
        p, q = p / p.sum(), q / q.sum()
        held = p > 0
        found.append(float((p[held] * np.log(p[held] / q[held])).sum()))
    return found


@given(counts=st.lists(st.integers(0, 50) | st.just(0) | st.just(0), min_size=8, max_size=40))
@settings(max_examples=300, deadline=None)
def test_divergences_equal_the_definition(counts: list[int]) -> None:
    from trtbuild_calibration.kernels import divergences

    array = np.array([*counts, 1], np.int64)  # the largest value lies in the last bin
    found = divergences(array, 8, 8)
    np.testing.assert_allclose(found, brute_entropy(array, 8, 8), rtol=1e-12, atol=1e-12)


def test_entropy_of_a_whole_histogram_equals_the_definition() -> None:
    """Candidates of the real size, at a few places."""
    values = np.random.default_rng(3).standard_normal(100_000)
    histogram = histogram_of(np.append(values, 9.0))
    from trtbuild_calibration.kernels import divergences

    found = divergences(histogram.counts, 128, 128)
    best = int(np.argmin(found)) + 128
    for i in (128, 129, 500, best, 1999, 2048):
        counts = histogram.counts.copy()
        p = counts[:i].astype(np.float64)
        p[-1] += counts[i:].sum()
        level = np.searchsorted(np.linspace(0, i, 129), np.arange(i), "right") - 1
        mass = np.bincount(level, counts[:i], 128)
        filled = np.bincount(level, counts[:i] > 0, 128)
        q = np.where(counts[:i] > 0, mass[level] / np.maximum(filled[level], 1), 0)
        if ((q == 0) & (p > 0)).any():
            assert found[i - 128] == np.inf
            continue
        p, q = p / p.sum(), q / q.sum()
        expected = (p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum()
        assert found[i - 128] == pytest.approx(expected, rel=1e-10)
    assert threshold(histogram, "entropy").amax == pytest.approx((best + 0.5) * histogram.top / 2048)
    assert threshold(histogram, "entropy").amax < 9.0


def test_an_outlier_is_clipped_by_entropy_and_kept_by_minmax() -> None:
    values = np.random.default_rng(0).standard_normal(200_000)
    histogram = histogram_of(np.append(values, 30.0))
    found = thresholds(histogram)
    assert found["entropy"].amax < 6
    assert found["minmax"].amax == 30.0
    assert found["percentile"].amax == pytest.approx(np.quantile(np.abs(values), 0.9999), abs=2 * 30 / BINS)


def test_a_tensor_of_one_value_keeps_it() -> None:
    for method in ("entropy", "percentile", "minmax"):
        assert threshold(histogram_of(np.full(100, -2.5)), method).amax == 2.5


def test_a_tensor_of_zeros_has_scale_one() -> None:
    histogram = histogram_of(np.zeros(100))
    for found in thresholds(histogram).values():
        assert (found.amax, found.bins) == (0.0, 0)
        assert scale_of(found.amax) == 1.0
    assert scale_of(127.0) == 1.0
    assert scale_of(1e-44) == 1.0  # amax / 127 would be 0 in float32
    assert scale_of(2.54) == 2.54 / 127


@given(
    places=st.lists(st.integers(0, BINS - 1), min_size=1, max_size=200),
    percentile=st.sampled_from([0.001, 1, 50, 99, 99.9, 99.99, 100]),
)
@settings(max_examples=30, deadline=None)
def test_the_percentile_is_an_upper_edge(places: list[int], percentile: float) -> None:
    counts = np.bincount(places, minlength=BINS)
    histogram = Histogram(top=8.0, counts=counts)
    found = threshold(histogram, "percentile", percentile=percentile)
    total = len(places)
    assert found.amax == 8.0 * found.bins / BINS
    assert counts[: found.bins].sum() >= percentile / 100 * total * (1 - 1e-12)
    assert counts[: found.bins - 1].sum() < math.ceil(percentile / 100 * total)


def test_what_has_no_threshold_is_refused() -> None:
    empty = Histogram(top=1.0, counts=np.zeros(BINS, np.int64))
    for method in ("entropy", "percentile", "minmax"):
        with pytest.raises(CalibrationError, match="empty"):
            threshold(empty, method)
    with pytest.raises(CalibrationError, match="no such method"):
        threshold(histogram_of(np.ones(3)), "mse")
    for percentile in (0, -1, 100.1, math.nan):
        with pytest.raises(CalibrationError, match="out of range"):
            threshold(histogram_of(np.ones(3)), "percentile", percentile=percentile)


def test_without_a_folder_for_its_cache_numba_compiles_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    from trtbuild_calibration import kernels

    def njit(**options):
        if "cache" in options:
            raise RuntimeError("cannot cache function 'f': no locator available for file 'x'")
        return lambda function: function

    monkeypatch.setattr(kernels, "njit", njit)
    with pytest.warns(RuntimeWarning, match="NUMBA_CACHE_DIR"):
        assert kernels._compiled(abs) is abs
    monkeypatch.setattr(kernels, "njit", lambda **options: lambda function: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        kernels._compiled(abs)
