"""From an image as read to what the network sees, on a GPU: the host only decodes the file.

`prepared_from_array` of volume/preparation defines it. The image goes up once, in its own order of axes; from there it
is walked with strides, so that transposing and cropping copy nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from numpy.typing import ArrayLike

from trtbuild.errors import EngineError
from trtbuild.runtime.device import Buffer
from trtbuild.runtime.gpu.image import bad_plane, not_finite_voxel, taken_memory, upload_image
from trtbuild.runtime.gpu.normalize import Memory, box_on_device, fill_mask, normalize_channel
from trtbuild.runtime.gpu.plan import in_grains
from trtbuild.runtime.gpu.prepare_plan import (
    Resizing,
    case_sizes,
    check_room,
    image_sizes,
    resizing_of_case,
    words_bytes,
)
from trtbuild.runtime.gpu.resample import placed_operators, resample_channel
from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.spec import ModelSpec
from trtbuild.stitch.preparation_launches import Image, contiguous
from trtbuild.volume import CaseGrid, Prepared
from trtbuild.volume.preparation.checks import checked_array, checked_image, checked_previous, checked_spacing
from trtbuild.volume.preparation.preprocess import grid_of_case


@dataclass(frozen=True, kw_only=True, eq=False)
class DevicePrepared:
    """A prepared case on the device: `image` holds `shape` (C, Z, Y, X) float32 in C order, `grid` is the way back.

    `empty` where every voxel of the image was 0. `close` gives the memory back; who predicts the case does it.
    """

    image: Buffer
    shape: tuple[int, ...]
    grid: CaseGrid
    empty: bool = False

    def close(self) -> None:
        self.image.close()


def shape_of(prepared: Prepared | DevicePrepared) -> tuple[int, ...]:
    """(C, Z, Y, X) on the network's grid."""
    return prepared.shape if isinstance(prepared, DevicePrepared) else prepared.data.shape


@contextmanager
def closed_after(prepared: Prepared | DevicePrepared) -> Iterator[None]:
    """A case on the device is given back with the block, whatever happens."""
    try:
        yield
    finally:
        if isinstance(prepared, DevicePrepared):
            prepared.close()


def prepared_on_device(
    data: ArrayLike,
    spacing: Sequence[float],
    spec: ModelSpec,
    gpu: Gpu,
    limit: int | None = None,
    uploaded: Buffer | None = None,
) -> DevicePrepared:
    """Transposes, crops, normalises and resamples one case.

    Args:
        data: (C, Z, Y, X) intensities as read, any real numbers; left unchanged.
        spacing: mm in array axis order (z, y, x).
        spec: the model, without a previous stage.
        gpu: where.
        limit: bytes of device memory that this may take, where the user named one.
        uploaded: the very `data` on the device already (`uploads`), which stays the caller's.

    Returns the case, to be closed; nothing else is left on the device, whatever happens.

    Raises:
        InputError, ModelError: as `prepared_from_array`, with the same words. Where several things are wrong, another
            one may be named.
        OutOfMemory: there is no memory.
        EngineError: the device failed.
    """
    given, millimetres = checked_array(data, spec), checked_spacing(spacing)
    checked_previous(None, given.shape[1:], spec)
    sizes = dict(image_sizes(given.shape[1:], spec))
    if uploaded is not None:
        del sizes["image"]
    check_room(sizes.values(), gpu, limit, 0, given.shape[1:])
    with _result() as kept, taken_memory(gpu, sizes) as memory:
        if uploaded is None:
            upload_image(given, memory["image"], gpu.copies)
        z, y, x = given.shape[1:]
        image = contiguous((uploaded or memory["image"]).address, (z, y, x), len(given))
        if bad_plane(image, gpu, memory) is not None:
            checked_image(given, spec)  # names the voxel, and its value before it became a float32
            raise EngineError("The image changed while it was prepared.", hint="hand over an array of your own")
        return _prepared(image, millimetres, spec, gpu, memory, limit, in_grains(sizes.values()), kept)


def prepared_from_image(
    image: Image, spacing: tuple[float, ...], spec: ModelSpec, gpu: Gpu, limit: int | None = None, held: int = 0
) -> DevicePrepared:
    """As `prepared_on_device`, of an image (C, Z, Y, X) float32 of the right shape that is on the device.

    `held` are the bytes of `limit` that are taken already. The image is not written to.
    """
    sizes = {"words": words_bytes(image.shape)}
    check_room(sizes.values(), gpu, limit, held, image.shape)
    with _result() as kept, taken_memory(gpu, sizes) as memory:
        found = bad_plane(image, gpu, memory)
        if found is not None:
            raise not_finite_voxel(image, found, spec, gpu)
        return _prepared(image, spacing, spec, gpu, memory, limit, held + in_grains(sizes.values()), kept)


@contextmanager
def _result() -> Iterator[ExitStack]:
    """What is to stay, closed where the block does not end well; everything else is given back before that is known."""
    with ExitStack() as kept:
        yield kept
        kept.pop_all()


def _prepared(
    image: Image,
    spacing: tuple[float, ...],
    spec: ModelSpec,
    gpu: Gpu,
    memory: Memory,
    limit: int | None,
    held: int,
    kept: ExitStack,
) -> DevicePrepared:
    """What is left to do when the image is on the device; `memory` holds the words, `kept` gets the result."""
    turned = image.turned(spec.transpose_forward)
    box, empty = box_on_device(turned, gpu, memory)
    grid = grid_of_case(turned.shape, box, tuple(spacing[axis] for axis in spec.transpose_forward), spec)
    resizing = resizing_of_case(grid, spec.resample_data)
    sizes = dict(case_sizes(grid, resizing, spec))
    check_room(sizes.values(), gpu, limit, held, image.shape)
    result = gpu.device.buffer(sizes.pop("prepared"))
    kept.callback(result.close)
    with taken_memory(gpu, sizes) as more:
        _fill(turned.cropped(box), resizing, spec, gpu, {**memory, **more, "prepared": result})
    return DevicePrepared(image=result, shape=(len(spec.channels), *grid.resampled), grid=grid, empty=empty)


def _fill(cropped: Image, resizing: Resizing, spec: ModelSpec, gpu: Gpu, memory: Memory) -> None:
    """Every channel of the cropped image, normalised and resampled, into the memory "prepared"."""
    if "mask" in memory:
        fill_mask(cropped, gpu, memory)
    placed = placed_operators(resizing.steps, memory["operators"], gpu) if resizing.steps else ()
    out = memory["prepared"]
    nbytes = out.nbytes // len(spec.channels)
    for number, (scheme, name) in enumerate(zip(spec.normalization, spec.channels, strict=True)):
        into = out.address + number * nbytes
        normalised = memory["channel"].address if placed else into
        normalize_channel(cropped.channel(number), scheme, normalised, gpu, memory, f"channel {name}")
        if placed:
            resample_channel(cropped.shape, into, resizing, placed, gpu, memory)
