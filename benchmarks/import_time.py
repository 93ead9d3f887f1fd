"""How long `import trtbuild` takes: fresh interpreters, the bare interpreter subtracted.

python benchmarks/import_time.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

from machine import describe

REPEATS = 15


def seconds(code: str) -> float:
    """Wall seconds of a fresh interpreter that runs `code`."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - started


def main() -> None:
    """Interleaves the two and writes the difference."""
    bare, importing = [], []
    for _ in range(REPEATS):
        bare.append(seconds("pass"))
        importing.append(seconds("import trtbuild"))
    differences = [b - a for a, b in zip(bare, importing, strict=True)]
    machine = describe()
    text = (
        f"# import trtbuild\n\n{machine['cpu']}, {machine['date']}, commit {machine['commit']}, Python {machine['python']}: "
        f"{statistics.median(differences) * 1000:.0f} ms more than the bare interpreter (median of {REPEATS}, "
        f"{min(differences) * 1000:.0f} to {max(differences) * 1000:.0f} ms; limit 200 ms).\n"
    )
    (Path(__file__).resolve().parent / "results" / "import_time.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
