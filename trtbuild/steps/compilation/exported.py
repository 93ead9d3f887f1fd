"""A trained model, or the two of a cascade, becomes networks: exported, cleaned, named."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import trtbuild
from trtbuild.bundle import SHARED_BY_STAGES, Provenance, Stage
from trtbuild.config import CompileConfig
from trtbuild.errors import ModelError
from trtbuild.spec import ModelSpec, NetworkRecord
from trtbuild.steps.compilation.networks import (
    INFERENCE_PRECISION,
    Networks,
    Report,
    check_postprocessing,
    form,
    postprocessing_steps,
)

if TYPE_CHECKING:
    from trtbuild.source import ExportedModel, SourceConfig


def networks_from_model(config: CompileConfig, report: Report) -> Networks:
    """Exports a trained model, after its previous stage where one is given, and cleans the networks."""
    steps = postprocessing_steps(config)
    model = _exported(_source(config), report)
    check_postprocessing(steps, model.spec, config.postprocessing)
    models = (model,) if config.previous_stage is None else (_previous(model, config, report), model)
    if len(models) == 1 and model.spec.previous_stage is not None:
        report(
            f"{model.spec.configuration} is a second stage: this bundle needs the segmentations of "
            f"{model.spec.previous_stage} beside the images (compile with --previous-stage for a bundle of both)"
        )
    files: dict[str, bytes | Path] = {"plans.json": model.plans, "dataset.json": model.dataset}
    stages, goldens = [], {}
    for number, exported in enumerate(models):
        prefix = f"stage_{number}_" if len(models) > 1 else ""
        records = []
        for network in exported.networks:
            report(f"cleaning {prefix}fold_{network.fold}")
            record, content = _cleaned(prefix, network.fold, network.model, config)
            files[record.file], goldens[record.id] = content, (network.golden_input, network.golden_logits)
            records.append(record)
        stages.append(Stage(spec=exported.spec, mirror_axes=exported.mirror_axes, networks=tuple(records)))
    return Networks(
        stages=tuple(stages),
        files=files,
        goldens=goldens,
        case=None,
        postprocessing=steps,
        provenance=_provenance(config, models),
    )


def _source(config: CompileConfig) -> SourceConfig:
    from trtbuild.source import ModelName, SourceConfig

    return SourceConfig(
        folder=config.model,
        name=ModelName(
            dataset=config.dataset, configuration=config.configuration, trainer=config.trainer, plans=config.plans
        ),
        folds=config.folds,
        checkpoint=config.checkpoint,
        network=config.network,
        trust_checkpoint=config.trust_checkpoint,
        assume_plans_architecture=config.assume_plans_architecture,
    )


def _exported(source: SourceConfig, report: Report) -> ExportedModel:
    from trtbuild.source import export_model

    exported = export_model(source, report)
    for note in exported.notes:
        report(note)
    return exported


def _previous(model: ExportedModel, config: CompileConfig, report: Report) -> ExportedModel:
    """The first stage, in a zip the one that the second one's plans name; checked to belong to the second."""
    from trtbuild.source import ModelName, is_zip

    wanted, path = model.spec.previous_stage, config.previous_stage
    if path is None or wanted is None:
        raise ModelError(
            "The model is no second stage of a cascade.",
            expected="a configuration with a previous_stage in plans.json",
            got=model.spec.configuration,
            where=model.where,
            hint="leave --previous-stage out",
        )
    name = ModelName(
        dataset=model.spec.dataset, configuration=wanted, trainer=model.spec.trainer, plans=model.spec.plans
    )
    source = replace(_source(config), folder=path, name=name if is_zip(path) else ModelName())
    previous = _exported(source, report)
    check_cascade(previous.spec, model.spec, path)
    return previous


def check_cascade(first: ModelSpec, second: ModelSpec, where: Path) -> None:
    """Whether the two are the stages of one cascade, else ModelError naming what differs."""
    if first.configuration != second.previous_stage:
        raise ModelError(
            "This is not the previous stage that the model was trained after.",
            expected=second.previous_stage,
            got=first.configuration,
            where=where,
            hint="give the folder of that configuration to --previous-stage",
        )
    for fact in SHARED_BY_STAGES:
        if getattr(first, fact) != getattr(second, fact):
            raise ModelError(
                f"The two stages of the cascade differ in {fact.replace('_', ' ')}.",
                expected=getattr(second, fact),
                got=getattr(first, fact),
                where=where,
                hint="give the first stage of the same dataset to --previous-stage",
            )


def _cleaned(prefix: str, fold: str, exported: bytes, config: CompileConfig) -> tuple[NetworkRecord, bytes]:
    """The network in the form that its engines want; in a cascade the stage's number is part of its names."""
    from trtbuild.graph import clean, io_from_model, model_from_bytes, opset_from_model

    model = clean(model_from_bytes(exported), **form(INFERENCE_PRECISION[config.precision])).model
    name = f"{prefix}fold_{fold}_fp32"
    record = NetworkRecord(
        id=name,
        fold=fold,
        file=f"networks/{name}.onnx",
        precision="fp32",
        zero_point="none",
        opset=opset_from_model(model),
        io=io_from_model(model),
        parent=None,
    )
    content: bytes = model.SerializeToString()
    return record, content


def _provenance(config: CompileConfig, models: tuple[ExportedModel, ...]) -> Provenance:
    from trtbuild.steps.doctor import package_versions

    model, sources = models[-1], dict(models[-1].sources)
    if len(models) > 1:
        sources |= {f"previous_stage/{name}": digest for name, digest in models[0].sources.items()}
    name = model.where if config.model is None else config.model
    return Provenance(
        trtbuild=trtbuild.__version__,
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        model=name.resolve().name,
        plans=model.spec.plans,
        trainer=model.spec.trainer,
        checkpoint=config.checkpoint,
        sources=sources,
        notes=tuple(dict.fromkeys(note for exported in models for note in exported.notes)),
        versions={name: version for name, version in package_versions().items() if version is not None},
    )
