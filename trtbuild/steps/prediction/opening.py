"""Opening a bundle's engines: which backend, which folds, which stages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.bundle import Bundle, Stage, open_bundle
from trtbuild.errors import EngineError, MissingExtra, ModelError
from trtbuild.runtime import Member
from trtbuild.runtime.warm import loops_loading
from trtbuild.spec import BuildRecord, NetworkRecord

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle with its engines open.

    `stages` are those that run, in their order: two for a cascade, whose first hands its labels to the second.
    `networks` and `records` belong to their runners, one by one. `refused` says why the backends before `backend` were
    not taken. `threads` are those of the engines' record, or the user's.
    """

    bundle: Bundle
    stages: tuple[Member, ...]
    networks: tuple[NetworkRecord, ...]
    records: tuple[BuildRecord, ...]
    backend: str
    refused: tuple[tuple[str, str], ...]
    threads: int


def open_model(
    path: Path,
    stack: ExitStack,
    *,
    backend: str,
    folds: tuple[str, ...] | None,
    threads: int | None,
    second_stage_only: bool,
) -> Model:
    """Opens the engines of a bundle; "auto" tries them in the bundle's order and keeps every reason.

    Args:
        path: the bundle.
        stack: closes the engines.
        backend: "auto", or a name that is used or fails.
        folds: of every stage; None takes all.
        threads: in place of those of the engine's record.
        second_stage_only: the labels of the first stage are given, so that it does not run.

    Raises:
        BundleError, EngineError, ModelError: with what is missing.
    """
    bundle = open_bundle(path)
    stages = _running_stages(bundle, second_stage_only)
    names = list(dict.fromkeys(record.backend for record in bundle.manifest.engines))
    if backend != "auto" and backend not in names:
        raise EngineError(
            "The bundle has no engine for this backend.",
            expected=", ".join(names),
            got=backend,
            where=path,
            hint=f"trtbuild compile {path} --backend {backend} -o OTHER.trtb",
        )
    chosen = [_chosen_folds(stage, folds, path) for stage in stages]
    refused: list[tuple[str, str]] = []
    for name in names if backend == "auto" else [backend]:
        try:
            with ExitStack() as attempt, loops_loading(stages[-1].spec):
                records = [_records(bundle, networks, name) for networks in chosen]
                members = tuple(
                    _member(bundle, stage, list(zip(networks, of_networks, strict=True)), threads, attempt)
                    for stage, networks, of_networks in zip(stages, chosen, records, strict=True)
                )
                stack.push(attempt.pop_all())
        except (EngineError, MissingExtra) as error:
            if backend != "auto":
                raise
            refused.append((name, str(error)))
            continue
        used = tuple(record for of_networks in records for record in of_networks)
        return Model(
            bundle=bundle,
            stages=members,
            networks=tuple(network for networks in chosen for network in networks),
            records=used,
            backend=name,
            refused=tuple(refused),
            threads=threads or int(used[0].options.get("threads", 1)),
        )
    raise EngineError(
        "No engine of the bundle runs on this machine.",
        got="\n".join(f"{n}: {r}" for n, r in refused),
        where=path,
        hint="trtbuild doctor shows what is installed",
    )


def _running_stages(bundle: Bundle, second_stage_only: bool) -> tuple[Stage, ...]:
    """The stages that run: all, or of a cascade only the last where the labels before it are given."""
    stages = bundle.manifest.stages
    previous = stages[0].spec.previous_stage
    if second_stage_only:
        return stages[-1:]
    if previous is not None:
        raise ModelError(
            "The bundle holds only the second stage of a cascade.",
            expected=f"labels of the configuration {previous}",
            where=bundle.path,
            hint="name their folder with -prev_stage_predictions, or compile both stages with "
            "`trtbuild compile MODEL --previous-stage MODEL_BEFORE -o BOTH.trtb`",
        )
    return stages


def _chosen_folds(stage: Stage, folds: tuple[str, ...] | None, path: Path) -> tuple[NetworkRecord, ...]:
    there = {network.fold: network for network in stage.networks}
    missing = [fold for fold in folds or () if fold not in there]
    if missing:
        raise ModelError(
            "The bundle lacks a fold.",
            expected=" ".join(folds or ()),
            got=" ".join(there),
            where=path,
            hint="compile it with -f " + " ".join(folds or ()),
        )
    return tuple(there[fold] for fold in folds) if folds else stage.networks


def _records(bundle: Bundle, networks: Sequence[NetworkRecord], backend: str) -> tuple[BuildRecord, ...]:
    records = {record.network: record for record in bundle.manifest.engines if record.backend == backend}
    for network in networks:
        if network.id not in records:
            raise EngineError(
                "A fold has no engine for this backend.", expected=backend, got=network.id, where=bundle.path
            )
    return tuple(records[network.id] for network in networks)


def _member(
    bundle: Bundle,
    stage: Stage,
    engines: Sequence[tuple[NetworkRecord, BuildRecord]],
    threads: int | None,
    stack: ExitStack,
) -> Member:
    from trtbuild.runtime.select import open_runner

    runners: list[Runner] = []
    for network, record in engines:
        file = bundle.file(record.file or network.file)
        runners.append(stack.enter_context(open_runner(record, file, threads=threads)))
    return Member(spec=stage.spec, runners=tuple(runners), mirror_axes=stage.mirror_axes)
