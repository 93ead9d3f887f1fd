"""Which files belong to which case.

Does: lists a folder, DICOM series, image files or a case list. Takes: paths and the model's file ending.
Gives: cases. May touch: names of files, and the first bytes of what may be DICOM.
"""

from trtbuild.volume.cases.case import Case
from trtbuild.volume.cases.inputs import cases_from_input, part_of

__all__ = ["Case", "cases_from_input", "part_of"]
