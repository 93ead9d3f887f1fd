"""What a bundle keeps of a calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trtbuild.spec import NetworkRecord
from trtbuild_calibration import CalibrationCache, ScaleTable, cache_from_scales

CACHE_VERSION = 101601
"""TensorRT 10.16.1, whose calibration caches ours are like: the last line of TensorRT that reads any."""

Facts = Mapping[str, Any]


def entropy_cache(table: ScaleTable) -> CalibrationCache:
    """The entropy scales as TensorRT's calibration cache."""
    return cache_from_scales(table.scales("entropy"), version=CACHE_VERSION, kind="EntropyCalibration2")


def calibration_facts(network: NetworkRecord, table: ScaleTable) -> dict[str, Any]:
    """Where a calibration is, of which patches, how large the ranges are."""
    return {
        "network": network.id,
        "file": f"calibrations/{network.id}.json",
        "cache": f"calibrations/{network.id}.cache",
        "patches": table.fingerprint.patches_used,
        "seed": table.fingerprint.seed,
        "cases": sorted(table.fingerprint.cases),
        "coverage": table.coverage.to_json(),
        "amax": {name: {"max": entry.maximum, **entry.amax} for name, entry in table.entries.items()},
    }


def calibration_files(network: NetworkRecord, table: ScaleTable) -> dict[str, bytes]:
    """The files that `calibration_facts` names."""
    return {
        f"calibrations/{network.id}.json": table.to_bytes(),
        f"calibrations/{network.id}.cache": entropy_cache(table).to_bytes(),
    }
