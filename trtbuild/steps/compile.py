"""`compile`: a trained-model folder, or a bundle, becomes a bundle."""

from __future__ import annotations

import datetime
import io
import math
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import trtbuild
from trtbuild.accuracy import LOGIT_TOLERANCE, logit_error
from trtbuild.atomic import write_whole
from trtbuild.bundle import Bundle, Contents, Golden, Provenance, Stage, open_bundle, write_bundle
from trtbuild.config import CompileConfig
from trtbuild.errors import EngineError, ModelError
from trtbuild.spec import BuildRecord, ModelSpec, NetworkRecord
from trtbuild.steps.golden import GoldenCase, golden_case

Report = Callable[[str], None]
INFERENCE_PRECISION = {"fp32": "f32", "bf16": "bf16"}
PLAIN_NORM_VOXELS = 64**3
"""Patches of up to so many voxels keep the backend's own instance normalisation, which sums a channel in one go.

Measured with a trained network (PlainConvUNet, 16 to 128 features): OpenVINO's logits are off by at most 6e-4 of the
largest at 64³, where 4e-6 of the labels change, and by 6e-3 at 128³ with an empty background, where 1.4e-3 of them do;
as sums of sums it is 7e-7 and none. That costs 28 % of the network's time at 64³ and 18 % at 128³.
"""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """What engines are built from, wherever it came from: the stage, its files, and the goldens per network id."""

    stage: Stage
    files: Mapping[str, bytes | Path]
    goldens: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    case: GoldenCase | None
    provenance: Provenance


def compile_bundle(config: CompileConfig, report: Report = lambda line: None) -> Bundle:
    """Runs every step from the model to the bundle; the bundle appears under its name only when it is whole.

    Args:
        config: what to compile, for which backends, where to.
        report: called with one line per step.

    Raises:
        ModelError, GraphError, EngineError, OutputError: with what was expected, what came, where, and what to do.
    """
    networks = (
        _networks_from_bundle(config, report) if _is_bundle(config.model) else _networks_from_folder(config, report)
    )
    with tempfile.TemporaryDirectory(prefix="trtbuild-") as scratch:
        models = _materialise(networks, Path(scratch))
        engines = tuple(_build_engines(config, networks, models, report))
        if networks.case is None:
            report("making the golden case")
        case = networks.case or golden_case(networks.stage, models, Path(scratch))
    goldens, golden_files = _goldens(networks, case)
    contents = Contents(
        stages=(networks.stage,),
        engines=engines,
        calibrations=(),
        gates=(),
        goldens=goldens,
        postprocessing=(),
        provenance=networks.provenance,
        extensions={},
    )
    report(f"writing {config.output}")
    return write_bundle(config.output, contents, {**networks.files, **golden_files}, overwrite=config.overwrite)


def _goldens(networks: Networks, case: GoldenCase) -> tuple[tuple[Golden, ...], Mapping[str, bytes]]:
    """The list of goldens and their `.npy` files."""
    goldens, files = [], {}
    for network in networks.stage.networks:
        stem = f"goldens/{network.id}"
        goldens.append(
            Golden(
                kind="patch", network=network.id, input=f"{stem}_input.npy", output=f"{stem}_logits.npy", spacing=None
            )
        )
        files[f"{stem}_input.npy"], files[f"{stem}_logits.npy"] = map(_npy, networks.goldens[network.id])
    goldens.append(
        Golden(
            kind="case",
            network=None,
            input="goldens/case_image.npy",
            output="goldens/case_labels.npy",
            spacing=case.spacing,
        )
    )
    files["goldens/case_image.npy"], files["goldens/case_labels.npy"] = _npy(case.image), _npy(case.labels)
    return tuple(goldens), files


def _form(inference_precision: str, patch: tuple[int, ...]) -> dict[str, bool]:
    """How a network is written for a CPU engine: with sums of sums in f32, where the patch is large.

    In bf16 the backend keeps the sums of its own instance normalisation in float32, while those of plain operators
    would be rounded to bf16.
    """
    large = math.prod(patch) > PLAIN_NORM_VOXELS
    return {"rewrite_conv_transpose": False, "split_instance_norm": inference_precision == "f32" and large}


def _is_bundle(path: Path) -> bool:
    return (path / "bundle.json").is_file()


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _networks_from_folder(config: CompileConfig, report: Report) -> Networks:
    from trtbuild.graph import clean, model_from_bytes
    from trtbuild.source import SourceConfig, export_model

    exported = export_model(
        SourceConfig(
            folder=config.model,
            folds=config.folds,
            checkpoint=config.checkpoint,
            trust_checkpoint=config.trust_checkpoint,
            assume_plans_architecture=config.assume_plans_architecture,
        ),
        report,
    )
    for note in exported.notes:
        report(note)
    if exported.spec.previous_stage is not None:
        raise ModelError(
            "The model is the second stage of a cascade, which this version cannot run.",
            got=f"{exported.spec.configuration} after {exported.spec.previous_stage}",
            where=config.model,
        )
    files: dict[str, bytes | Path] = {"plans.json": exported.plans, "dataset.json": exported.dataset}
    records, goldens = [], {}
    for network in exported.networks:
        report(f"cleaning fold {network.fold}")
        result = clean(
            model_from_bytes(network.model), **_form(INFERENCE_PRECISION[config.precision], exported.spec.patch)
        )
        record = _network_record(network.fold, exported.spec, result.model)
        files[record.file] = result.model.SerializeToString()
        goldens[record.id] = (network.golden_input, network.golden_logits)
        records.append(record)
    stage = Stage(spec=exported.spec, mirror_axes=exported.mirror_axes, networks=tuple(records))
    return Networks(
        stage=stage,
        files=files,
        goldens=goldens,
        case=None,
        provenance=_provenance(config, exported.spec, exported.sources),
    )


def _network_record(fold: str, spec: ModelSpec, model: Any) -> NetworkRecord:
    from trtbuild.graph import io_from_model, opset_from_model

    return NetworkRecord(
        id=f"fold_{fold}_fp32",
        fold=fold,
        file=f"networks/fold_{fold}_fp32.onnx",
        precision="fp32",
        zero_point="none",
        opset=opset_from_model(model),
        io=io_from_model(model),
        parent=None,
    )


def _provenance(config: CompileConfig, spec: ModelSpec, sources: Mapping[str, str]) -> Provenance:
    from trtbuild.steps.doctor import package_versions

    return Provenance(
        trtbuild=trtbuild.__version__,
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        model=config.model.resolve().name,
        plans=spec.plans,
        trainer=spec.trainer,
        checkpoint=config.checkpoint,
        sources=dict(sources),
        versions={name: version for name, version in package_versions().items() if version is not None},
    )


def _networks_from_bundle(config: CompileConfig, report: Report) -> Networks:
    """Takes over the networks of a bundle: new engines need neither the checkpoint nor torch."""
    bundle = open_bundle(config.model)
    if len(bundle.manifest.stages) != 1:
        raise ModelError("This version cannot recompile a cascade.", where=config.model)
    stage = bundle.manifest.stages[0]
    if config.folds is not None:
        kept = tuple(n for n in stage.networks if n.fold in config.folds)
        missing = sorted(set(config.folds) - {n.fold for n in kept})
        if missing:
            raise ModelError(
                "The bundle lacks a fold.",
                expected=", ".join(config.folds),
                where=config.model,
                got=", ".join(n.fold for n in stage.networks),
            )
        stage = replace(stage, networks=kept)
    report(f"taking over {len(stage.networks)} networks from {config.model}")
    goldens, case = {}, None
    for golden in bundle.manifest.goldens:
        pair = tuple(np.load(bundle.file(name), allow_pickle=False) for name in (golden.input, golden.output))
        if golden.network is not None:
            goldens[golden.network] = pair
        elif golden.spacing is not None and config.folds is None:
            case = GoldenCase(image=pair[0], spacing=golden.spacing, labels=pair[1])
    files: dict[str, bytes | Path] = {n.file: _reformed(bundle, stage.spec, n, config, report) for n in stage.networks}
    files |= {name: bundle.file(name) for name in ("plans.json", "dataset.json")}
    return Networks(stage=stage, files=files, goldens=goldens, case=case, provenance=bundle.manifest.provenance)


def _reformed(
    bundle: Bundle, spec: ModelSpec, network: NetworkRecord, config: CompileConfig, report: Report
) -> bytes | Path:
    """The network's file as it is, or written anew where the new engines want another form than the bundle's."""
    path = bundle.file(network.file)
    now = {record.inference_precision for record in bundle.manifest.engines}
    wanted = INFERENCE_PRECISION[config.precision]
    if now == {wanted}:
        return path
    from trtbuild.graph import clean, load_onnx

    report(f"rewriting fold {network.fold} for {wanted}")
    content: bytes = clean(load_onnx(path), **_form(wanted, spec.patch)).model.SerializeToString()
    return content


def _materialise(networks: Networks, scratch: Path) -> Mapping[str, Path]:
    """Every network as a file that a backend can open."""
    models = {}
    for network in networks.stage.networks:
        content = networks.files[network.file]
        if isinstance(content, Path):
            models[network.id] = content
        else:
            models[network.id] = scratch / Path(network.file).name
            write_whole(models[network.id], content)
    return models


def _build_engines(
    config: CompileConfig, networks: Networks, models: Mapping[str, Path], report: Report
) -> Iterable[BuildRecord]:
    """One engine per backend and network. All folds share the settings that were measured for the first."""
    from trtbuild.engine import engine_from_onnx
    from trtbuild.runtime.select import choose_backend

    for asked in config.backends:
        choice = choose_backend(asked)
        for name, reason in choice.refused:
            report(f"not {name}: {reason}")
        first: BuildRecord | None = None
        for network in networks.stage.networks:
            report(f"building fold {network.fold} for {choice.name} ({config.precision})")
            if first is None:
                record = first = engine_from_onnx(
                    models[network.id],
                    network,
                    backend=choice.name,
                    threads=config.threads,
                    inference_precision=INFERENCE_PRECISION[config.precision],
                    tune=config.tune,
                )
            else:
                record = replace(first, network=network.id)
            _check_against_golden(record, models[network.id], networks.goldens[network.id], report)
            yield record


def _check_against_golden(
    record: BuildRecord, model: Path, golden: tuple[NDArray[np.float32], NDArray[np.float32]], report: Report
) -> None:
    from trtbuild.runtime.select import open_runner

    with open_runner(record, model) as runner:
        error = logit_error(runner.infer(golden[0]), golden[1])
    limit = LOGIT_TOLERANCE[record.inference_precision]
    report(f"logits differ from PyTorch by {error:.1e} of the largest (limit {limit:.0e})")
    if not error <= limit:
        raise EngineError(
            "An engine does not compute what the network computes.",
            got=f"{error:.2e} of the largest logit",
            expected=f"at most {limit:.0e}",
            where=f"{record.backend} ({record.inference_precision}), {record.network}",
            hint="compile with --backend onnxruntime, and report the model",
        )
