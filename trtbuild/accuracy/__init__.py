"""How equal is equal.

Does: measures agreement of segmentations and logits, and holds every tolerance with its reason.
Takes: arrays. Gives: numbers and verdicts.
May touch: nothing. It knows no engines and no files.
"""

from trtbuild.accuracy.metrics import dice, differing_voxels
from trtbuild.accuracy.tolerances import LOGIT_TOLERANCE, logit_error

__all__ = ["LOGIT_TOLERANCE", "dice", "differing_voxels", "logit_error"]
