"""Each kernel against the function that defines it: one check per kernel, a case in, AssertionError out.

The property tests draw cases, the mutants and the sanitizers take fixed ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from host_kernels import HostKernels, Memory, address
from numpy.typing import NDArray
from specs import make_spec, spline

from trtbuild.runtime.tiles import mirrored, padded, patch3, tile_plan, window_from_image
from trtbuild.spec import Labels, ModelSpec, Resampling, ZScore
from trtbuild.stitch import launches
from trtbuild.stitch.accumulate import add_window, empty_accumulator, shift_down
from trtbuild.stitch.launches import NO_TILE, Launch, Three
from trtbuild.volume import CaseGrid
from trtbuild.volume.back import empty_segmentation, first_needed, label_slices, probability_block, way_back
from trtbuild.volume.back.taps import Taps

Kind = Literal["f32", "f16"]
DTYPES: dict[str, type[Any]] = {"f32": np.float32, "f16": np.float16, "u8": np.uint8, "u16": np.uint16}
MOST_TILES = 24
ACCUMULATORS: dict[str, Any] = {"f32": "float32", "f16": "float16"}


@dataclass(kw_only=True)
class Host:
    """Where a check runs: the kernels, memory for its arrays, and how the threads are ordered."""

    kernels: HostKernels
    exact: bool = False
    backwards: bool = False
    geometry: tuple[Three, Three] | None = None
    memory: Memory = field(init=False)

    def __post_init__(self) -> None:
        self.memory = Memory(exact=self.exact)

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        return self.memory.put(array)

    def run(self, launch: Launch) -> None:
        grid, block = self.geometry or (launch.grid, launch.block)
        same = Launch(kernel=launch.kernel, grid=grid, block=block, arguments=launch.arguments)
        self.kernels.run(same, backwards=self.backwards)
        self.memory.check()


def same_bits(ours: NDArray[Any], expected: NDArray[Any]) -> None:
    """Equal in every bit: 0 and -0 are two values, NaN is one."""
    word = {1: np.uint8, 2: np.uint16, 4: np.uint32}[expected.itemsize]
    np.testing.assert_array_equal(np.ascontiguousarray(ours).view(word), np.ascontiguousarray(expected).view(word))


def triple(values: tuple[int, ...]) -> Three:
    z, y, x = values
    return z, y, x


# --- gather


@dataclass(frozen=True, kw_only=True)
class GatherCase:
    shape: Three
    patch: tuple[int, ...]
    channels: int
    batch: int
    kind: Kind = "f32"
    step: float = 0.5
    seed: int = 0


def check_gather(host: Host, case: GatherCase) -> None:
    """Tiles of a case, with any flips, in batches of which the last may be a rest."""
    rng = np.random.default_rng(case.seed)
    spec = make_spec(
        patch=case.patch,
        spacing=(1.0,) * len(case.patch),
        channels=("c",) * case.channels,
        normalization=(ZScore(masked=False),) * case.channels,
    )
    image = rng.normal(size=(case.channels, *case.shape)).astype(np.float32)
    image[0, 0, 0, 0] = -0.0
    plan = tile_plan(case.shape, spec, tuple(range(len(case.patch))), case.step)
    tiles, size = list(plan), patch3(spec)
    tiles = [tiles[i] for i in sorted(rng.choice(len(tiles), size=min(len(tiles), MOST_TILES), replace=False))]
    offset = triple(tuple(part.start for part in plan.grid.inside))
    on_device = host.put(image)
    packed = host.put(np.array([launches.packed_tile(t.start, t.flip) for t in tiles], dtype=np.int32))
    whole = padded(image, plan.grid)
    for first in range(0, len(tiles), case.batch):
        group = tiles[first : first + case.batch]
        out = host.put(np.full((len(group), case.channels, *size), np.nan, dtype=DTYPES[case.kind]))
        host.run(
            launches.gather(
                address(on_device),
                address(out),
                address(packed[first:]),
                kind=case.kind,
                batch=len(group),
                channels=case.channels,
                shape=case.shape,
                offset=offset,
                patch=size,
            )
        )
        expected = np.stack([mirrored(window_from_image(whole, t.start, size), t.flip) for t in group])
        same_bits(out, expected.astype(DTYPES[case.kind]))


# --- blend


@dataclass(frozen=True, kw_only=True)
class BlendCase:
    shape: Three
    patch: Three
    heads: int
    windows: int
    batch: int
    kinds: tuple[Kind, Kind] = ("f32", "f32")
    seed: int = 0


def check_blend(host: Host, case: BlendCase) -> None:
    """Windows at random places of the accumulator, each a batch of tiles with random flips: bit for bit `add_window`,
    and within rounding the float64 sum."""
    rng = np.random.default_rng(case.seed)
    logits_type, total_type = (DTYPES[k] for k in case.kinds)
    expected = empty_accumulator((case.heads, *case.shape), ACCUMULATORS[case.kinds[1]])
    total, exact = host.put(expected), np.zeros(expected.shape)
    status, size_sum = host.put(np.array([NO_TILE], dtype=np.int32)), np.zeros(expected.shape)
    for window in range(case.windows):
        start = triple(tuple(int(rng.integers(n - p + 1)) for n, p in zip(case.shape, case.patch, strict=True)))
        weights = tuple(rng.uniform(0.01, 1, size=p).astype(np.float32) for p in case.patch)
        flips = rng.integers(0, 2, size=(case.batch, 3)).astype(bool)
        logits = rng.normal(0, 3, size=(case.batch, case.heads, *case.patch)).astype(logits_type)
        tiles = np.array([launches.packed_tile((7, 7, 7), tuple(flip)) for flip in flips], dtype=np.int32)
        host.run(
            blend_launch(host, case, logits, total, weights, tiles, status, start=start, first_tile=window * case.batch)
        )
        inside = (slice(None), *(slice(s, s + p) for s, p in zip(start, case.patch, strict=True)))
        for flip, one in zip(flips, logits, strict=True):
            z, y, x = weights
            add_window(expected, one.astype(np.float32), (z, y, x), start, tuple(flip))
            weight = z.astype(np.float64)[:, None, None] * y[:, None] * x
            added = np.flip(one.astype(np.float64), [1 + a for a in range(3) if flip[a]]) * weight
            exact[inside] += added
            size_sum[inside] += np.abs(added)
    same_bits(total, expected)
    assert status[0] == NO_TILE
    # every addition rounds by half a unit of the sum, the product by two of its own
    rounding = (case.windows * case.batch + 3) * float(np.finfo(total_type).eps)
    assert (np.abs(total - exact) <= rounding * size_sum + 1e-6).all()


def blend_launch(
    host: Host,
    case: BlendCase,
    logits: NDArray[Any],
    total: NDArray[Any],
    weights: tuple[NDArray[np.float32], ...],
    tiles: NDArray[np.int32],
    status: NDArray[np.int32],
    *,
    start: Three,
    first_tile: int,
) -> Launch:
    return launches.blend(
        address(host.put(logits)),
        address(total),
        triple(tuple(address(host.put(w)) for w in weights)),
        address(host.put(tiles)),
        address(status),
        kinds=case.kinds,
        first_tile=first_tile,
        batch=len(logits),
        heads=case.heads,
        shape=case.shape,
        start=start,
        patch=case.patch,
    )


def check_not_finite(host: Host, case: BlendCase, bad: dict[int, float]) -> int:
    """The status after one launch in whose tiles `bad` one logit of one head has this value."""
    rng = np.random.default_rng(case.seed)
    total = host.put(empty_accumulator((case.heads, *case.shape), ACCUMULATORS[case.kinds[1]]))
    logits = rng.normal(size=(case.batch, case.heads, *case.patch)).astype(DTYPES[case.kinds[0]])
    for tile, value in bad.items():
        place = tuple(int(rng.integers(n)) for n in logits.shape[1:])
        logits[(tile, *place)] = value
    weights = tuple(np.ones(p, dtype=np.float32) for p in case.patch)
    status = host.put(np.array([NO_TILE], dtype=np.int32))
    tiles = np.zeros((case.batch, 4), dtype=np.int32)
    host.run(blend_launch(host, case, logits, total, weights, tiles, status, start=(0, 0, 0), first_tile=100))
    return int(status[0])


# --- shift


@dataclass(frozen=True, kw_only=True)
class ShiftCase:
    heads: int
    shape: Three
    slices: int
    kind: Kind = "f32"
    seed: int = 0


def check_shift(host: Host, case: ShiftCase) -> None:
    values = np.random.default_rng(case.seed).normal(size=(case.heads, *case.shape)).astype(DTYPES[case.kind])
    total = host.put(values)
    shift_down(values, case.slices)
    host.run(launches.shift(address(total), kind=case.kind, heads=case.heads, shape=case.shape, slices=case.slices))
    same_bits(total, values)


# --- labels and probabilities


@dataclass(frozen=True, kw_only=True)
class BackCase:
    """Logits on a grid `resampled`, padded by `padding` (below, above) on each axis, to a crop of an image."""

    resampled: Three
    cropped: Three
    heads: int
    regions: bool = False
    ties: bool = False
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0)
    method: Literal["spline", "torch"] = "spline"
    order: int = 1
    transpose: Three = (0, 1, 2)
    padding: tuple[tuple[int, int], tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0), (0, 0))
    parts: int = 1
    kind: Kind = "f32"
    out: str = "u8"
    seed: int = 0

    @property
    def spec(self) -> ModelSpec:
        how = spline(self.order)
        if self.method == "torch":
            how = Resampling(**{**vars(how), "method": "torch"})
        backward = triple(tuple(int(i) for i in np.argsort(self.transpose)))
        return make_spec(
            labels=self.labels,
            resample_probabilities=how,
            transpose_forward=self.transpose,
            transpose_backward=backward,
        )

    @property
    def labels(self) -> Labels:
        rng = np.random.default_rng(self.seed)
        top = 65535 if self.out == "u16" else 255
        values = tuple(int(v) for v in rng.permutation(np.arange(1 if self.regions else 0, top + 1))[: self.heads])
        if self.out == "u16":
            values = (*values[:-1], 40000)  # one value needs the second byte
        decision: Literal["argmax", "regions"] = "regions" if self.regions else "argmax"
        return Labels(decision=decision, values=values, names={}, foreground=values, ignore=None)

    @property
    def grid(self) -> CaseGrid:
        target = tuple(s * c / r for s, c, r in zip(self.spacing, self.cropped, self.resampled, strict=True))
        box = (slice(2, 2 + self.cropped[0]), slice(1, 1 + self.cropped[1]), slice(3, 3 + self.cropped[2]))
        shape = tuple(n + 5 for n in self.cropped)
        return CaseGrid(shape=shape, box=box, spacing=self.spacing, target=target, resampled=self.resampled)

    def logits(self) -> NDArray[Any]:
        """(heads, *resampled); with `ties` often equal, and often 0."""
        values = np.random.default_rng(self.seed).normal(0, 2, size=(self.heads, *self.resampled))
        return (np.round(values) if self.ties else values).astype(DTYPES[self.kind])


def device_logits(host: Host, case: BackCase, logits: NDArray[Any], first: int) -> launches.Logits:
    """Network slices [first, ...) of the logits inside a padded accumulator of NaN."""
    around = ((0, 0), *case.padding)
    total = host.put(np.pad(logits[:, first:], around, constant_values=np.nan))
    inside = total[
        (slice(None), *(slice(low, n - high) for (low, high), n in zip(around[1:], total.shape[1:], strict=True)))
    ]
    z, y, x = (stride // total.itemsize for stride in total.strides[:3])
    return launches.Logits(address=address(inside), kind=case.kind, heads=case.heads, origin_z=first, strides=(z, y, x))


def device_taps(host: Host, taps: tuple[Taps, Taps, Taps], first: int, last: int) -> launches.TapAddresses:
    z, y, x = (host.put(launches.packed_taps(t.low, t.high, t.weight)) for t in taps)
    return launches.TapAddresses(
        z=address(z) + launches.TAP.itemsize * first, y=address(y), x=address(x), shape=(last - first, len(y), len(x))
    )


def exact_values(case: BackCase, taps: tuple[Taps, Taps, Taps], logits: NDArray[Any]) -> NDArray[np.float64]:
    """The interpolated logits (heads, *cropped) in float64, an axis at a time as a product of matrices."""
    result = logits.astype(np.float64)
    for axis, tap in enumerate(taps):
        matrix = np.zeros((len(tap.low), logits.shape[1 + axis]))
        np.add.at(matrix, (np.arange(len(tap.low)), tap.low), 1 - tap.weight.astype(np.float64))
        np.add.at(matrix, (np.arange(len(tap.low)), tap.high), tap.weight.astype(np.float64))
        result = np.moveaxis(np.tensordot(matrix, result, axes=(1, 1 + axis)), 0, 1 + axis)
    return result


def parts_of(case: BackCase) -> list[tuple[int, int]]:
    edges = np.unique(np.linspace(0, case.cropped[0], case.parts + 1).astype(int)).tolist()
    return list(itertools.pairwise(edges))


def check_labels(host: Host, case: BackCase) -> None:
    """Slab after slab, each from the slices that it needs, into the uncropped image in the order of its own axes."""
    spec, grid, logits = case.spec, case.grid, case.logits()
    way = way_back(grid, spec)
    assert way.taps is not None
    expected = empty_segmentation(grid, spec)
    label_slices(logits, 0, way, expected[grid.box], 0, grid.cropped[0], 1)
    image = np.zeros(expected.transpose(spec.transpose_backward).shape, dtype=DTYPES[case.out])
    assert image.dtype == expected.dtype
    full = host.put(image).transpose(case.transpose)
    crop = full[grid.box]
    strides = triple(tuple(stride // crop.itemsize for stride in crop.strides))
    values = host.put(np.array(spec.labels.values, dtype=np.uint16))
    for first, last in parts_of(case):
        host.run(
            launches.labels(
                device_logits(host, case, logits, first_needed(way, first)),
                device_taps(host, way.taps, first, last),
                address(values),
                address(crop[first:]),
                kind="u8" if case.out == "u8" else "u16",
                strides=strides,
                regions=case.regions,
            )
        )
    same_bits(full, expected)
    check_decisions(case, exact_values(case, way.taps, logits), crop)


def check_decisions(case: BackCase, exact: NDArray[np.float64], crop: NDArray[Any]) -> None:
    """In float64, wherever rounding cannot decide."""
    values = np.array(case.labels.values)
    if case.regions:
        clear, expected = (np.abs(exact) > 1e-5).all(axis=0), np.zeros(case.cropped, dtype=int)
        for value, one in zip(values, exact, strict=True):
            expected[one > 0] = value
    else:
        ranked = np.sort(exact, axis=0)
        clear = np.ones(case.cropped, dtype=bool) if case.heads == 1 else ranked[-1] - ranked[-2] > 1e-5
        expected = values[exact.argmax(axis=0)]
    np.testing.assert_array_equal(crop[clear], expected[clear])


def check_probabilities(host: Host, case: BackCase, kind: Kind = "f32") -> None:
    """A part of the slices, against NumPy's and against float64."""
    grid, logits = case.grid, case.logits()
    way = way_back(grid, case.spec)
    assert way.taps is not None
    for first, last in parts_of(case):
        block = (slice(first, last), slice(None), slice(None))
        expected = probability_block(logits, way, block)
        stored = host.put(np.full((last - first, case.heads, *case.cropped[:0:-1]), np.nan, dtype=DTYPES[kind]))
        out = stored.transpose(1, 0, 3, 2)  # x does not lie last: any strides do
        h, z, y, x = (stride // stored.itemsize for stride in out.strides)
        host.run(
            launches.probabilities(
                device_logits(host, case, logits, first_needed(way, first)),
                device_taps(host, way.taps, first, last),
                address(stored),
                kind=kind,
                strides=(h, z, y, x),
                regions=case.regions,
            )
        )
        # exp differs by 2 units between libraries, and each of `heads` terms carries that; halves round to 2**-11
        tolerance = (4e-7 if kind == "f32" else 2.0**-11, 2e-7 if kind == "f32" else 2.0**-24)
        np.testing.assert_allclose(out, expected, rtol=tolerance[0] + 1e-6, atol=tolerance[1])
        exact = decided(exact_values(case, way.taps, logits)[:, first:last], case.regions)
        np.testing.assert_allclose(out, exact, rtol=tolerance[0] + 2e-5, atol=tolerance[1])


def decided(values: NDArray[np.float64], regions: bool) -> NDArray[np.float64]:
    if regions:
        return 1 / (1 + np.exp(-values))
    soft = np.exp(values - values.max(axis=0))
    return np.asarray(soft / soft.sum(axis=0))


# --- fixed cases, which together meet every line of the kernels

Check = Callable[[Host], None]

FIXED: dict[str, Check] = {
    "gather 3d": lambda h: check_gather(h, GatherCase(shape=(9, 14, 11), patch=(6, 8, 10), channels=2, batch=3)),
    "gather small": lambda h: check_gather(h, GatherCase(shape=(3, 14, 5), patch=(6, 8, 10), channels=1, batch=5)),
    "gather thin": lambda h: check_gather(h, GatherCase(shape=(7, 3, 10), patch=(6, 8, 10), channels=2, batch=7)),
    "gather 2d half": lambda h: check_gather(
        h, GatherCase(shape=(3, 9, 7), patch=(8, 5), channels=3, batch=4, kind="f16")
    ),
    "blend floats": lambda h: check_blend(
        h, BlendCase(shape=(9, 11, 13), patch=(4, 5, 7), heads=3, windows=3, batch=4)
    ),
    "blend halves": lambda h: check_blend(
        h, BlendCase(shape=(6, 7, 9), patch=(4, 7, 5), heads=2, windows=2, batch=8, kinds=("f16", "f16"))
    ),
    "shift": lambda h: check_shift(h, ShiftCase(heads=3, shape=(7, 5, 9), slices=2)),
    "shift halves": lambda h: check_shift(h, ShiftCase(heads=2, shape=(5, 3, 3), slices=6, kind="f16")),
    "labels": lambda h: check_labels(
        h,
        BackCase(
            resampled=(7, 9, 8),
            cropped=(11, 13, 6),
            heads=4,
            transpose=(2, 0, 1),
            padding=((1, 2), (0, 3), (2, 1)),
            parts=3,
            seed=1,
        ),
    ),
    "labels ties": lambda h: check_labels(
        h, BackCase(resampled=(5, 6, 7), cropped=(5, 6, 7), heads=6, ties=True, kind="f16", out="u16", seed=2)
    ),
    # thirds and fifths of small integers: what is equal in theory differs by rounding, which decides
    "labels by rounding": lambda h: check_labels(
        h, BackCase(resampled=(5, 6, 7), cropped=(15, 18, 35), heads=6, ties=True, parts=2, seed=5)
    ),
    "labels regions": lambda h: check_labels(
        h, BackCase(resampled=(5, 6, 7), cropped=(8, 6, 9), heads=3, regions=True, ties=True, seed=3)
    ),
    "probabilities": lambda h: check_probabilities(
        h, BackCase(resampled=(4, 5, 6), cropped=(7, 6, 9), heads=5, padding=((0, 0), (1, 1), (0, 2)), parts=2)
    ),
    "probabilities regions": lambda h: check_probabilities(
        h, BackCase(resampled=(4, 5, 6), cropped=(4, 6, 5), heads=2, regions=True, kind="f16"), "f16"
    ),
    "not finite": lambda h: check_status(h),
}


def check_status(host: Host) -> None:
    """NaN, both infinities, and a sum that is infinite only as a half; the smallest tile that has one is named."""
    case = BlendCase(shape=(4, 5, 6), patch=(3, 5, 4), heads=3, windows=1, batch=6)
    half = BlendCase(shape=(4, 5, 6), patch=(3, 5, 4), heads=3, windows=1, batch=6, kinds=("f32", "f16"))
    assert check_not_finite(host, case, {}) == NO_TILE
    assert check_not_finite(host, case, {4: math.nan, 2: math.inf}) == 102
    assert check_not_finite(host, case, {0: -math.inf, 5: math.nan}) == 100
    assert check_not_finite(host, case, {3: 1e5}) == NO_TILE
    assert check_not_finite(host, half, {3: 1e5}) == 103
