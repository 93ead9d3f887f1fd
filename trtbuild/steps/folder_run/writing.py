"""The files of one finished case. The segmentation comes last: where it exists, the case is complete."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.atomic import output_error, whole_file, write_whole
from trtbuild.spec import ModelSpec
from trtbuild.steps.folder_run.outputs import Targets

if TYPE_CHECKING:
    from trtbuild.runtime import Prediction
    from trtbuild.volume import CaseGrid
    from trtbuild.volume.image import Geometry


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a segmentation belongs: what the writer of the model's reader needs, and nnU-Net's properties.

    `series` is the folder of the DICOM series that a DICOM-SEG is wanted for, `bundle` the identity that it names.
    """

    geometry: Geometry
    properties: dict[str, Any]
    series: Path | None
    bundle: str


def write_case(prediction: Prediction, place: Place, targets: Targets, spec: ModelSpec) -> None:
    """Writes probabilities and their properties, the map, the DICOM-SEG, and the segmentation, in this order.

    Raises:
        InputError: the DICOM series is no longer what was read.
        OutputError: a file cannot be written; none is half-written.
    """
    from trtbuild.volume.io import reader_named

    reader = reader_named(spec.reader)
    if prediction.probabilities is not None:
        import numpy as np

        with whole_file(targets.probabilities) as partial:
            np.savez_compressed(partial, probabilities=prediction.probabilities)
        write_whole(targets.properties, pickle.dumps({**place.properties, **_cropping(prediction.grid)}))
    if prediction.disagreement is not None:
        try:
            targets.disagreement.parent.mkdir(exist_ok=True)
        except OSError as error:
            raise output_error(error, targets.disagreement.parent) from error
        reader.write_segmentation(prediction.disagreement, place.geometry, targets.disagreement)
    if place.series is not None:
        from trtbuild.volume.io.dicom_seg import write_dicom_seg

        names = {name: values for name, values in spec.labels.names.items() if values != (spec.labels.ignore,)}
        write_dicom_seg(
            prediction.segmentation, place.geometry, place.series, names, targets.dicom_seg, bundle=place.bundle
        )
    reader.write_segmentation(prediction.segmentation, place.geometry, targets.segmentation)


def _cropping(grid: CaseGrid) -> dict[str, Any]:
    """What nnU-Net's preprocessing adds to the properties."""
    return {
        "shape_before_cropping": grid.shape,
        "bbox_used_for_cropping": [[s.start, s.stop] for s in grid.box],
        "shape_after_cropping_and_before_resampling": grid.cropped,
    }
