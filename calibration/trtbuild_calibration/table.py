"""The ScaleTable: what a calibration found, of which network and patches. JSON, read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trtbuild_calibration.coverage import Coverage, coverage_from_json
from trtbuild_calibration.errors import CalibrationError
from trtbuild_calibration.files import read_whole, write_whole
from trtbuild_calibration.histogram import BINS
from trtbuild_calibration.observe import Observation
from trtbuild_calibration.strictjson import fields, mapping, size, text, value_from_bytes, whole, wrong
from trtbuild_calibration.thresholds import METHODS, Method, scale_of, thresholds

FORMAT = 1
VERSION = "1"
"""Of the calibration: it changes when the same patches would give other numbers."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One target.

    Attributes:
        maximum: largest |x|.
        amax: method -> T.
        bins: the candidate that entropy chose, 128 to 2048; 0 for a tensor of zeros.
    """

    maximum: float
    amax: Mapping[Method, float]
    bins: int


@dataclass(frozen=True, kw_only=True)
class Fingerprint:
    """What the numbers depend on.

    Attributes:
        network: SHA-256 of the ONNX file.
        cases: name -> SHA-256 of its files.
        seed: of the patches.
        patches_asked, patches_used: equal, since a calibration never shortens itself.
        percentile: of the method of that name.
        versions: package -> version; holds trtbuild_calibration.
    """

    network: str
    cases: Mapping[str, str]
    seed: int
    patches_asked: int
    patches_used: int
    percentile: float
    versions: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ScaleTable:
    """Attributes:
    entries: target -> thresholds, in the network's order.
    ranges: largest |x| of every observed tensor.
    fingerprint: network, cases, patches, versions.
    coverage: what the patches hold.
    """

    entries: Mapping[str, Entry]
    ranges: Mapping[str, float]
    fingerprint: Fingerprint
    coverage: Coverage

    def amax(self, method: Method) -> dict[str, float]:
        """Target -> T.

        Raises:
            CalibrationError: there is no such method.
        """
        if method not in METHODS:
            raise CalibrationError("There is no such method.", expected=", ".join(METHODS), got=method)
        return {name: entry.amax[method] for name, entry in self.entries.items()}

    def scales(self, method: Method) -> dict[str, float]:
        """Target -> T / 127, or 1 for a tensor of zeros."""
        return {name: scale_of(amax) for name, amax in self.amax(method).items()}

    def to_bytes(self) -> bytes:
        """The file; the same table gives the same bytes."""
        value = {
            "format": FORMAT,
            "entries": {name: _entry_to_json(entry) for name, entry in self.entries.items()},
            "ranges": dict(self.ranges),
            "fingerprint": asdict(self.fingerprint),
            "coverage": self.coverage.to_json(),
        }
        return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def table_from_observation(observation: Observation, fingerprint: Fingerprint, coverage: Coverage) -> ScaleTable:
    """Decides every threshold by every method.

    Raises:
        CalibrationError: the observation did not see as many patches as the fingerprint says.
    """
    seen = (observation.patches, fingerprint.patches_asked)
    if set(seen) != {fingerprint.patches_used}:
        raise CalibrationError(
            "A calibration used another number of patches than asked for.", expected=seen[1], got=seen[0]
        )
    entries = {}
    for name, histogram in observation.histograms.items():
        found = thresholds(histogram, percentile=fingerprint.percentile)
        amax = {method: one.amax for method, one in found.items()}
        entries[name] = Entry(maximum=histogram.top, amax=amax, bins=found["entropy"].bins)
    return ScaleTable(entries=entries, ranges=observation.ranges, fingerprint=fingerprint, coverage=coverage)


def write_table(path: Path, table: ScaleTable) -> None:
    """Writes the file, whole or not at all."""
    write_whole(path, table.to_bytes())


def read_table(path: Path) -> ScaleTable:
    """The table in a file.

    Raises:
        CalibrationError: it cannot be read, or is not a ScaleTable; the message names the key.
    """
    return table_from_bytes(read_whole(path, "The scale table"), str(path))


def table_from_bytes(raw: bytes, where: str = "scale table") -> ScaleTable:
    """The table in these bytes.

    Raises:
        CalibrationError: an unknown, missing or repeated key, a wrong type, or a number that is negative or not finite.
    """
    value = mapping(value_from_bytes(raw, where), where)
    if value.get("format") != FORMAT:
        raise wrong(f"{where}: format", str(FORMAT), value.get("format"))
    value = fields(value, ("format", "entries", "ranges", "fingerprint", "coverage"), where)
    entries = mapping(value["entries"], f"{where}: entries")
    ranges = mapping(value["ranges"], f"{where}: ranges")
    return ScaleTable(
        entries={name: _entry(entry, f"{where}: entries.{name}") for name, entry in entries.items()},
        ranges={name: size(one, f"{where}: ranges.{name}") for name, one in ranges.items()},
        fingerprint=_fingerprint(value["fingerprint"], f"{where}: fingerprint"),
        coverage=coverage_from_json(value["coverage"], f"{where}: coverage"),
    )


def _entry_to_json(entry: Entry) -> dict[str, Any]:
    return {"maximum": entry.maximum, "amax": dict(entry.amax), "bins": entry.bins}


def _entry(value: Any, where: str) -> Entry:
    value = fields(value, ("maximum", "amax", "bins"), where)
    maximum = size(value["maximum"], f"{where}.maximum")
    by_method = fields(value["amax"], METHODS, f"{where}.amax")
    amax = {method: size(by_method[method], f"{where}.amax.{method}") for method in METHODS}
    for method, one in amax.items():
        if one > maximum:
            raise wrong(f"{where}.amax.{method}", f"at most the maximum, {maximum}", one)
    return Entry(maximum=maximum, amax=amax, bins=whole(value["bins"], f"{where}.bins", most=BINS))


def _fingerprint(value: Any, where: str) -> Fingerprint:
    keys = ("network", "cases", "seed", "patches_asked", "patches_used", "percentile", "versions")
    value = fields(value, keys, where)
    cases, versions = mapping(value["cases"], f"{where}.cases"), mapping(value["versions"], f"{where}.versions")
    return Fingerprint(
        network=text(value["network"], f"{where}.network"),
        cases={name: text(one, f"{where}.cases.{name}") for name, one in cases.items()},
        seed=whole(value["seed"], f"{where}.seed"),
        patches_asked=whole(value["patches_asked"], f"{where}.patches_asked"),
        patches_used=whole(value["patches_used"], f"{where}.patches_used"),
        percentile=size(value["percentile"], f"{where}.percentile"),
        versions={name: text(one, f"{where}.versions.{name}") for name, one in versions.items()},
    )
