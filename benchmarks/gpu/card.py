"""The card's memory as NVML tells it, whoever takes it; through ctypes, so that no package is needed."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

INTERVAL = 0.002
DRIVER, NVML = "libcuda.so.1", "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    _fields_ = [("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong)]


class Card:
    """The first GPU of CUDA in NVML."""

    def __init__(self) -> None:
        driver, self._nvml = ctypes.CDLL(DRIVER), ctypes.CDLL(NVML)
        bus, device = ctypes.create_string_buffer(32), ctypes.c_int(0)
        _check(driver.cuInit(0), "cuInit")
        _check(driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
        _check(driver.cuDeviceGetPCIBusId(bus, len(bus), device), "cuDeviceGetPCIBusId")
        self._handle: Any = ctypes.c_void_p()
        _check(self._nvml.nvmlInit_v2(), "nvmlInit")
        _check(self._nvml.nvmlDeviceGetHandleByPciBusId_v2(bus, ctypes.byref(self._handle)), "nvmlDeviceGetHandle")

    def used(self) -> int:
        """Bytes."""
        memory = _Memory()
        _check(self._nvml.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)), "nvmlDeviceGetMemoryInfo")
        return int(memory.used)


@dataclass
class Peak:
    """The most that was used at any sample, in bytes."""

    used: int = 0


@contextmanager
def peak_used(card: Any, interval: float = INTERVAL) -> Iterator[Peak]:
    """Samples `card.used()` while the block runs, and once at its start and its end."""
    peak, stop = Peak(used=card.used()), threading.Event()

    def sample() -> None:
        while not stop.wait(interval):
            peak.used = max(peak.used, card.used())

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        stop.set()
        sampler.join()
        peak.used = max(peak.used, card.used())


def _check(status: int, what: str) -> None:
    if status != 0:
        raise RuntimeError(f"{what} failed with {status}")
