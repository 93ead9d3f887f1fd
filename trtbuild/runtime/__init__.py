"""Runs networks and cases.

Does: opens engines behind one Runner protocol, drives the windows, turns one image into its segmentation.
Takes: a BuildRecord with its ONNX or plan, arrays, a ModelSpec. Gives: logits, a Prediction.
May touch: device memory and engines (read). It knows neither torch nor onnx, nor how engines are built or bundled.
"""

from trtbuild.runtime.case import Recipe, prediction_from_models
from trtbuild.runtime.predictor import Member, Prediction, Progress, Settings, prediction_from_array
from trtbuild.runtime.slabs import logits_from_image
from trtbuild.runtime.tiles import tile_plan

__all__ = [
    "Member",
    "Prediction",
    "Progress",
    "Recipe",
    "Settings",
    "logits_from_image",
    "prediction_from_array",
    "prediction_from_models",
    "tile_plan",
]
