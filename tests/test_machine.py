"""CPU and memory limits as the kernel and container runtimes write them, in made-up file trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trtbuild import machine
from trtbuild.machine import available_memory, cpu_description, cpu_quota, usable_cores, usable_cpus


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {"proc/self/cgroup": "0::/pod/box\n"}
BOX = "sys/fs/cgroup/cpu/box/cpu"
V1 = {"proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n1:name=systemd:/x\n"}


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        (V2, None),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n"}, None),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "400000 100000\n"}, 4.0),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n", "sys/fs/cgroup/pod/cpu.max": "200000 100000\n"}, 2.0),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "300000 100000\n", "sys/fs/cgroup/pod/cpu.max": "50000 100000"}, 0.5),
        ({**V1, f"{BOX}.cfs_quota_us": "-1\n", f"{BOX}.cfs_period_us": "100000\n"}, None),
        ({**V1, f"{BOX}.cfs_quota_us": "250000\n", f"{BOX}.cfs_period_us": "100000\n"}, 2.5),
    ],
)  # fmt: skip
def test_the_tightest_quota_on_the_way_to_the_root_counts(
    files: dict[str, str], quota: float | None, tmp_path: Path
) -> None:
    assert cpu_quota(tree(tmp_path, files)) == quota


@pytest.mark.parametrize(("quota", "cpus"), [(None, 3), (0.1, 1), (1.5, 2), (2.0, 2), (8.0, 3)])
def test_usable_cpus_are_the_affinity_capped_by_the_quota(
    quota: float | None, cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_affinity", lambda: (0, 2, 5))
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    assert usable_cpus() == cpus


def test_hyperthreads_of_one_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_affinity", lambda: (0, 1, 2, 3))
    monkeypatch.setattr(machine, "cpu_quota", lambda: None)
    monkeypatch.setattr(machine, "_siblings", lambda cpu: f"{cpu % 2},{cpu % 2 + 2}")
    assert (usable_cpus(), usable_cores()) == (4, 2)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity masks here")
def test_the_affinity_mask_of_this_process_is_respected() -> None:
    mask = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mask)})
        assert (usable_cpus(), usable_cores()) == (1, 1)
    finally:
        os.sched_setaffinity(0, mask)


def test_free_memory_is_capped_by_the_group(tmp_path: Path) -> None:
    meminfo = {"proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n"}
    assert available_memory(tmp_path) is None
    assert available_memory(tree(tmp_path / "a", meminfo)) == 4000 * 1024
    group = {"sys/fs/cgroup/pod/box/memory.max": "3000000\n", "sys/fs/cgroup/pod/box/memory.current": "1000000\n"}
    assert available_memory(tree(tmp_path / "b", {**meminfo, **V2, **group})) == 2_000_000
    group = {"sys/fs/cgroup/memory/box/memory.limit_in_bytes": "500\n",
             "sys/fs/cgroup/memory/box/memory.usage_in_bytes": "900\n"}  # fmt: skip
    assert available_memory(tree(tmp_path / "c", {**meminfo, **V1, **group})) == 0


def test_the_cpu_has_a_name() -> None:
    assert set(cpu_description()) == {"model", "isa"}
    assert cpu_description()["model"]
