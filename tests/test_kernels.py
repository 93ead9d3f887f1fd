"""The kernels, compiled for the host, against the functions that define them."""

from __future__ import annotations

import itertools
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from host_kernels import Memory, address, host_kernels, host_library
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    FIXED,
    BackCase,
    BlendCase,
    GatherCase,
    Host,
    ShiftCase,
    check_blend,
    check_gather,
    check_labels,
    check_probabilities,
    check_shift,
    check_status,
    same_bits,
)

from trtbuild.runtime.nvrtc import kernels_source
from trtbuild.stitch import launches
from trtbuild.stitch.launches import KERNELS, NO_TILE, Launch
from trtbuild.stitch.preparation_launches import PREPARATION_KERNELS

KINDS = st.sampled_from(["f32", "f16"])
SEEDS = st.integers(0, 2**32 - 1)
GEOMETRIES = st.one_of(
    st.none(),
    st.tuples(st.tuples(*[st.integers(1, 5)] * 3), st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 3))),
)
HOSTS = st.builds(lambda g, b: Host(kernels=host_kernels(), geometry=g, backwards=b), GEOMETRIES, st.booleans())


def sides(smallest: int, largest: int) -> st.SearchStrategy[tuple[int, int, int]]:
    return st.tuples(*[st.integers(smallest, largest)] * 3)


@given(
    host=HOSTS,
    case=st.builds(
        GatherCase,
        shape=sides(1, 13),
        patch=st.one_of(sides(1, 9), st.tuples(st.integers(1, 9), st.integers(1, 9))),
        channels=st.integers(1, 3),
        batch=st.integers(1, 9),
        kind=KINDS,
        step=st.sampled_from([0.5, 0.7, 1.0]),
        seed=SEEDS,
    ),
)
@settings(max_examples=80, deadline=None)
def test_gather_is_the_mirrored_window_of_the_padded_image(host: Host, case: GatherCase) -> None:
    check_gather(host, case)


@given(
    host=HOSTS,
    case=sides(1, 8).flatmap(
        lambda patch: st.builds(
            BlendCase,
            shape=st.tuples(*[st.integers(p, p + 6) for p in patch]),
            patch=st.just(patch),
            heads=st.integers(1, 4),
            windows=st.integers(1, 3),
            batch=st.integers(1, 8),
            kinds=st.tuples(KINDS, KINDS),
            seed=SEEDS,
        )
    ),
)
@settings(max_examples=100, deadline=None)
def test_blend_adds_as_add_window_bit_for_bit(host: Host, case: BlendCase) -> None:
    check_blend(host, case)


@given(
    host=HOSTS,
    case=st.builds(
        ShiftCase, heads=st.integers(1, 4), shape=sides(1, 9), slices=st.integers(0, 11), kind=KINDS, seed=SEEDS
    ),
)
@settings(max_examples=80, deadline=None)
def test_shift_moves_slices_to_the_front(host: Host, case: ShiftCase) -> None:
    check_shift(host, case)


@st.composite
def back_cases(draw: st.DrawFn, most_heads: int = 6) -> BackCase:
    resampled = draw(sides(1, 10))
    same = draw(st.booleans())
    regions = draw(st.booleans())
    margin = st.integers(0, 2)
    return BackCase(
        resampled=resampled,
        cropped=resampled if same else draw(sides(1, 17)),
        heads=draw(st.integers(1, most_heads)),
        regions=regions,
        ties=draw(st.booleans()),
        spacing=draw(st.sampled_from([(1.0, 1.0, 1.0), (5.0, 1.0, 1.0), (0.7, 0.7, 4.0)])),
        method=draw(st.sampled_from(["spline", "torch"])),
        order=draw(st.sampled_from([0, 1])),
        transpose=draw(st.sampled_from(list(itertools.permutations(range(3))))),
        padding=draw(st.tuples(*[st.tuples(margin, margin)] * 3)),
        parts=draw(st.integers(1, 4)),
        kind=draw(KINDS),
        out=draw(st.sampled_from(["u8", "u16"])),
        seed=draw(SEEDS),
    )


@given(host=HOSTS, case=back_cases())
@settings(max_examples=150, deadline=None)
def test_labels_are_those_of_the_way_back_in_every_voxel(host: Host, case: BackCase) -> None:
    check_labels(host, case)


@given(host=HOSTS, case=back_cases(), kind=KINDS)
@settings(max_examples=80, deadline=None)
def test_probabilities_are_those_of_the_way_back(host: Host, case: BackCase, kind: str) -> None:
    check_probabilities(host, replace(case, ties=False), "f16" if kind == "f16" else "f32")


@pytest.mark.parametrize("regions", [False, True], ids=["argmax", "regions"])
@pytest.mark.parametrize("heads", [1, 2, 105, 254, 300])
def test_any_number_of_classes(heads: int, regions: bool) -> None:
    out = "u8" if heads < 255 else "u16"
    case = BackCase(resampled=(3, 5, 4), cropped=(4, 7, 6), heads=heads, regions=regions, out=out, seed=heads)
    check_labels(Host(kernels=host_kernels()), case)
    check_probabilities(Host(kernels=host_kernels()), case)


def test_logits_of_any_size_give_finite_probabilities() -> None:
    for regions, expected in ((False, [0.0, 1.0, 0.0]), (True, [0.0, 1.0, 0.5])):
        values = np.array([-3e38, 3e38, 0], dtype=np.float32).reshape(3, 1, 1, 1)
        host = Host(kernels=host_kernels())
        taps = host.put(launches.packed_taps(np.array([0]), np.array([0]), np.array([0], dtype=np.float32)))
        out = host.put(np.full(3, np.nan, dtype=np.float32))
        logits = launches.Logits(address=address(host.put(values)), kind="f32", heads=3, origin_z=0, strides=(1, 1, 1))
        place = launches.TapAddresses(z=address(taps), y=address(taps), x=address(taps), shape=(1, 1, 1))
        host.run(launches.probabilities(logits, place, address(out), kind="f32", strides=(1, 1, 1, 1), regions=regions))
        np.testing.assert_array_equal(out, np.array(expected, dtype=np.float32))


def test_a_sum_that_is_not_finite_names_the_first_tile() -> None:
    check_status(Host(kernels=host_kernels()))
    check_status(Host(kernels=host_kernels(), backwards=True))


@pytest.mark.parametrize(("known", "expected"), [(3, 3), (7, 7), (9, 7)])
def test_a_tile_that_is_known_already_stays_if_it_is_smaller(known: int, expected: int) -> None:
    logits = np.array([1, np.nan], dtype=np.float32)
    assert blended(Host(kernels=host_kernels()), logits, np.float32, known)[1] == expected


@pytest.mark.parametrize("name", FIXED)
def test_the_order_of_threads_changes_nothing(name: str) -> None:
    FIXED[name](Host(kernels=host_kernels(), backwards=True))
    FIXED[name](Host(kernels=host_kernels(), geometry=((1, 1, 1), (1, 1, 1))))
    FIXED[name](Host(kernels=host_kernels(), geometry=((3, 2, 2), (7, 3, 2)), backwards=True))


def test_halves_round_as_numpys_do() -> None:
    """The shim's conversions, which stand for two instructions of a GPU: every half, and floats around every half."""
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    ascending = np.unique(every.astype(np.float32))
    middle = (ascending[1:] + ascending[:-1]) / 2
    values = np.concatenate([every, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)])
    values = np.append(values, [65519.9, 65520, 1e9, -1e9, np.inf]).astype(np.float32)
    host, line = Host(kernels=host_kernels()), (1, 1, values.size)
    image, out = host.put(values), host.put(np.zeros(values.size, dtype=np.float16))
    tile = host.put(np.zeros((1, 4), dtype=np.int32))
    places = (address(image), address(out), address(tile))
    host.run(launches.gather(*places, kind="f16", batch=1, channels=1, shape=line, offset=(0, 0, 0), patch=line))
    with np.errstate(over="ignore"):
        same_bits(out, values.astype(np.float16))
    back, _ = blended(host, every, np.float32)
    same_bits(back, every.astype(np.float32) + np.float32(0))


def blended(host: Host, logits: np.ndarray, total: type[np.generic], status: int = NO_TILE) -> tuple[np.ndarray, int]:
    """A row of logits of tile 7, added once with weight 1: the sums and the status."""
    ones, into = host.put(np.ones(logits.size, dtype=np.float32)), host.put(np.zeros(logits.size, dtype=total))
    tiles, flag = host.put(np.zeros((1, 4), dtype=np.int32)), host.put(np.array([status], dtype=np.int32))
    kinds = ("f16" if logits.dtype == np.float16 else "f32", "f16" if total is np.float16 else "f32")
    host.run(
        launches.blend(
            address(host.put(logits)),
            address(into),
            (address(ones),) * 3,
            address(tiles),
            address(flag),
            kinds=kinds,  # type: ignore[arg-type]
            first_tile=7,
            batch=1,
            heads=1,
            shape=(1, 1, logits.size),
            start=(0, 0, 0),
            patch=(1, 1, logits.size),
        )
    )
    return into, int(flag[0])


def test_more_rows_than_cuda_launches_blocks() -> None:
    launch = launches.gather(
        1, 1, 1, kind="f32", batch=70000, channels=2, shape=(1, 1, 1), offset=(0, 0, 0), patch=(800, 800, 1)
    )
    assert launch.grid == (1, launches.MAX_BLOCKS, launches.MAX_BLOCKS)


def test_one_thread_for_every_voxel() -> None:
    logits = launches.Logits(address=1, kind="f32", heads=1, origin_z=0, strides=(1, 1, 1))
    taps = launches.TapAddresses(z=1, y=1, x=1, shape=(70, 33, 65))
    launch = launches.labels(logits, taps, 1, 1, kind="u8", strides=(1, 1, 1), regions=False)
    assert tuple(np.multiply(launch.grid, launch.block)) == (96, 40, 70)


@pytest.mark.parametrize("start", [(-1, 0, 0), (0, 0, 2), (3, 0, 0)])
def test_a_window_outside_the_accumulator_is_refused(start: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="leave the accumulator"):
        launches.blend(
            1,
            1,
            (1, 1, 1),
            1,
            1,
            kinds=("f32", "f32"),
            first_tile=0,
            batch=1,
            heads=1,
            shape=(4, 4, 4),
            start=start,
            patch=(2, 4, 3),
        )


@pytest.mark.parametrize("slices", [0, 2**31])
def test_an_axis_that_cannot_be_counted_is_refused(slices: int) -> None:
    with pytest.raises((ValueError, OverflowError)):
        launches.shift(1, kind="f32", heads=1, shape=(1, 1, slices), slices=1)


def test_every_kernel_of_the_source_has_a_launch() -> None:
    source = kernels_source()
    by_macro = re.findall(r"^[A-Z]+\((\w+), [\w ]+(?:, \w+)?\)$", source, re.MULTILINE)
    plain = set(re.findall(r'extern "C" __global__ void (\w+)\(', source)) - {"name"}
    assert {*by_macro, *plain} == {*KERNELS, *PREPARATION_KERNELS}


def test_arguments_of_wrong_sizes_are_noticed() -> None:
    launch = Launch(kernel="shift_f32", grid=(1, 1, 1), block=(1, 1, 1), arguments=(np.uint64(1), np.int32(1)))
    with pytest.raises(AssertionError, match="takes"):
        host_kernels().run(launch)


def test_a_write_beside_an_array_is_noticed() -> None:
    memory = Memory()
    inside = memory.put(np.zeros(4, dtype=np.float32))
    memory.check()
    np.lib.stride_tricks.as_strided(inside, (5,))[4] = 1
    with pytest.raises(AssertionError, match="beside"):
        memory.check()


def test_no_compiler_is_a_clear_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(RuntimeError, match=r"g\+\+ is needed .* apt-get install"):
        host_library("// another source\n")
