"""The checks of the kernels on a GPU: a `Host` whose memory goes to the device and back with every launch.

Arrays keep their guard zones there, so a kernel that writes beside one is found as on the host.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from host_kernels import HostKernels, address
from kernel_checks import Host

from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.stitch.launches import Launch

ALIGNED = 256
"""Bytes: where the driver, too, begins arrays."""


@dataclass(kw_only=True)
class GpuHost(Host):
    """Runs every launch on `gpu`."""

    gpu: Gpu
    kernels: HostKernels | None = None  # type: ignore[assignment]  # not used

    def run(self, launch: Launch) -> None:
        sizes = [-(-len(block) // ALIGNED) * ALIGNED for block, _ in self.memory.blocks]
        offsets = np.cumsum([0, *sizes]).tolist()
        buffer = self.gpu.device.buffer(offsets[-1])
        try:
            whole = np.zeros(offsets[-1], dtype=np.uint8)
            for (block, _), offset in zip(self.memory.blocks, offsets, strict=False):
                whole[offset : offset + len(block)] = block
            self.gpu.upload(buffer, whole)
            self.gpu.launch(self._there(launch, buffer.address, offsets))
            self.gpu.download(whole, buffer)
        finally:
            buffer.close()
        for (block, _), offset in zip(self.memory.blocks, offsets, strict=False):
            block[...] = whole[offset : offset + len(block)]
        self.memory.check()

    def _there(self, launch: Launch, base: int, offsets: list[int]) -> Launch:
        """The launch with the device's addresses for the host's."""
        grid, block = self.geometry or (launch.grid, launch.block)

        def moved(argument: np.generic) -> np.generic:
            here = int(argument) if isinstance(argument, np.uint64) else 0
            if not here:
                return argument
            for (bytes_, _), offset in zip(self.memory.blocks, offsets, strict=False):
                if address(bytes_) <= here < address(bytes_) + len(bytes_):
                    return np.uint64(base + offset + here - address(bytes_))
            raise AssertionError(f"{launch.kernel} is given an address that is nowhere")

        return Launch(kernel=launch.kernel, grid=grid, block=block, arguments=tuple(map(moved, launch.arguments)))
