"""The zoo meets the conditions under which parity with nnU-Net says something, and so does the reference."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import nnunetv2.inference.predict_from_raw_data as raw
import numpy as np
import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from nnunetv2.preprocessing.cropping.cropping import crop_to_nonzero
from nnunetv2.utilities.utils import create_lists_from_splitted_dataset_folder
from reference import (
    accumulators,
    dice,
    differing_voxels,
    geometry_differences,
    nnunet_logits,
    nnunet_predict,
    nnunet_predictor,
    nnunet_preprocess,
    quiet,
    segmentation_from_file,
    threads,
)
from scipy.ndimage import gaussian_filter
from zoo import ALL_RECIPES, MODELS, MORE_MODELS, REFUSAL, ZooModel, make_model, nnunet_cascade_input

pytestmark = pytest.mark.parity

Get = Callable[[str], ZooModel]
ALONE = [name for name in MORE_MODELS if name not in ("cascade3d", "four_d")]
"""Those of the other models that nnU-Net takes from files to files by themselves."""


@pytest.fixture(scope="module")
def get(tmp_path_factory: pytest.TempPathFactory) -> Get:
    """The model of a name, made once."""
    root, made = tmp_path_factory.mktemp("zoo"), {}

    def get_model(name: str) -> ZooModel:
        if name not in made:
            made[name] = make_model(name, root)
        return made[name]

    return get_model


@pytest.fixture(scope="module")
def segment(get: Get, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """nnU-Net's segmentation of a case, with probabilities, predicted once."""
    root, done = tmp_path_factory.mktemp("nnunet"), {}

    def segment_case(name: str, kind: str) -> Path:
        if (name, kind) not in done:
            model = get(name)
            predictor = nnunet_predictor(model.folder, model.folds, mirroring=True)
            done[name, kind] = nnunet_predict(predictor, model.cases[kind], root / name / kind, probabilities=True)
        return done[name, kind]

    return segment_case


def preprocessed(model: ZooModel, kind: str) -> tuple[nnUNetPredictor, np.ndarray, dict[str, Any]]:
    predictor = nnunet_predictor(model.folder, model.folds, mirroring=True)
    image, properties = nnunet_preprocess(predictor, model.cases[kind])
    return predictor, image, properties


def read(model: ZooModel, kind: str) -> np.ndarray:
    """The image as nnU-Net's reader returns it, (C, Z, Y, X) float32."""
    reader = nnunet_predictor(model.folder, model.folds[:1], mirroring=False).plans_manager.image_reader_writer_class()
    image: np.ndarray = reader.read_images([str(f) for f in model.cases[kind]])[0]
    return image


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_every_label_covers_a_hundredth_of_the_main_image(name: str, get: Get, segment: Callable[..., Path]) -> None:
    labels = segmentation_from_file(segment(name, "main"))
    shares = {label: float((labels == label).mean()) for label in get(name).labels}
    assert min(shares.values()) >= 0.01, shares
    assert set(np.unique(labels)) == set(get(name).labels)


@pytest.mark.parametrize("name", ["resenc5", "rgb_png"])
def test_every_label_covers_a_hundredth_without_mirroring_too(name: str, get: Get, tmp_path: Path) -> None:
    model = get(name)
    predictor = nnunet_predictor(model.folder, model.folds, mirroring=False)
    labels = segmentation_from_file(nnunet_predict(predictor, model.cases["main"], tmp_path / "main"))
    assert min(float((labels == label).mean()) for label in model.labels) >= 0.01


@pytest.mark.parametrize("name", MODELS)
def test_the_main_image_is_cropped_and_resampled_both_ways_between_odd_unequal_sizes(name: str, get: Get) -> None:
    predictor, image, properties = preprocessed(get(name), "main")
    tiled = len(predictor.configuration_manager.patch_size)
    before = properties["shape_before_cropping"][-tiled:]
    cropped = properties["shape_after_cropping_and_before_resampling"][-tiled:]
    grid = image.shape[-tiled:]
    for shape in (before, cropped, grid):
        assert all(size % 2 for size in shape), shape
        assert len(set(shape)) == tiled, shape
    assert all(small < large for small, large in zip(cropped, before, strict=True))
    box = properties["bbox_used_for_cropping"][-tiled:]
    assert any(low != size - high for (low, high), size in zip(box, before, strict=True)), "the crop is lopsided"
    assert any(new > old for new, old in zip(grid, cropped, strict=True))
    assert any(new < old for new, old in zip(grid, cropped, strict=True))


@pytest.mark.parametrize("name", MODELS)
def test_every_tiled_axis_of_the_main_image_has_windows_and_some_are_unevenly_spaced(name: str, get: Get) -> None:
    predictor, image, _ = preprocessed(get(name), "main")
    patch = predictor.configuration_manager.patch_size
    sizes = image.shape[-len(patch) :]
    steps = compute_steps_for_sliding_window(sizes, patch, 0.5)
    assert all(len(axis) >= 2 for axis in steps), steps
    assert any(len(set(np.diff(axis))) > 1 for axis in steps), steps
    floored = [math.floor((size - p) / (len(axis) - 1) * i) for size, p, axis in zip(sizes, patch, steps, strict=True)
               for i in range(len(axis))]  # fmt: skip
    assert floored != [start for axis in steps for start in axis], "rounding down gives the same windows"


@pytest.mark.parametrize("name", MODELS)
def test_the_small_image_is_padded_unevenly(name: str, get: Get) -> None:
    predictor, image, _ = preprocessed(get(name), "small")
    patch = predictor.configuration_manager.patch_size
    missing = [p - size for size, p in zip(image.shape[-len(patch) :], patch, strict=True)]
    assert any(count > 0 and count % 2 for count in missing), missing


def test_the_other_cases_are_what_their_names_say(get: Get) -> None:
    for name in MODELS:
        model = get(name)
        for kind in model.cases.keys() & {"zero", "slice", "noresample"}:
            _, image, properties = preprocessed(model, kind)
            cropped = properties["shape_after_cropping_and_before_resampling"]
            if kind == "zero":
                # CT normalises 0 to another constant
                assert image.min() == image.max()
                assert tuple(cropped) == tuple(properties["shape_before_cropping"])
            if kind == "slice":
                assert image.shape[1] == 1
            if kind == "noresample":
                assert tuple(cropped) == image.shape[1:]
    thin, thick = preprocessed(get("ct_aniso"), "thin")[2], preprocessed(get("slices2d"), "thick")[2]
    assert max(thin["spacing"]) < 3 * min(thin["spacing"])
    assert max(thick["spacing"]) > 3 * min(thick["spacing"])


@pytest.mark.parametrize("name", ["iso3d", "regions4"])
def test_masked_normalisation_has_something_to_mask_and_something_to_fill(name: str, get: Get) -> None:
    cropped, mask, _ = crop_to_nonzero(read(get(name), "main"))
    assert (mask < 0).mean() > 0.2
    filled = (cropped == 0).all(axis=0) & (mask[0] >= 0)
    assert np.count_nonzero(filled) >= 27, "the cavity counts as inside"


def test_the_bounding_box_needs_every_channel(get: Get) -> None:
    image = read(get("regions4"), "main")
    whole = crop_to_nonzero(image)[2]
    for channel in image[:2]:
        assert crop_to_nonzero(channel[None])[2] != whole


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_nnunet_predicts_every_case_and_a_folder_of_them(name: str, get: Get, segment: Callable[..., Path]) -> None:
    model = get(name)
    for kind, files in model.cases.items():
        output = segment(name, kind)
        assert output.name == f"{kind}{model.file_ending}"
        probabilities = np.load(output.with_name(f"{kind}.npz"))["probabilities"]
        assert probabilities.dtype == np.float32
        assert probabilities.shape[0] == model.heads
        assert np.isfinite(probabilities).all(), f"{kind}: {files}"
    listed = create_lists_from_splitted_dataset_folder(str(model.images), model.file_ending)
    assert {tuple(files) for files in listed} == {tuple(map(str, files)) for files in model.cases.values()}


@pytest.mark.parametrize("name", [name for name in MODELS if name != "rgb_png"])
def test_nnunet_dies_of_an_axis_that_resampling_removes(name: str, get: Get, tmp_path: Path) -> None:
    model = get(name)
    predictor = nnunet_predictor(model.folder, model.folds[:1], mirroring=False)
    with pytest.raises(ValueError, match=REFUSAL):
        nnunet_predict(predictor, model.refused["vanishing"], tmp_path / "vanishing")


def test_making_a_model_twice_gives_the_same_weights_and_images(get: Get, tmp_path: Path) -> None:
    for name in ("rgb_png", "ct_aniso"):
        first, second = get(name), make_model(name, tmp_path)
        a, b = (torch.load(m.folder / "fold_0" / "checkpoint_final.pth", weights_only=False)["network_weights"]
                for m in (first, second))  # fmt: skip
        assert all(torch.equal(a[key], b[key]) for key in a.keys() | b.keys())
        for kind in first.cases:
            np.testing.assert_array_equal(read(first, kind), read(second, kind))


def test_the_five_folds_differ(get: Get) -> None:
    model = get("resenc5")
    _, image, _ = preprocessed(model, "small")
    logits = [nnunet_logits(nnunet_predictor(model.folder, (fold,), mirroring=False), image) for fold in model.folds]
    distances = [float((a - b).abs().mean()) for i, a in enumerate(logits) for b in logits[:i]]
    assert min(distances) > 0.25  # of a spread of 1


def independent_logits(predictor: nnUNetPredictor, image: np.ndarray) -> np.ndarray:
    """The sliding window of a 3-D model once more, without mirroring: float64 sums, float64 Gaussian."""
    patch = tuple(predictor.configuration_manager.patch_size)
    impulse = np.zeros(patch)
    impulse[tuple(p // 2 for p in patch)] = 1
    gaussian = gaussian_filter(impulse, [p / 8 for p in patch], mode="constant")
    total = np.zeros((predictor.label_manager.num_segmentation_heads, *image.shape[1:]))
    weights = np.zeros(image.shape[1:])
    network = predictor.network.eval()
    z_steps, y_steps, x_steps = compute_steps_for_sliding_window(image.shape[1:], patch, predictor.tile_step_size)
    for z in z_steps:
        for y in y_steps:
            for x in x_steps:
                window = np.s_[:, z : z + patch[0], y : y + patch[1], x : x + patch[2]]
                with torch.inference_mode(), threads(1):
                    logits = network(torch.from_numpy(image[window][None]))[0].double().numpy()
                total[window] += logits * gaussian
                weights[window[1:]] += gaussian
    return total / weights


def test_float32_accumulators_change_nothing_but_the_rounding(get: Get) -> None:
    model = get("iso3d")
    _, image, _ = preprocessed(model, "main")
    ours = nnunet_predictor(model.folder, model.folds, mirroring=False)
    stock = nnunet_predictor(model.folder, model.folds, mirroring=False, float32_accumulators=False)
    exact = independent_logits(ours, image)
    float32, float16 = nnunet_logits(ours, image), nnunet_logits(stock, image)
    assert float32.dtype == torch.float32
    assert float16.dtype == torch.float16
    scale = float(np.abs(exact).max())
    assert np.abs(float32.numpy() - exact).max() < 2e-6 * scale
    assert np.abs(float16.numpy() - exact).max() > 2e-4 * scale, "then float16 would do as the reference"


def test_the_patch_for_float32_is_undone_even_after_an_error() -> None:
    with accumulators(torch.float32):
        assert raw.torch.half == torch.float32
        assert raw.compute_gaussian((4, 4), device="cpu").dtype == torch.float32
    with contextlib.suppress(KeyError), accumulators(torch.float32):
        raise KeyError
    assert raw.torch is torch
    assert raw.compute_gaussian is compute_gaussian


@pytest.mark.slow
@pytest.mark.parametrize("name", [*MODELS, *ALONE])
def test_rounding_in_the_network_changes_next_to_no_voxel(name: str, get: Get, segment: Callable[..., Path]) -> None:
    """nnU-Net in float64 throughout gives the same labels: a float32 network can be asked for 2e-5."""
    model = get(name)
    predictor, image, properties = preprocessed(model, "main")
    predictor.network.double()
    stock = nnUNetPredictor._internal_predict_sliding_window_return_logits
    with accumulators(torch.float64), mock.patch.object(
        type(predictor), "_internal_predict_sliding_window_return_logits", stock
    ):  # fmt: skip
        logits = nnunet_logits(predictor, image.astype(np.float64))
    assert logits.dtype == torch.float64
    output = segment(name, "main").with_name(f"float64{model.file_ending}")
    with quiet():
        raw.export_prediction_from_logits(
            logits, properties, predictor.configuration_manager, predictor.plans_manager, predictor.dataset_json,
            str(output)[: -len(model.file_ending)],
        )  # fmt: skip
    assert differing_voxels(output, segment(name, "main")) <= max(1, 1e-5 * segmentation_from_file(output).size)


# --- the other models: each has what it is there for ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ALONE)
def test_nnunet_segments_every_case_of_the_other_models(name: str, get: Get, segment: Callable[..., Path]) -> None:
    model = get(name)
    for kind in model.cases:
        output = segment(name, kind)
        assert output.name == f"{kind}{model.file_ending}"
        assert np.isfinite(np.load(output.with_name(f"{kind}.npz"))["probabilities"]).all()
    labels = segmentation_from_file(segment(name, "main"))
    if name == "many300":
        assert len(np.unique(labels)) > 290
        assert labels.max() == 299
        assert labels.dtype == np.uint16
    else:
        shares = {label: float((labels == label).mean()) for label in model.labels}
        assert min(shares.values()) >= 0.01, shares


def test_pairs_have_one_plans_file_and_equal_images(get: Get) -> None:
    for names in (("lowres3d", "cascade3d"), ("ens2d", "ens3d")):
        first, second = map(get, names)
        for file in ("plans.json", "dataset.json"):
            assert (first.folder / file).read_bytes() == (second.folder / file).read_bytes()
        for kind in first.cases:
            np.testing.assert_array_equal(read(first, kind), read(second, kind))


def test_the_first_stage_changes_what_the_second_one_sees_and_says(get: Get, segment: Callable[..., Path]) -> None:
    """Its labels are an input, and where they lie outside the nonzero mask they change the masked z-score."""
    model, files = get("cascade3d"), get("cascade3d").cases["main"]
    predictor = nnunet_predictor(model.folder, model.folds, mirroring=True)
    first = segment("lowres3d", "main")
    outside = segmentation_from_file(first).transpose(2, 1, 0)[read(model, "main")[0] == 0]
    assert np.count_nonzero(outside) > 1000
    with_labels = nnunet_cascade_input(predictor, files, first)
    assert with_labels.shape[0] == 4
    without, _ = nnunet_preprocess(predictor, files)
    assert np.count_nonzero(np.abs(with_labels[0] - without[0]) > 0.01) > 0.1 * without[0].size
    blank = np.concatenate([with_labels[:1], np.zeros_like(with_labels[1:])])
    labels = [nnunet_logits(predictor, image).argmax(0) for image in (with_labels, blank)]
    assert float((labels[0] != labels[1]).float().mean()) > 0.05
    shares = np.bincount(labels[0].flatten().numpy(), minlength=4) / labels[0].numel()
    assert shares.min() > 0.01


def test_the_readers_of_the_other_models_return_the_scenes(get: Get) -> None:
    for name in MORE_MODELS:
        recipe = ALL_RECIPES[name]
        predictor = nnunet_predictor(get(name).folder, get(name).folds[:1], mirroring=False)
        reader = predictor.plans_manager.image_reader_writer_class()
        for kind, scene in recipe.scenes.items():
            with quiet():
                image, properties = reader.read_images([str(f) for f in get(name).cases[kind]])
            assert image.shape == (len(recipe.channels), *scene.shape), (name, kind)
            np.testing.assert_allclose(properties["spacing"], scene.spacing, rtol=1e-5)


def test_four_channels_in_one_file_are_what_nnunet_cannot_write(get: Get, tmp_path: Path) -> None:
    model = get("four_d")
    assert all(len(files) == 1 for files in model.cases.values())
    predictor = nnunet_predictor(model.folder, model.folds, mirroring=False)
    with pytest.raises(AssertionError):
        nnunet_predict(predictor, model.cases["small"], tmp_path / "small")


def test_torch_resampling_separates_the_coarse_axis_in_one_model_and_not_in_the_other(get: Get) -> None:
    from nnunetv2.preprocessing.resampling.default_resampling import determine_do_sep_z_and_axis

    for name, forced, expected in (("torch3d", None, True), ("torch3d_iso", False, False)):
        for kind in get(name).cases:
            predictor, image, properties = preprocessed(get(name), kind)
            spacing, new = properties["spacing"], predictor.configuration_manager.spacing
            assert determine_do_sep_z_and_axis(forced, spacing, new, 3)[0] is expected
            assert tuple(properties["shape_after_cropping_and_before_resampling"]) != image.shape[1:]
    thick = ALL_RECIPES["torch3d_iso"].scenes["thick"].spacing
    assert max(thick) > 3 * min(thick)
    assert determine_do_sep_z_and_axis(None, thick, thick, 3)[0], "then forcing it off changes nothing"


def test_no_resampling_leaves_the_grid_alone_where_spacings_differ(get: Get) -> None:
    for kind in get("none3d").cases:
        _, image, properties = preprocessed(get("none3d"), kind)
        assert tuple(properties["shape_after_cropping_and_before_resampling"]) == image.shape[1:]


def test_the_old_plans_are_old(get: Get) -> None:
    plans = (get("legacy3d").folder / "plans.json").read_text()
    assert "UNet_class_name" in plans
    assert "architecture" not in plans
    assert "foreground_intensity_properties_by_modality" in plans
    assert "modality" in (get("legacy3d").folder / "dataset.json").read_text()


def test_the_reoriented_images_are_stored_in_other_orientations(get: Get) -> None:
    import SimpleITK as sitk

    codes = set()
    for files in get("reorient3d").cases.values():
        image = sitk.ReadImage(str(files[0]))
        codes.add(sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(image.GetDirection()))
        assert np.count_nonzero(np.abs(image.GetDirection()) > 1e-3) > 3, "oblique"
    assert len(codes) == 4
    assert "RAS" not in codes


def test_the_measures_measure(segment: Callable[..., Path], get: Get) -> None:
    for name in ("iso3d", "regions4", "rgb_png"):
        main, small = segment(name, "main"), segment(name, "small")
        assert differing_voxels(main, main) == 0
        assert dice(main, main, 1) == 1
        assert math.isnan(dice(main, main, 77))
        assert geometry_differences(main, main) == []
        assert any(line.startswith("shape") for line in geometry_differences(main, small))
        with pytest.raises(ValueError, match="shapes differ"):
            differing_voxels(main, small)
    labels, other = segmentation_from_file(segment("iso3d", "main")), get("iso3d").cases["main"][0]
    assert differing_voxels(segment("iso3d", "main"), other) > 0.5 * labels.size
    assert {line.split(":")[0] for line in geometry_differences(segment("iso3d", "main"), other)} >= {"dtype"}
