"""Trained-model folders with random weights, and images for them: for measurements in which the network is not the point.

    python benchmarks/random_model.py FOLDER --classes 60

The files are nnU-Net's own: dataset.json, plans.json and a checkpoint with the keys that its trainer saves.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

Json = dict[str, Any]
TRAINER, PLANS = "nnUNetTrainer", "nnUNetPlans"


@dataclass(frozen=True, kw_only=True)
class RandomModel:
    """What is to be made: a U-Net of `features`, one number per resolution; `classes` count the background."""

    classes: int = 60
    channels: int = 1
    patch: tuple[int, ...] = (64, 64, 64)
    spacing: tuple[float, ...] = (1.5, 1.5, 1.5)
    features: tuple[int, ...] = (8, 16, 32)
    seed: int = 0

    @property
    def configuration(self) -> str:
        """nnU-Net's name for it."""
        return "2d" if len(self.patch) == 2 else "3d_fullres"


def write_model(model: RandomModel, root: Path) -> Path:
    """The trained-model folder of `model` below `root`, with fold 0."""
    import torch

    folder = root / f"{TRAINER}__{PLANS}__{model.configuration}"
    (folder / "fold_0").mkdir(parents=True)
    plans, dataset = _plans(model), _dataset(model)
    for name, content in (("plans", plans), ("dataset", dataset), ("dataset_fingerprint", {})):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
    checkpoint = {
        "network_weights": _network(model, plans).state_dict(),
        "optimizer_state": {},
        "grad_scaler_state": None,
        "logging": {},
        "_best_ema": 0.0,
        "current_epoch": 1,
        "init_args": {
            "plans": plans, "configuration": model.configuration, "fold": 0, "dataset_json": dataset,
            "device": torch.device("cpu"),
        },
        "trainer_name": TRAINER,
        "inference_allowed_mirroring_axes": tuple(range(len(model.patch))),
    }  # fmt: skip
    torch.save(checkpoint, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def write_case(folder: Path, case: str, shape: Sequence[int], spacing: Sequence[float], channels: int = 1) -> None:
    """Images of one case (shape and spacing in z, y, x): a body of organs with noise in air, in Hounsfield units, int16."""
    import SimpleITK

    folder.mkdir(parents=True, exist_ok=True)
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in shape)
    plane = (y[:, None] / 0.8) ** 2 + (x[None] / 0.9) ** 2
    rng = np.random.default_rng(len(case) + sum(shape))
    for channel in range(channels):
        voxels = np.full(tuple(shape), -1024, dtype=np.int16)
        for k, height in enumerate(z):
            inside = plane < 1 - 0.3 * height**2
            organs = 60 * np.sin(5 * plane + 3 * height + channel) + rng.normal(40, 25, size=plane.shape)
            voxels[k][inside] = organs[inside]
        image = SimpleITK.GetImageFromArray(voxels)
        image.SetSpacing([float(s) for s in reversed(spacing)])
        SimpleITK.WriteImage(image, str(folder / f"{case}_{channel:04d}.nii.gz"), True)


def _network(model: RandomModel, plans: Json) -> Any:
    """The network of the plans as nnU-Net builds it, with logits of spread 1 or so in every class."""
    import torch
    from dynamic_network_architectures.architectures.unet import PlainConvUNet
    from torch import nn

    arguments = dict(plans["configurations"][model.configuration]["architecture"]["arch_kwargs"])
    dimensions = len(model.patch)
    arguments |= {
        "conv_op": getattr(nn, f"Conv{dimensions}d"),
        "norm_op": getattr(nn, f"InstanceNorm{dimensions}d"),
        "nonlin": nn.LeakyReLU,
    }
    torch.manual_seed(model.seed)
    network = PlainConvUNet(model.channels, num_classes=model.classes, deep_supervision=False, **arguments)
    with torch.no_grad():
        network.decoder.seg_layers[-1].weight.normal_()
    return network


def _plans(model: RandomModel) -> Json:
    stages, dimensions = len(model.features), len(model.patch)
    configuration: Json = {
        "data_identifier": f"{PLANS}_{model.configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(model.patch),
        "median_image_size_in_voxels": [128.0] * dimensions,
        "spacing": list(model.spacing),
        "normalization_schemes": ["CTNormalization"] * model.channels,
        "use_mask_for_norm": [False] * model.channels,
        "architecture": {
            "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
            "arch_kwargs": {
                "n_stages": stages,
                "features_per_stage": list(model.features),
                "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
                "kernel_sizes": [[3] * dimensions] * stages,
                "strides": [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
                "n_conv_per_stage": [2] * stages,
                "n_conv_per_stage_decoder": [2] * (stages - 1),
                "conv_bias": True,
                "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
                "norm_op_kwargs": {"eps": 1e-05, "affine": True},
                "dropout_op": None,
                "dropout_op_kwargs": None,
                "nonlin": "torch.nn.LeakyReLU",
                "nonlin_kwargs": {"inplace": True},
            },
            "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
        },
        "batch_dice": False,
    }
    for role, segmentation, order in (("data", False, 3), ("seg", True, 1), ("probabilities", False, 1)):
        configuration[f"resampling_fn_{role}"] = "resample_data_or_seg_to_shape"
        arguments = {"is_seg": segmentation, "order": order, "order_z": 0, "force_separate_z": None}
        configuration[f"resampling_fn_{role}_kwargs"] = arguments
    intensities = {
        "max": 300.0, "mean": 40.0, "median": 40.0, "min": -100.0, "percentile_00_5": -100.0,
        "percentile_99_5": 200.0, "std": 45.0,
    }  # fmt: skip
    return {
        "dataset_name": "Dataset900_Random",
        "plans_name": PLANS,
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [128, 128, 128],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {model.configuration: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {str(c): intensities for c in range(model.channels)},
    }


def _dataset(model: RandomModel) -> Json:
    labels = {"background": 0, **{f"organ{number}": number for number in range(1, model.classes)}}
    return {
        "channel_names": {str(number): "CT" for number in range(model.channels)},
        "labels": labels,
        "numTraining": 1,
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
    }


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--classes", type=click.IntRange(2), default=60, show_default=True, help="With the background.")
def main(folder: Path, classes: int) -> None:
    """Writes FOLDER/nnUNetTrainer__nnUNetPlans__3d_fullres and the case FOLDER/images/body (300 x 400 x 400, 0.8 mm)."""
    print(write_model(RandomModel(classes=classes), folder))
    write_case(folder / "images", "body", (300, 400, 400), (0.8, 0.8, 0.8))


if __name__ == "__main__":
    main()
