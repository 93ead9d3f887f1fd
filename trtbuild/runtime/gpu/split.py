"""One case on several GPUs: each runs a contiguous range of the rows of windows, and the host adds what they found.

Every GPU gets the slices of the image that its windows cover, and gives their mean logits (`gpu.split_parts`).

What it costs besides the network: all logits come to the host (4 bytes per voxel and class, against 1 or 2 for labels
that one GPU makes), stand there twice, and the CPU makes the labels. It pays where the network takes far longer than
that: many folds, mirroring, large networks. Several cases go faster when each has a GPU of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trtbuild.runtime.gpu.attempts import Report, in_memory
from trtbuild.runtime.gpu.case import (
    arrays_of_case,
    case_logits_on_device,
    device_case,
    finished_on_host,
    prediction_on_device,
)
from trtbuild.runtime.gpu.parallel import Share, run_shares
from trtbuild.runtime.gpu.prepare import DevicePrepared, closed_after, shape_of
from trtbuild.runtime.gpu.split_parts import Part, merged_logits, parts_of_case
from trtbuild.runtime.predictor import Clock, Member, Prediction, Progress, Settings
from trtbuild.runtime.tiles import tile_plan
from trtbuild.volume import Prepared
from trtbuild.volume.back import Logits

if TYPE_CHECKING:
    from trtbuild.runtime.gpu.shared import Gpu
    from trtbuild.runtime.on_device import OnDevice


def prediction_on_devices(
    prepared: Prepared | DevicePrepared,
    member: Member,
    settings: Settings,
    places: Sequence[OnDevice],
    progress: Progress | None,
    report: Report,
    clock: Clock,
) -> Prediction:
    """Segments a prepared case; the labels are those of `prediction_on_device` but for rounding where parts overlap.

    Args:
        prepared: the case; one on a device is on that of the first place, and closed at the end.
        member: its `spec` and `mirror_axes`.
        settings: see `prediction_on_device`; `accumulator` is taken as it is.
        places: one per GPU, with the same engines.
        progress: called with "network" and "back", by one thread at a time.
        report: see `prediction_on_device`.
        clock: of the case.

    Raises:
        OutOfMemory, NonFinite, EngineError, Cancelled: as there, once all GPUs have ended.
    """
    with closed_after(prepared):
        parts = _parts(prepared, member, settings, len(places))
        if len(parts) == 1:
            place = places[0]
            return prediction_on_device(
                prepared, member, settings, place.engines, place.gpu, progress, report, clock, place.limit
            )
        logits = _split_logits(prepared, parts, member, settings, places, progress, report)
        clock.lap("network")
        case = device_case(prepared, member, settings, places[0].engines)
        return finished_on_host(logits, prepared, case, settings, progress, clock)


def case_logits_on_devices(
    prepared: Prepared | DevicePrepared,
    member: Member,
    settings: Settings,
    places: Sequence[OnDevice],
    progress: Progress | None,
    report: Report,
) -> Logits:
    """Mean logits (heads, Z, Y, X) on the host, for an ensemble; arguments and errors of `prediction_on_devices`."""
    with closed_after(prepared):
        parts = _parts(prepared, member, settings, len(places))
        if len(parts) == 1:
            place = places[0]
            return case_logits_on_device(
                prepared, member, settings, place.engines, place.gpu, progress, report, place.limit
            )
        return _split_logits(prepared, parts, member, settings, places, progress, report)


def _parts(prepared: Prepared | DevicePrepared, member: Member, settings: Settings, count: int) -> tuple[Part, ...]:
    axes = member.mirror_axes if settings.mirroring else ()
    plan = tile_plan(shape_of(prepared)[1:], member.spec, axes, settings.step_size)
    return parts_of_case(plan, member.spec, count)


def _split_logits(
    prepared: Prepared | DevicePrepared,
    parts: Sequence[Part],
    member: Member,
    settings: Settings,
    places: Sequence[OnDevice],
    progress: Progress | None,
    report: Report,
) -> Logits:
    image = _image(prepared, places[0].gpu)

    def share(part: Part, place: OnDevice) -> Share[Logits]:
        return Share(
            name=f"GPU {place.gpu.device.index}, slices {part.first} to {part.last}",
            tiles=len(part.tiles) * len(place.engines),
            run=lambda told: _of_part(prepared, image, part, member, settings, place, told, report),
        )

    shares = [share(part, place) for part, place in zip(parts, places, strict=False)]
    return merged_logits(parts, run_shares(shares, progress), image.shape[1])


def _image(prepared: Prepared | DevicePrepared, gpu: Gpu) -> NDArray[np.float32]:
    """(C, Z, Y, X) on the host; what was on the GPU is given back there, where a part of it comes again."""
    if isinstance(prepared, Prepared):
        return prepared.data
    image = np.empty(prepared.shape, dtype=np.float32)
    gpu.download(image, prepared.image)
    prepared.close()
    return image


def _of_part(
    prepared: Prepared | DevicePrepared,
    image: NDArray[np.float32],
    part: Part,
    member: Member,
    settings: Settings,
    place: OnDevice,
    progress: Progress,
    report: Report,
) -> Logits:
    """Mean logits (heads, last - first, Y, X) over the part's windows."""
    own = Prepared(data=image[:, part.first : part.last], grid=prepared.grid)
    case = device_case(own, member, settings, place.engines)
    case = replace(case, tiles=part.tiles, first=part.first, wants_logits=True)
    return in_memory(
        case, (settings.accumulator,), place.engines, place.gpu, place.limit, report,
        lambda plan: arrays_of_case(own, case, plan, place.engines, place.gpu, progress, Clock())[0],
    )  # fmt: skip
