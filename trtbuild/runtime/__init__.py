"""Runs networks and cases.

Does: opens engines behind one Runner protocol, drives the tile loop, turns one image into its segmentation.
Takes: a BuildRecord with its ONNX or plan, arrays, a ModelSpec. Gives: logits, a Prediction.
May touch: device memory and engines (read). It knows neither torch nor onnx, nor how engines are built or bundled.
"""

from trtbuild.runtime.predictor import Prediction, Progress, Settings, prediction_from_array
from trtbuild.runtime.tiles import logits_from_image, tile_plan

__all__ = ["Prediction", "Progress", "Settings", "logits_from_image", "prediction_from_array", "tile_plan"]
