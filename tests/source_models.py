"""Tiny trained-model folders in nnU-Net's format, every part of which a test can replace."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

Json = dict[str, Any]
MODEL = "nnUNetTrainer__nnUNetPlans__3d_fullres"


def architecture(dimensions: int = 3, kind: str = "PlainConvUNet", features: tuple[int, ...] = (4, 8)) -> Json:
    """The architecture entry of new plans."""
    blocks = "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage"
    stages = len(features)
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [[3] * dimensions for _ in features],
            "strides": [[1] * dimensions] + [[2] * dimensions for _ in features[1:]],
            blocks: [1] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def resampling(order: int, is_seg: bool = False) -> Json:
    return {"is_seg": is_seg, "order": order, "order_z": 0, "force_separate_z": None}


def make_plans(dimensions: int = 3, channels: int = 1, kind: str = "PlainConvUNet", **changes: Any) -> Json:
    """plans.json with one configuration, "3d_fullres"; `changes` replace entries of that configuration."""
    configuration = {
        "data_identifier": "nnUNetPlans_3d_fullres",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 24, 8][:dimensions],
        "median_image_size_in_voxels": [40.0, 50.0, 30.0][:dimensions],
        "spacing": [1.5, 1, 2.5][:dimensions],
        "normalization_schemes": ["ZScoreNormalization"] * channels,
        "use_mask_for_norm": [True] * channels,
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": resampling(3),
        "resampling_fn_seg_kwargs": resampling(1, is_seg=True),
        "resampling_fn_probabilities_kwargs": resampling(1),
        "architecture": architecture(dimensions, kind),
        "batch_dice": False,
    }
    configuration |= changes
    return {
        "dataset_name": "Dataset042_Tiny",
        "plans_name": "nnUNetPlans",
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [1, 0, 2],
        "transpose_backward": [1, 0, 2],
        "configurations": {"3d_fullres": {key: value for key, value in configuration.items() if value is not ...}},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            str(i): {
                "mean": 100.5 + i,
                "std": 20.25,
                "percentile_00_5": -50.0,
                "percentile_99_5": 250.0,
                "min": -1000.0,
            }
            for i in range(channels)
        },
    }


def make_dataset(channels: int = 1, **changes: Any) -> Json:
    dataset = {
        "channel_names": {str(i): f"MR{i}" for i in range(channels)},
        "labels": {"background": 0, "organ": 1, "tumour": 2},
        "numTraining": 6,
        "file_ending": ".nii.gz",
    }
    return {key: value for key, value in (dataset | changes).items() if value is not ...}


def legacy_configuration(dimensions: int = 3, kind: str = "PlainConvUNet") -> Json:
    """The architecture's entries as plans before nnU-Net 2.3 had them."""
    return {
        "architecture": ...,
        "UNet_class_name": kind,
        "UNet_base_num_features": 4,
        "n_conv_per_stage_encoder": [1, 2, 1],
        "n_conv_per_stage_decoder": [2, 1],
        "num_pool_per_axis": [2] * dimensions,
        "pool_op_kernel_sizes": [[1] * dimensions, [2] * dimensions, [1] + [2] * (dimensions - 1)],
        "conv_kernel_sizes": [[3] * dimensions, [1] + [3] * (dimensions - 1), [3] * dimensions],
        "unet_max_num_features": 9,
    }


def nnunet_network(entry: Mapping[str, Any], channels: int, heads: int, seed: int = 0) -> torch.nn.Module:
    """The network as nnU-Net builds it, with weights that leave nothing at its initial value."""
    torch.manual_seed(seed)
    network = get_network_from_plans(
        entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], channels, heads, False, False
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, 0.1, 0.3)
    assert isinstance(network, torch.nn.Module)
    return network.eval()


def make_checkpoint(weights: Mapping[str, torch.Tensor], fold: int | str = 0, **changes: Any) -> Json:
    """A checkpoint with everything that nnU-Net 2.8.1 writes, NumPy scalars and a device among it."""
    checkpoint = {
        "network_weights": weights,
        "optimizer_state": {
            "state": {0: {"momentum_buffer": torch.zeros(3)}},
            "param_groups": [{"lr": np.float64(0.01)}],
        },
        "grad_scaler_state": {"scale": 65536.0, "_growth_tracker": 3},
        "logging": {"mean_fg_dice": [np.float32(0.5), np.float64(0.75)], "epoch_start_timestamps": [1.0]},
        "_best_ema": np.float64(0.6),
        "current_epoch": 1000,
        "init_args": {
            "plans": {"plans_name": "nnUNetPlans"},
            "configuration": "3d_fullres",
            "fold": fold,
            "dataset_json": {"labels": {"background": 0}},
            "device": torch.device("cpu"),
        },
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1),
    }
    return {key: value for key, value in (checkpoint | changes).items() if value is not ...}


def write_model(
    root: Path,
    plans: Json | None = None,
    dataset: Json | None = None,
    folds: tuple[int | str, ...] = (0,),
    network: torch.nn.Module | None = None,
    **checkpoint: Any,
) -> Path:
    """Writes a model folder below `root` and returns it. `checkpoint` replaces entries of every checkpoint."""
    folder = root / MODEL
    folder.mkdir(parents=True)
    plans, dataset = plans or make_plans(), dataset or make_dataset()
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    for fold in folds:
        module = tiny_network(seed=0 if fold == "all" else int(fold)) if network is None else network
        (folder / f"fold_{fold}").mkdir()
        torch.save(
            make_checkpoint(module.state_dict(), fold, **checkpoint), folder / f"fold_{fold}" / "checkpoint_final.pth"
        )
    return folder


def tiny_network(seed: int = 0) -> PlainConvUNet:
    """What `make_plans()` and `make_dataset()` describe."""
    return nnunet_network(architecture(), channels=1, heads=3, seed=seed)


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A deep copy with the entry at `path` replaced; `...` removes it."""
    result = copy.deepcopy(value)
    target = result
    for key in path[:-1]:
        target = target[key]
    if new is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = new
    return result
