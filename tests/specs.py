"""A small ModelSpec for tests of single rooms; every field can be replaced."""

from __future__ import annotations

from typing import Any

from trtbuild.spec import Labels, ModelSpec, Resampling, ZScore


def spline(order: int, **changes: Any) -> Resampling:
    values: dict[str, Any] = {
        "method": "spline",
        "is_segmentation": False,
        "order": order,
        "order_z": 0,
        "separate_z": "auto",
        "anisotropy_threshold": 3.0,
    }
    return Resampling(**(values | changes))


def make_spec(**changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "dataset": "Dataset999_Test",
        "plans": "nnUNetPlans",
        "configuration": "3d_fullres",
        "trainer": "nnUNetTrainer",
        "channels": ("T1",),
        "previous_stage": None,
        "patch": (8, 12, 10),
        "spacing": (1.0, 1.0, 1.0),
        "transpose_forward": (0, 1, 2),
        "transpose_backward": (0, 1, 2),
        "normalization": (ZScore(masked=False),),
        "resample_data": spline(3),
        "resample_segmentation": spline(1, is_segmentation=True),
        "resample_probabilities": spline(1),
        "labels": Labels(
            decision="argmax",
            values=(0, 1, 2),
            names={"background": (0,), "a": (1,), "b": (2,)},
            foreground=(1, 2),
            ignore=None,
        ),
        "reader": "SimpleITKIO",
        "file_ending": ".nii.gz",
    }
    return ModelSpec(**(values | changes))
