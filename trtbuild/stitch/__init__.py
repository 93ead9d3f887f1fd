"""What a sliding window means.

Does: places windows on an image, weights them, mirrors them, and adds their logits into one accumulator.
Takes: arrays and plain numbers. Gives: window positions, weights, logits.
May touch: nothing; it knows no files, devices, models or engines. Everything here but `accumulate` is plain NumPy;
`accumulate` holds the compiled loops (Numba) and is imported late.
"""

from trtbuild.stitch.gaussian import axis_gaussian, normalised_weights
from trtbuild.stitch.grid import Grid, axis_steps, grid_from_shape, padded_shape
from trtbuild.stitch.mirror import flip_combinations

__all__ = [
    "Grid",
    "axis_gaussian",
    "axis_steps",
    "flip_combinations",
    "grid_from_shape",
    "normalised_weights",
    "padded_shape",
]
