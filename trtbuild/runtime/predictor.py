"""One case from an array to its segmentation: prepare, run the windows, bring the labels back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trtbuild.errors import Cancelled
from trtbuild.runtime.tiles import logits_from_image
from trtbuild.spec import ModelSpec
from trtbuild.volume import CaseGrid, prepared_from_array, probabilities_from_logits, segmentation_from_logits
from trtbuild.volume.back import Segmentation

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner
    from trtbuild.volume.image import Image

Progress = Callable[[str, int, int], bool | None]
"""Called with (stage, done, total); stages are "read", "prepare", "network", "back", "write". False stops the
case, as does any false value but None."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to run the windows. `step_size` is in (0, 1]; `mirroring` uses the mirror axes the model was trained with."""

    step_size: float = 0.5
    mirroring: bool = True
    probabilities: bool = False
    threads: int = 1


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The result of one case.

    `segmentation` (Z, Y, X), uint8 or uint16, on the image's own grid; `probabilities` (heads, Z, Y, X) float32 where
    asked for; `grid` the way back that was taken; `image` what was read, where it came from files; `seconds` wall time
    per stage.
    """

    segmentation: Segmentation
    probabilities: NDArray[np.float32] | None
    grid: CaseGrid
    seconds: Mapping[str, float]
    image: Image | None = None
    warnings: tuple[str, ...] = ()


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
) -> Prediction:
    """Segments one image.

    Args:
        data: (C, Z, Y, X) real numbers as nnU-Net's reader returns them; left unchanged.
        spacing: mm in array axis order (z, y, x).
        spec: the model.
        runners: one per fold.
        mirror_axes: the axes that the model allows; used when `settings.mirroring`.
        settings: step size, mirroring, probabilities, threads.
        progress: called as the case advances.
    """
    clock = [time.perf_counter()]
    tell(progress, "prepare", 0, 1)
    prepared = prepared_from_array(data, spacing, spec)
    tell(progress, "prepare", 1, 1)
    clock.append(time.perf_counter())

    axes = mirror_axes if settings.mirroring else ()
    logits = logits_from_image(
        prepared.data,
        spec,
        runners,
        axes,
        settings.step_size,
        lambda done, total: tell(progress, "network", done, total),
    )
    clock.append(time.perf_counter())

    tell(progress, "back", 0, 1)
    segmentation = segmentation_from_logits(logits, prepared.grid, spec, threads=settings.threads)
    probabilities = (
        probabilities_from_logits(logits, prepared.grid, spec, threads=settings.threads)
        if settings.probabilities
        else None
    )
    tell(progress, "back", 1, 1)
    clock.append(time.perf_counter())
    empty = not np.any(data)
    return Prediction(
        segmentation=segmentation,
        probabilities=probabilities,
        grid=prepared.grid,
        seconds=dict(zip(("prepare", "network", "back"), np.diff(clock).tolist(), strict=True)),
        warnings=("every voxel of the image is 0",) if empty else (),
    )
