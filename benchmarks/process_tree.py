"""Memory and CPU time of a process and all that it started (Linux)."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

INTERVAL = 0.02
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass
class Peak:
    """Samples of the sum of PSS over a process tree: (seconds since the epoch, bytes)."""

    samples: list[tuple[float, int]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """The largest one."""
        return max((size for _, size in self.samples), default=0)


def tree(root: int) -> list[int]:
    """The process, its children, theirs and so on, as far as they live."""
    import psutil

    try:
        process = psutil.Process(root)
        return [root, *(child.pid for child in process.children(recursive=True))]
    except psutil.NoSuchProcess:
        return []


def proportional_set(processes: Sequence[int]) -> int:
    """Sum of PSS in bytes: pages that are shared count by their share. Ended processes count nothing."""
    total = 0
    for process in processes:
        with suppress(OSError):
            text = Path(f"/proc/{process}/smaps_rollup").read_text(encoding="ascii")
            total += sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith("Pss:"))
    return total


def cpu_seconds(processes: Sequence[int]) -> float:
    """User and system time that these processes have taken."""
    total = 0
    for process in processes:
        with suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total / TICKS


def waiting_seconds(processes: Sequence[int]) -> float:
    """Time that threads of these processes were ready to run but had no CPU: other processes had it."""
    total = 0
    for process in processes:
        with suppress(OSError):
            for thread in os.listdir(f"/proc/{process}/task"):
                with suppress(OSError, ProcessLookupError):
                    total += int(Path(f"/proc/{process}/task/{thread}/schedstat").read_text().split()[1])
    return total / 1e9


@contextmanager
def sampled(root: int, interval: float = INTERVAL) -> Iterator[Peak]:
    """Samples the memory of a tree while the block runs, seldom enough to take a fifth of the time at most."""
    peak, stop = Peak(), threading.Event()

    def sample() -> None:
        pause = interval
        while not stop.wait(pause):
            started = time.perf_counter()
            peak.samples.append((time.time(), proportional_set(tree(root))))
            # the kernel holds up page faults while it counts the pages of a large process
            pause = max(interval, 4 * (time.perf_counter() - started))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()


def run_sampled(command: Sequence[str], environment: dict[str, str] | None = None) -> tuple[Peak, str]:
    """Runs a command to its end: its memory and its standard output. A failure raises with what it said."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **(environment or {})}
    )
    with sampled(process.pid) as peak:
        output, said = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-1000:]}\n{said[-3000:]}")
    return peak, output
