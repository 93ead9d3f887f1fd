"""What a set of patches holds: cases, classes, voxels, and which class it could not hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trtbuild_calibration.strictjson import fields, mapping, text, whole, wrong


@dataclass(frozen=True, kw_only=True)
class ClassCoverage:
    """One label.

    Attributes:
        cases: how many of the cases hold it.
        patches: how many of the patches hold it.
        voxels: in all patches together.
        missed: why no patch holds it, or None.
    """

    cases: int
    patches: int
    voxels: int
    missed: str | None = None


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """What was sampled.

    Attributes:
        patches: case -> patches taken of it, 0 included.
        forced: patches that were centred on a voxel of a class.
        classes: label -> coverage; empty without segmentations.
        note: what a reader of the report should know, or None.
    """

    patches: Mapping[str, int]
    forced: int
    classes: Mapping[int, ClassCoverage]
    note: str | None = None

    @property
    def missed(self) -> tuple[int, ...]:
        """The labels that no patch holds."""
        return tuple(label for label, entry in self.classes.items() if entry.patches == 0)

    def to_json(self) -> dict[str, Any]:
        """Plain values; labels become strings, as JSON's keys are."""
        return {
            "patches": dict(self.patches),
            "forced": self.forced,
            "classes": {str(label): asdict(entry) for label, entry in self.classes.items()},
            "note": self.note,
        }


NO_LABELS = "no segmentations: every patch lies at a uniformly drawn position, so a rare class may be missing"
SOME_LABELS = "some cases have no segmentation; their patches lie at uniformly drawn positions and count no classes"


def coverage_of(
    cases: Sequence[str],
    places: Sequence[tuple[str, bool]],
    held: Mapping[str, Mapping[int, int] | None],
    patches: Sequence[Mapping[int, int]],
    classes: Sequence[int],
) -> Coverage:
    """Counts what was sampled.

    Args:
        cases: the names of all cases.
        places: of each patch its case, and whether it was forced.
        held: case -> label -> voxels, or None for a case without labels.
        patches: of each patch label -> voxels.
        classes: the labels to report.
    """
    drawn = Counter(case for case, _ in places)
    labelled = [counts for counts in held.values() if counts is not None]
    entries = {}
    for label in classes:
        holding = sum(counts.get(label, 0) > 0 for counts in labelled)
        hits = [counts[label] for counts in patches if counts.get(label, 0)]
        missed = None if hits else _reason(holding, len(places))
        entries[label] = ClassCoverage(cases=holding, patches=len(hits), voxels=sum(hits), missed=missed)
    return Coverage(
        patches={case: drawn[case] for case in cases},
        forced=sum(forced for _, forced in places),
        classes=entries if labelled else {},
        note=NO_LABELS if not labelled else SOME_LABELS if len(labelled) < len(held) else None,
    )


def _reason(holding: int, patches: int) -> str:
    if not holding:
        return "no case holds it"
    return f"{patches} patches are too few for all classes"


def coverage_from_json(value: Any, where: str) -> Coverage:
    """The other way of `Coverage.to_json`.

    Raises:
        CalibrationError: anything else than what that gives; the message names the key.
    """
    value = fields(value, ("patches", "forced", "classes", "note"), where)
    patches = mapping(value["patches"], f"{where}.patches")
    classes = mapping(value["classes"], f"{where}.classes")
    return Coverage(
        patches={name: whole(count, f"{where}.patches.{name}") for name, count in patches.items()},
        forced=whole(value["forced"], f"{where}.forced"),
        classes={_label(key, where): _class(entry, f"{where}.classes.{key}") for key, entry in classes.items()},
        note=_text_or_none(value["note"], f"{where}.note"),
    )


def _class(value: Any, where: str) -> ClassCoverage:
    value = fields(value, ("cases", "patches", "voxels", "missed"), where)
    return ClassCoverage(
        cases=whole(value["cases"], f"{where}.cases"),
        patches=whole(value["patches"], f"{where}.patches"),
        voxels=whole(value["voxels"], f"{where}.voxels"),
        missed=_text_or_none(value["missed"], f"{where}.missed"),
    )


def _label(key: str, where: str) -> int:
    if not (key.isascii() and key.isdigit() and str(int(key)) == key):
        raise wrong(f"{where}.classes", "labels", key)
    return int(key)


def _text_or_none(value: Any, where: str) -> str | None:
    return None if value is None else text(value, where)
