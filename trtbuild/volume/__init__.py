"""Images and the way between their grid and the network's.

Does: reads and writes image files; crops, normalises and resamples; brings logits back as labels.
Takes: files or arrays, and a ModelSpec. Gives: arrays for the network, segmentations, written files.
May touch: image files. It knows no engines, no runners and no folders of models.
"""

from trtbuild.volume.back import probabilities_from_logits, segmentation_from_logits
from trtbuild.volume.preparation import CaseGrid, Prepared, prepared_from_array

__all__ = ["CaseGrid", "Prepared", "prepared_from_array", "probabilities_from_logits", "segmentation_from_logits"]
