"""More models of the zoo: cascades, ensembles, other resampling, readers, many labels, old plans."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from zoo_images import Intensity, Scene
from zoo_plans import Recipe

CUBE = ((3, 3, 3),) * 3
HALVING = ((1, 1, 1), (2, 2, 2), (2, 2, 2))

# One channel with masked z-score: where the first stage finds something outside the nonzero mask, those voxels count
# as inside in the second.
CASCADE: dict[str, Any] = {
    "dataset": "Dataset701_Cascade",
    "image_seed": 70,
    "plans": "nnUNetPlans",
    "reader": "SimpleITKIO",
    "file_ending": ".nii.gz",
    "channels": ("T1",),
    "labels": {"background": 0, "one": 1, "two": 2, "three": 3},
    "transpose_forward": (1, 0, 2),
    "normalization": ("ZScoreNormalization",),
    "masked": True,
    "features": (4, 8, 16),
    "kernels": CUBE,
    "strides": HALVING,
    "intensity": Intensity(scale=600, offset=40, dtype="float32"),
    "scenes": {
        "main": Scene(shape=(41, 59, 53), spacing=(1.15, 0.8, 0.93), below=(2, 1, 5), above=(4, 5, 3)),
        "small": Scene(shape=(25, 29, 27), spacing=(1.15, 0.8, 0.93), below=(1, 2, 3), above=(3, 2, 1)),
        "zero": Scene(shape=(31, 27, 35), spacing=(1.15, 0.8, 0.93), empty=True),
        "slice": Scene(shape=(1, 33, 47), spacing=(1.15, 0.8, 0.93), below=(0, 2, 1), above=(0, 1, 3)),
    },
}
LOWRES3D = Recipe(
    name="lowres3d", seed=71, configuration="3d_lowres", next_stage="3d_cascade_fullres", patch=(16, 20, 16),
    spacing=(1.9, 1.8, 2.0), mirror_axes=(0, 1, 2), **CASCADE,
)  # fmt: skip
CASCADE3D = Recipe(
    name="cascade3d", seed=72, configuration="3d_cascade_fullres", inherits_from="3d_fullres",
    previous_stage="3d_lowres", patch=(24, 20, 28), spacing=(0.9, 1.0, 1.0), mirror_axes=(0, 2), **CASCADE,
)  # fmt: skip

ENSEMBLE: dict[str, Any] = {
    "dataset": "Dataset731_Ensemble",
    "image_seed": 73,
    "plans": "nnUNetPlans",
    "reader": "NibabelIO",
    "file_ending": ".nii.gz",
    "channels": ("MR",),
    "labels": {"background": 0, "left": 1, "right": 2},
    "transpose_forward": (2, 0, 1),
    "normalization": ("ZScoreNormalization",),
    "intensity": Intensity(scale=900, offset=60, dtype="float32"),
    "scenes": {
        "main": Scene(shape=(43, 57, 25), spacing=(1.2, 0.8, 1.9), below=(1, 4, 1), above=(3, 2, 3)),
        "small": Scene(shape=(23, 35, 9), spacing=(1.2, 0.8, 1.9), below=(1, 1, 1), above=(1, 3, 1)),
        "zero": Scene(shape=(33, 41, 7), spacing=(1.2, 0.8, 1.9), empty=True),
    },
}
ENS2D = Recipe(
    name="ens2d", seed=74, configuration="2d", patch=(32, 36), spacing=(1.0, 1.0), features=(6, 12, 24),
    kernels=((3, 3),) * 3, strides=((1, 1), (2, 2), (2, 2)), mirror_axes=(0, 1), **ENSEMBLE,
)  # fmt: skip
ENS3D = Recipe(
    name="ens3d", seed=75, configuration="3d_fullres", patch=(12, 28, 32), spacing=(2.2, 1.0, 1.0),
    features=(6, 12, 24), kernels=CUBE, strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)), folds=("0", "1"),
    mirror_axes=(0, 1, 2), **ENSEMBLE,
)  # fmt: skip

TORCH3D = Recipe(
    name="torch3d",
    seed=76,
    plans="nnUNetResEncUNetLPlans_torchres_sepz",
    configuration="3d_fullres",
    reader="SimpleITKIO",
    file_ending=".nii.gz",
    channels=("CT",),
    labels={"background": 0, "organ": 1, "vessel": 2},
    resampling="torch",
    torch_separate_z=None,
    patch=(12, 32, 28),
    spacing=(4.0, 1.0, 0.8),
    normalization=("CTNormalization",),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    mirror_axes=(0, 1),
    intensity=Intensity(scale=700, offset=-330, dtype="int16"),
    scenes={
        "main": Scene(shape=(17, 57, 47), spacing=(5.0, 0.7, 1.1), below=(1, 2, 4), above=(3, 4, 6)),
        "small": Scene(shape=(9, 41, 25), spacing=(5.0, 0.7, 1.1), below=(1, 1, 2), above=(1, 3, 2)),
        "zero": Scene(shape=(13, 45, 31), spacing=(5.0, 0.7, 1.1), empty=True),
        "slice": Scene(shape=(1, 51, 43), spacing=(5.0, 0.7, 1.1), below=(0, 2, 1), above=(0, 1, 3)),
        # the image is nearly isotropic, only the model is not: the new spacing decides about separate z
        "thin": Scene(shape=(41, 41, 37), spacing=(1.0, 0.9, 0.9), below=(2, 1, 1), above=(2, 1, 1)),
    },
)

TORCH3D_ISO = Recipe(
    name="torch3d_iso",
    seed=77,
    plans="nnUNetResEncUNetLPlans_torchres",
    configuration="3d_fullres",
    reader="SimpleITKIO",
    file_ending=".nii.gz",
    channels=("T1", "T2"),
    labels={"background": 0, "core": 1, "rim": 2},
    resampling="torch",
    torch_separate_z=False,
    patch=(20, 24, 28),
    spacing=(1.0, 1.1, 1.0),
    transpose_forward=(2, 0, 1),
    normalization=("ZScoreNormalization", "NoNormalization"),
    features=(6, 12, 24),
    kernels=CUBE,
    strides=HALVING,
    mirror_axes=(1,),
    intensity=Intensity(scale=60, offset=4, dtype="float32"),
    scenes={
        "main": Scene(shape=(41, 37, 49), spacing=(0.9, 1.3, 0.83), below=(2, 1, 5), above=(4, 5, 3)),
        "small": Scene(shape=(25, 29, 21), spacing=(0.9, 1.3, 0.83), below=(1, 2, 3), above=(3, 2, 1)),
        "zero": Scene(shape=(21, 27, 35), spacing=(0.9, 1.3, 0.83), empty=True),
        # force_separate_z False: thick slices are interpolated along all axes at once
        "thick": Scene(shape=(33, 37, 11), spacing=(0.9, 1.0, 4.1), below=(1, 2, 1), above=(1, 2, 1)),
    },
)

NONE3D = Recipe(
    name="none3d",
    seed=78,
    plans="nnUNetPlans_noResampling",
    configuration="3d_fullres",
    reader="NibabelIOWithReorient",
    file_ending=".nii.gz",
    channels=("MR",),
    labels={"background": 0, "one": 1, "two": 2},
    resampling="none",
    patch=(20, 24, 28),
    spacing=(1.0, 1.0, 1.0),
    normalization=("ZScoreNormalization",),
    features=(6, 12, 24),
    kernels=CUBE,
    strides=HALVING,
    mirror_axes=(0, 1),
    intensity=Intensity(scale=600, offset=40, dtype="float32"),
    # spacings that any other function would resample
    scenes={
        "main": Scene(shape=(31, 43, 47), spacing=(1.7, 0.8, 0.9), below=(2, 1, 5), above=(4, 5, 3), codes="LPS"),
        "small": Scene(shape=(17, 29, 27), spacing=(1.7, 0.8, 0.9), below=(1, 2, 3), above=(3, 2, 1), codes="PIR"),
        "zero": Scene(shape=(25, 27, 35), spacing=(1.7, 0.8, 0.9), empty=True),
    },
)

MANY300 = Recipe(
    name="many300",
    seed=79,
    plans="nnUNetPlans",
    configuration="3d_fullres",
    reader="SimpleITKIO",
    file_ending=".nii.gz",
    channels=("MR",),
    labels={"background": 0, **{f"part_{value}": value for value in range(1, 300)}},
    patch=(12, 16, 16),
    spacing=(1.2, 1.0, 1.0),
    normalization=("ZScoreNormalization",),
    features=(8, 12),
    kernels=((3, 3, 3),) * 2,
    strides=((1, 1, 1), (2, 2, 2)),
    mirror_axes=(2,),
    intensity=Intensity(scale=900, offset=60, dtype="float32"),
    scenes={
        "main": Scene(shape=(23, 31, 27), spacing=(1.0, 1.3, 0.9), below=(1, 2, 1), above=(3, 2, 3)),
        "small": Scene(shape=(13, 17, 15), spacing=(1.0, 1.3, 0.9), below=(1, 1, 1), above=(1, 1, 1)),
    },
)

IGNORE3D = Recipe(
    name="ignore3d",
    seed=80,
    plans="nnUNetPlans",
    configuration="3d_fullres",
    reader="SimpleITKIO",
    file_ending=".nrrd",
    channels=("MR",),
    labels={"background": 0, "one": 1, "two": 2, "ignore": 3},
    patch=(16, 20, 24),
    spacing=(1.2, 1.0, 1.0),
    transpose_forward=(1, 0, 2),
    normalization=("ZScoreNormalization",),
    features=(6, 12, 24),
    kernels=CUBE,
    strides=HALVING,
    mirror_axes=(0, 1, 2),
    intensity=Intensity(scale=900, offset=60, dtype="int16"),
    scenes={
        "main": Scene(shape=(39, 31, 43), spacing=(0.8, 1.4, 0.9), below=(1, 2, 1), above=(3, 2, 3)),
        "small": Scene(shape=(23, 13, 21), spacing=(0.8, 1.4, 0.9), below=(1, 1, 1), above=(1, 1, 1)),
        "zero": Scene(shape=(25, 27, 35), spacing=(0.8, 1.4, 0.9), empty=True),
    },
)

LEGACY3D = Recipe(
    name="legacy3d",
    seed=81,
    plans="nnUNetPlans",
    configuration="3d_fullres",
    reader="SimpleITKIO",
    file_ending=".nii.gz",
    channels=("CT",),
    labels={"background": 0, "organ": 1, "tumour": 2},
    legacy=True,
    patch=(16, 24, 28),
    spacing=(2.5, 0.9, 0.9),
    normalization=("CTNormalization",),
    features=(6, 12, 20),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    strides=((1, 1, 1), (1, 2, 2), (2, 2, 2)),
    mirror_axes=(0, 1, 2),
    intensity=Intensity(scale=700, offset=-330, dtype="int16"),
    scenes={
        "main": Scene(shape=(29, 43, 47), spacing=(2.1, 1.1, 0.8), below=(1, 2, 4), above=(3, 4, 6)),
        "small": Scene(shape=(13, 31, 25), spacing=(2.1, 1.1, 0.8), below=(1, 1, 2), above=(1, 3, 2)),
        "zero": Scene(shape=(19, 27, 31), spacing=(2.1, 1.1, 0.8), empty=True),
    },
)

REORIENT3D = Recipe(
    name="reorient3d",
    seed=82,
    plans="nnUNetPlans",
    configuration="3d_fullres",
    reader="SimpleITKIOWithReorient",
    file_ending=".nii.gz",
    channels=("T1", "T2"),
    labels={"background": 0, "one": 1, "two": 2},
    patch=(16, 20, 24),
    spacing=(1.2, 1.0, 1.0),
    normalization=("ZScoreNormalization",) * 2,
    features=(6, 12, 24),
    kernels=CUBE,
    strides=HALVING,
    mirror_axes=(0, 1),
    intensity=Intensity(scale=900, offset=60, dtype="int16"),
    scenes={
        "main": Scene(shape=(31, 39, 43), spacing=(1.4, 0.8, 0.9), below=(1, 2, 1), above=(3, 2, 3), codes="LIP"),
        "small": Scene(shape=(13, 23, 21), spacing=(1.4, 0.8, 0.9), below=(1, 1, 1), above=(1, 1, 1), codes="SAL"),
        "zero": Scene(shape=(25, 27, 35), spacing=(1.4, 0.8, 0.9), empty=True, codes="LPS"),
        "slice": Scene(shape=(1, 33, 47), spacing=(1.4, 0.8, 0.9), below=(0, 2, 1), above=(0, 1, 3), codes="PSR"),
    },
)

TIFF3D = Recipe(
    name="tiff3d",
    seed=83,
    plans="nnUNetPlans",
    configuration="3d_fullres",
    reader="Tiff3DIO",
    file_ending=".tif",
    channels=("light",),
    labels={"background": 0, "cell": 1, "border": 2},
    patch=(16, 20, 24),
    spacing=(1.2, 1.0, 1.0),
    transpose_forward=(2, 0, 1),
    normalization=("RescaleTo01Normalization",),
    features=(6, 12, 24),
    kernels=CUBE,
    strides=HALVING,
    mirror_axes=(0, 1, 2),
    intensity=Intensity(scale=200, offset=20, dtype="uint8"),
    scenes={
        "main": Scene(shape=(31, 39, 43), spacing=(1.4, 0.8, 0.9), below=(1, 2, 1), above=(3, 2, 3)),
        "small": Scene(shape=(13, 23, 21), spacing=(1.4, 0.8, 0.9), below=(1, 1, 1), above=(1, 1, 1)),
        "zero": Scene(shape=(25, 27, 35), spacing=(1.4, 0.8, 0.9), empty=True),
    },
)

FOUR_D = Recipe(
    name="four_d",
    seed=84,
    plans="nnUNetPlans",
    configuration="3d_fullres",
    reader="SimpleITKIO",
    file_ending=".nii.gz",
    channels=("T1", "T2", "FLAIR"),
    labels={"background": 0, "one": 1, "two": 2},
    one_file=True,
    patch=(16, 20, 24),
    spacing=(1.2, 1.0, 1.0),
    transpose_forward=(1, 0, 2),
    normalization=("ZScoreNormalization",) * 3,
    masked=True,
    features=(6, 12, 24),
    kernels=CUBE,
    strides=HALVING,
    mirror_axes=(0, 1),
    intensity=Intensity(scale=900, offset=60, dtype="float32"),
    scenes={
        "main": Scene(shape=(39, 31, 43), spacing=(0.8, 1.4, 0.9), below=(1, 2, 1), above=(3, 2, 3)),
        "small": Scene(shape=(23, 13, 21), spacing=(0.8, 1.4, 0.9), below=(1, 1, 1), above=(1, 1, 1)),
        "zero": Scene(shape=(25, 27, 35), spacing=(0.8, 1.4, 0.9), empty=True),
    },
)

REGIONS2D = Recipe(
    name="regions2d",
    seed=85,
    plans="nnUNetPlans",
    configuration="2d",
    reader="SimpleITKIO",
    file_ending=".mha",
    channels=("light", "dark"),
    labels={"background": 0, "whole": (1, 2, 3), "core": (1, 3), "centre": (3,)},
    regions_class_order=(2, 1, 3),
    flat=True,
    patch=(40, 48),
    spacing=(0.9, 1.1),
    normalization=("ZScoreNormalization", "RescaleTo01Normalization"),
    kernels=((3, 3),) * 4,
    features=(8, 16, 32, 32),
    strides=((1, 1), (2, 2), (2, 2), (2, 2)),
    mirror_axes=(0, 1),
    intensity=Intensity(scale=900, offset=60, dtype="int16"),
    scenes={
        "main": Scene(shape=(1, 79, 119), spacing=(1098.9, 1.1, 0.8), below=(0, 2, 3), above=(0, 4, 7)),
        "small": Scene(shape=(1, 35, 97), spacing=(1098.9, 1.1, 0.8), below=(0, 1, 1), above=(0, 3, 3)),
        "zero": Scene(shape=(1, 61, 91), spacing=(1098.9, 1.1, 0.8), empty=True),
    },
)

MORE_RECIPES: Mapping[str, Recipe] = {
    r.name: r
    for r in (
        LOWRES3D, CASCADE3D, ENS2D, ENS3D, TORCH3D, TORCH3D_ISO, NONE3D, MANY300, IGNORE3D, LEGACY3D, REORIENT3D,
        TIFF3D, FOUR_D, REGIONS2D,
    )
}  # fmt: skip
