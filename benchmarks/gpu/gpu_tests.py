"""The tests with the marker `gpu` as rows of the table: what each file shows, and why something did not run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from targets import MISSING, TARGETS, TESTS, package_missing
from verdicts import Row

COLLECTION = "collection failure"
"""What pytest calls a file that it cannot import."""


@dataclass(frozen=True, kw_only=True)
class Counted:
    """A group of tests, by name; reasons of those that were skipped, and why the file was not read, if so."""

    passed: Sequence[str]
    failed: Sequence[str]
    skipped: Sequence[str]
    unread: str | None


def rows_of_tests(reports: Mapping[str, str], ended: Mapping[str, str]) -> list[Row]:
    """One row per group of tests: all of them must have run, and none may fail.

    Args:
        reports: pytest's, by file; empty where it wrote none.
        ended: why, by file.
    """
    return [
        _row(target, counted(reports[file], file, part), ended[file])
        for (file, part), target in zip(TESTS, TARGETS["tests"], strict=True)
    ]


def counted(report: str, file: str, part: str = "") -> Counted:
    """The tests of one file with this part in their names, from pytest's report."""
    cases = ElementTree.fromstring(report).iter("testcase") if report else ()
    passed, failed, skipped, unread = list[str](), list[str](), list[str](), None
    for case in (case for case in cases if file in _place(case)):
        name = str(case.get("name"))
        errors = [*case.iter("failure"), *case.iter("error")]
        if any(error.get("message") == COLLECTION for error in errors):
            unread = _why_unread("\n".join(str(error.text) for error in errors))
        elif part not in name:
            continue
        elif errors:
            failed.append(name)
        elif case.find("skipped") is not None:
            skipped += [str(one.get("message")) for one in case.iter("skipped")]
        else:
            passed.append(name)
    return Counted(passed=passed, failed=failed, skipped=skipped, unread=unread)


def _row(target: Row, found: Counted, ended: str) -> Row:
    reasons = "; ".join(sorted(set(found.skipped)))
    counts = [
        f"{len(found.passed)} passed" if found.passed else "",
        f"{len(found.skipped)} skipped: {reasons}" if found.skipped else "",
        ", ".join(found.failed),
    ]
    note = found.unread or "; ".join(text for text in counts if text) or ended
    all_ran = not found.unread and not found.skipped and bool(found.passed)
    return replace(target, value=len(found.failed) if found.failed or all_ran else None, note=note)


def _place(case: ElementTree.Element) -> Sequence[str]:
    """The parts of the module's name; of a file that was not read it is the case's own name."""
    return str(case.get("classname") or case.get("name")).split(".")


def _why_unread(error: str) -> str:
    lines = [line.removeprefix("E ").strip() for line in error.splitlines() if line.startswith("E ")]
    named = next((line for line in reversed(lines) if MISSING.search(line)), "")
    return package_missing(named) or " ".join(lines)[-400:]
