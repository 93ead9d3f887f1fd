"""The whole of this room in one step: a trained-model folder -> spec, facts and exported networks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.errors import ModelError
from trtbuild.source.architecture import architecture_from_plans
from trtbuild.source.checkpoint import Checkpoint, load_checkpoint
from trtbuild.source.export import ExportedNetwork, exported_network
from trtbuild.source.factory import factory_from_word, network_from_factory
from trtbuild.source.fields import field_from_json
from trtbuild.source.files import FolderFiles, ModelFiles
from trtbuild.source.folder import ModelFolder, model_from_files
from trtbuild.source.names import ModelName, folder_from_results
from trtbuild.source.network import load_weights, network_from_architecture
from trtbuild.source.plans import spec_from_plans
from trtbuild.source.trainers import architecture_of_trainer, is_known
from trtbuild.source.zipped import files_from_zip, is_zip
from trtbuild.spec import ModelSpec

if TYPE_CHECKING:
    import torch

Progress = Callable[[str], None]
ANY = ModelName()


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What to export.

    `folder` is a trained-model folder or a zip; None looks `name` up below `nnUNet_results`. `name` also chooses among
    the models of a zip. `folds` are numbers or "all"; None takes what nnU-Net would take (`folder.model_from_files`).
    `network` is a factory for the network (`factory.py`).
    """

    folder: Path | None = None
    name: ModelName = ANY
    folds: tuple[str, ...] | None = None
    checkpoint: str = "checkpoint_final.pth"
    network: str | None = None
    trust_checkpoint: bool = False
    assume_plans_architecture: bool = False

    def __post_init__(self) -> None:
        folds = self.folds if self.folds is not None else ("all",)
        if not folds or len(set(folds)) != len(folds) or not all(re.fullmatch(r"0|[1-9][0-9]*|all", f) for f in folds):
            raise ModelError("The folds cannot be read.", expected='numbers or "all", each once', got=folds, where="-f")
        if not self.checkpoint or Path(self.checkpoint).name != self.checkpoint:
            raise ModelError("The checkpoint is the name of a file in every fold's folder.", where="-chk",
                             expected="a file name such as checkpoint_best.pth", got=self.checkpoint)  # fmt: skip
        if self.folder is None and (self.name.dataset is None or self.name.configuration is None):
            raise ModelError("No model is named.", expected="a model folder or zip, or -d DATASET -c CONFIGURATION",
                             got=str(self.name) or "neither")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportedNetworks:
    """The networks of a model in the order of its folds, exported while one iterates: `for network in networks`.

    Only one fold is in memory at a time, which is why this is no tuple. Every loop exports anew, from the files as they
    are then. Iterating raises what `export.exported_network` and `network.load_weights` raise.
    """

    checkpoints: Mapping[str, Checkpoint]
    build: Callable[[], torch.nn.Module]
    spec: ModelSpec
    trust: bool
    progress: Progress | None

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[ExportedNetwork]:
        for fold, checkpoint in self.checkpoints.items():
            _say(self.progress, f"fold {fold}: exporting to ONNX and comparing with torch")
            network = self.build()
            load_weights(network, self._weights(checkpoint), self.spec, f"fold_{fold}/{checkpoint.file.name}")
            yield exported_network(network, self.spec, fold)

    def _weights(self, checkpoint: Checkpoint) -> Mapping[str, torch.Tensor]:
        """Mapped weights as they are; others, which were let go of, are read once more."""
        if checkpoint.weights:
            return checkpoint.weights
        again = load_checkpoint(checkpoint.file, trust=self.trust)
        if again.sha256 != checkpoint.sha256:
            raise ModelError("The checkpoint was changed while it was read.", expected=checkpoint.sha256,
                             got=again.sha256, where=checkpoint.file.where)  # fmt: skip
        return again.weights


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A trained model, read.

    `where` is the folder, or its place in a zip. `plans` and `dataset` are the two files as they are; `sources` maps
    every file that was read, relative to the folder, to its SHA-256; `notes` say what was chosen or assumed for the
    user.
    """

    where: Path
    spec: ModelSpec
    mirror_axes: tuple[int, ...]
    networks: ExportedNetworks
    plans: bytes
    dataset: bytes
    sources: Mapping[str, str]
    notes: tuple[str, ...]


def export_model(config: SourceConfig, progress: Progress | None = None) -> ExportedModel:
    """Reads a trained nnU-Net v2 model; its networks are exported when `networks` is iterated.

    `progress` gets one line per step. Everything about the files is checked here; what can still fail while iterating
    is that weights do not fit the network, or that the export differs from torch.

    Raises:
        ModelError: no model, or something in it that cannot be reproduced.
        Untrusted: it would have to run code that it brings along.
        MissingExtra: a package of the [export] extra is not installed.
    """
    files = _files(config)
    folder = model_from_files(files, config.folds, config.checkpoint)
    plans = field_from_json(folder.plans, "plans.json").entries()
    dataset = field_from_json(folder.dataset, "dataset.json").entries()
    checkpoints = {}
    for fold, file in folder.checkpoints.items():
        _say(progress, f"fold {fold}: reading {file.name}")
        checkpoint = load_checkpoint(file, trust=config.trust_checkpoint)
        checkpoints[fold] = checkpoint if file.path is not None else replace(checkpoint, weights={})
    first = _agreed(checkpoints)
    spec = spec_from_plans(plans, dataset, configuration=first.configuration, trainer=first.trainer)
    _check_facts(config, first, spec)
    return ExportedModel(
        where=files.where,
        spec=spec,
        mirror_axes=first.mirror_axes,
        networks=ExportedNetworks(checkpoints=checkpoints, build=_builder(config, plans, dataset, spec), spec=spec,
                                  trust=config.trust_checkpoint, progress=progress),
        plans=folder.plans,
        dataset=folder.dataset,
        sources=_sources(folder, checkpoints),
        notes=(*folder.notes, *_notes(config, spec, checkpoints)),
    )  # fmt: skip


def _files(config: SourceConfig) -> ModelFiles:
    if config.folder is None:
        return FolderFiles(folder_from_results(config.name))
    if is_zip(config.folder):
        return files_from_zip(config.folder, config.name)
    if config.name.said and config.folder.is_dir():
        raise ModelError("A model folder is one model: there is nothing to choose.", got=str(config.name),
                         where=config.folder, hint="leave -d, -c, -tr and -p out, or the folder")  # fmt: skip
    return FolderFiles(config.folder)


def _check_facts(config: SourceConfig, first: Checkpoint, spec: ModelSpec) -> None:
    """Mirror axes that exist, and the configuration that was asked for: folders can be renamed."""
    if any(axis >= spec.dimensions for axis in first.mirror_axes):
        raise ModelError("A mirror axis does not exist.", expected=f"below {spec.dimensions}", got=first.mirror_axes,
                         where=f"{first.file.where}.inference_allowed_mirroring_axes")  # fmt: skip
    if config.name.configuration not in (None, spec.configuration):
        raise ModelError("The checkpoint is of another configuration than its folder's name says.",
                         expected=config.name.configuration, got=spec.configuration,
                         where=first.file.where)  # fmt: skip


def _builder(
    config: SourceConfig, plans: Mapping[str, Any], dataset: Mapping[str, Any], spec: ModelSpec
) -> Callable[[], torch.nn.Module]:
    """How a network is made: by the user's factory, else by the plans as the trainer reads them."""
    if config.network is not None:
        factory = factory_from_word(config.network)
        return lambda: network_from_factory(factory, plans, dataset, spec)
    architecture = architecture_of_trainer(architecture_from_plans(plans, spec.configuration), spec.trainer,
                                           assume_plans=config.assume_plans_architecture)  # fmt: skip
    return lambda: network_from_architecture(architecture, spec, trust=config.trust_checkpoint)


def _agreed(checkpoints: Mapping[str, Checkpoint]) -> Checkpoint:
    """The first checkpoint, whose facts must be those of all: nnU-Net takes them from the first without a look."""
    (first_fold, first), *others = checkpoints.items()
    for fold, other in others:
        for fact in ("configuration", "trainer", "mirror_axes"):
            if getattr(other, fact) != getattr(first, fact):
                raise ModelError(f"The folds {first_fold} and {fold} differ in {fact}.", expected=getattr(first, fact),
                                 got=getattr(other, fact), where=other.file.where,
                                 hint="choose folds of one training with -f")  # fmt: skip
    return first


def _sources(folder: ModelFolder, checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    files = {"plans.json": folder.plans, "dataset.json": folder.dataset}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return digests | {f"fold_{fold}/{c.file.name}": c.sha256 for fold, c in checkpoints.items()}


def _notes(config: SourceConfig, spec: ModelSpec, checkpoints: Mapping[str, Checkpoint]) -> Iterator[str]:
    if config.network is not None:
        yield f"the network is the one that {config.network} builds, in place of the plans' and {spec.trainer}'s"
    elif not is_known(spec.trainer):
        yield f"{spec.trainer} is unknown: it was assumed to build the network of the plans"
    for fold, checkpoint in checkpoints.items():
        if checkpoint.fold not in (None, fold):
            yield f"fold_{fold} holds a checkpoint of fold {checkpoint.fold}"


def _say(progress: Progress | None, line: str) -> None:
    if progress is not None:
        progress(line)
