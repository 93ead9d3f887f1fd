"""How equal is equal.

Does: measures agreement of segmentations, surfaces and logits, and holds every tolerance with its reason.
Takes: arrays. Gives: numbers, nnU-Net's summary of them, and verdicts.
May touch: nothing. It knows no engines and no files.
"""

from trtbuild.accuracy.metrics import Overlap, dice, differing_voxels, overlaps
from trtbuild.accuracy.tolerances import LOGIT_TOLERANCE, LOWERED_TOLERANCE, TYPED_TOLERANCE, logit_error, logit_rms

__all__ = [
    "LOGIT_TOLERANCE", "LOWERED_TOLERANCE", "TYPED_TOLERANCE",
    "Overlap", "dice", "differing_voxels", "logit_error", "logit_rms", "overlaps",
]  # fmt: skip
