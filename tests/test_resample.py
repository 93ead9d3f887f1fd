"""Resampling against nnU-Net's own functions (skimage's and torch's), over orders, sizes and separate-z rules."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild.errors import InputError, ModelError
from trtbuild.spec import Resampling
from trtbuild.volume.resampling import coarse_axis, nearest_index, new_shape, resample
from trtbuild.volume.resampling.axis import axis_matrix
from trtbuild.volume.resampling.linear import torch_linear_matrix, torch_nearest_index

# The limit of the issue: 1e-6 of the input's range. float32 products over three axes reach 2.5e-7.
TOLERANCE = 1e-6


def how(order: int, order_z: int = 0, separate_z: str = "auto", threshold: float = 3.0) -> Resampling:
    return Resampling(
        method="spline",
        is_segmentation=False,
        order=order,
        order_z=order_z,
        separate_z=separate_z,
        anisotropy_threshold=threshold,
    )  # type: ignore[arg-type]


def reference(data, shape, spacing, target, rule):  # type: ignore[no-untyped-def]
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg_to_shape

    force = {"auto": None, "always": True, "never": False}[rule.separate_z]
    return resample_data_or_seg_to_shape(
        data,
        np.array(shape),
        spacing,
        target,
        order=rule.order,
        order_z=rule.order_z,
        force_separate_z=force,
        separate_z_anisotropy_threshold=rule.anisotropy_threshold,
    )


@pytest.mark.parametrize("order", [0, 1, 2, 3])
@pytest.mark.parametrize(
    ("shape", "spacing", "target"),
    [
        ((31, 37, 26), (1, 1, 1), (1.5, 1.5, 1.5)),
        ((31, 37, 26), (1, 1, 1), (0.8, 1.3, 0.7)),
        ((10, 37, 26), (5, 1, 1), (4, 0.7, 1.3)),
        ((37, 10, 26), (1, 5, 1), (0.9, 4, 1.3)),
        ((37, 26, 10), (0.7, 0.7, 5), (0.9, 0.9, 4)),
        ((1, 35, 26), (999, 1, 1), (999, 1.2, 0.8)),
        ((7, 2, 50), (1, 1, 1), (0.5, 1, 0.3)),
        ((30, 31, 32), (1, 1, 4), (1, 1, 4)),
        ((101, 130, 60), (1, 0.9, 1.1), (1.3, 1, 1)),
    ],
)
def test_every_order_equals_nnunet(order, shape, spacing, target) -> None:  # type: ignore[no-untyped-def]
    data = np.random.default_rng(0).normal(100, 40, size=(2, *shape)).astype(np.float32)
    grid = new_shape(shape, spacing, target)
    for order_z in (0, 1, 3):
        rule = how(order, order_z)
        expected = reference(data, grid, spacing, target, rule)
        ours = resample(data, grid, spacing, target, rule)
        assert ours.dtype == np.float32
        assert ours.shape == expected.shape
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE * np.ptp(data), rtol=0)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_random_grids_and_spacings_equal_nnunet(draw) -> None:  # type: ignore[no-untyped-def]
    shape = draw.draw(st.tuples(*[st.integers(1, 40)] * 3))
    spacing = draw.draw(st.tuples(*[st.floats(0.3, 6)] * 3))
    target = draw.draw(st.tuples(*[st.floats(0.3, 6)] * 3))
    rule = how(draw.draw(st.sampled_from([1, 3])), 0, draw.draw(st.sampled_from(["auto", "always", "never"])))
    try:
        grid = new_shape(shape, spacing, target)
    except InputError:
        return
    data = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    expected = reference(data, grid, spacing, target, rule)
    # an image of one voxel has no range; there float32 rounds its value
    limit = max(TOLERANCE * np.ptp(data), 2 * np.finfo(np.float32).eps * np.abs(data).max())
    np.testing.assert_allclose(resample(data, grid, spacing, target, rule), expected, atol=limit, rtol=0)


def test_the_clip_to_the_inputs_range_is_there() -> None:
    step = np.zeros((1, 8, 8, 24), dtype=np.float32)
    step[..., 12:] = 1
    out = resample(step, (8, 8, 60), (1, 1, 1), (1, 1, 0.4), how(3))
    assert out.min() == 0
    assert out.max() == 1
    unclipped = axis_matrix(24, 60, 3) @ step[0, 0, 0]
    assert unclipped.max() > 1.01  # so the clip above did something


def test_separate_z_clips_every_slice_to_its_own_range() -> None:
    data = np.zeros((1, 2, 20, 20), dtype=np.float32)
    data[0, 0, :, 10:] = 1
    data[0, 1] = 50
    out = resample(data, (2, 33, 33), (9, 1, 1), (9, 0.6, 0.6), how(3))
    assert out[0, 0].max() == 1


def test_equal_grids_are_returned_untouched() -> None:
    data = np.random.default_rng(2).normal(size=(1, 5, 6, 7)).astype(np.float32)
    assert resample(data, (5, 6, 7), (1, 1, 1), (1, 1, 1), how(3)) is data


def test_new_shape_is_nnunets_rounding() -> None:
    from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape

    rng = np.random.default_rng(5)
    for _ in range(300):
        shape, a, b = rng.integers(1, 400, 3), rng.uniform(0.3, 6, 3), rng.uniform(0.3, 6, 3)
        expected = tuple(int(n) for n in compute_new_shape(shape, a, b))
        if min(expected) >= 1:
            assert new_shape(tuple(int(n) for n in shape), tuple(a), tuple(b)) == expected


def test_a_volume_thinner_than_half_a_voxel_is_refused() -> None:
    with pytest.raises(InputError, match="half a voxel"):
        new_shape((1, 50, 50), (1, 1, 1), (5, 1, 1))


def test_the_coarse_axis_rule_is_nnunets() -> None:
    from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

    rng = np.random.default_rng(6)
    forces = {"auto": None, "always": True, "never": False}
    for _ in range(500):
        pool = rng.choice([0.5, 0.6, 1.0, 2.0, 4.0, 7.0], size=(2, 3))
        rule = how(3, separate_z=str(rng.choice(list(forces))), threshold=float(rng.choice([2.0, 3.0])))
        separate, axis = determine_do_sep_z_and_axis(
            forces[rule.separate_z], pool[0], pool[1], rule.anisotropy_threshold
        )
        assert coarse_axis(tuple(pool[0]), tuple(pool[1]), rule) == (int(axis) if separate else None)


def test_nearest_index_is_map_coordinates_order_0() -> None:
    from scipy.ndimage import map_coordinates

    for old in range(1, 40):
        for new in range(1, 60):
            scale = float(old) / new
            expected = map_coordinates(
                np.arange(old, dtype=float), [scale * (np.arange(new) + 0.5) - 0.5], order=0, mode="nearest"
            )
            np.testing.assert_array_equal(nearest_index(old, new), expected)


def torch_rule(separate_z: str = "auto") -> Resampling:
    return Resampling(
        method="torch", is_segmentation=False, order=1, order_z=0, separate_z=separate_z, anisotropy_threshold=3.0
    )  # type: ignore[arg-type]


def torch_reference(data, shape, spacing, target, rule):  # type: ignore[no-untyped-def]
    from nnunetv2.preprocessing.resampling.resample_torch import resample_torch_fornnunet

    return resample_torch_fornnunet(
        data,
        shape,
        spacing,
        target,
        num_threads=1,
        force_separate_z={"auto": None, "always": True, "never": False}[rule.separate_z],
        separate_z_anisotropy_threshold=rule.anisotropy_threshold,
    )


@pytest.mark.parametrize("separate_z", ["auto", "always", "never"])
@pytest.mark.parametrize(
    ("shape", "spacing", "target"),
    [
        ((31, 37, 26), (1, 1, 1), (1.5, 1.5, 1.5)),
        ((31, 37, 26), (1, 1, 1), (0.8, 1.3, 0.7)),
        ((10, 37, 26), (5, 1, 1), (4, 0.7, 1.3)),
        ((37, 10, 26), (1, 5, 1), (0.9, 4, 1.3)),
        ((37, 26, 10), (0.7, 0.7, 5), (0.9, 0.9, 4)),
        ((1, 35, 26), (999, 1, 1), (999, 1.2, 0.8)),
        ((1, 1, 26), (1, 1, 1), (0.3, 0.5, 0.8)),
        ((2, 300, 7), (1, 1.3, 1), (0.5, 1, 3)),
    ],
)
def test_torch_resampling_equals_nnunet(shape, spacing, target, separate_z) -> None:  # type: ignore[no-untyped-def]
    data = np.random.default_rng(0).normal(100, 40, size=(2, *shape)).astype(np.float32)
    grid = new_shape(shape, spacing, target)
    rule = torch_rule(separate_z)
    expected = torch_reference(data, grid, spacing, target, rule)
    ours = resample(data, grid, spacing, target, rule)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, expected, atol=TOLERANCE * np.ptp(data), rtol=0)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_torch_resampling_of_random_grids_equals_nnunet(draw) -> None:  # type: ignore[no-untyped-def]
    shape = draw.draw(st.tuples(*[st.integers(1, 40)] * 3))
    grid = draw.draw(st.tuples(*[st.integers(1, 60)] * 3))
    spacing = draw.draw(st.tuples(*[st.floats(0.3, 6)] * 3))
    rule = torch_rule(draw.draw(st.sampled_from(["auto", "always", "never"])))
    data = np.random.default_rng(1).normal(size=(1, *shape)).astype(np.float32)
    expected = torch_reference(data, grid, spacing, spacing, rule)
    # an image of one voxel has no range; there float32 rounds its value, by one unit in the last place (seen)
    limit = max(TOLERANCE * np.ptp(data), 2 * np.finfo(np.float32).eps * np.abs(data).max())
    np.testing.assert_allclose(resample(data, grid, spacing, spacing, rule), expected, atol=limit, rtol=0)


def test_the_sampling_points_of_torch_are_torchs_to_the_last_bit() -> None:
    import torch
    from torch.nn.functional import interpolate

    for old in [*range(1, 40), 133, 512]:
        for new in [*range(1, 60), 257, 800]:
            ramp = torch.arange(old, dtype=torch.float32)
            nearest = interpolate(ramp[None, None], (new,), mode="nearest-exact")[0, 0].numpy()
            np.testing.assert_array_equal(torch_nearest_index(old, new), nearest)
            if old <= 133:
                weights = interpolate(torch.eye(old)[None], (new,), mode="linear")[0].numpy().T
                np.testing.assert_array_equal(torch_linear_matrix(old, new).astype(np.float32), weights)


def test_no_resampling_keeps_equal_shapes_and_refuses_others() -> None:
    rule = dataclasses.replace(torch_rule(), method="none")
    data = np.zeros((1, 4, 4, 4), np.float32)
    assert resample(data, (4, 4, 4), (1, 1, 1), (2, 2, 2), rule) is data
    with pytest.raises(ModelError, match="no_resampling_hack"):
        resample(data, (5, 5, 5), (1, 1, 1), (1, 1, 1), rule)


def test_intensities_are_not_resampled_as_a_segmentation() -> None:
    rule = dataclasses.replace(how(1), is_segmentation=True)
    with pytest.raises(ModelError, match="is_seg"):
        resample(np.zeros((1, 4, 4, 4), np.float32), (5, 5, 5), (1, 1, 1), (1, 1, 1), rule)
