"""Fails if a test against another program or in a fresh environment was skipped, or none ran: a skip is no proof."""

from __future__ import annotations

import sys
from xml.etree import ElementTree

MUST_RUN = ("parity", "freshenv", "bindings", "polygraphy")


def main(reports: list[str]) -> int:
    """0 where every test of the required files ran."""
    cases = [case for report in reports for case in ElementTree.parse(report).iter("testcase")]
    skipped = [f"{c.get('classname')}.{c.get('name')}" for c in cases if c.find("skipped") is not None]
    print(f"{', '.join(reports)}: {len(cases)} tests, {len(skipped)} skipped")
    for name in skipped:
        print(f"  skipped: {name}")
    forbidden = [name for name in skipped if any(word in name for word in MUST_RUN)]
    if forbidden:
        print(f"these must run in CI: {', '.join(forbidden)}")
    ordinary = not any(report.endswith("slow.xml") for report in reports)
    missing = [word for word in MUST_RUN if ordinary and not any(word in (c.get("classname") or "") for c in cases)]
    if missing:
        print(f"no test ran at all for: {', '.join(missing)}")
    return 1 if forbidden or missing or not cases else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
