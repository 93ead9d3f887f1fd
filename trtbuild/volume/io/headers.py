"""What the headers of NIfTI, GIPL, MetaImage and NRRD promise: as little of them as it takes to tell a whole file."""

from __future__ import annotations

import math
import re
import struct
from dataclasses import dataclass

# Bytes per voxel of NIfTI's datatype codes (nifti1.h; DT_BINARY, 1 bit, is read by no library).
NIFTI_BYTES = {2: 1, 4: 2, 8: 4, 16: 4, 32: 8, 64: 8, 128: 3, 256: 1, 512: 2, 768: 4, 1024: 8, 1280: 8, 1536: 16,
               1792: 16, 2048: 32, 2304: 4}  # fmt: skip
NIFTI_FLOATS = {16: "f4", 64: "f8"}
# Bytes per voxel of GIPL's image types, its header's length and its two magic numbers (itkGiplImageIO.cxx).
GIPL_BYTES = {7: 1, 8: 1, 15: 2, 16: 2, 31: 4, 32: 4, 64: 4, 65: 8}
GIPL_HEADER = 256
GIPL_MAGIC = (719555000, 4026526128)


@dataclass(frozen=True, kw_only=True)
class Promise:
    """Where the voxels begin in the (decompressed) file, how many there are (x, y, z …) and of which size in bytes.

    `floats` is their NumPy type if it is one that holds NaN and the library that reads it would hide that.
    """

    start: int
    shape: tuple[int, ...]
    voxel: int
    floats: str | None = None

    @property
    def length(self) -> int:
        """Bytes that the decompressed file must have at least."""
        return self.start + self.voxel * math.prod(self.shape)


def promise_from_head(head: bytes) -> Promise | None:
    """What a NIfTI (one file) or GIPL promises; None for anything else, and where the header makes no sense."""
    for order in "<>":
        if head[:4] == struct.pack(order + "i", 348) and len(head) >= 348 and head[344:348] == b"n+1\0":
            axes, *dim = struct.unpack_from(order + "8h", head, 40)
            (code,), (start,) = struct.unpack_from(order + "h", head, 70), struct.unpack_from(order + "f", head, 108)
            return _nifti(axes, dim, code, start, order)
        if head[:4] == struct.pack(order + "i", 540) and len(head) >= 540 and head[4:8] == b"n+2\0":
            axes, *dim = struct.unpack_from(order + "8q", head, 16)
            (code,), (start,) = struct.unpack_from(order + "h", head, 12), struct.unpack_from(order + "q", head, 168)
            return _nifti(axes, dim, code, start, order)
    if len(head) >= GIPL_HEADER and struct.unpack_from(">I", head, 252)[0] in GIPL_MAGIC:
        *dim, code = struct.unpack_from(">5H", head, 0)
        if code in GIPL_BYTES:
            return Promise(start=GIPL_HEADER, shape=tuple(max(1, n) for n in dim), voxel=GIPL_BYTES[code])
    return None


def _nifti(axes: int, dim: list[int], code: int, start: float, order: str) -> Promise | None:
    if code not in NIFTI_BYTES or not 1 <= axes <= 7 or min(dim[:axes]) < 0 or not math.isfinite(start):
        return None  # The library that reads the file refuses it, with a better reason.
    floats = order + NIFTI_FLOATS[code] if code in NIFTI_FLOATS else None
    return Promise(start=max(0, int(start)), shape=tuple(dim[:axes]), voxel=NIFTI_BYTES[code], floats=floats)


def data_start(head: bytes) -> int | None:
    """Where the voxels begin in a MetaImage or NRRD that holds them itself as raw or compressed bytes, else None."""
    if head.startswith(b"NRRD"):
        end = re.search(rb"\r?\n\r?\n", head)
        elsewhere = rb"^(data ?file|(line|byte) ?skip|encoding:(?!\s*(raw|gz)))"
    else:
        end = re.search(rb"^ElementDataFile\s*=\s*LOCAL\s*?\n", head, re.M | re.I)
        elsewhere = rb"^BinaryData\s*=\s*False"
    if end is None or re.search(elsewhere, head[: end.end()], re.M | re.I):
        return None
    return end.end()


def is_packed(head: bytes) -> bool:
    """Whether a MetaImage or NRRD header announces compressed voxels."""
    return re.search(rb"^(CompressedData\s*=\s*True|encoding:\s*(gzip|gz))\s*$", head, re.M | re.I) is not None
