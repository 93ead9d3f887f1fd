"""The way back: logits on the network's grid to labels and probabilities on the image's grid.

Does: plans which slices need which logits, writes labels slab by slab, gives probabilities block by block.
Takes: logits, the case's CaseGrid, a ModelSpec. Gives: segmentations, probabilities, and how many bytes that takes.
May touch: nothing. `interpolate` and `vectors` hold the compiled loops and are imported late.
"""

from trtbuild.volume.back.labels import label_slices, segmentation_from_logits
from trtbuild.volume.back.probabilities import probabilities_bytes, probabilities_from_logits, probability_block
from trtbuild.volume.back.way import (
    Logits,
    Segmentation,
    WayBack,
    empty_segmentation,
    first_needed,
    label_type,
    ready_slices,
    way_back,
    way_back_bytes,
)

__all__ = [
    "Logits",
    "Segmentation",
    "WayBack",
    "empty_segmentation",
    "first_needed",
    "label_slices",
    "label_type",
    "probabilities_bytes",
    "probabilities_from_logits",
    "probability_block",
    "ready_slices",
    "segmentation_from_logits",
    "way_back",
    "way_back_bytes",
]
