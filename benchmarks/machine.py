"""What a record must say about the machine, and how a command's time and memory are measured."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("trtbuild", "nnunetv2", "torch", "openvino", "onnxruntime", "numpy", "scipy", "numba", "scikit-image")


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of a command: wall seconds, CPU seconds of all its processes, and peak PSS in bytes (0 if not sampled)."""

    wall: float
    cpu: float
    pss: int


def describe() -> dict[str, Any]:
    """CPU, processors, system, versions and commit."""
    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "processors": len(os.sched_getaffinity(0)),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
    }


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # the record has no such entry, and what needs it says so itself
    return found


def measure(command: Sequence[str], *, sample_memory: bool, environment: Mapping[str, str] | None = None) -> Measured:
    """Runs a command to its end; a failure raises with its output. Memory is sampled every 50 ms over all processes."""
    import psutil

    started, before = time.perf_counter(), os.times()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, **(environment or {})}
    )
    peak = [0]
    stop = threading.Event()

    def sample() -> None:
        root = psutil.Process(process.pid)
        while not stop.wait(0.05):
            total = 0
            try:
                for one in [root, *root.children(recursive=True)]:
                    total += one.memory_full_info().pss
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue  # a process ended between listing and reading: this sample is void
            peak[0] = max(peak[0], total)

    sampler = threading.Thread(target=sample, daemon=True)
    if sample_memory:
        sampler.start()
    output, _ = process.communicate()
    wall, after = time.perf_counter() - started, os.times()
    stop.set()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}:\n{output[-3000:]}")
    cpu = (after.children_user + after.children_system) - (before.children_user + before.children_system)
    return Measured(wall=wall, cpu=cpu, pss=peak[0])
