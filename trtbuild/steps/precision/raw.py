"""Raw images as calibration cases: read, prepared as for a prediction, and kept as arrays on the disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.config import CalibrationConfig
from trtbuild.errors import InputError
from trtbuild.spec import ModelSpec
from trtbuild.volume.cases import Case, cases_from_input
from trtbuild.volume.io import reader_named
from trtbuild.volume.io.previous import labels_for_image
from trtbuild.volume.preparation import labels_on_grid, prepared_from_array
from trtbuild_calibration import ArraySource

BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class RawCase:
    """A prepared case; `source` reads it from the disk, `digest` is of its image, label and previous files."""

    name: str
    source: ArraySource
    digest: str


def raw_cases(
    config: CalibrationConfig,
    spec: ModelSpec,
    previous: Path | None,
    scratch: Path,
    report: Callable[[str], None],
) -> tuple[RawCase, ...]:
    """Prepares the cases of a folder of raw images; of many, twice as many as there will be patches, drawn by the seed.

    Raises:
        InputError: no images, an image or its labels are damaged or missing. None is left out in silence.
    """
    if config.images is None:
        raise InputError("There are no images to calibrate on.", expected="--calibration-images FOLDER")
    cases = cases_from_input([config.images], spec.file_ending)
    if not len(cases):
        raise InputError("The folder holds no images.", expected=f"CASE_0000{spec.file_ending}", where=config.images)
    chosen = sorted(np.random.default_rng(config.seed).permutation(len(cases))[: 2 * config.patches].tolist())
    prepared = []
    for number, index in enumerate(chosen, start=1):
        case = cases[index]
        report(f"preparing {case.id} ({number} of {len(chosen)})")
        prepared.append(_prepared(case, config, spec, previous, scratch))
    return tuple(prepared)


def _prepared(case: Case, config: CalibrationConfig, spec: ModelSpec, previous: Path | None, scratch: Path) -> RawCase:
    if case.is_dicom:
        raise InputError("DICOM series do not calibrate.", expected=f"images {spec.file_ending}", where=case.files[0])
    name = case.output_name(spec.file_ending)
    label_file = None if config.labels is None else config.labels / name
    before_file = None if previous is None else previous / name
    image = reader_named(spec.reader).read_image(case.files, spec.channels)
    before = None if before_file is None else labels_for_image(before_file, spec.reader, image).labels
    result = prepared_from_array(image.data, image.spacing, spec, before)
    labels = None
    if label_file is not None:
        truth = labels_for_image(label_file, spec.reader, image).labels
        labels = _on_disk(labels_on_grid(truth, image.data, result.grid, spec), scratch / f"{case.id}_seg.npy")
    data = _on_disk(result.data, scratch / f"{case.id}.npy")
    files = [*case.files, *(file for file in (label_file, before_file) if file is not None)]
    return RawCase(name=case.id, source=ArraySource(name=case.id, data=data, labels=labels), digest=_digest(files))


def _on_disk(array: NDArray[Any], path: Path) -> NDArray[Any]:
    np.save(path, array, allow_pickle=False)
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                total.update(block)
    return total.hexdigest()
