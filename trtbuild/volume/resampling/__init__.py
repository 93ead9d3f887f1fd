"""From one grid to another, as nnU-Net does it: images, logits and segmentations.

Does: chooses the new shape and the axis that is resampled apart; splines, torch's linear interpolation, or nothing.
Takes: arrays, spacings, a Resampling. Gives: arrays. May touch: nothing.
"""

from trtbuild.volume.resampling.image import coarse_axis, nearest_index, new_shape, resample, resample_into
from trtbuild.volume.resampling.labels import resample_segmentation

__all__ = ["coarse_axis", "nearest_index", "new_shape", "resample", "resample_into", "resample_segmentation"]
