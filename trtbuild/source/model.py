"""The whole of this room in one step: a trained-model folder -> spec, facts and exported networks."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import ModelError
from trtbuild.source.architecture import Architecture, architecture_from_plans
from trtbuild.source.checkpoint import Checkpoint, load_checkpoint
from trtbuild.source.export import ExportedNetwork, exported_network
from trtbuild.source.fields import field_from_json
from trtbuild.source.folder import ModelFolder, find_model
from trtbuild.source.network import load_weights, network_from_architecture
from trtbuild.source.plans import spec_from_plans
from trtbuild.source.trainers import architecture_of_trainer, is_known
from trtbuild.spec import ModelSpec

Progress = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """What to export. `folds` are numbers or "all"; None takes what nnU-Net would take (`folder.find_model`)."""

    folder: Path
    folds: tuple[str, ...] | None = None
    checkpoint: str = "checkpoint_final.pth"
    trust_checkpoint: bool = False
    assume_plans_architecture: bool = False

    def __post_init__(self) -> None:
        folds = self.folds if self.folds is not None else ("all",)
        if not folds or len(set(folds)) != len(folds) or not all(re.fullmatch(r"0|[1-9][0-9]*|all", f) for f in folds):
            raise ModelError("The folds cannot be read.", expected='numbers or "all", each once', got=folds, where="-f")
        if not self.checkpoint or Path(self.checkpoint).name != self.checkpoint:
            raise ModelError("The checkpoint is the name of a file in every fold's folder.", where="-chk",
                             expected="a file name such as checkpoint_best.pth", got=self.checkpoint)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ExportedNetworks:
    """The networks of a model in the order of its folds, exported while one iterates: `for network in networks`.

    Only one fold is in memory at a time, which is why this is no tuple. Every loop exports anew, from the files as they
    are then. Iterating raises what `export.exported_network` and `network.load_weights` raise.
    """

    checkpoints: Mapping[str, Checkpoint]
    architecture: Architecture
    spec: ModelSpec
    trust: bool
    progress: Progress | None

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[ExportedNetwork]:
        for fold, checkpoint in self.checkpoints.items():
            _say(self.progress, f"fold {fold}: exporting to ONNX and comparing with torch")
            network = network_from_architecture(self.architecture, self.spec, trust=self.trust)
            load_weights(network, checkpoint.weights, self.spec, f"fold_{fold}/{checkpoint.path.name}")
            yield exported_network(network, self.spec, fold)


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """A trained model, read.

    `plans` and `dataset` are the two files as they are; `sources` maps every file that was read, relative to the
    folder, to its SHA-256; `notes` say what was chosen or assumed for the user.
    """

    spec: ModelSpec
    mirror_axes: tuple[int, ...]
    networks: ExportedNetworks
    plans: bytes
    dataset: bytes
    sources: Mapping[str, str]
    notes: tuple[str, ...]


def export_model(config: SourceConfig, progress: Progress | None = None) -> ExportedModel:
    """Reads a trained nnU-Net v2 folder; its networks are exported when `networks` is iterated.

    `progress` gets one line per step. Everything about the files is checked here; what can still fail while iterating
    is that weights do not fit the network, or that the export differs from torch.

    Raises:
        ModelError: no model folder, or something in it that cannot be reproduced.
        Untrusted: it would have to run code that it brings along.
        MissingExtra: a package of the [export] extra is not installed.
    """
    folder = find_model(config.folder, config.folds, config.checkpoint)
    plans = field_from_json(folder.plans, "plans.json").entries()
    dataset = field_from_json(folder.dataset, "dataset.json").entries()
    checkpoints = {}
    for fold, path in folder.checkpoints.items():
        _say(progress, f"fold {fold}: reading {path.name}")
        checkpoints[fold] = load_checkpoint(path, trust=config.trust_checkpoint)
    first = _agreed(checkpoints)
    spec = spec_from_plans(plans, dataset, configuration=first.configuration, trainer=first.trainer)
    if any(axis >= spec.dimensions for axis in first.mirror_axes):
        raise ModelError("A mirror axis does not exist.", expected=f"below {spec.dimensions}", got=first.mirror_axes,
                         where=f"{first.path}.inference_allowed_mirroring_axes")  # fmt: skip
    architecture = architecture_of_trainer(architecture_from_plans(plans, spec.configuration), spec.trainer,
                                           assume_plans=config.assume_plans_architecture)  # fmt: skip
    return ExportedModel(
        spec=spec,
        mirror_axes=first.mirror_axes,
        networks=ExportedNetworks(checkpoints=checkpoints, architecture=architecture, spec=spec,
                                  trust=config.trust_checkpoint, progress=progress),
        plans=folder.plans,
        dataset=folder.dataset,
        sources=_sources(folder, checkpoints),
        notes=(*folder.notes, *_notes(spec, checkpoints)),
    )  # fmt: skip


def _agreed(checkpoints: Mapping[str, Checkpoint]) -> Checkpoint:
    """The first checkpoint, whose facts must be those of all: nnU-Net takes them from the first without a look."""
    (first_fold, first), *others = checkpoints.items()
    for fold, other in others:
        for fact in ("configuration", "trainer", "mirror_axes"):
            if getattr(other, fact) != getattr(first, fact):
                raise ModelError(f"The folds {first_fold} and {fold} differ in {fact}.", expected=getattr(first, fact),
                                 got=getattr(other, fact), where=other.path,
                                 hint="choose folds of one training with -f")  # fmt: skip
    return first


def _sources(folder: ModelFolder, checkpoints: Mapping[str, Checkpoint]) -> dict[str, str]:
    files = {"plans.json": folder.plans, "dataset.json": folder.dataset}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return digests | {f"fold_{fold}/{c.path.name}": c.sha256 for fold, c in checkpoints.items()}


def _notes(spec: ModelSpec, checkpoints: Mapping[str, Checkpoint]) -> Iterator[str]:
    if not is_known(spec.trainer):
        yield f"{spec.trainer} is unknown: it was assumed to build the network of the plans"
    for fold, checkpoint in checkpoints.items():
        if checkpoint.fold not in (None, fold):
            yield f"fold_{fold} holds a checkpoint of fold {checkpoint.fold}"


def _say(progress: Progress | None, line: str) -> None:
    if progress is not None:
        progress(line)
