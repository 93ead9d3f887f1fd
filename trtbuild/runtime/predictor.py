"""One prepared case through one configuration: windows, and the way back slab by slab."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trtbuild.errors import Cancelled
from trtbuild.runtime.slabs import Accumulator, Logits, logits_from_image, slabs_from_image
from trtbuild.runtime.tiles import tile_plan
from trtbuild.spec import ModelSpec
from trtbuild.volume import CaseGrid, Prepared, prepared_from_array
from trtbuild.volume.back import Segmentation, WayBack

if TYPE_CHECKING:
    from trtbuild.runtime.on_device import OnDevice
    from trtbuild.runtime.runner import Runner
    from trtbuild.volume.image import Image

Progress = Callable[[str, int, int], bool | None]
"""Called with (stage, done, total); stages are "read", "prepare", "network", "back", "write". False stops the
case, as does any false value but None."""


EMPTY = "every voxel of the image is 0"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run the windows. `step_size` is in (0, 1]; `mirroring` uses the mirror axes the model was trained with.

    `accumulator` float16 halves the memory of the sum, as nnU-Net's does, and changes about 1e-4 of the voxels.
    """

    step_size: float = 0.5
    mirroring: bool = True
    probabilities: bool = False
    threads: int = 1
    accumulator: Accumulator = "float32"


@dataclass(frozen=True, kw_only=True)
class Member:
    """One configuration, opened: its spec, a runner per fold, the mirror axes that the model allows, and where its
    engines are on a GPU, their place there."""

    spec: ModelSpec
    runners: tuple[Runner, ...]
    mirror_axes: tuple[int, ...]
    device: OnDevice | None = None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of one case.

    `segmentation` (Z, Y, X), uint8 or uint16, on the image's own grid; `probabilities` (heads, Z, Y, X) float32 where
    asked for; `disagreement` (Z, Y, X) float32 in 0..1 where asked for; `grid` the way back that was taken; `image`
    what was read, where it came from files; `seconds` wall time per stage.
    """

    segmentation: Segmentation
    probabilities: NDArray[np.float32] | None
    grid: CaseGrid
    seconds: Mapping[str, float]
    disagreement: NDArray[np.float32] | None = None
    image: Image | None = None
    warnings: tuple[str, ...] = ()


@dataclass
class Clock:
    """Seconds per stage; `lap` adds what passed since the last one."""

    seconds: dict[str, float] = field(default_factory=dict)
    last: float = field(default_factory=time.perf_counter)

    def lap(self, stage: str) -> None:
        """The time since the last lap belongs to `stage`."""
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self.last
        self.last = now


def tell(progress: Progress | None, stage: str, done: int, total: int) -> None:
    """Reports to the caller and stops the case if it says so."""
    wish = None if progress is None else progress(stage, done, total)
    if wish is not None and not wish:
        raise Cancelled(f"Stopped by the caller during {stage} ({done} of {total}).")


def prediction_from_array(
    data: ArrayLike,
    spacing: Sequence[float],
    spec: ModelSpec,
    runners: Sequence[Runner],
    mirror_axes: tuple[int, ...],
    settings: Settings,
    progress: Progress | None = None,
    previous: NDArray[np.integer] | None = None,
) -> Prediction:
    """Segments one image with one configuration.

    Args:
        data: (C, Z, Y, X) real numbers as nnU-Net's reader returns them; left unchanged.
        spacing: mm in array axis order (z, y, x).
        spec: the model.
        runners: one per fold.
        mirror_axes: the axes that the model allows; used when `settings.mirroring`.
        settings: step size, mirroring, probabilities, threads, accumulator.
        progress: called as the case advances.
        previous: labels (Z, Y, X) of the stage before, where the model is the second stage of a cascade.
    """
    clock = Clock()
    tell(progress, "prepare", 0, 1)
    prepared = prepared_from_array(data, spacing, spec, previous)
    tell(progress, "prepare", 1, 1)
    clock.lap("prepare")
    member = Member(spec=spec, runners=tuple(runners), mirror_axes=mirror_axes)
    prediction = prediction_from_prepared(prepared, member, settings, progress, clock)
    return prediction if np.any(data) else replace(prediction, warnings=(EMPTY,))


def prediction_from_prepared(
    prepared: Prepared, member: Member, settings: Settings, progress: Progress | None, clock: Clock
) -> Prediction:
    """Segments a prepared case. Labels leave slab by slab; with probabilities the logits are kept whole."""
    if settings.probabilities:
        return _whole(prepared, member, settings, progress, clock)
    from trtbuild.volume.back import way_back

    way = way_back(prepared.grid, member.spec)
    if not way.streams:
        return _whole(prepared, member, settings, progress, clock)
    segmentation = _streamed(prepared, way, member, settings, progress, clock)
    return Prediction(segmentation=segmentation, probabilities=None, grid=prepared.grid, seconds=clock.seconds)


def case_logits(prepared: Prepared, member: Member, settings: Settings, progress: Progress | None) -> Logits:
    """Mean logits (heads, Z, Y, X) of the whole case on the network's grid, in the accumulator's type."""
    return logits_from_image(
        prepared.data,
        member.spec,
        member.runners,
        member.mirror_axes if settings.mirroring else (),
        settings.step_size,
        lambda done, total: tell(progress, "network", done, total),
        settings.accumulator,
    )


def _whole(
    prepared: Prepared, member: Member, settings: Settings, progress: Progress | None, clock: Clock
) -> Prediction:
    from trtbuild.volume.back import probabilities_from_logits, segmentation_from_logits

    spec, grid = member.spec, prepared.grid
    logits = case_logits(prepared, member, settings, progress)
    clock.lap("network")
    tell(progress, "back", 0, 1)
    segmentation = segmentation_from_logits(logits, grid, spec, threads=settings.threads)
    probabilities = (
        probabilities_from_logits(logits, grid, spec, threads=settings.threads) if settings.probabilities else None
    )
    tell(progress, "back", 1, 1)
    clock.lap("back")
    return Prediction(segmentation=segmentation, probabilities=probabilities, grid=grid, seconds=clock.seconds)


def _streamed(
    prepared: Prepared, way: WayBack, member: Member, settings: Settings, progress: Progress | None, clock: Clock
) -> Segmentation:
    """Labels (Z, Y, X) of the image: every slab of final logits becomes labels at once and is forgotten."""
    from trtbuild.volume.back import empty_segmentation, first_needed, label_slices, ready_slices

    spec, done = member.spec, 0
    full = empty_segmentation(prepared.grid, spec)
    cropped = full[prepared.grid.box]
    axes = member.mirror_axes if settings.mirroring else ()
    slabs = slabs_from_image(
        prepared.data,
        spec,
        member.runners,
        tile_plan(prepared.data.shape[1:], spec, axes, settings.step_size),
        settings.accumulator,
        lambda final: first_needed(way, ready_slices(way, final)),
        lambda tiles, total: tell(progress, "network", tiles, total),
    )
    for slab in slabs:
        clock.lap("network")
        ready = ready_slices(way, slab.last)
        label_slices(slab.logits, slab.first, way, cropped, done, ready, settings.threads)
        done = ready
        clock.lap("back")
    tell(progress, "back", 1, 1)
    return cast(Segmentation, np.ascontiguousarray(full.transpose(spec.transpose_backward)))
