"""What engines are built from, wherever it comes from, and how a bundle's networks are taken over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.atomic import write_whole
from trtbuild.bundle import Bundle, Provenance, Stage, open_bundle
from trtbuild.config import CompileConfig
from trtbuild.errors import ModelError
from trtbuild.spec import KeepLargestComponent, ModelSpec, NetworkRecord
from trtbuild.steps.compilation.golden import GoldenCase

Report = Callable[[str], None]
GoldenPair = tuple[NDArray[np.float32], NDArray[np.float32]]
INFERENCE_PRECISION = {"fp32": "f32", "bf16": "bf16", "fp16": "f32", "int8": "f32"}
"""What a CPU backend computes in: FP16 graphs and what INT8 leaves over in float32, BF16 from the FP32 graph."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The stages (two are a cascade), the files of the bundle so far, and the goldens per network id."""

    stages: tuple[Stage, ...]
    files: Mapping[str, bytes | Path]
    goldens: Mapping[str, GoldenPair]
    case: GoldenCase | None
    postprocessing: tuple[KeepLargestComponent, ...]
    provenance: Provenance


def networks_from_bundle(path: Path, config: CompileConfig, report: Report) -> Networks:
    """Takes over the networks of a bundle: new engines need neither the checkpoint nor torch."""
    _refuse_for_bundle(path, config)
    bundle = open_bundle(path)
    stages = tuple(_with_folds(_roots(stage), config.folds, path) for stage in bundle.manifest.stages)
    networks = [network for stage in stages for network in stage.networks]
    ids = {network.id for network in networks}
    report(f"taking over {len(networks)} networks from {path}")
    goldens, case = {}, None
    for golden in bundle.manifest.goldens:
        pair = tuple(np.load(bundle.file(name), allow_pickle=False) for name in (golden.input, golden.output))
        if golden.network in ids:
            goldens[golden.network] = pair
        elif golden.spacing is not None and config.folds is None and config.postprocessing is None:
            case = GoldenCase(image=pair[0], spacing=golden.spacing, labels=pair[1])
    files: dict[str, bytes | Path] = {n.file: _reformed(bundle, n, config, report) for n in networks}
    files |= {name: bundle.file(name) for name in ("plans.json", "dataset.json")}
    steps = bundle.manifest.postprocessing if config.postprocessing is None else postprocessing_steps(config)
    check_postprocessing(steps, stages[-1].spec, config.postprocessing)
    return Networks(
        stages=stages,
        files=files,
        goldens=goldens,
        case=case,
        postprocessing=steps,
        provenance=bundle.manifest.provenance,
    )


def materialised(networks: Networks, scratch: Path) -> Mapping[str, Path]:
    """Every network, by its id, as a file that a backend can open."""
    models = {}
    for network in (network for stage in networks.stages for network in stage.networks):
        content = networks.files[network.file]
        if isinstance(content, Path):
            models[network.id] = content
        else:
            models[network.id] = scratch / Path(network.file).name
            write_whole(models[network.id], content)
    return models


def in_fp32(networks: Networks) -> Networks:
    """The same networks in the form of FP32 engines."""
    from trtbuild.graph import clean, load_onnx, model_from_bytes

    files = dict(networks.files)
    for network in (network for stage in networks.stages for network in stage.networks):
        content = files[network.file]
        model = load_onnx(content) if isinstance(content, Path) else model_from_bytes(content)
        files[network.file] = clean(model, **form("f32")).model.SerializeToString()
    return replace(networks, files=files)


def form(inference_precision: str) -> dict[str, bool]:
    """How a network is written for a CPU engine: in f32 with instance normalisation as sums of sums.

    The backends sum a whole channel in one float32 accumulator. Measured with a trained network: OpenVINO's logits are
    off by up to 6e-4 of the largest at 64³ and 6e-3 at 128³ (empty background, 0.14 % of the labels change), and by
    4e-7 with sums of sums. In bf16 the backend keeps the sums of its own operator in float32, while those of plain
    operators would be rounded to bf16.
    """
    return {"rewrite_conv_transpose": False, "split_instance_norm": inference_precision == "f32"}


def postprocessing_steps(config: CompileConfig) -> tuple[KeepLargestComponent, ...]:
    """The steps of the file that was given, none without one."""
    if config.postprocessing is None:
        return ()
    from trtbuild.volume.postprocessing import postprocessing_from_file

    return postprocessing_from_file(config.postprocessing)


def check_postprocessing(steps: tuple[KeepLargestComponent, ...], spec: ModelSpec, where: Path | None) -> None:
    """Said before the work, and by the file's name, what the bundle's own check would say after it."""
    known = {0, *spec.labels.values, *spec.labels.foreground}
    strange = sorted({label for step in steps for label in (*step.labels, step.background)} - known)
    if strange:
        raise ModelError(
            "The post-processing is that of another model.",
            expected=f"labels out of {sorted(known)}",
            got=strange,
            where=where,
            hint="take the file that nnUNetv2_determine_postprocessing wrote for this model",
        )


def _refuse_for_bundle(path: Path, config: CompileConfig) -> None:
    """A bundle is finished but for its engines: options that choose or change its model are an error."""
    given = {
        "--previous-stage": config.previous_stage,
        "--network": config.network,
        "-d": config.dataset,
        "-c": config.configuration,
        "-tr": config.trainer,
        "-p": config.plans,
        "-chk": None if config.checkpoint == CompileConfig.checkpoint else config.checkpoint,
        "--assume-plans-architecture": config.assume_plans_architecture or None,
        "--trust-checkpoint": config.trust_checkpoint or None,
    }
    for option, value in given.items():
        if value is not None:
            raise ModelError(
                f"{option} is for trained models, and this is a bundle.",
                got=value,
                where=path,
                hint="compile the trained model again",
            )


def _roots(stage: Stage) -> Stage:
    """The stage with the networks that were exported; those in a lower precision are made anew."""
    return replace(stage, networks=tuple(network for network in stage.networks if network.parent is None))


def _with_folds(stage: Stage, folds: tuple[str, ...] | None, where: Path) -> Stage:
    if folds is None:
        return stage
    kept = tuple(network for network in stage.networks if network.fold in folds)
    if set(folds) - {network.fold for network in kept}:
        raise ModelError(
            "The bundle lacks a fold.",
            expected=", ".join(folds),
            where=where,
            got=", ".join(network.fold for network in stage.networks),
        )
    return replace(stage, networks=kept)


def _reformed(bundle: Bundle, network: NetworkRecord, config: CompileConfig, report: Report) -> bytes | Path:
    """The network's file as it is, or written anew where the new engines want another form than the bundle's."""
    path = bundle.file(network.file)
    now = {record.inference_precision for record in bundle.manifest.engines if record.network == network.id}
    wanted = INFERENCE_PRECISION[config.precision]
    if now == {wanted}:
        return path
    from trtbuild.graph import clean, load_onnx

    report(f"rewriting {network.id} for {wanted}")
    content: Any = clean(load_onnx(path), **form(wanted)).model.SerializeToString()
    return bytes(content)
