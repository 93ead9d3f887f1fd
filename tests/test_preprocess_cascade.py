"""Whole preprocessing, with and without a previous stage, against nnU-Net's DefaultPreprocessor and its one-hot."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from specs import make_spec, spline

from trtbuild.errors import InputError, ModelError
from trtbuild.spec import CT, Labels, ModelSpec, NoNormalization, Normalization, Resampling, RescaleTo01, ZScore
from trtbuild.volume import prepared_from_array

TOLERANCE = 1e-6  # of the range, for resampled intensities: what resampling itself is held to


def torch_rule(*, is_segmentation: bool) -> Resampling:
    return Resampling(
        method="torch", is_segmentation=is_segmentation, order=1, order_z=0, separate_z="auto",
        anisotropy_threshold=3.0,
    )  # fmt: skip


def nowhere(*, is_segmentation: bool) -> Resampling:
    return dataclasses.replace(torch_rule(is_segmentation=is_segmentation), method="none")


REGIONS = Labels(
    decision="regions", values=(1, 2, 4), names={"background": (0,), "whole": (1, 2, 4), "core": (2, 4), "rim": (4,)},
    foreground=(1, 2, 4), ignore=None,
)  # fmt: skip
MASKED, PLAIN = ZScore(masked=True), ZScore(masked=False)
CLIPPED = CT(lower=-20, upper=120, mean=31.5, std=17.25)
SPECS: dict[str, tuple[ModelSpec, tuple[float, float, float]]] = {
    "masked z-score": (make_spec(normalization=(MASKED,)), (1.3, 0.8, 0.9)),
    "CT and rescaling": (make_spec(normalization=(CLIPPED, RescaleTo01()), channels=("a", "b")), (0.7, 1.2, 1.1)),
    "plain z-score, transposed": (
        make_spec(normalization=(PLAIN,), transpose_forward=(2, 0, 1), transpose_backward=(1, 2, 0)), (1.3, 0.8, 0.9),
    ),
    "anisotropic image": (
        make_spec(normalization=(MASKED, PLAIN), channels=("a", "b"), spacing=(4.0, 0.7, 1.2)), (5.0, 1.0, 0.9),
    ),
    "anisotropic, transposed": (
        make_spec(
            normalization=(MASKED,), spacing=(4.0, 0.7, 1.2), transpose_forward=(1, 2, 0), transpose_backward=(2, 0, 1)
        ),
        (0.8, 5.0, 1.0),
    ),
    "2-D": (make_spec(normalization=(MASKED,), patch=(8, 8), spacing=(0.8, 1.2), configuration="2d"), (3.0, 1.0, 1.0)),
    "2-D, transposed": (
        make_spec(
            normalization=(PLAIN,), patch=(8, 8), spacing=(0.8, 1.2), transpose_forward=(2, 0, 1),
            transpose_backward=(1, 2, 0),
        ),
        (1.0, 1.3, 2.5),
    ),
    "regions": (make_spec(normalization=(MASKED,), labels=REGIONS), (1.3, 0.8, 0.9)),
    "torch": (
        make_spec(
            normalization=(MASKED,), resample_data=torch_rule(is_segmentation=False),
            resample_segmentation=torch_rule(is_segmentation=True),
        ),
        (1.3, 0.8, 0.9),
    ),
    "no resampling": (
        make_spec(
            normalization=(PLAIN,), resample_data=nowhere(is_segmentation=False),
            resample_segmentation=nowhere(is_segmentation=True),
        ),
        (1.3, 0.8, 0.9),
    ),
    "same spacing": (make_spec(normalization=(MASKED, NoNormalization()), channels=("a", "b")), (1.0, 1.0, 1.0)),
}  # fmt: skip


def scheme(normalization: Normalization) -> tuple[str, bool, dict[str, float]]:
    """nnU-Net's name of it, whether it uses the mask, and its numbers in the plans."""
    match normalization:
        case ZScore():
            return "ZScoreNormalization", normalization.masked, {}
        case CT():
            return "CTNormalization", False, {
                "percentile_00_5": normalization.lower, "percentile_99_5": normalization.upper,
                "mean": normalization.mean, "std": normalization.std,
            }  # fmt: skip
        case RescaleTo01():
            return "RescaleTo01Normalization", False, {}
        case _:
            return "NoNormalization", False, {}


def resampling(how: Resampling, key: str) -> dict[str, Any]:
    force = {"auto": None, "always": True, "never": False}[how.separate_z]
    name = {
        "spline": "resample_data_or_seg_to_shape", "torch": "resample_torch_fornnunet", "none": "no_resampling_hack",
    }[how.method]  # fmt: skip
    arguments: dict[str, Any] = {"is_seg": how.is_segmentation, "force_separate_z": force}
    if how.method == "spline":
        arguments |= {"order": how.order, "order_z": how.order_z}
    return {key: name, f"{key}_kwargs": {} if how.method == "none" else arguments}


def nnunet_data(
    data: NDArray[np.float32], spacing: Any, spec: ModelSpec, previous: NDArray[Any] | None
) -> tuple[NDArray[np.float32], dict[str, Any]]:
    """The case as nnU-Net hands it to the network, and its properties."""
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    schemes = [scheme(n) for n in spec.normalization]
    configuration = {
        "preprocessor_name": "DefaultPreprocessor", "spacing": list(spec.spacing), "patch_size": list(spec.patch),
        "normalization_schemes": [name for name, _, _ in schemes],
        "use_mask_for_norm": [masked for _, masked, _ in schemes], "architecture": {},
        **resampling(spec.resample_data, "resampling_fn_data"),
        **resampling(spec.resample_segmentation, "resampling_fn_seg"),
    }  # fmt: skip
    plans = PlansManager({
        "configurations": {"c": configuration}, "transpose_forward": list(spec.transpose_forward),
        "transpose_backward": list(spec.transpose_backward), "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(i): p for i, (_, _, p) in enumerate(schemes)},
    })  # fmt: skip
    names = {name: list(v) if len(v) > 1 else v[0] for name, v in spec.labels.names.items()}
    dataset = {"labels": names, "regions_class_order": list(spec.labels.values)}
    properties: dict[str, Any] = {"spacing": list(spacing)}
    seg = None if previous is None else previous[None].astype(np.float32)  # as its readers read segmentations
    image, resampled, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        data, seg, properties, plans, plans.get_configuration("c"), dataset
    )
    if previous is not None:
        foreground = plans.get_label_manager(dataset).foreground_labels
        image = np.vstack((image, convert_labelmap_to_one_hot(resampled[0], foreground, image.dtype)))
    return image, properties


def image_and_labels(spec: ModelSpec, seed: int) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Structured intensities with a zero rim and holes, and labels that reach into the zeros."""
    from scipy.ndimage import gaussian_filter

    rng = np.random.default_rng(seed)
    shape = (21, 25, 19)
    data = np.stack([gaussian_filter(rng.normal(size=shape), 2) for _ in spec.channels]) * 300 + 40
    inside = gaussian_filter(rng.normal(size=shape), 3) > -0.02
    inside[:2] = inside[-1:] = False
    inside[:, :3] = False
    inside[:, :, -2:] = False
    noise = gaussian_filter(rng.normal(size=shape), 1.5)
    values = np.array([0, *spec.labels.foreground], dtype=np.uint8)
    edges = np.quantile(noise, np.linspace(0.5, 1, len(values))[:-1])
    return (data * inside).astype(np.float32), values[np.digitize(noise, edges)]


@pytest.mark.parametrize("cascade", [False, True], ids=["one stage", "cascade"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SPECS)
def test_what_the_network_sees_is_what_nnunet_shows_it(name: str, seed: int, cascade: bool) -> None:
    spec, spacing = SPECS[name]
    if cascade:
        spec = dataclasses.replace(spec, previous_stage="3d_lowres")
    data, labels = image_and_labels(spec, seed)
    previous = labels if cascade else None
    expected, properties = nnunet_data(data, spacing, spec, previous)
    prepared = prepared_from_array(data, spacing, spec, previous)
    assert prepared.data.dtype == np.float32
    assert prepared.data.shape == expected.shape
    assert len(prepared.data) == spec.network_channels
    assert [[s.start, s.stop] for s in prepared.grid.box] == properties["bbox_used_for_cropping"]
    images = len(spec.channels)
    if prepared.grid.resampled == prepared.grid.cropped:
        np.testing.assert_array_equal(prepared.data[:images], expected[:images])
    else:
        limit = TOLERANCE * np.ptp(expected[:images])
        np.testing.assert_allclose(prepared.data[:images], expected[:images], atol=limit, rtol=0)
    np.testing.assert_array_equal(prepared.data[images:], expected[images:])
    if cascade:
        assert set(np.unique(prepared.data[images:])) == {0, 1}


def test_labels_outside_the_nonzero_region_count_for_the_masked_z_score() -> None:
    spec = make_spec(normalization=(MASKED,), previous_stage="3d_lowres")
    data = np.zeros((1, 9, 9, 9), dtype=np.float32)
    data[0, 1:8, 1:8, 1:8] = np.random.default_rng(0).normal(100, 20, size=(7, 7, 7))
    data[0, 1, 1:4, :] = 0  # touches the box's face: outside, where no label is
    nothing = np.zeros((9, 9, 9), dtype=np.uint8)
    label = nothing.copy()
    label[1, 1:3, 1:8] = 1
    without, with_label = (prepared_from_array(data, (1, 1, 1), spec, p).data[0] for p in (nothing, label))
    assert (without[0, :3] == 0).all()
    assert (with_label[0, :2] < 0).all()


def test_a_cascade_with_300_labels_keeps_every_one() -> None:
    values = tuple(range(301))
    labels = Labels(
        decision="argmax", values=values, names={f"l{v}": (v,) for v in values} | {"background": (0,)},
        foreground=values[1:], ignore=None,
    )  # fmt: skip
    spec = make_spec(labels=labels, previous_stage="3d_lowres", spacing=(1.0, 1.0, 1.0))
    data = np.random.default_rng(0).normal(size=(1, 7, 10, 5)).astype(np.float32)
    previous = np.arange(350).reshape(7, 10, 5).astype(np.uint16) % 301
    channels = prepared_from_array(data, (1, 1, 1), spec, previous).data[1:]
    np.testing.assert_array_equal(channels.argmax(axis=0) + 1, np.where(previous == 0, 1, previous))
    np.testing.assert_array_equal(channels.sum(axis=0), previous > 0)


CASCADE = make_spec(previous_stage="3d_lowres")
IMAGE = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
LABELS = np.ones((4, 5, 6), dtype=np.uint8)


@pytest.mark.parametrize(
    ("spec", "previous", "message"),
    [
        (CASCADE, None, r"needs the segmentation(.|\n)*3d_lowres"),
        (make_spec(), LABELS, "no previous stage"),
        (CASCADE, LABELS[:3], r"does not fit(.|\n)*\(4, 5, 6\)(.|\n)*\(3, 5, 6\)"),
        (CASCADE, LABELS[None], "does not fit"),
        (CASCADE, LABELS.astype(np.float32), r"integer array(.|\n)*float32"),
        (CASCADE, LABELS.tolist(), r"integer array(.|\n)*list"),
        (CASCADE, LABELS * 7, r"no labels of the model(.|\n)*got: +7\n"),
        (CASCADE, np.arange(120, dtype=np.uint8).reshape(4, 5, 6), r"3, 4, 5, 6, 7, 8, 9, 10 and 109 more"),
        (CASCADE, LABELS.astype(np.int8) - 2, r"got: +-1\n"),
        (CASCADE, LABELS.astype(np.int64) << 40, "no labels of the model"),
    ],
)
def test_a_previous_segmentation_that_does_not_fit_is_refused(spec: ModelSpec, previous: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepared_from_array(IMAGE, (1, 1, 1), spec, previous)


def test_plans_that_resample_images_but_not_labels_are_refused() -> None:
    spec = make_spec(previous_stage="3d_lowres", resample_segmentation=nowhere(is_segmentation=True))
    with pytest.raises(ModelError, match="no_resampling_hack"):
        prepared_from_array(IMAGE, (2, 2, 2), spec, LABELS)


def test_the_previous_segmentation_is_left_unchanged() -> None:
    previous = LABELS.copy()
    prepared_from_array(IMAGE, (2, 2, 2), make_spec(previous_stage="l", resample_data=spline(3)), previous)
    np.testing.assert_array_equal(previous, LABELS)


def test_the_mean_of_a_large_cropped_image_is_nnunets_to_the_last_bit() -> None:
    """NumPy sums float32 in the order of the memory; a copy of the crop would have another mean."""
    spec = make_spec(normalization=(PLAIN,), transpose_forward=(2, 0, 1), transpose_backward=(1, 2, 0))
    data = np.random.default_rng(0).uniform(900, 1100, size=(1, 60, 90, 100)).astype(np.float32)
    data[:, :2] = data[:, :, -3:] = data[..., :1] = 0
    expected, _ = nnunet_data(data, (1, 1, 1), spec, None)
    np.testing.assert_array_equal(prepared_from_array(data, (1, 1, 1), spec).data, expected)
    cropped = data[0, 2:, :-3, 1:]
    assert cropped.copy().mean() != cropped.mean()  # so the test can fail
