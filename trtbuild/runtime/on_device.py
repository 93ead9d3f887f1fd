"""Where a member runs: on a GPU, where its engines are open there, or else on the CPU; the results are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike, NDArray

from trtbuild.errors import OutOfMemory
from trtbuild.runtime.predictor import (
    Clock,
    Member,
    Prediction,
    Progress,
    Settings,
    case_logits,
    prediction_from_prepared,
)
from trtbuild.volume import Prepared, prepared_from_array

if TYPE_CHECKING:
    import numpy as np

    from trtbuild.runtime.device import Buffer
    from trtbuild.runtime.gpu.prepare import DevicePrepared
    from trtbuild.runtime.gpu.shared import DeviceEngine, Gpu
    from trtbuild.runtime.slabs import Logits

Report = Callable[[str], None]
"""Told in words what runs otherwise than asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class OnDevice:
    """A member's place on a GPU: its folds' engines there, and the bytes of device memory that a case may take (None:
    what is free). `others` are places of the same engines on other GPUs, which share the windows of every case."""

    gpu: Gpu
    engines: tuple[DeviceEngine, ...]
    limit: int | None
    others: tuple[OnDevice, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PreparedInstead(Prepared):
    """A case that the host prepared in place of the GPU; `note` says why."""

    note: str


def prepared_for_member(
    data: ArrayLike,
    spacing: Sequence[float],
    member: Member,
    labels: NDArray[np.integer] | None,
    uploaded: Buffer | None = None,
) -> Prepared | DevicePrepared:
    """The case as the member's network sees it: on its GPU, or on the host for a CPU, and where `labels` of a cascade's
    first stage come from the host. Arguments and errors are those of `prepared_from_array`.

    What lies on the GPU is closed by `member_prediction` or `member_logits`. Where the GPU has no memory to prepare the
    case, the host does it (`PreparedInstead`); whether a limit leads to that is known before (`model_memory`).
    """
    if member.device is None or labels is not None:
        return prepared_from_array(data, spacing, member.spec, labels)
    from trtbuild.runtime.gpu.prepare import prepared_on_device

    try:
        return prepared_on_device(data, spacing, member.spec, member.device.gpu, member.device.limit, uploaded)
    except OutOfMemory as error:
        note = f"The GPU had no memory to prepare the case ({error.got}): the host prepared it."
    prepared = prepared_from_array(data, spacing, member.spec)  # outside `except`, whose error holds what was there
    return PreparedInstead(data=prepared.data, grid=prepared.grid, note=note)


def member_prediction(
    prepared: Prepared | DevicePrepared,
    member: Member,
    settings: Settings,
    progress: Progress | None,
    clock: Clock,
    report: Report,
) -> Prediction:
    """Segments a prepared case where the member runs; see `prediction_from_prepared` and `prediction_on_device`."""
    if member.device is None:
        return prediction_from_prepared(on_host(prepared), member, settings, progress, clock)
    place = member.device
    if place.others:
        from trtbuild.runtime.gpu.split import prediction_on_devices

        places = (place, *place.others)
        return prediction_on_devices(prepared, member, settings, places, progress, report, clock)
    from trtbuild.runtime.gpu.case import prediction_on_device

    return prediction_on_device(
        prepared, member, settings, place.engines, place.gpu, progress, report, clock, place.limit
    )


def member_logits(
    prepared: Prepared | DevicePrepared, member: Member, settings: Settings, progress: Progress | None, report: Report
) -> Logits:
    """Mean logits (heads, Z, Y, X) on the host; see `case_logits` and `case_logits_on_device`."""
    if member.device is None:
        return case_logits(on_host(prepared), member, settings, progress)
    place = member.device
    if place.others:
        from trtbuild.runtime.gpu.split import case_logits_on_devices

        return case_logits_on_devices(prepared, member, settings, (place, *place.others), progress, report)
    from trtbuild.runtime.gpu.case import case_logits_on_device

    return case_logits_on_device(prepared, member, settings, place.engines, place.gpu, progress, report, place.limit)


def on_host(prepared: Prepared | DevicePrepared) -> Prepared:
    """The case for a CPU, which gets none that was prepared on a GPU."""
    if not isinstance(prepared, Prepared):
        prepared.close()
        raise TypeError("a case on a GPU cannot run on a CPU")
    return prepared


def given_back(prepared: Prepared | DevicePrepared) -> None:
    """For a case that does not run after all: what lies on a GPU is closed."""
    if not isinstance(prepared, Prepared):
        prepared.close()
