"""What this machine is: usable CPUs, free memory, the CPU's name and instruction sets.

A leaf: standard library only. A container's limits count: the scheduler's affinity mask, and the quotas of cgroup v1
and v2 on the way from the process's group to the root.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

# The instruction sets that decide how a network is computed, in the names of /proc/cpuinfo (x86, then Arm).
ISA = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "asimdhp",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)

NO_ISA = "none"
"""What stands for the instruction sets of a CPU that has none of these; nothing stands for one that does not tell."""


M_MMAP_THRESHOLD = -3
"""malloc.h (glibc)"""
LARGE = 4 << 20
"""Smaller limits cost more page faults; with this one the CPU time of preparing a case stays the same (measured)."""


def usable_cpus() -> int:
    """Logical CPUs that this process may keep busy: its affinity mask, capped by the cgroup's quota (rounded up)."""
    quota = cpu_quota()
    count = len(_affinity())
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def usable_cores() -> int:
    """Like `usable_cpus`, but hyperthreads of one core count once: matrix work gains nothing from the second one."""
    siblings = {_siblings(cpu) for cpu in _affinity()}
    return min(usable_cpus(), len(siblings))


def cpu_quota(root: Path = Path("/")) -> float | None:
    """CPUs' worth of time that the cgroup grants, or None without a limit. `root` holds proc/ and sys/."""
    quotas = []
    for folder in _groups(root, "cpu"):
        v1 = (*_words(folder / "cpu.cfs_quota_us"), *_words(folder / "cpu.cfs_period_us"))
        for words in (_words(folder / "cpu.max"), v1):
            if len(words) == 2 and words[0] not in ("max", "-1"):
                quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can still be allocated: the kernel's MemAvailable, capped by the cgroup's limit; None if unknown."""
    free = []
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    for folder in _groups(root, "memory"):
        for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
            numbers = (*_words(folder / limit), *_words(folder / used))
            if len(numbers) == 2 and numbers[0] != "max":
                free.append(max(0, int(numbers[0]) - int(numbers[1])))
    return min(free, default=None)


def memory_in_use(processes: Sequence[int] = ()) -> int:
    """Bytes that this process and `processes` hold: shared pages count by their share (PSS); 0 where it is unknown.

    A process that has ended counts nothing.
    """
    return sum(_proportional_set("self" if pid is None else str(pid)) for pid in (None, *processes))


def keep_no_large_block() -> None:
    """From now on this process gives freed blocks of `LARGE` bytes back to the system at once (Linux with glibc).

    By itself glibc raises that limit up to 32 MB, and then keeps up to 100 MB beside the next case's arrays.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if set_option is not None:
        set_option(M_MMAP_THRESHOLD, LARGE)


def give_back_memory() -> None:
    """Freed memory that the C library keeps goes to the system (glibc's malloc_trim; elsewhere nothing)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _proportional_set(process: str) -> int:
    for line in _lines(Path(f"/proc/{process}/smaps_rollup")):
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0


@cache
def cpu_description() -> Mapping[str, str]:
    """Name of the CPU and its relevant instruction sets (space-separated), as they stand in a BuildRecord's device."""
    fields: dict[str, str] = {}
    for line in _lines(Path("/proc/cpuinfo")):
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine() or "unknown CPU"
    return {"model": model, "isa": " ".join(name for name in ISA if name in flags) or (NO_ISA if flags else "")}


def _affinity() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _siblings(cpu: int) -> str:
    """The hyperthreads of the core of `cpu`, as the kernel writes them; the CPU itself where it does not say."""
    return " ".join(_words(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"))) or str(cpu)


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of the process's control group and of its parents, for cgroup v2 and for v1's `controller`."""
    top = root / "sys/fs/cgroup"
    for line in _lines(root / "proc/self/cgroup"):
        _, names, path = line.split(":", 2)
        base = top if not names else top / controller if controller in names.split(",") else None
        if base is None:
            continue
        inside = base / path.lstrip("/")
        yield inside
        yield from (folder for folder in inside.parents if folder == base or base in folder.parents)


def _words(path: Path) -> tuple[str, ...]:
    return tuple(" ".join(_lines(path)).split())


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux, or hidden by the container: there is no limit to read
        return []
