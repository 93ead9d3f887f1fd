"""Is a file whole? ITK does not ask.

ITK 5.4 reads a truncated .nii, .nii.gz or .gipl and a damaged .nii.gz or .mha without a word, the rest of the image
being zero or arbitrary; it takes all the memory that a header asks for; and in NIfTI it makes NaN and infinity zero. So
compressed data is decompressed once against its own checksum, the bytes that are there are held against those that the
header promises, and NIfTI's floats are looked at.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trtbuild.errors import InputError
from trtbuild.volume.io.headers import Promise, data_start, is_packed, promise_from_head

GZIP = b"\x1f\x8b"
HEAD = 1 << 16
CHUNK = 1 << 20
GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS
"""zlib's window bits for "find out which of the two it is"."""


def require_sound(file: Path, voxel_bytes: int | None = None) -> None:
    """Raises InputError where `file` is damaged, shorter than its header says, or a NIfTI that holds NaN or infinity.

    NIfTI, GIPL, MetaImage and NRRD are known, and every file that is compressed by gzip as a whole. Other formats,
    and headers that point to another file, are left to the library that reads them. Memory is constant.

    Args:
        file: the image file.
        voxel_bytes: bytes of all voxels according to the library, for MetaImage and NRRD.
    """
    with file.open("rb") as stream:
        head = stream.read(HEAD)
    start = data_start(head)
    if start is not None:
        packed = is_packed(head[:start])
        length = _length(_blocks(file, start)) if packed else file.stat().st_size - start
        _require_length(file, length, voxel_bytes)
        return
    packed = head.startswith(GZIP)
    promise = promise_from_head(next(_blocks(file), b"") if packed else head)
    if promise is not None and promise.floats is not None and 0 not in promise.shape:
        _require_finite(file, promise)
    else:
        length = _length(_blocks(file)) if packed else file.stat().st_size
        _require_length(file, length, None if promise is None else promise.length)


def _require_length(file: Path, length: int, promised: int | None) -> None:
    if promised is not None and length < promised:
        raise InputError("The image file is truncated, or its header is wrong.", expected=f"{promised} bytes",
                         got=f"{length} bytes", where=file, hint="Copy or export the file again.")  # fmt: skip


def _require_finite(file: Path, promise: Promise) -> None:
    """Length and values in one pass over a NIfTI of floats."""
    dtype = np.dtype(promise.floats)
    missing, seen, bad, first = promise.length - promise.start, 0, 0, 0
    skip, rest, length = promise.start, b"", 0
    for block in _blocks(file):
        length += len(block)
        rest += block[skip:]
        skip = max(0, skip - len(block))
        values = np.frombuffer(rest[: min(len(rest) // dtype.itemsize * dtype.itemsize, missing)], dtype)
        rest, missing = rest[values.nbytes :] if missing else b"", missing - values.nbytes
        finite = np.isfinite(values)
        if not finite.all():
            first = first if bad else seen + int(finite.argmin())
            bad += int(np.count_nonzero(~finite))
        seen += values.size
    _require_length(file, length, promise.length)
    if bad:
        raise non_finite(file, bad, tuple(map(int, np.unravel_index(first, promise.shape[::-1]))))


def non_finite(file: Path, count: int, first: tuple[int, ...]) -> InputError:
    """The error for NaN or infinity in an image; `first` is an index in (z, y, x) order."""
    return InputError("The image holds NaN or infinity.", expected="finite float32 values", where=file,
                      got=f"{count} such voxels, the first at (z, y, x) = {first}",
                      hint="Replace them, for example by the background value.")  # fmt: skip


def _length(blocks: Iterator[bytes]) -> int:
    return sum(map(len, blocks))


def _blocks(file: Path, start: int = 0) -> Iterator[bytes]:
    """What stands in the file from `start` on, decompressed and checked where it is a gzip or zlib stream.

    Like zlib's own reader: further members follow directly, anything else behind the last one is not looked at.
    """
    with file.open("rb") as stream:
        stream.seek(start)
        packed = stream.read(CHUNK)
        if start == 0 and not packed.startswith(GZIP):
            while packed:
                yield packed
                packed = stream.read(CHUNK)
            return
        member = zlib.decompressobj(GZIP_OR_ZLIB)
        while True:
            try:
                data = member.decompress(packed, CHUNK)
            except zlib.error as error:
                raise _damaged(file, str(error)) from error
            if data:
                yield data
            elif not packed and not member.eof:
                raise _damaged(file, "the compressed data ends too early")
            packed = member.unconsumed_tail or (b"" if member.eof else stream.read(CHUNK))
            if member.eof:
                packed = member.unused_data
                if len(packed) < len(GZIP):
                    packed += stream.read(CHUNK)
                if not packed.startswith(GZIP):
                    return
                member = zlib.decompressobj(GZIP_OR_ZLIB)


def _damaged(file: Path, reason: str) -> InputError:
    return InputError("The image file is damaged.", expected="compressed data that agrees with its checksum",
                      got=reason, where=file, hint="Copy or export the file again.")  # fmt: skip
