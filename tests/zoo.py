"""Small trained-model folders, made with nnunetv2 from plans and seeded weights, and images for each.

The weights are random, so that a head would win nearly everywhere or nowhere. The last layer is therefore rescaled
until, on the model's own "main" image, the heads are uncorrelated, of spread 1, and of about equal share.
Everything follows from the seeds of `zoo_plans`; nothing is trained.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from numpy.typing import NDArray
from reference import empty_predictor, nnunet_logits, nnunet_predict, nnunet_predictor, nnunet_preprocess, quiet
from zoo_images import Scene, array_from_scene, write_image
from zoo_more import MORE_RECIPES
from zoo_plans import (
    RECIPES,
    Json,
    Recipe,
    dataset_from_recipe,
    dataset_name,
    fingerprint_from_recipe,
    plans_from_recipe,
)

MODELS: tuple[str, ...] = tuple(RECIPES)
MORE_MODELS: tuple[str, ...] = tuple(MORE_RECIPES)
"""Cascade pair lowres3d + cascade3d, ensemble pair ens2d + ens3d, torch3d, torch3d_iso, none3d, many300, ignore3d,
legacy3d, reorient3d, tiff3d, four_d, regions2d. Pairs have one plans.json and equal images. nnU-Net cannot write the
result of four_d (4-D files) and wraps none of the others."""
ALL_RECIPES: Mapping[str, Recipe] = {**RECIPES, **MORE_RECIPES}

SPREAD = 1.0
"""Standard deviation of a head's logits. Labels do not depend on it (rounding grows with it); probabilities stay away
from 0 and 1, where they would hide differences."""
AT_FULL_RESOLUTION = ("encoder.stem", "encoder.stages.0")
"""The layers before the first stride keep nnU-Net's initial biases of 0, as all convolutions before a norm do. A norm
magnifies the rounding of a flat region's mean, most over many voxels and differently in every backend (ONNX Runtime
1.31 is off by 1e-4 of the deviation); with these zeros a region of zeros is exact until its voxels are few."""
MANY_HEADS = 20
"""With more heads than this there are fewer features than heads, and the heads cannot be uncorrelated."""
REGION_SHARES = (0.6, 0.45, 0.3)
"""Share of the voxels in which each region's head is above 0."""
REFUSAL = "zero-size array to reduction operation maximum which has no identity"
"""The ValueError of nnU-Net 2.8.1 (NumPy's words) when resampling leaves an axis without a voxel."""


@dataclass(frozen=True, kw_only=True)
class ZooModel:
    """A trained-model folder and its images. `images` holds all `cases` in nnU-Net's file names: KIND_0000 + ending.

    Kinds: main (meets the parity conditions), small (below the patch in at least one axis), zero, slice (one slice
    along the first axis of the network's order), noresample (has the model's spacing), thin and thick (see zoo_plans).
    nnU-Net predicts every one of them, not those in `refused`: "vanishing" has an axis that is less than half a voxel
    long at the model's spacing, and nnU-Net 2.8.1 dies of it in preprocessing (`REFUSAL`).
    """

    name: str
    folder: Path
    folds: tuple[str, ...]
    images: Path
    cases: Mapping[str, tuple[Path, ...]]
    file_ending: str
    mirror_axes: tuple[int, ...] | None
    heads: int
    labels: tuple[int, ...]
    refused: Mapping[str, tuple[Path, ...]] = field(default_factory=dict)


def make_model(name: str, root: Path) -> ZooModel:
    """Write the model folder and the images of one of MODELS or MORE_MODELS below `root`."""
    recipe = ALL_RECIPES[name]
    cases = _write_cases(recipe, recipe.scenes, root / name / "imagesTs")
    folder = root / name / f"{recipe.trainer}__{recipe.plans}__{recipe.configuration}"
    folder.mkdir(parents=True)
    files = {"plans": _plans, "dataset": dataset_from_recipe, "dataset_fingerprint": fingerprint_from_recipe}
    for stem, content in files.items():
        (folder / f"{stem}.json").write_text(json.dumps(content(recipe), indent=4))
    networks = [_seeded_network(recipe, 100 * recipe.seed + int(fold)) for fold in recipe.folds]
    _balance_heads(recipe, networks, cases["main"])
    for fold, network in zip(recipe.folds, networks, strict=True):
        path = folder / f"fold_{fold}" / "checkpoint_final.pth"
        path.parent.mkdir()
        torch.save(_checkpoint(recipe, int(fold), network), path)
    return ZooModel(
        name=name,
        folder=folder,
        folds=recipe.folds,
        images=root / name / "imagesTs",
        cases=cases,
        refused=_write_cases(recipe, recipe.refused, root / name / "imagesRefused"),
        file_ending=recipe.file_ending,
        mirror_axes=recipe.mirror_axes,
        heads=_heads(recipe),
        labels=_labels(recipe),
    )


def _write_cases(recipe: Recipe, scenes: Mapping[str, Scene], folder: Path) -> dict[str, tuple[Path, ...]]:
    folder.mkdir(parents=True)
    files = 1 if recipe.reader == "NaturalImage2DIO" or recipe.one_file else len(recipe.channels)
    seed = recipe.seed if recipe.image_seed is None else recipe.image_seed
    cases = {}
    for index, (kind, scene) in enumerate(scenes.items()):
        cases[kind] = tuple(folder / f"{kind}_{channel:04d}{recipe.file_ending}" for channel in range(files))
        array = array_from_scene(scene, len(recipe.channels), recipe.intensity, 10 * seed + index)
        write_image(cases[kind], array, scene, recipe.intensity, recipe.reader, one_file=recipe.one_file,
                    flat=recipe.flat)  # fmt: skip
    return cases


def _plans(recipe: Recipe) -> Json:
    """plans.json, with the configurations of all models of the dataset."""
    return plans_from_recipe(recipe, [r for r in ALL_RECIPES.values() if dataset_name(r) == dataset_name(recipe)])


def _labels(recipe: Recipe) -> tuple[int, ...]:
    """The values that a segmentation can hold."""
    if recipe.regions_class_order:
        return (0, *sorted(recipe.regions_class_order))
    return tuple(value for name, value in recipe.labels.items() if isinstance(value, int) and name != "ignore")


def _heads(recipe: Recipe) -> int:
    """One per label; with regions, one per region, of which the background is none."""
    return len(recipe.regions_class_order or _labels(recipe))


def _inputs(recipe: Recipe) -> int:
    """Input channels of the network: a cascade's second stage gets one per foreground label."""
    return len(recipe.channels) + (len(_labels(recipe)) - 1 if recipe.previous_stage is not None else 0)


def _seeded_network(recipe: Recipe, seed: int) -> torch.nn.Module:
    """The trainer's own network; initialisation as nnU-Net's, but with biases and norm weights that are not 0 and 1."""
    plans = PlansManager(_plans(recipe))
    # the generator's state is put back: other tests draw from it too
    with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet():
        torch.manual_seed(seed)
        trainer = recursive_find_trainer_class_by_name(recipe.trainer)
        network: torch.nn.Module = trainer.build_network_architecture(
            plans, plans.get_configuration(recipe.configuration), _inputs(recipe), _heads(recipe),
            enable_deep_supervision=False,
        )  # fmt: skip
        for name, parameter in network.named_parameters():
            _vary(name, parameter)
    return network


def _vary(name: str, parameter: torch.Tensor) -> None:
    """Draw norm weights and biases, and smooth the kernels, in place."""
    if "norm" in name and name.endswith("weight"):
        parameter.uniform_(0.5, 1.5)
    elif name.endswith("bias") and ("norm" in name or "transp" in name) and not name.startswith(AT_FULL_RESOLUTION):
        parameter.normal_(0, 0.2)
    elif parameter.ndim > 2:
        # independent taps answer to noise and leave the checkerboard of their strides
        flat = parameter.mean(dim=tuple(range(2, parameter.ndim)), keepdim=True)
        parameter.copy_(flat + 0.35 * (parameter - flat))


def _last_layer(network: torch.nn.Module) -> torch.nn.Module:
    layer: torch.nn.Module = network.decoder.seg_layers[-1]
    return layer


def _balance_heads(recipe: Recipe, networks: list[torch.nn.Module], files: tuple[Path, ...]) -> None:
    """Apply one affine map to all folds' last layers. Windows, flips and folds are averaged, so it maps the result."""
    plans = PlansManager(_plans(recipe))
    predictor = empty_predictor(mirroring=True)
    with quiet():
        predictor.manual_initialization(
            networks[0], plans, plans.get_configuration(recipe.configuration),
            [{key: value.clone() for key, value in network.state_dict().items()} for network in networks],
            dataset_from_recipe(recipe), recipe.trainer, recipe.mirror_axes,
        )  # fmt: skip
    image = _network_input(recipe, predictor, files)
    first = predictor.list_of_parameters[0]
    logits = nnunet_logits(predictor, image).numpy().reshape(_heads(recipe), -1).astype(np.float64)
    networks[0].load_state_dict(first)  # the predictor leaves the last fold's weights in it
    if recipe.regions_class_order:
        matrix, offset = _region_map(logits)
    elif _heads(recipe) > MANY_HEADS:
        layer = _last_layer(networks[0])
        matrix, offset = _voronoi_map(logits, layer.weight.detach().double().flatten(1).numpy(),
                                      layer.bias.detach().double().numpy(), recipe.seed)  # fmt: skip
    else:
        matrix, offset = _argmax_map(logits)
    with torch.no_grad():
        for network in networks:
            layer = _last_layer(network)
            weight, bias = layer.weight.double(), layer.bias.double()
            mixed = torch.einsum("ij,j...->i...", torch.from_numpy(matrix), weight)
            layer.weight.copy_(mixed)
            layer.bias.copy_(torch.from_numpy(matrix) @ bias + torch.from_numpy(offset))


def _network_input(recipe: Recipe, predictor: Any, files: tuple[Path, ...]) -> NDArray[np.float32]:
    """What the sliding window gets; for a second stage with the one-hot channels of nnU-Net's first stage."""
    if recipe.previous_stage is None:
        return nnunet_preprocess(predictor, files)[0]
    first = next(r for r in ALL_RECIPES.values()
                 if r.dataset == recipe.dataset and r.configuration == recipe.previous_stage)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(first.name, Path(folder))
        segmentation = nnunet_predict(nnunet_predictor(model.folder, model.folds, mirroring=True), files,
                                      Path(folder) / "out" / "main")  # fmt: skip
        return nnunet_cascade_input(predictor, files, segmentation)


def nnunet_cascade_input(predictor: Any, files: tuple[Path, ...], previous_segmentation: Path) -> NDArray[np.float32]:
    """The case as nnU-Net hands it to the second stage, (C + foreground labels, Z, Y, X)."""
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    with quiet():
        image, segmentation, _ = preprocessor.run_case(
            [str(f) for f in files], str(previous_segmentation), predictor.plans_manager,
            predictor.configuration_manager, predictor.dataset_json,
        )  # fmt: skip
    labels = predictor.plans_manager.get_label_manager(predictor.dataset_json).foreground_labels
    return np.vstack((image, convert_labelmap_to_one_hot(segmentation[0], labels, image.dtype)))


def _voronoi_map(
    logits: NDArray[np.float64], weight: NDArray[np.float64], bias: NDArray[np.float64], seed: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """For more heads than features: head i wins where the features are nearest to those of the i-th of as many voxels
    drawn from the image (in the metric of the features' covariance), so that nearly every head wins somewhere."""
    inverse = np.linalg.pinv(weight)
    features = inverse @ (logits - bias[:, None])
    metric = np.linalg.inv(np.cov(features))
    chosen = np.random.default_rng(seed).choice(features.shape[1], len(logits), replace=False)
    points = features[:, chosen].T
    matrix = points @ metric @ inverse
    offset = -matrix @ bias - 0.5 * np.einsum("ij,jk,ik->i", points, metric, points)
    return matrix, offset


def _argmax_map(logits: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrix and offset after which the heads are uncorrelated, of spread SPREAD, and win equally often."""
    values, vectors = np.linalg.eigh(np.cov(logits))
    # three decimals, so that rounding elsewhere does not reach the weights
    matrix = np.round(SPREAD * vectors @ np.diag(values**-0.5) @ vectors.T, 3)
    mapped = matrix @ logits[:, ::3]
    offset = -mapped.mean(axis=1)
    heads = len(logits)
    for _ in range(80):
        share = np.bincount((mapped + offset[:, None]).argmax(axis=0), minlength=heads) / mapped.shape[1]
        offset += SPREAD * (1 / heads - share)
    return matrix, np.round(offset, 3)


def _region_map(logits: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Diagonal matrix and offset after which head i is positive in REGION_SHARES[i] of the voxels."""
    matrix = np.diag(np.round(SPREAD / logits.std(axis=1), 3))
    mapped = matrix @ logits
    offset = [-np.quantile(head, 1 - share) for head, share in zip(mapped, REGION_SHARES, strict=True)]
    return matrix, np.round(offset, 3)


def _checkpoint(recipe: Recipe, fold: int, network: torch.nn.Module) -> dict[str, Any]:
    """What nnUNetTrainer.save_checkpoint writes on a GPU: same keys, same types, momentum buffers included."""
    optimizer = torch.optim.SGD(network.parameters(), 0.0, weight_decay=3e-5, momentum=0.99, nesterov=True)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # the learning rate is 0: makes the buffers, leaves the weights
    score = np.float32(0.5)
    return {
        "network_weights": network.state_dict(),
        "optimizer_state": optimizer.state_dict(),
        "grad_scaler_state": {"scale": 65536.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000,
                              "_growth_tracker": 0},
        "logging": {
            "mean_fg_dice": [score], "ema_fg_dice": [score], "dice_per_class_or_region": [[score, score]],
            "train_losses": [np.float32(-0.3)], "val_losses": [np.float64(-0.2)], "lrs": [0.01],
            "epoch_start_timestamps": [0.0], "epoch_end_timestamps": [1.0],
        },
        "_best_ema": score,
        "current_epoch": 1,
        "init_args": {
            "plans": _plans(recipe), "configuration": recipe.configuration, "fold": fold,
            "dataset_json": dataset_from_recipe(recipe), "device": torch.device("cuda", 0),
        },
        "trainer_name": recipe.trainer,
        "inference_allowed_mirroring_axes": recipe.mirror_axes,
    }  # fmt: skip
