"""`compile`: a trained-model folder, or a bundle, becomes a bundle."""

from __future__ import annotations

import datetime
import io
import os
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
from trtbuild.bundle.writer import check_target
from trtbuild.config import CompileConfig
from trtbuild.errors import EngineError, ModelError
from trtbuild.spec import BuildRecord, ModelSpec, NetworkRecord
from trtbuild.steps.golden import GoldenCase, golden_case

Report = Callable[[str], None]
INFERENCE_PRECISION = {"fp32": "f32", "bf16": "bf16"}


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

    What is cheap to find out (a place for the bundle, usable backends) is found out before the work starts.

    Args:
        config: what to compile, for which backends, where to.
        report: called with one line per step.

    Raises:
        ModelError, GraphError, EngineError, OutputError: with what was expected, what came, where, and what to do.
    """
    check_target(config.output, overwrite=config.overwrite)
    backends = _chosen_backends(config, report)
    networks = (
        _networks_from_bundle(config, report) if _is_bundle(config.model) else _networks_from_folder(config, report)
    )
    with tempfile.TemporaryDirectory(prefix="trtbuild-") as scratch:
        models = _materialise(networks, Path(scratch))
        engines = tuple(_build_engines(config, backends, networks, models, report))
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


def _form(inference_precision: str) -> dict[str, bool]:
    """How a network is written for a CPU engine: in f32 with instance normalisation as sums of sums.

    The backends sum a whole channel in one float32 accumulator. Measured with a trained network: OpenVINO's logits are
    off by up to 6e-4 of the largest at 64³ and 6e-3 at 128³ (empty background, 0.14 % of the labels change), and by
    4e-7 with sums of sums. In bf16 the backend keeps the sums of its own operator in float32, while those of plain
    operators would be rounded to bf16.
    """
    return {"rewrite_conv_transpose": False, "split_instance_norm": inference_precision == "f32"}


def _is_bundle(path: Path) -> bool:
    return os.path.isfile(path / "bundle.json")


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
        result = clean(model_from_bytes(network.model), **_form(INFERENCE_PRECISION[config.precision]))
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
    files: dict[str, bytes | Path] = {n.file: _reformed(bundle, n, config, report) for n in stage.networks}
    files |= {name: bundle.file(name) for name in ("plans.json", "dataset.json")}
    return Networks(stage=stage, files=files, goldens=goldens, case=case, provenance=bundle.manifest.provenance)


def _reformed(bundle: Bundle, network: NetworkRecord, config: CompileConfig, report: Report) -> bytes | Path:
    """The network's file as it is, or written anew where the new engines want another form than the bundle's."""
    path = bundle.file(network.file)
    now = {record.inference_precision for record in bundle.manifest.engines}
    wanted = INFERENCE_PRECISION[config.precision]
    if now == {wanted}:
        return path
    from trtbuild.graph import clean, load_onnx

    report(f"rewriting fold {network.fold} for {wanted}")
    content: bytes = clean(load_onnx(path), **_form(wanted)).model.SerializeToString()
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


def _chosen_backends(config: CompileConfig, report: Report) -> tuple[str, ...]:
    """The backends by name, each of which runs here and computes in the precision."""
    from trtbuild.runtime.select import choose_backend

    names = []
    for asked in config.backends:
        choice = choose_backend(asked)
        for name, reason in choice.refused:
            report(f"not {name}: {reason}")
        names.append(choice.name)
    if len(set(names)) != len(names):
        raise EngineError(
            "Two of the backends are the same one, and a bundle holds one engine per network and backend.",
            expected="distinct backends",
            got=", ".join(f"{a} (here {n})" if a != n else a for a, n in zip(config.backends, names, strict=True)),
            hint="leave auto out",
        )
    for name in names:
        _check_precision(name, config.precision)
    return tuple(names)


def _check_precision(backend: str, precision: str) -> None:
    """Whether the backend has the precision, and, where it says so, whether this CPU has it."""
    from trtbuild.engine.build import BACKENDS

    wanted, known = INFERENCE_PRECISION[precision], BACKENDS[backend].precisions
    if backend == "openvino":
        from trtbuild.runtime.openvino import PRECISIONS, openvino_module

        capable = openvino_module().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        known = tuple(name for name in known if PRECISIONS[name][0] in capable)
    if wanted not in known:
        raise EngineError(
            "The backend does not compute in this precision here.",
            expected=" or ".join(name for name, inference in INFERENCE_PRECISION.items() if inference in known),
            got=precision,
            where=backend,
            hint="compile with --precision fp32",
        )


def _build_engines(
    config: CompileConfig,
    backends: tuple[str, ...],
    networks: Networks,
    models: Mapping[str, Path],
    report: Report,
) -> Iterable[BuildRecord]:
    """One engine per backend and network. All folds share the settings that were measured for the first."""
    from trtbuild.engine import engine_from_onnx

    for backend in backends:
        first: BuildRecord | None = None
        for network in networks.stage.networks:
            report(f"building fold {network.fold} for {backend} ({config.precision})")
            if first is None:
                record = first = engine_from_onnx(
                    models[network.id],
                    network,
                    backend=backend,
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
