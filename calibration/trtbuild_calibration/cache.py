"""TensorRT's calibration cache, read and written: a text of scales that TensorRT 10 and ModelOpt take.

Line 1 is `TRT-<version>-EntropyCalibration2` (or `-MinMaxCalibration`); then `<tensor>: <hex>` for each tensor, the
scale (amax / 127) as the digits of its big-endian IEEE float32. Each line ends in a newline. TensorRT leaves leading
zeros out, so zero is `0`; ModelOpt needs 8 digits, so that many are written here. A tensor's name may hold `: `.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from trtbuild_calibration.errors import CacheError
from trtbuild_calibration.files import read_whole, write_whole
from trtbuild_calibration.thresholds import SMALLEST

Kind = Literal["EntropyCalibration2", "MinMaxCalibration"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HEADER = re.compile(rf"TRT-([1-9][0-9]{{3,6}})-({'|'.join(KINDS)})")
DAMAGED = "calibrate again, or copy the cache again"


@dataclass(frozen=True, kw_only=True)
class CalibrationCache:
    """Scales of tensors, as text so that a file written by TensorRT comes out byte for byte.

    Attributes:
        version: of TensorRT, as its headers have it: 8400 is 8.4.0, 101401 is 10.14.1.
        kind: which calibrator.
        digits: tensor -> hexadecimal digits of the scale, in the order of the file.
    """

    version: int
    kind: Kind
    digits: Mapping[str, str]

    @property
    def scales(self) -> dict[str, float]:
        """Tensor -> scale; 0 where TensorRT saw no values but 0, or none."""
        return {name: _scale(digits) for name, digits in self.digits.items()}

    @property
    def amax(self) -> dict[str, float]:
        """Tensor -> T = 127 * scale."""
        return {name: 127 * scale for name, scale in self.scales.items()}

    def to_bytes(self) -> bytes:
        """The file."""
        lines = [f"TRT-{self.version}-{self.kind}", *(f"{name}: {digits}" for name, digits in self.digits.items())]
        return "".join(line + "\n" for line in lines).encode()


def cache_from_scales(scales: Mapping[str, float], *, version: int, kind: Kind) -> CalibrationCache:
    """A cache of these scales, rounded to float32.

    Raises:
        CacheError: no scales; a name or a scale that the format cannot hold; a wrong version or kind.
    """
    if not HEADER.fullmatch(f"TRT-{version}-{kind}"):
        raise CacheError(
            "The header is wrong.", expected=f"TRT-<version>-{' or -'.join(KINDS)}", got=f"{version}, {kind}"
        )
    if not scales:
        raise CacheError("There are no scales to write.")
    return CalibrationCache(
        version=version, kind=kind, digits={name: _digits(name, scale) for name, scale in scales.items()}
    )


def write_cache(path: Path, cache: CalibrationCache) -> None:
    """Writes the file, whole or not at all."""
    write_whole(path, cache.to_bytes())


def read_cache(path: Path) -> CalibrationCache:
    """The cache in a file.

    Raises:
        CacheError: see `cache_from_bytes`; the message names the file.
        CalibrationError: the file cannot be read.
    """
    return cache_from_bytes(read_whole(path, "The calibration cache"), str(path))


def cache_from_bytes(raw: bytes, where: str = "calibration cache") -> CalibrationCache:
    """The cache in these bytes.

    Raises:
        CacheError: empty, cut in the middle of a line, another header, or a line that holds no name and positive
            scale; the message names the line. A cut between two lines shows only beside a network: `check_cache`.
    """
    if not raw:
        raise CacheError("The calibration cache is empty.", where=where, hint=DAMAGED)
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _wrong(where, line, "The calibration cache is no text.", "UTF-8", error.reason) from error
    header, *lines = text.split("\n")
    found = HEADER.fullmatch(header)
    if found is None:
        raise _wrong(where, 1, "The file is no calibration cache.", f"TRT-<version>-{' or -'.join(KINDS)}", header)
    if not lines or lines[-1]:
        raise _wrong(
            where, len(lines) + 1, "The calibration cache is cut.", "a line end", lines[-1] if lines else header
        )
    if len(lines) == 1:
        raise _wrong(where, 2, "The calibration cache holds no scales.", "<tensor>: <hex>", "the end of the file")
    digits: dict[str, str] = {}
    for number, entry in enumerate(lines[:-1], start=2):
        name, word = _entry(where, number, entry)
        if name in digits:
            raise _wrong(where, number, "A tensor stands twice in the calibration cache.", "different names", name)
        digits[name] = word
    kind: Kind = "EntropyCalibration2" if found[2] == KINDS[0] else "MinMaxCalibration"
    return CalibrationCache(version=int(found[1]), kind=kind, digits=digits)


def check_cache(cache: CalibrationCache, tensors: Iterable[str]) -> dict[str, float]:
    """Tensor -> amax for the tensors that a network quantises, in their order; the cache may hold more.

    Raises:
        CacheError: the cache lacks one of them, so it was made for another network, or is cut.
    """
    known = cache.amax
    wanted = list(tensors)
    missing = [name for name in wanted if name not in known]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise CacheError(
            "The calibration cache is not of this network.",
            expected=f"scales of {len(wanted)} tensors",
            got=f"{len(missing)} are missing: {', '.join(missing[:3])}{more}",
            hint="calibrate this network",
        )
    return {name: known[name] for name in wanted}


def _entry(where: str, number: int, line: str) -> tuple[str, str]:
    name, separator, word = line.rpartition(": ")
    if not separator or not name or not re.fullmatch("[0-9a-f]{1,8}", word):
        raise _wrong(where, number, "A line of the calibration cache is damaged.", "<tensor>: <hex>", f"{line:.80}")
    scale = _scale(word)
    if scale != 0 and not SMALLEST <= scale < float("inf"):  # NaN ends here too
        raise _wrong(
            where, number, "A scale of the calibration cache is damaged.", "0 or a positive float32", f"{line:.80}"
        )
    return name, word


def _scale(digits: str) -> float:
    value: float = struct.unpack("!f", bytes.fromhex(digits.zfill(8)))[0]
    return value


def _digits(name: str, scale: float) -> str:
    try:
        digits = struct.pack("!f", scale).hex()
    except OverflowError as error:
        raise CacheError("A scale does not fit into float32.", got=scale, where=name) from error
    if not name or "\n" in name or "\r" in name:
        raise CacheError("A tensor's name does not fit into a line.", got=repr(name))
    if not SMALLEST <= _scale(digits) < float("inf"):
        raise CacheError("A scale is wrong.", expected="a positive, normal float32", got=scale, where=name)
    return digits


def _wrong(where: str, line: int, what: str, expected: str, got: str) -> CacheError:
    return CacheError(what, expected=expected, got=f"{got:.80}", where=f"{where}, line {line}", hint=DAMAGED)
