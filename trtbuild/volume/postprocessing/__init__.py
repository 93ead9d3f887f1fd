"""What is done to a segmentation afterwards: nnU-Net's rules, read without running them, and applied.

Does: reads postprocessing.json and .pkl; keeps largest components. Takes: a file, a segmentation.
Gives: rules, segmentations. May touch: the file.
"""

from trtbuild.volume.postprocessing.rules import postprocessed, postprocessing_bytes, postprocessing_from_file

__all__ = ["postprocessed", "postprocessing_bytes", "postprocessing_from_file"]
