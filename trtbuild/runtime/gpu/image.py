"""An image on the device: how it gets there, and which of its voxels are not finite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import InputError
from trtbuild.runtime.device import Buffer
from trtbuild.runtime.gpu.normalize import Memory, first_not_finite
from trtbuild.runtime.gpu.prepare_plan import FLOAT
from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.runtime.gpu.staging import Staging
from trtbuild.spec import ModelSpec
from trtbuild.stitch.preparation_launches import Image, normalize
from trtbuild.volume.preparation.checks import not_finite


@contextmanager
def taken_memory(gpu: Gpu, sizes: Mapping[str, int]) -> Iterator[dict[str, Buffer]]:
    """Memory, given back with the block when nothing is under way."""
    with ExitStack() as stack:
        memory: dict[str, Buffer] = {}
        for name, nbytes in sizes.items():
            memory[name] = gpu.device.buffer(nbytes)
            stack.callback(memory[name].close)
        stack.callback(gpu.stream.synchronize)  # the first that happens at the end: nothing is freed under work
        yield memory


def upload_image(given: NDArray[Any], buffer: Buffer, copies: Staging) -> None:
    """Copies an image to the device as float32, in C order; done at the end."""
    for _ in image_pieces(given, buffer, copies):
        pass
    copies.settle()


def image_pieces(given: NDArray[Any], buffer: Buffer, copies: Staging) -> Iterator[None]:
    """As `upload_image`, a piece at each step.

    It becomes float32 on the host, piece by piece where it is copied to page-locked memory anyway: that is the rounding
    of the CPU path, of every type that NumPy has, and takes no memory but a channel's where its voxels do not follow
    one another. What becomes infinite is found on the device.
    """
    for number, channel in enumerate(given):
        yield from copies.pieces(buffer, channel, offset=FLOAT * number * channel.size, dtype=np.float32)


def bad_plane(image: Image, gpu: Gpu, memory: Memory) -> tuple[int, int] | None:
    """The first channel with NaN or infinity, and the first z in it; None where all is finite."""
    for number in range(image.channels):
        found = first_not_finite(image.channel(number), gpu, memory)
        if found is not None:
            return number, found
    return None


def not_finite_voxel(image: Image, found: tuple[int, int], spec: ModelSpec, gpu: Gpu) -> InputError:
    """The error that names the first such voxel; only its slice comes to the host for that."""
    (channel, z), (_, height, width) = found, image.shape
    line = slice(z, z + 1), slice(0, height), slice(0, width)
    plane, one = np.empty((height, width), dtype=np.float32), np.float32(1)
    with taken_memory(gpu, {"plane": plane.nbytes}) as memory:
        out, part = memory["plane"], image.channel(channel).cropped(line)
        gpu.launch(normalize(part, 0, out.address, low=-np.inf, high=np.inf, shift=np.float32(0), scale=one))
        gpu.download(plane, out)
    y, x = (int(i) for i in np.argwhere(~np.isfinite(plane))[0])
    return not_finite(plane[y, x], (z, y, x), spec.channels[channel])
