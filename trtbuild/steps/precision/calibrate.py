"""One network and its patches -> a ScaleTable, kept and resumed in a folder where the user names one."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trtbuild
from trtbuild.atomic import output_error
from trtbuild.config import CalibrationConfig
from trtbuild.errors import InputError, OutputError
from trtbuild.graph import clean
from trtbuild.spec import Labels, ModelSpec
from trtbuild.steps.precision.data import StageData, as_input_errors
from trtbuild.steps.precision.facts import entropy_cache
from trtbuild.steps.precision.network import ObservedNetwork
from trtbuild_calibration import (
    PERCENTILE,
    VERSION,
    Fingerprint,
    PatchSequence,
    Progress,
    Sample,
    ScaleTable,
    Source,
    observe,
    read_table,
    sample_places,
    table_from_observation,
    write_cache,
    write_table,
)

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """What a network is calibrated with: `sample` of patches out of `sources`, none of which the gate sees."""

    spec: ModelSpec
    sources: Sequence[Source] = field(repr=False)
    data: StageData
    config: CalibrationConfig
    threads: int


def calibrated(
    network_id: str, model: onnx.ModelProto, job: Calibration, progress: Callable[[Progress], None]
) -> ScaleTable:
    """The scales of a network.

    Args:
        network_id: its name in the folder of scales.
        model: clean, float32, norms written out.
        job: the patches.
        progress: called after each forward pass.

    Raises:
        InputError: the data cannot be used, or the folder of scales holds a calibration of something else.
    """
    with as_input_errors():
        sample = sample_places(
            job.sources,
            patch=job.spec.patch,
            count=job.config.patches,
            seed=job.config.seed,
            classes=classes_of(job.spec.labels),
            ignore=job.spec.labels.ignore,
        )
        fingerprint = _fingerprint(model, job, sample)
        kept = None if job.config.scales is None else _kept(job.config.scales, network_id, fingerprint)
        if kept is not None:
            return kept
        table = _observed(network_id, model, job, sample, fingerprint, progress)
        if job.config.scales is not None:
            keep_table(job.config.scales, network_id, table)
    return table


def observed_form(model: onnx.ModelProto) -> onnx.ModelProto:
    """A network as it is calibrated, with norms written out: the hash in a table's fingerprint is of this one."""
    return clean(model, rewrite_conv_transpose=False, split_instance_norm=True).model


def what_is_done(network_id: str, config: CalibrationConfig, cases: int) -> str:
    """A line for people: a finished table is used again, or refused, and never made twice."""
    if config.scales is not None and (config.scales / f"{network_id}.json").exists():
        return f"{network_id}: its scales are there, in {config.scales}"
    patches = f"{config.patches} patch{'es' * (config.patches != 1)}"
    return f"calibrating {network_id} on {patches} of {cases} case{'s' * (cases != 1)}"


def classes_of(labels: Labels) -> tuple[int, ...]:
    """The label values that patches shall hold: all but background and the ignore label."""
    values = {value for several in labels.names.values() for value in several}
    return tuple(sorted(values - {0, labels.ignore}))


def keep_table(folder: Path, network_id: str, table: ScaleTable) -> None:
    """Writes the table, and the entropy thresholds as TensorRT's calibration cache; the state that led there goes."""
    write_table(folder / f"{network_id}.json", table)
    write_cache(folder / f"{network_id}.cache", entropy_cache(table))
    _state(folder, network_id).unlink(missing_ok=True)


def _observed(
    network_id: str,
    model: onnx.ModelProto,
    job: Calibration,
    sample: Sample,
    fingerprint: Fingerprint,
    progress: Callable[[Progress], None],
) -> ScaleTable:
    network = ObservedNetwork(model=model, patch=(job.spec.network_channels, *job.spec.patch), threads=job.threads)
    patches = PatchSequence(
        sources={source.name: source for source in job.sources}, places=sample.places, patch=job.spec.patch
    )
    folder = job.config.scales
    observation = observe(
        network,
        network.targets(),
        patches,
        state=None if folder is None else _state(folder, network_id),
        fingerprint=asdict(fingerprint),
        progress=progress,
    )
    return table_from_observation(observation, fingerprint, sample.coverage)


def _fingerprint(model: onnx.ModelProto, job: Calibration, sample: Sample) -> Fingerprint:
    used = sorted({place.case for place in sample.places})
    return Fingerprint(
        network=hashlib.sha256(model.SerializeToString()).hexdigest(),
        cases={name: job.data.digest(name) for name in used},
        seed=job.config.seed,
        patches_asked=job.config.patches,
        patches_used=len(sample.places),
        percentile=PERCENTILE,
        versions={"trtbuild": trtbuild.__version__, "trtbuild_calibration": VERSION},
    )


def _kept(folder: Path, network_id: str, fingerprint: Fingerprint) -> ScaleTable | None:
    """The finished table of the folder, if it is of this very calibration."""
    path = folder / f"{network_id}.json"
    if not path.exists():
        return None
    table = read_table(path)
    wanted, found = _facts(fingerprint), _facts(table.fingerprint)
    other = [name for name in wanted if wanted[name] != found[name]]
    if other:
        raise InputError(
            "The folder holds the scales of another calibration.",
            expected=f"{other[0]} {wanted[other[0]]}",
            got=f"{other[0]} {found[other[0]]}",
            where=path,
            hint="name another folder with --scales, or remove the file",
        )
    return table


def _facts(fingerprint: Fingerprint) -> Mapping[str, object]:
    facts = asdict(fingerprint)
    facts.pop("versions")
    return facts | {"calibration": fingerprint.versions.get("trtbuild_calibration")}


def _state(folder: Path, network_id: str) -> Path:
    return folder / f"{network_id}.partial.npz"


def make_scales_folder(config: CalibrationConfig) -> None:
    """Before any work: whether the scales can be kept where the user wants them.

    Raises:
        OutputError: the folder cannot be made, or written to.
    """
    folder = config.scales
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except FileExistsError as error:
        raise OutputError("The scales need a folder.", got="a file", where=folder, hint="name a folder") from error
    except OSError as error:
        raise output_error(error, folder) from error
