"""Opening a bundle's engines: which backend, which folds, which stages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trtbuild.bundle import Bundle, Stage, open_bundle
from trtbuild.errors import EngineError, MissingExtra, ModelError, OutOfMemory
from trtbuild.machine import usable_cores
from trtbuild.runtime import Member
from trtbuild.runtime.on_device import OnDevice
from trtbuild.runtime.select import DEVICE_BACKENDS, open_runner
from trtbuild.runtime.warm import loops_loading
from trtbuild.spec import BuildRecord, NetworkRecord

if TYPE_CHECKING:
    from trtbuild.runtime.gpu.shared import Enqueues, Gpu
    from trtbuild.runtime.runner import Runner

Engine = tuple[NetworkRecord, BuildRecord]
"""A network of the bundle, and how it was built."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A bundle with its engines open.

    `stages` are those that run, in their order: two for a cascade, whose first hands its labels to the second.
    `networks` and `records` belong to their runners, one by one. `refused` says why the backends before `backend` were
    not taken. `threads` are the user's, or those of the engines' record; where it names none (a GPU), one per core.
    `gpu` is where the engines are, if they are on one.
    """

    bundle: Bundle
    stages: tuple[Member, ...]
    networks: tuple[NetworkRecord, ...]
    records: tuple[BuildRecord, ...]
    backend: str
    refused: tuple[tuple[str, str], ...]
    threads: int
    gpu: Gpu | None = None


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """How the user wants engines to be opened.

    `backend` is "auto", or a name that is used or fails; `folds` of every stage, None takes all; `threads` in place of
    those of the engines' records; with `second_stage_only` the labels of a cascade's first stage are given, so that it
    does not run. `device` is the number of the GPU for engines that need one; any but 0 was named by the user, so that
    no engine runs elsewhere. `device_memory` are the bytes of its memory that a case may take, None what is free.
    """

    backend: str = "auto"
    folds: tuple[str, ...] | None = None
    threads: int | None = None
    second_stage_only: bool = False
    device: int = 0
    device_memory: int | None = None


def open_model(path: Path, stack: ExitStack, wishes: Wishes, gpu: Gpu | None = None) -> Model:
    """Opens the engines of a bundle; "auto" tries them in the bundle's order and keeps every reason.

    Args:
        path: the bundle.
        stack: closes the engines, and then the GPU.
        wishes: the user's.
        gpu: where engines that need one run, if it is open already.

    Raises:
        BundleError, EngineError, ModelError: with what is missing.
    """
    bundle = open_bundle(path)
    stages = _running_stages(bundle, wishes.second_stage_only)
    names = list(dict.fromkeys(record.backend for record in bundle.manifest.engines))
    if wishes.backend != "auto" and wishes.backend not in names:
        raise EngineError(
            "The bundle has no engine for this backend.",
            expected=", ".join(names),
            got=wishes.backend,
            where=path,
            hint=f"trtbuild compile {path} --backend {wishes.backend} -o OTHER.trtb",
        )
    chosen = [_checked_folds(stage, wishes.folds, path) for stage in stages]
    refused: list[tuple[str, str]] = []
    for name in names if wishes.backend == "auto" else [wishes.backend]:
        if wishes.device > 0 and name not in DEVICE_BACKENDS:
            refused.append((name, "It runs on the CPU."))
            continue
        try:
            with ExitStack() as attempt, loops_loading(stages[-1].spec):
                engines = [_engines(bundle, stage, names, name) for stage, names in zip(stages, chosen, strict=True)]
                place = (gpu or _opened_gpu(wishes.device, attempt)) if name in DEVICE_BACKENDS else None
                members = tuple(
                    _member(bundle, stage, of_stage, wishes, place, attempt)
                    for stage, of_stage in zip(stages, engines, strict=True)
                )
                stack.push(attempt.pop_all())
        except (EngineError, MissingExtra) as error:
            # what has no room would have it at another time: then another backend would have answered, in silence
            if wishes.backend != "auto" or isinstance(error, OutOfMemory):
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
            threads=wishes.threads or int(used[0].options.get("threads", usable_cores())),
            gpu=place,
        )
    raise EngineError(
        f"No engine of the bundle runs on {f'GPU {wishes.device}' if wishes.device > 0 else 'this machine'}.",
        got="\n".join(f"{n}: {r}" for n, r in refused),
        where=path,
        hint="trtbuild doctor shows what is installed, and the GPUs with their numbers",
    )


def _opened_gpu(index: int, stack: ExitStack) -> Gpu:
    """A GPU with the kernels for it.

    Raises:
        EngineError, MissingExtra, OutOfMemory: see `opened_device`, `kernels_cubin` and `opened_gpu`.
    """
    from trtbuild.runtime.device import opened_device
    from trtbuild.runtime.gpu.shared import opened_gpu
    from trtbuild.runtime.nvrtc import kernels_cubin

    device = stack.enter_context(opened_device(index))
    return stack.enter_context(opened_gpu(device, kernels_cubin(device.capability)))


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
    wishes: Wishes,
    gpu: Gpu | None,
    stack: ExitStack,
) -> Member:
    runners: list[Runner] = []
    for network, record in engines:
        file = bundle.file(record.file or network.file)
        runners.append(stack.enter_context(open_runner(record, file, threads=wishes.threads, gpu=gpu)))
    place = None if gpu is None else _place(runners, [record for _, record in engines], gpu, wishes.device_memory)
    return Member(spec=stage.spec, runners=tuple(runners), mirror_axes=stage.mirror_axes, device=place)


def _place(runners: Sequence[Runner], records: Sequence[BuildRecord], gpu: Gpu, limit: int | None) -> OnDevice:
    from trtbuild.runtime.gpu.shared import engine_from_runner

    pairs = zip(runners, records, strict=True)
    engines = tuple(engine_from_runner(cast("Enqueues", runner), record) for runner, record in pairs)
    return OnDevice(gpu=gpu, engines=engines, limit=limit)
