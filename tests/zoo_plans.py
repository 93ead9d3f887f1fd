"""The first six models of the zoo as values, and nnU-Net's plans.json, dataset.json and fingerprint made from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zoo_images import Intensity, Scene

Json = dict[str, Any]
Axes = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines one model of the zoo.

    Models with the same `dataset` are configurations of one plans.json, and those with the same `image_seed` have the
    same images. `torch_separate_z` is the argument of `resample_torch_fornnunet`. `legacy`: plans and dataset.json as
    before nnU-Net 2.3. `one_file`: all channels in one 4-D file. `flat`: the image files are 2-D.
    """

    name: str
    seed: int
    dataset: str | None = None
    image_seed: int | None = None
    previous_stage: str | None = None
    next_stage: str | None = None
    resampling: Literal["spline", "torch", "none"] = "spline"
    torch_separate_z: bool | None = None
    legacy: bool = False
    one_file: bool = False
    flat: bool = False
    # nnU-Net finds any other trainer by importing all of its trainers, some of which need a fitting torchvision
    trainer: str = "nnUNetTrainer"
    plans: str
    configuration: str
    inherits_from: str | None = None
    reader: str
    file_ending: str
    channels: tuple[str, ...]
    labels: Mapping[str, int | tuple[int, ...]]
    regions_class_order: tuple[int, ...] | None = None
    patch: tuple[int, ...]
    spacing: tuple[float, ...]
    transpose_forward: tuple[int, int, int] = (0, 1, 2)
    normalization: tuple[str, ...]
    masked: bool = False
    architecture: str = "unet.PlainConvUNet"
    features: tuple[int, ...] = (8, 16, 32)
    kernels: tuple[Axes, ...]
    strides: tuple[Axes, ...]
    folds: tuple[str, ...] = ("0",)
    mirror_axes: tuple[int, ...] | None
    intensity: Intensity
    scenes: Mapping[str, Scene]
    refused: Mapping[str, Scene] = field(default_factory=dict)

    @property
    def transpose_backward(self) -> tuple[int, int, int]:
        """As nnU-Net's planner makes it: the inverse permutation."""
        a, b, c = (self.transpose_forward.index(axis) for axis in range(3))
        return a, b, c


ISO3D = Recipe(
    name="iso3d",
    seed=11,
    plans="nnUNetPlans",
    configuration="3d_fullres",
    reader="SimpleITKIO",
    file_ending=".nii.gz",
    channels=("T1", "FLAIR"),
    labels={"background": 0, "core": 1, "rim": 2},
    patch=(32, 24, 40),
    spacing=(1.0, 1.0, 1.0),
    normalization=("ZScoreNormalization", "ZScoreNormalization"),
    masked=True,
    features=(4, 8, 16, 16),
    kernels=((3, 3, 3),) * 4,
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2), (2, 2, 2)),
    mirror_axes=(2,),
    intensity=Intensity(scale=600, offset=40, dtype="float32"),
    scenes={
        "main": Scene(shape=(75, 39, 71), spacing=(0.8, 1.3, 0.93), below=(2, 1, 5), above=(4, 5, 3)),
        "small": Scene(shape=(35, 29, 39), spacing=(0.8, 1.3, 0.93), below=(1, 2, 3), above=(3, 2, 1)),
        "zero": Scene(shape=(31, 27, 45), spacing=(0.8, 1.3, 0.93), empty=True),
        "slice": Scene(shape=(1, 33, 47), spacing=(0.8, 1.3, 0.93), below=(0, 2, 1), above=(0, 1, 3)),
        "noresample": Scene(shape=(37, 31, 47), spacing=(1.0, 1.0, 1.0), below=(1, 1, 2), above=(1, 3, 2)),
    },
    refused={"vanishing": Scene(shape=(1, 33, 47), spacing=(0.4, 1.3, 0.93))},
)

CT_ANISO = Recipe(
    name="ct_aniso",
    seed=22,
    plans="nnUNetPlans",
    configuration="3d_fullres",
    reader="NibabelIOWithReorient",
    file_ending=".nii.gz",
    channels=("CT",),
    labels={"background": 0, "organ": 1, "vessel": 2, "lesion": 3},
    patch=(12, 40, 32),
    spacing=(4.0, 1.0, 0.8),
    normalization=("CTNormalization",),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    mirror_axes=None,
    # Hounsfield units stored as int16 with an intercept; the percentiles of the plans cut both ends
    intensity=Intensity(scale=700, offset=-330, dtype="int16", inter=-1024),
    scenes={
        "main": Scene(shape=(19, 73, 47), spacing=(5.0, 0.7, 1.1), below=(1, 2, 4), above=(3, 4, 6), codes="LPS"),
        "small": Scene(shape=(9, 45, 35), spacing=(5.0, 0.7, 1.1), below=(1, 1, 2), above=(1, 3, 2), codes="PIR"),
        "zero": Scene(shape=(13, 45, 31), spacing=(5.0, 0.7, 1.1), empty=True, codes="LPS"),
        "slice": Scene(shape=(1, 51, 43), spacing=(5.0, 0.7, 1.1), below=(0, 2, 1), above=(0, 1, 3), codes="LAS"),
        "noresample": Scene(shape=(15, 45, 37), spacing=(4.0, 1.0, 0.8), below=(1, 1, 1), above=(1, 1, 1)),
        # the image is nearly isotropic, only the model is not: the new spacing decides about separate z
        "thin": Scene(shape=(51, 41, 37), spacing=(1.0, 0.9, 0.9), below=(2, 1, 1), above=(2, 1, 1), codes="RSA"),
    },
    refused={"vanishing": Scene(shape=(1, 51, 43), spacing=(1.5, 0.7, 1.1))},
)

SLICES2D = Recipe(
    name="slices2d",
    seed=33,
    plans="nnUNetPlans",
    configuration="2d",
    reader="NibabelIO",
    file_ending=".nii",
    channels=("MR",),
    labels={"background": 0, "left": 1, "right": 2, "ignore": 3},
    patch=(32, 40),
    spacing=(1.0, 1.0),
    transpose_forward=(2, 0, 1),
    normalization=("ZScoreNormalization",),
    kernels=((3, 3),) * 4,
    features=(8, 16, 32, 32),
    strides=((1, 1), (2, 2), (2, 2), (2, 2)),
    mirror_axes=(1,),
    intensity=Intensity(scale=900, offset=60, dtype="uint16", slope=0.25),
    scenes={
        "main": Scene(shape=(53, 77, 19), spacing=(1.2, 0.8, 2.0), below=(1, 4, 1), above=(3, 2, 3)),
        "small": Scene(shape=(23, 35, 7), spacing=(1.2, 0.8, 2.0), below=(1, 1, 1), above=(1, 3, 1)),
        "zero": Scene(shape=(33, 47, 3), spacing=(1.2, 0.8, 2.0), empty=True),
        "slice": Scene(shape=(35, 57, 1), spacing=(1.2, 0.8, 2.0), below=(1, 2, 0), above=(1, 2, 0)),
        "noresample": Scene(shape=(41, 47, 7), spacing=(1.0, 1.0, 2.0), below=(1, 2, 1), above=(1, 2, 1)),
        # slices so thick that nnU-Net resamples each on its own
        "thick": Scene(shape=(43, 63, 9), spacing=(1.2, 0.8, 6.0), below=(1, 2, 1), above=(1, 2, 1)),
    },
    refused={"vanishing": Scene(shape=(1, 57, 9), spacing=(0.4, 0.8, 2.0))},
)

REGIONS4 = Recipe(
    name="regions4",
    seed=44,
    plans="nnUNetPlans",
    configuration="3d_fullres_bs4",
    inherits_from="3d_fullres",
    reader="SimpleITKIO",
    file_ending=".mha",
    channels=("T1", "T1ce", "T2", "FLAIR"),
    labels={"background": 0, "whole tumor": (1, 2, 3), "tumor core": (1, 3), "enhancing tumor": (3,)},
    regions_class_order=(2, 1, 3),
    patch=(24, 32, 28),
    spacing=(1.2, 1.0, 1.0),
    normalization=("ZScoreNormalization",) * 4,
    masked=True,
    features=(6, 12, 24),
    kernels=((3, 3, 3),) * 3,
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    mirror_axes=(0, 1),
    intensity=Intensity(scale=1200, offset=90, dtype="int16"),
    scenes={
        "main": Scene(shape=(51, 37, 63), spacing=(1.0, 1.35, 0.9), below=(1, 2, 2), above=(3, 2, 4)),
        "small": Scene(shape=(27, 39, 23), spacing=(1.0, 1.35, 0.9), below=(1, 3, 1), above=(3, 1, 1)),
        "zero": Scene(shape=(29, 25, 33), spacing=(1.0, 1.35, 0.9), empty=True),
        "slice": Scene(shape=(1, 37, 43), spacing=(1.0, 1.35, 0.9), below=(0, 2, 1), above=(0, 1, 3)),
        "noresample": Scene(shape=(27, 37, 33), spacing=(1.2, 1.0, 1.0), below=(1, 1, 1), above=(1, 1, 1)),
    },
    refused={"vanishing": Scene(shape=(1, 37, 43), spacing=(0.5, 1.35, 0.9))},
)

RESENC5 = Recipe(
    name="resenc5",
    seed=55,
    plans="nnUNetResEncUNetMPlans",
    configuration="3d_fullres",
    reader="SimpleITKIO",
    file_ending=".nrrd",
    channels=("rescale_to_0_1", "noNorm"),
    labels={"background": 0, "shell": 1, "kernel": 2},
    patch=(12, 16, 20),
    spacing=(1.5, 1.2, 1.2),
    normalization=("RescaleTo01Normalization", "NoNormalization"),
    architecture="unet.ResidualEncoderUNet",
    features=(6, 12, 24),
    kernels=((3, 3, 3),) * 3,
    strides=((1, 1, 1), (2, 2, 2), (2, 2, 2)),
    folds=("0", "1", "2", "3", "4"),
    mirror_axes=(0, 1, 2),
    intensity=Intensity(scale=90, offset=-20, dtype="float32"),
    scenes={
        "main": Scene(shape=(35, 21, 31), spacing=(1.2, 1.6, 1.3), below=(1, 1, 4), above=(3, 3, 2)),
        "small": Scene(shape=(13, 13, 31), spacing=(1.2, 1.6, 1.3), below=(1, 1, 1), above=(1, 1, 3)),
        "zero": Scene(shape=(13, 17, 21), spacing=(1.2, 1.6, 1.3), empty=True),
        "slice": Scene(shape=(1, 19, 27), spacing=(1.2, 1.6, 1.3), below=(0, 1, 1), above=(0, 1, 1)),
        "noresample": Scene(shape=(17, 21, 27), spacing=(1.5, 1.2, 1.2), below=(1, 1, 1), above=(1, 1, 1)),
    },
    refused={"vanishing": Scene(shape=(1, 19, 27), spacing=(0.6, 1.6, 1.3))},
)

RGB_PNG = Recipe(
    name="rgb_png",
    seed=66,
    plans="nnUNetPlans",
    configuration="2d",
    reader="NaturalImage2DIO",
    file_ending=".png",
    channels=("R", "G", "B"),
    labels={"background": 0, "road": 1, "house": 2},
    patch=(48, 64),
    # png has spacing 1: these make one axis grow and the other shrink
    spacing=(0.8, 1.3),
    normalization=("RGBTo01Normalization",) * 3,
    kernels=((3, 3),) * 4,
    features=(8, 16, 32, 32),
    strides=((1, 1), (2, 2), (2, 2), (2, 2)),
    mirror_axes=(0, 1),
    intensity=Intensity(scale=255, offset=0, dtype="uint8"),
    scenes={
        "main": Scene(shape=(1, 79, 139), spacing=(999, 1, 1), below=(0, 2, 3), above=(0, 4, 7)),
        "small": Scene(shape=(1, 35, 117), spacing=(999, 1, 1), below=(0, 1, 1), above=(0, 3, 3)),
        "zero": Scene(shape=(1, 61, 91), spacing=(999, 1, 1), empty=True),
    },
)

RECIPES: Mapping[str, Recipe] = {r.name: r for r in (ISO3D, CT_ANISO, SLICES2D, REGIONS4, RESENC5, RGB_PNG)}


def plans_from_recipe(recipe: Recipe, family: Sequence[Recipe] = ()) -> Json:
    """plans.json as nnU-Net 2.8.1 writes it; `family` are all models of the dataset where it has several."""
    configurations: Json = {}
    for member in family or (recipe,):
        configuration = _configuration(member)
        if member.inherits_from is None:
            configurations[member.configuration] = configuration
        else:
            child = {"inherits_from": member.inherits_from, "batch_size": 4}
            if member.previous_stage is not None:
                child["previous_stage"] = member.previous_stage
            configurations |= {member.inherits_from: configuration, member.configuration: child}
    intensities = "by_modality" if recipe.legacy else "per_channel"
    return {
        "dataset_name": dataset_name(recipe),
        "plans_name": recipe.plans,
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [64, 64, 64],
        "image_reader_writer": recipe.reader,
        "transpose_forward": list(recipe.transpose_forward),
        "transpose_backward": list(recipe.transpose_backward),
        "configurations": configurations,
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        f"foreground_intensity_properties_{intensities}": _intensity_properties(recipe),
    }


def dataset_name(recipe: Recipe) -> str:
    return recipe.dataset or f"Dataset{recipe.seed:03d}_{recipe.name}"


def _configuration(recipe: Recipe) -> Json:
    next_stage = {} if recipe.next_stage is None else {"next_stage": recipe.next_stage}
    return {
        "data_identifier": f"{recipe.plans}_{recipe.inherits_from or recipe.configuration}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": list(recipe.patch),
        "median_image_size_in_voxels": [64.0] * len(recipe.patch),
        "spacing": list(recipe.spacing),
        "normalization_schemes": list(recipe.normalization),
        "use_mask_for_norm": [recipe.masked] * len(recipe.normalization),
        **_resampling(recipe),
        **(_legacy_network(recipe) if recipe.legacy else {"architecture": _architecture(recipe)}),
        **next_stage,
        "batch_dice": False,
    }


def _resampling(recipe: Recipe) -> Json:
    """The three resampling functions with the arguments that nnU-Net's planners write for them."""
    if recipe.resampling == "none":
        function, kwargs = "no_resampling_hack", dict.fromkeys(("data", "seg", "probabilities"), Json())
    elif recipe.resampling == "torch":
        function = "resample_torch_fornnunet"
        common = {"force_separate_z": recipe.torch_separate_z, "memefficient_seg_resampling": False}
        kwargs = {role: {"is_seg": role == "seg", **common} for role in ("data", "seg", "probabilities")}
    else:
        function = "resample_data_or_seg_to_shape"
        common = {"order_z": 0, "force_separate_z": None}
        orders = {"data": 3, "seg": 1, "probabilities": 1}
        kwargs = {role: {"is_seg": role == "seg", "order": order, **common} for role, order in orders.items()}
    names = {f"resampling_fn_{role}": function for role in kwargs}
    return names | {f"resampling_fn_{role}_kwargs": arguments for role, arguments in kwargs.items()}


def _legacy_network(recipe: Recipe) -> Json:
    """The architecture's keys of plans before nnU-Net 2.3."""
    stages = len(recipe.features)
    return {
        "UNet_class_name": recipe.architecture.rpartition(".")[2],
        "UNet_base_num_features": recipe.features[0],
        "n_conv_per_stage_encoder": [2] * stages,
        "n_conv_per_stage_decoder": [2] * (stages - 1),
        "num_pool_per_axis": [sum(size > 1 for size in sizes) for sizes in zip(*recipe.strides, strict=True)],
        "pool_op_kernel_sizes": [list(stride) for stride in recipe.strides],
        "conv_kernel_sizes": [list(kernel) for kernel in recipe.kernels],
        "unet_max_num_features": recipe.features[-1],
    }


def _architecture(recipe: Recipe) -> Json:
    dimensions, stages = len(recipe.patch), len(recipe.features)
    residual = recipe.architecture.endswith("ResidualEncoderUNet")
    encoder = {"n_blocks_per_stage": [1, 2, 2]} if residual else {"n_conv_per_stage": [2] * stages}
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.{recipe.architecture}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(recipe.features),
            "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
            "kernel_sizes": [list(kernel) for kernel in recipe.kernels],
            "strides": [list(stride) for stride in recipe.strides],
            **encoder,
            "n_conv_per_stage_decoder": [1 if residual else 2] * (stages - 1),
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


def _intensity_properties(recipe: Recipe) -> Json:
    """Numbers such that CTNormalization cuts off both ends of the values."""
    low, high = recipe.intensity.offset, recipe.intensity.offset + recipe.intensity.scale
    properties = {
        "max": high,
        "mean": low + 0.47 * (high - low),
        "median": low + 0.46 * (high - low),
        "min": low,
        "percentile_00_5": low + 0.25 * (high - low),
        "percentile_99_5": low + 0.7 * (high - low),
        "std": 0.21 * (high - low),
    }
    return {str(channel): dict(properties) for channel in range(len(recipe.channels))}


def dataset_from_recipe(recipe: Recipe) -> Json:
    """dataset.json."""
    labels = {name: value if isinstance(value, int) else list(value) for name, value in recipe.labels.items()}
    order = {} if recipe.regions_class_order is None else {"regions_class_order": list(recipe.regions_class_order)}
    return {
        "modality" if recipe.legacy else "channel_names": {
            str(index): name for index, name in enumerate(recipe.channels)
        },
        "labels": labels,
        **order,
        "numTraining": 5,
        "file_ending": recipe.file_ending,
        "overwrite_image_reader_writer": recipe.reader,
    }


def fingerprint_from_recipe(recipe: Recipe) -> Json:
    """dataset_fingerprint.json. Inference never reads it."""
    return {
        "foreground_intensity_properties_per_channel": _intensity_properties(recipe),
        "median_relative_size_after_cropping": 0.7,
        "shapes_after_crop": [[64, 64, 64]] * 5,
        "spacings": [[1.0, 1.0, 1.0]] * 5,
    }
