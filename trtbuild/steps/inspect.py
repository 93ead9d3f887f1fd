"""`inspect`: what a bundle holds, as plain values to show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.bundle import Bundle, open_bundle, verify_bundle
from trtbuild.spec import json_from_value

if TYPE_CHECKING:
    from trtbuild.steps.compilation.export import CleanedFile


def overview(bundle: Bundle) -> dict[str, Any]:
    """The facts of a bundle: stages, engines, goldens, provenance, size."""
    manifest = bundle.manifest
    return {
        "path": str(bundle.path),
        "identity": bundle.identity,
        "bytes": sum(entry.size for entry in manifest.files.values()),
        "stages": json_from_value(manifest.stages),
        "engines": json_from_value(manifest.engines),
        "calibrations": [json_from_value(entry) for entry in manifest.calibrations],
        "gates": [json_from_value(entry) for entry in manifest.gates],
        "goldens": json_from_value(manifest.goldens),
        "provenance": json_from_value(manifest.provenance),
    }


def inspect_bundle(path: Path, *, verify: bool) -> dict[str, Any]:
    """Opens a bundle and, with `verify`, checks the hash of every file."""
    bundle = open_bundle(path)
    facts = overview(bundle)
    if verify:
        facts["verified"] = list(verify_bundle(bundle))
    return facts


def clean_facts(cleaned: CleanedFile) -> dict[str, Any]:
    """The before/after table of a cleaned model; which passes changed something and what they left alone."""
    return {
        "rows": [json_from_value(row) for row in cleaned.rows],
        "passes": [
            {"name": report.name, "modified": report.modified, "left": list(report.left)} for report in cleaned.reports
        ],
    }
