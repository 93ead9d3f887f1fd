"""How much host memory an engine takes: the rise of this process's peak while it is opened and run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trtbuild.machine import give_back_memory

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(work: Callable[[], None]) -> int | None:
    """Bytes by which the resident memory rose at most while `work` ran; None where the kernel cannot tell.

    Linux only: the high-water mark is reset by writing 5 to /proc/self/clear_refs (man 5 proc). Memory that the
    process had freed but kept is given back first, since reusing it would not show.
    """
    give_back_memory()
    try:
        CLEAR.write_text("5")
        before = _status_bytes("VmRSS")
    except OSError:
        work()
        return None
    work()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(key: str) -> int:
    for line in STATUS.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{STATUS} has no {key}")
