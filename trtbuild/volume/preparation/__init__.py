"""From an image as read to what the network sees.

Does: checks, transposes, crops, normalises and resamples a case; adds the labels of a cascade's first stage.
Takes: arrays, spacings, a ModelSpec. Gives: `Prepared`, and how many bytes that takes. May touch: nothing.
"""

from trtbuild.volume.preparation.memory import preparation_bytes
from trtbuild.volume.preparation.preprocess import (
    CaseGrid,
    Prepared,
    labels_on_grid,
    prepared_from_array,
    uncropped_grid,
)

__all__ = ["CaseGrid", "Prepared", "labels_on_grid", "preparation_bytes", "prepared_from_array", "uncropped_grid"]
