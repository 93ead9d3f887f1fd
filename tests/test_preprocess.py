"""Crop, normalisation and their order against nnU-Net's DefaultPreprocessor pieces."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from specs import make_spec, spline

from trtbuild.errors import InputError, OutputError
from trtbuild.spec import CT, NoNormalization, RescaleTo01, RGBTo01, ZScore
from trtbuild.volume import prepared_from_array
from trtbuild.volume.preparation.crop import filled_nonzero_mask, nonzero_box


def blob(shape: tuple[int, ...], channels: int = 1, seed: int = 0) -> np.ndarray:
    """Structured intensities with a zero rim, zero holes, and an odd offset."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    data = np.stack([gaussian_filter(rng.normal(size=shape), 2) for _ in range(channels)]) * 300 + 40
    inside = gaussian_filter(rng.normal(size=shape), 3) > -0.02
    inside[:2] = inside[-1:] = False
    inside[:, :3] = False
    inside[:, :, -2:] = False
    return (data * inside).astype(np.float32)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_mask_are_nnunets(seed: int, channels: int) -> None:
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    data = blob((19, 24, 21), channels, seed)
    expected, segmentation, bbox = crop_to_nonzero(data.copy())
    box = nonzero_box(data)
    assert [[s.start, s.stop] for s in box] == bbox
    np.testing.assert_array_equal(data[(slice(None), *box)], expected)
    np.testing.assert_array_equal(filled_nonzero_mask(expected), segmentation[0] >= 0)


@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 1, 9), (12, 13, 14)])
def test_crop_of_flat_volumes_and_of_nothing_is_nnunets(shape: tuple[int, ...]) -> None:
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero

    for data in (np.zeros((1, *shape), np.float32), np.ones((1, *shape), np.float32)):
        _, segmentation, bbox = crop_to_nonzero(data.copy())
        assert [[s.start, s.stop] for s in nonzero_box(data)] == bbox
        np.testing.assert_array_equal(
            filled_nonzero_mask(data[(slice(None), *nonzero_box(data))]), segmentation[0] >= 0
        )


SCHEMES = [
    (ZScore(masked=True), "ZScoreNormalization", True, {}),
    (ZScore(masked=False), "ZScoreNormalization", False, {}),
    (
        CT(lower=-20, upper=120, mean=31.5, std=17.25),
        "CTNormalization",
        False,
        {"percentile_00_5": -20, "percentile_99_5": 120, "mean": 31.5, "std": 17.25},
    ),
    (NoNormalization(), "NoNormalization", False, {}),
    (RescaleTo01(), "RescaleTo01Normalization", False, {}),
]


@pytest.mark.parametrize(("scheme", "name", "masked", "properties"), SCHEMES, ids=lambda v: getattr(v, "kind", None))
def test_each_normalisation_is_nnunets_bit_for_bit(scheme, name, masked, properties) -> None:  # type: ignore[no-untyped-def]
    from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
    from nnunetv2.preprocessing.normalization import default_normalization_schemes as theirs

    data = blob((15, 20, 18))
    cropped, segmentation, _ = crop_to_nonzero(data.copy())
    expected = getattr(theirs, name)(masked, properties).run(cropped[0].copy(), segmentation[0])
    ours = prepared_from_array(data, (1, 1, 1), make_spec(normalization=(scheme,))).data[0]
    np.testing.assert_array_equal(ours, expected)


def test_rgb_is_divided_by_255_and_other_values_are_refused() -> None:
    spec = make_spec(normalization=(RGBTo01(),))
    data = np.full((1, 4, 4, 4), 51, np.float32)
    np.testing.assert_array_equal(prepared_from_array(data, (1, 1, 1), spec).data, np.float32(51) / np.float32(255))
    for value in (-1, 256):
        data[0, 1, 1, 1] = value
        with pytest.raises(InputError, match="8-bit RGB"):
            prepared_from_array(data, (1, 1, 1), spec)


def test_the_input_array_is_left_unchanged() -> None:
    data = blob((10, 11, 12))
    before = data.copy()
    prepared_from_array(data, (1, 1, 1), make_spec())
    np.testing.assert_array_equal(data, before)


def test_transpose_spacing_and_grids_fit_together() -> None:
    spec = make_spec(transpose_forward=(2, 0, 1), transpose_backward=(1, 2, 0), spacing=(2.0, 1.0, 0.5))
    data = np.ones((1, 10, 12, 14), dtype=np.float32)
    grid = prepared_from_array(data, (1.0, 0.5, 4.0), spec).grid
    assert grid.shape == (14, 10, 12)
    assert grid.spacing == (4.0, 1.0, 0.5)
    assert grid.resampled == (28, 10, 12)


def test_a_2d_configuration_keeps_the_slice_spacing() -> None:
    spec = make_spec(patch=(8, 8), spacing=(0.5, 2.0), configuration="2d")
    prepared = prepared_from_array(np.ones((1, 7, 10, 12), np.float32), (3.0, 1.0, 1.0), spec)
    assert prepared.grid.resampled == (7, 20, 6)
    assert prepared.grid.target == (3.0, 0.5, 2.0)


@pytest.mark.parametrize(
    ("data", "spacing", "message"),
    [
        (np.ones((4, 4, 4)), (1, 1, 1), "four axes"),
        (np.ones((2, 4, 4, 4)), (1, 1, 1), "number of channels"),
        (np.full((1, 4, 4, 4), np.nan), (1, 1, 1), "NaN"),
        (np.full((1, 4, 4, 4), np.inf), (1, 1, 1), "NaN or infinity"),
        (np.ones((1, 4, 4, 4)), (1, 0, 1), "spacing"),
        (np.ones((1, 4, 4, 4)), (1, -1, 1), "spacing"),
        (np.ones((1, 4, 4, 4)), (1, 1), "spacing"),
        (np.ones((1, 4, 4, 4)), (1, float("nan"), 1), "spacing"),
    ],
)
def test_bad_arrays_are_refused_with_what_is_wrong(data, spacing, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        prepared_from_array(data.astype(np.float32), spacing, make_spec(resample_data=spline(3)))


@pytest.mark.parametrize("scheme", [ZScore(masked=True), ZScore(masked=False), RescaleTo01()], ids=repr)
@pytest.mark.parametrize("extreme", [1e20, 3e38])
def test_intensities_whose_statistics_overflow_are_refused(scheme, extreme: float) -> None:  # type: ignore[no-untyped-def]
    data = blob((9, 10, 11))
    data[0, 4, 4, 4:6] = extreme, -extreme
    if isinstance(scheme, RescaleTo01) and extreme < 1e38:
        assert np.isfinite(prepared_from_array(data, (1, 1, 1), make_spec(normalization=(scheme,))).data).all()
        return
    with pytest.raises(InputError, match=r"overflow float32(.|\n)*channel T1"):
        prepared_from_array(data, (1, 1, 1), make_spec(normalization=(scheme,)))


def test_a_ct_window_beyond_float32_is_refused() -> None:
    scheme = CT(lower=-3e38, upper=3e38, mean=3e38, std=1.0)
    with pytest.raises(InputError, match="overflow float32"):
        prepared_from_array(np.full((1, 4, 4, 4), -3e38, np.float32), (1, 1, 1), make_spec(normalization=(scheme,)))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "uint64", "float16", "float64", ">f4", "bool"])
def test_real_numbers_of_any_type_are_converted(dtype: str) -> None:
    data = (blob((9, 10, 11)) > 40).astype(dtype)
    expected = prepared_from_array(data.astype(np.float32), (1.0, 1.0, 1.0), make_spec()).data
    for given in (data, data.tolist()):
        np.testing.assert_array_equal(prepared_from_array(given, np.ones(3), make_spec()).data, expected)


@pytest.mark.parametrize(
    ("data", "spacing", "message"),
    [
        (np.ones((1, 4, 4, 4), complex), (1, 1, 1), "no real numbers(.|\n)*complex128"),
        (np.ones((1, 4, 4, 4), object), (1, 1, 1), "no real numbers(.|\n)*object"),
        (np.full((1, 4, 4, 4), "1"), (1, 1, 1), "no real numbers"),
        (np.ones((1, 4, 4, 4), "M8[s]"), (1, 1, 1), "no real numbers"),
        ([[[[1.0, 2.0], [1.0]]]], (1, 1, 1), "no array"),
        (np.ma.masked_equal(np.ones((1, 4, 4, 4)), 0), (1, 1, 1), "masked array(.|\n)*filled"),
        (np.ones((1, 4, 0, 4)), (1, 1, 1), r"empty(.|\n)*\(1, 4, 0, 4\)"),
        (np.full((1, 4, 4, 4), 1e300), (1, 1, 1), r"overflow float32(.|\n)*3.4e\+38(.|\n)*1e\+300"),
        (np.ones((1, 4, 4, 4)), ("a", 1, 1), "three positive numbers"),
        (np.ones((1, 4, 4, 4)), "111", "three positive numbers"),
        (np.ones((1, 4, 4, 4)), None, "three positive numbers"),
        (np.ones((1, 4, 4, 4)), 1.0, "three positive numbers"),
        (np.ones((1, 4, 4, 4)), (1, 1j, 1), "three positive numbers"),
        (np.ones((1, 4, 4, 4)), (1, (1, 2), 1), "three positive numbers"),
    ],
)
def test_what_is_no_image_is_refused_with_what_came(data, spacing, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=message):
        prepared_from_array(data, spacing, make_spec())


def test_a_file_name_that_is_not_utf8_is_refused_before_itk_ends_the_process(tmp_path: Path) -> None:
    from trtbuild.volume.image import ItkGeometry
    from trtbuild.volume.io import simpleitk_io

    file = tmp_path / "caf\udce9_0000.nii.gz"
    file.touch()
    with pytest.raises(InputError, match=r"not UTF-8(.|\n)*caf\\udce9_0000"):
        simpleitk_io.read_image([file], ("T1",))
    place = ItkGeometry(spacing=(1.0,) * 3, origin=(0.0,) * 3, direction=tuple(np.eye(3).ravel().tolist()))
    with pytest.raises(OutputError, match=r"not UTF-8(.|\n)*caf\\udce9_0000"):
        simpleitk_io.write_segmentation(np.zeros((2, 2, 2), np.uint8), place, file)
    assert list(tmp_path.iterdir()) == [file]
    assert file.stat().st_size == 0
