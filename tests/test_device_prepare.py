"""Preparation on the fake GPU, with the kernels compiled for the host, against `prepared_from_array`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from device_samples import (
    EXAMPLES,
    SMALL_STAGING,
    Bench,
    Example,
    assert_same,
    check_unharmed,
    fake_gpu,
    opened_bench,
)
from fake_cuda import CUBIN, Cuda, LaunchError
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from preparation_checks import HOWS, spots
from specs import make_spec, spline
from zoo_images import array_from_scene
from zoo_more import MORE_RECIPES
from zoo_plans import RECIPES, dataset_from_recipe, dataset_name, plans_from_recipe

from trtbuild.errors import EngineError, InputError, ModelError, NonFinite, OutOfMemory, TrtbuildError
from trtbuild.runtime.device import opened_device
from trtbuild.runtime.gpu.prepare import DevicePrepared, prepared_on_device
from trtbuild.runtime.gpu.prepare_plan import bytes_on_device
from trtbuild.runtime.gpu.shared import Gpu, opened_gpu
from trtbuild.runtime.predictor import Clock, case_logits, prediction_from_prepared
from trtbuild.source import spec_from_plans
from trtbuild.spec import CT, ModelSpec, NoNormalization, Normalization, Resampling, RescaleTo01, RGBTo01, ZScore
from trtbuild.volume import Prepared, prepared_from_array

TOLERANCE = 2e-5
"""Of a prepared value, in units of its channel's range or 1, whichever is more. NumPy's float32 mean of some 10**4
voxels is off by 1e-6 of their range, and two float32 sums of up to 50 products in another order by 2e-6."""
ULPS = 4
"""Besides, in units of the last place of the channel's largest value: CT with a deviation of 1e-8 makes values of -3e9
with no range at all, and their weighted means round there."""
ISO, THICK = (1.0, 1.0, 1.0), (5.0, 1.0, 1.0)
NONE = replace(spline(3), method="none")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test; sizes count in bytes."""
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    with fake_gpu() as fake:
        yield fake
        check_unharmed(fake)


@pytest.fixture
def gpu(cuda: Cuda) -> Iterator[Gpu]:
    with opened_device() as device, opened_gpu(device, CUBIN, SMALL_STAGING) as opened:
        yield opened


def on_host(prepared: DevicePrepared, gpu: Gpu) -> Prepared:
    """The very values on the device."""
    data = np.empty(prepared.shape, dtype=np.float32)
    gpu.download(data, prepared.image)
    return Prepared(data=data, grid=prepared.grid)


def check(data: Any, spacing: tuple[float, ...], spec: ModelSpec, gpu: Gpu) -> None:
    """The same case, in the same place; nothing but it is left on the device, and less was taken than predicted."""
    expected, cuda = prepared_from_array(data, spacing, spec), gpu.device.cuda
    cuda.peak = sum(each.size for each in cuda.live.values())
    prepared = prepared_on_device(data, spacing, spec, gpu)
    try:
        assert cuda.peak <= bytes_on_device(np.shape(data)[1:], spacing, spec)
        assert [each.size for each in cuda.live.values()] == [prepared.image.nbytes] == [expected.data.nbytes]
        assert prepared.grid == expected.grid
        assert prepared.shape == expected.data.shape
        found = on_host(prepared, gpu).data
    finally:
        prepared.close()
    for ours, theirs in zip(found, expected.data, strict=True):
        last_place = float(np.spacing(np.abs(theirs).max()))
        limit = TOLERANCE * max(1.0, float(np.ptp(theirs))) + ULPS * last_place
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=limit)


def case_of(shape: tuple[int, ...], channels: int = 1, rim: int = 2, seed: int = 0) -> NDArray[np.float32]:
    """Noise with holes, between zeros."""
    image = spots(seed, channels, shape, 0.8)
    if rim:
        image[:, :rim], image[:, :, -rim:], image[..., : rim - 1] = 0, 0, 0
    return image


SCHEMES: dict[str, Normalization] = {
    "z-score": ZScore(masked=False),
    "masked z-score": ZScore(masked=True),
    "ct": CT(lower=60.0, upper=130.0, mean=90.0, std=20.0),
    "ct without deviation": CT(lower=60.0, upper=130.0, mean=90.0, std=0.0),
    "ct with its ends swapped": CT(lower=130.0, upper=60.0, mean=90.0, std=20.0),
    "rescale": RescaleTo01(),
    "none": NoNormalization(),
}


@pytest.mark.parametrize("resized", [False, True])
@pytest.mark.parametrize("name", SCHEMES)
def test_every_normalisation(gpu: Gpu, name: str, resized: bool) -> None:
    spec = make_spec(normalization=(SCHEMES[name],), spacing=(0.8, 1.3, 1.0) if resized else ISO)
    check(case_of((13, 11, 12)), ISO, spec, gpu)


def test_rgb(gpu: Gpu) -> None:
    image = np.random.default_rng(0).integers(0, 256, (3, 1, 21, 17)).astype(np.uint8)
    spec = make_spec(channels=("R", "G", "B"), normalization=(RGBTo01(),) * 3, patch=(8, 8), spacing=(0.8, 1.3))
    check(image, (999.0, 1.0, 1.0), spec, gpu)


@pytest.mark.parametrize("forward", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("name", [*HOWS, "order 3 along it", "not at all"])
def test_every_resampling_in_every_order_of_axes(gpu: Gpu, name: str, forward: tuple[int, int, int]) -> None:
    extra: dict[str, tuple[Resampling, tuple[float, float, float]]] = {
        "order 3 along it": (spline(3, order_z=3), THICK), "not at all": (NONE, ISO),
    }  # fmt: skip
    how, spacing = (HOWS | extra)[name]
    spec = make_spec(
        channels=("a", "b"), normalization=(ZScore(masked=True), NoNormalization()), resample_data=how,
        spacing=(0.8 * spacing[0], 1.3, 0.7), transpose_forward=forward,
        transpose_backward=tuple(int(i) for i in np.argsort(forward)),
    )  # fmt: skip
    read = tuple(spacing[forward.index(axis)] for axis in range(3))
    check(case_of((12, 9, 11), channels=2), read, spec, gpu)


@pytest.mark.parametrize(
    ("new", "axes"), [((0.5, 1.0, 1.0), 1), ((1.0, 2.0, 1.0), 1), ((1.0, 0.6, 0.8), 2), ((0.5, 0.6, 1.9), 3)]
)
def test_any_number_of_axes_change(gpu: Gpu, new: tuple[float, float, float], axes: int) -> None:
    data, spec = case_of((9, 12, 10)), make_spec(spacing=new)
    grid = prepared_from_array(data, ISO, spec).grid
    assert sum(a != b for a, b in zip(grid.cropped, grid.resampled, strict=True)) == axes
    check(data, ISO, spec, gpu)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 9, 8), (7, 1, 8), (7, 9, 1), (1, 1, 9), (40, 3, 3), (2, 2, 2), (3, 70, 5)]
)
def test_thin_images(gpu: Gpu, shape: tuple[int, int, int], masked: bool) -> None:
    for spacing in ((0.6, 0.9, 1.0), ISO):
        check(case_of(shape, rim=0) + 1, ISO, make_spec(normalization=(ZScore(masked=masked),), spacing=spacing), gpu)


@pytest.mark.parametrize("scheme", [*SCHEMES.values(), RGBTo01()], ids=repr)
@pytest.mark.parametrize("value", [0, 7])
def test_a_constant_image(gpu: Gpu, scheme: Normalization, value: int) -> None:
    """All of an image of zeros is kept; its mask is empty."""
    data = np.full((1, 6, 7, 5), value, dtype=np.int16)
    check(data, ISO, make_spec(normalization=(scheme,), spacing=(0.7, 1.0, 1.4)), gpu)


def test_a_channel_without_anything_beside_one_with(gpu: Gpu) -> None:
    data = case_of((9, 8, 7), channels=2)
    data[1] = 0
    schemes = (ZScore(masked=True), ZScore(masked=True))
    check(data, ISO, make_spec(channels=("a", "b"), normalization=schemes, spacing=(0.7, 1.2, 1.0)), gpu)


def test_a_2d_configuration_keeps_its_slices(gpu: Gpu) -> None:
    check(case_of((6, 13, 11)), THICK, make_spec(patch=(8, 8), spacing=(0.8, 1.3)), gpu)


@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", ">i2", "uint16", "int32", "int64", "uint64", "f2", ">f4", "f8", "g"]
)
def test_real_numbers_of_any_type(gpu: Gpu, dtype: str) -> None:
    data = (np.abs(case_of((9, 8, 7))) % 100).astype(dtype)
    check(data, ISO, make_spec(spacing=(0.7, 1.2, 1.0)), gpu)


def test_arrays_that_do_not_lie_in_c_order_and_lists(gpu: Gpu) -> None:
    data, spec = case_of((9, 8, 7), channels=2), make_spec(channels=("a", "b"), normalization=(RescaleTo01(),) * 2)
    for array in (np.asfortranarray(data), data[:, ::-1, :, ::2], data.tolist()):
        before = np.array(array)
        check(array, ISO, spec, gpu)
        np.testing.assert_array_equal(array, before)
    data.flags.writeable = False
    check(data, ISO, spec, gpu)


@pytest.mark.parametrize("name", [*RECIPES, *MORE_RECIPES])
def test_the_zoo(gpu: Gpu, name: str) -> None:
    recipes = {**RECIPES, **MORE_RECIPES}
    recipe = recipes[name]
    family = [r for r in recipes.values() if dataset_name(r) == dataset_name(recipe)]
    spec = spec_from_plans(
        plans_from_recipe(recipe, family), dataset_from_recipe(recipe), configuration=recipe.configuration,
        trainer=recipe.trainer,
    )  # fmt: skip
    for kind, scene in recipe.scenes.items():
        if kind == "main":
            continue  # large, and of the kind of the others
        data = array_from_scene(scene, len(recipe.channels), recipe.intensity, recipe.seed)
        check(data, scene.spacing, replace(spec, previous_stage=None), gpu)


@st.composite
def cases(draw: st.DrawFn) -> tuple[NDArray[Any], tuple[float, ...], ModelSpec]:
    channels, forward = draw(st.integers(1, 3)), draw(st.permutations(range(3)))
    shape = tuple(draw(st.integers(1, 14)) for _ in range(3))
    how = spline(
        draw(st.integers(0, 5)), order_z=draw(st.integers(0, 3)),
        method=draw(st.sampled_from(["spline", "spline", "torch", "none"])),
        separate_z=draw(st.sampled_from(["auto", "always", "never"])),
    )  # fmt: skip
    spec = make_spec(
        channels=tuple("abc"[:channels]),
        normalization=tuple(draw(st.sampled_from(list(SCHEMES.values()))) for _ in range(channels)),
        resample_data=how,
        spacing=tuple(draw(st.sampled_from([0.6, 1.0, 1.7])) for _ in range(3)),
        transpose_forward=tuple(forward),
        transpose_backward=tuple(int(n) for n in np.argsort(forward)),
    )
    data = spots(draw(st.integers(0, 99)), channels, shape, draw(st.sampled_from([0.0, 0.01, 0.3, 1.0])))
    spacing = (draw(st.sampled_from([0.8, 1.0, 4.0])), 1.0, draw(st.sampled_from([1.0, 1.3])))
    try:
        prepared_from_array(data, spacing, spec)
    except InputError:  # thinner than half a voxel of the model
        reject()
    return data.astype(draw(st.sampled_from(["f4", "f8", "i2", "u1"]))), spacing, spec


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(case=cases())
def test_any_case(case: tuple[NDArray[Any], tuple[float, ...], ModelSpec]) -> None:
    with pytest.MonkeyPatch.context() as patch, fake_gpu() as cuda:
        patch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
        with opened_device() as device, opened_gpu(device, CUBIN, SMALL_STAGING) as gpu:
            check(*case, gpu)
        check_unharmed(cuda)


# --- what is refused


def bad(**values: float) -> NDArray[np.float64]:
    data = case_of((5, 6, 7)).astype(np.float64)
    data[0, 2, 3, 4], data[0, 4, 0, 0] = values["value"], values.get("later", 1.0)
    return data


ONE = np.ones((1, 4, 4, 4))
HOSTILE: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "NaN": (bad(value=np.nan, later=np.inf), ISO, {}),
    "infinity": (bad(value=-np.inf), ISO, {}),
    "beyond float32": (bad(value=1e300, later=np.nan), ISO, {}),
    "NaN in the second channel": (
        np.concatenate([case_of((5, 6, 7)), bad(value=np.nan)]), ISO,
        {"channels": ("a", "b"), "normalization": (RescaleTo01(),) * 2},
    ),
    "three axes": (ONE[0], ISO, {}),
    "channels": (np.ones((2, 4, 4, 4)), ISO, {}),
    "empty": (np.ones((1, 4, 0, 4)), ISO, {}),
    "complex": (ONE.astype(complex), ISO, {}),
    "objects": (ONE.astype(object), ISO, {}),
    "masked": (np.ma.masked_equal(ONE, 0), ISO, {}),
    "ragged": ([[[[1.0, 2.0], [1.0]]]], ISO, {}),
    "spacing of 0": (ONE, (1, 0, 1), {}),
    "spacing of NaN": (ONE, (1, float("nan"), 1), {}),
    "two spacings": (ONE, (1, 1), {}),
    "too thin": (ONE, (0.01, 1, 1), {}),
    "too many voxels": (ONE, (1e5, 1e5, 1e5), {}),
    "no rgb": (case_of((5, 6, 7)) - 300, ISO, {"normalization": (RGBTo01(),)}),
    "a previous stage": (ONE, ISO, {"previous_stage": "3d_lowres"}),
    "segmentations' resampling": (ONE, (2, 1, 1), {"resample_data": spline(1, is_segmentation=True)}),
    "deviation overflows": (bad(value=1e20), ISO, {}),
    "masked deviation overflows": (bad(value=1e20), ISO, {"normalization": (ZScore(masked=True),)}),
    "range overflows": (bad(value=3e38, later=-3e38), ISO, {"normalization": (RescaleTo01(),)}),
    "window overflows": (
        np.full((1, 4, 4, 4), -3e38), ISO, {"normalization": (CT(lower=-3e38, upper=3e38, mean=3e38, std=1.0),)}
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_what_the_cpu_path_refuses_is_refused_with_the_same_words(gpu: Gpu, name: str) -> None:
    data, spacing, changes = HOSTILE[name]
    spec = make_spec(**changes)
    with pytest.raises((InputError, ModelError)) as theirs:
        prepared_from_array(data, spacing, spec)
    with pytest.raises(TrtbuildError) as ours:
        prepared_on_device(data, spacing, spec, gpu)
    assert (type(ours.value), str(ours.value)) == (type(theirs.value), str(theirs.value))
    assert gpu.device.cuda.live == {}


# --- memory and faults

FULL = make_spec(normalization=(ZScore(masked=True),), spacing=(0.8, 0.6, 1.3))
IMAGE = case_of((9, 8, 7))
ALLOCATIONS = 9
"""Of that: image, words, prepared, mask, sums, folded, channel, operators, between."""


@pytest.mark.parametrize("at", range(ALLOCATIONS))
def test_memory_that_is_short_anywhere_leaves_nothing(gpu: Gpu, cuda: Cuda, at: int) -> None:
    cuda.allocations_left = at
    with pytest.raises(OutOfMemory) as caught:
        prepared_on_device(IMAGE, ISO, FULL, gpu)
    assert caught.value.hint
    assert cuda.live == {}
    cuda.allocations_left = ALLOCATIONS
    prepared_on_device(IMAGE, ISO, FULL, gpu).close()
    cuda.allocations_left = None


def test_a_gpu_that_fails_anywhere_leaves_nothing(gpu: Gpu, cuda: Cuda) -> None:
    runs = 0

    class Failing:
        def __init__(self, real: Any) -> None:
            self.spans, self.addresses, self.real = real.spans, real.addresses, real

        def run(self, *launch: Any) -> None:
            nonlocal runs
            runs += 1
            if runs == fail_at:
                for queue in cuda.streams.values():
                    queue.work.clear()  # nothing more happens there
                raise LaunchError("an illegal memory access was encountered")
            self.real.run(*launch)

    cuda.kernels = {name: Failing(kernel) for name, kernel in cuda.kernels.items()}
    fail_at = 0
    prepared_on_device(IMAGE, ISO, FULL, gpu).close()
    total = runs
    assert total >= 16, "three axes, a mask, its statistics"
    for number in range(1, total + 1):
        runs, fail_at = 0, number
        with pytest.raises(EngineError, match="illegal memory access"):
            prepared_on_device(IMAGE, ISO, FULL, gpu)
        assert cuda.live == {}


def test_the_prediction_is_what_is_taken(gpu: Gpu, cuda: Cuda) -> None:
    whole = IMAGE.copy()
    whole[:, [0, -1]] = whole[:, :, [0, -1]] = whole[..., [0, -1]] = 5  # nothing is cropped
    for spec in (FULL, make_spec(), make_spec(spacing=(0.5, 1.0, 1.0)), make_spec(normalization=(RescaleTo01(),))):
        cuda.peak = 0
        prepared_on_device(whole, ISO, spec, gpu).close()
        most = bytes_on_device(whole.shape[1:], ISO, spec)
        assert cuda.peak == most
        cuda.memory = most
        prepared_on_device(whole, ISO, spec, gpu).close()
        cuda.memory, cuda.peak = most - 1, 0
        with pytest.raises(OutOfMemory, match="cannot be prepared"):
            prepared_on_device(whole, ISO, spec, gpu)
        assert cuda.peak < most - 1, "it was refused before it was taken"
        cuda.memory = 1 << 28


def test_a_limit_is_kept(gpu: Gpu, cuda: Cuda) -> None:
    cuda.peak = 0
    prepared_on_device(IMAGE, ISO, FULL, gpu).close()
    most = cuda.peak
    prepared_on_device(IMAGE, ISO, FULL, gpu, limit=most).close()
    for limit in (most - 1, IMAGE.nbytes - 1, 0):
        cuda.peak = 0
        with pytest.raises(OutOfMemory) as caught:
            prepared_on_device(IMAGE, ISO, FULL, gpu, limit=limit)
        assert cuda.peak <= limit
        assert "on the host" in str(caught.value)
        assert "raise the limit" in str(caught.value)


def test_the_fill_of_holes_gives_up_where_it_never_ends(gpu: Gpu, cuda: Cuda) -> None:
    class Endless:
        def __init__(self, real: Any) -> None:
            self.spans, self.addresses = real.spans, real.addresses

        def run(self, grid: Any, block: Any, arguments: Any) -> None:
            cuda.at(int(arguments[1]), 4)[:] = 0

    cuda.kernels = {**cuda.kernels, "flood": Endless(cuda.kernels["flood"])}
    with pytest.raises(EngineError, match="never finished"):
        prepared_on_device(IMAGE[:, 4:7, 4:, 4:], ISO, FULL, gpu)
    assert cuda.live == {}


def test_it_is_given_back_once(gpu: Gpu, cuda: Cuda) -> None:
    prepared = prepared_on_device(IMAGE, ISO, FULL, gpu)
    prepared.close()
    prepared.close()
    assert cuda.live == {}


# --- predicted from there


def resident(one: Bench, example: Example) -> tuple[Bench, Prepared]:
    """The case on the device, and the very same on the host."""
    prepared = prepared_on_device(example.data(), example.spacing, example.spec, one.gpu)
    return replace(one, prepared=prepared), on_host(prepared, one.gpu)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_case_that_is_on_the_device_has_the_labels_of_the_cpu_path(cuda: Cuda, name: str) -> None:
    with opened_bench(cuda, EXAMPLES[name]) as one:
        here, same = resident(one, EXAMPLES[name])
        assert_same(here.on_device(), prediction_from_prepared(same, one.member, one.settings, None, Clock()))
        assert here.notes == []
        assert cuda.live == {}


def test_its_logits_are_those_of_the_cpu_path(cuda: Cuda) -> None:
    example = EXAMPLES["transposed"]
    with opened_bench(cuda, example) as one:
        here, same = resident(one, example)
        found = here.logits_on_device()
        np.testing.assert_array_equal(found, case_logits(same, one.member, one.settings, None))
        assert cuda.live == {}


def test_its_image_is_not_planned_again(cuda: Cuda) -> None:
    example = EXAMPLES["mirrored"]
    with opened_bench(cuda, example) as one:
        best = one.plans()[0]
        here, _ = resident(one, example)
        assert here.plans()[0].buffers == {k: v for k, v in best.buffers.items() if k != "image"}
        cuda.memory, cuda.peak = best.nbytes, 0
        assert_same(here.on_device(), one.on_cpu())
        assert cuda.peak == best.nbytes
        for limit in (best.nbytes, one.plans()[1].nbytes):
            here, _ = resident(one, example)
            cuda.peak = 0
            here.on_device(limit=limit)
            assert cuda.peak == limit


@pytest.mark.parametrize("at", range(5))
def test_memory_that_is_short_gives_it_back_too(cuda: Cuda, at: int) -> None:
    example = EXAMPLES["mirrored"]
    with opened_bench(cuda, example) as one:
        here, _ = resident(one, example)
        cuda.allocations_left = at
        with pytest.raises(OutOfMemory):
            here.on_device()
        assert cuda.live == {}
        cuda.allocations_left, cuda.recovers = None, True
        here, _ = resident(one, example)
        cuda.allocations_left = at
        assert_same(here.on_device(), one.on_cpu())
        assert "begins again" in here.notes[-1]


@pytest.mark.parametrize("how", ["an engine that fails", "engines that do not fit", "stopped", "logits"])
def test_a_case_that_fails_is_given_back(cuda: Cuda, how: str) -> None:
    example = EXAMPLES["folds"]
    with opened_bench(cuda, example) as one:
        here, _ = resident(one, example)
        if how == "engines that do not fit":
            one.runners[0].largest, one.runners[1].smallest = 2, 3
        elif how != "stopped":
            one.runners[1].fail_at = 1
        with ExitStack() as stack:
            stack.enter_context(pytest.raises(TrtbuildError))
            if how == "logits":
                here.logits_on_device()
            else:
                here.on_device(lambda *_: how != "stopped")
        assert cuda.live == {}


def test_nan_on_the_device_is_found_before_the_network_sees_it(cuda: Cuda) -> None:
    example = EXAMPLES["two channels"]
    with opened_bench(cuda, example) as one:
        here, same = resident(one, example)
        same.data[1, 11, 12, 10] = np.nan
        assert isinstance(here.prepared, DevicePrepared)
        one.gpu.upload(here.prepared.image, same.data)
        with pytest.raises(NonFinite, match="prepared case"):
            here.on_device()
        assert cuda.live == {}
        assert one.runners[0].batches == []


def test_a_case_that_was_given_back_is_refused(cuda: Cuda) -> None:
    example = EXAMPLES["3D"]
    with opened_bench(cuda, example) as one:
        here, _ = resident(one, example)
        here.on_device()
        with pytest.raises(EngineError, match="given back"):
            here.on_device()
        assert cuda.live == {}
