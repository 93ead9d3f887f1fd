"""Opening a bundle's engines: which backend, which folds, which stages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.bundle import Bundle, Stage, open_bundle
from trtbuild.errors import EngineError, MissingExtra, ModelError, OutOfMemory
from trtbuild.machine import usable_cores
from trtbuild.runtime import Member
from trtbuild.runtime.warm import loops_loading
from trtbuild.spec import BuildRecord, NetworkRecord

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner

Engine = tuple[NetworkRecord, BuildRecord]
"""A network of the bundle, and how it was built."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle with its engines open.

    `stages` are those that run, in their order: two for a cascade, whose first hands its labels to the second.
    `networks` and `records` belong to their runners, one by one. `refused` says why the backends before `backend` were
    not taken. `threads` are the user's, or those of the engines' record; where it names none (a GPU), one per core.
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
    chosen = [_checked_folds(stage, folds, path) for stage in stages]
    refused: list[tuple[str, str]] = []
    for name in names if backend == "auto" else [backend]:
        try:
            with ExitStack() as attempt, loops_loading(stages[-1].spec):
                engines = [_engines(bundle, stage, names, name) for stage, names in zip(stages, chosen, strict=True)]
                members = tuple(
                    _member(bundle, stage, of_stage, threads, attempt)
                    for stage, of_stage in zip(stages, engines, strict=True)
                )
                stack.push(attempt.pop_all())
        except (EngineError, MissingExtra) as error:
            # what has no room would have it at another time: then another backend would have answered, in silence
            if backend != "auto" or isinstance(error, OutOfMemory):
                raise
            refused.append((name, str(error)))
            continue
        used = tuple(record for of_stage in engines for _, record in of_stage)
        return Model(
            bundle=bundle,
            stages=members,
            networks=tuple(network for of_stage in engines for network, _ in of_stage),
            records=used,
            backend=name,
            refused=tuple(refused),
            threads=threads or int(used[0].options.get("threads", usable_cores())),
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


def _checked_folds(stage: Stage, folds: tuple[str, ...] | None, path: Path) -> tuple[str, ...]:
    there = tuple(dict.fromkeys(network.fold for network in stage.networks))
    missing = [fold for fold in folds or () if fold not in there]
    if missing:
        raise ModelError(
            "The bundle lacks a fold.",
            expected=" ".join(folds or ()),
            got=" ".join(there),
            where=path,
            hint="compile it with -f " + " ".join(folds or ()),
        )
    return folds or there


def _engines(bundle: Bundle, stage: Stage, folds: Sequence[str], backend: str) -> tuple[Engine, ...]:
    """The engine of each fold for this backend; the network may be there in other precisions without one."""
    records = {record.network: record for record in bundle.manifest.engines if record.backend == backend}
    chosen = []
    for fold in folds:
        networks = [network for network in stage.networks if network.fold == fold]
        built = [(network, records[network.id]) for network in networks if network.id in records]
        if len(built) != 1:
            raise EngineError(
                "A fold needs one engine for this backend.",
                expected=backend,
                got=", ".join(network.id for network, _ in built) or f"none of {', '.join(n.id for n in networks)}",
                where=bundle.path,
            )
        chosen.append(built[0])
    return tuple(chosen)


def _member(
    bundle: Bundle,
    stage: Stage,
    engines: Sequence[Engine],
    threads: int | None,
    stack: ExitStack,
) -> Member:
    from trtbuild.runtime.select import open_runner

    runners: list[Runner] = []
    for network, record in engines:
        file = bundle.file(record.file or network.file)
        runners.append(stack.enter_context(open_runner(record, file, threads=threads)))
    return Member(spec=stage.spec, runners=tuple(runners), mirror_axes=stage.mirror_axes)
