"""Opening a bundle for prediction: which engine, which folds, one case at a time."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from trtbuild.bundle import Bundle, Stage, open_bundle
from trtbuild.config import check_folds, check_threads
from trtbuild.errors import EngineError, MissingExtra, ModelError
from trtbuild.runtime import Prediction, Progress, Settings, prediction_from_array
from trtbuild.runtime.predictor import tell
from trtbuild.runtime.warm import loops_loading
from trtbuild.spec import BuildRecord, NetworkRecord

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner, RunnerInfo


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """An opened bundle. Use it in a `with` block, or call `close`.

    `backend` is what was chosen; `refused` says why the engines before it were not taken.
    """

    bundle: Bundle
    stage: Stage
    runners: tuple[Runner, ...]
    backend: str
    refused: tuple[tuple[str, str], ...]
    threads: int
    _resources: ExitStack

    def predict(
        self,
        files: str | PathLike[str] | Sequence[str | PathLike[str]],
        *,
        step_size: float | None = None,
        mirroring: bool = True,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segments one case.

        Args:
            files: the file, or the files of all channels in order (`case_0000…`, `case_0001…`).
            step_size: distance between windows as a share of the patch; None takes the model's (0.5).
            mirroring: average over the mirror axes that the model was trained with.
            probabilities: also return softmax (or sigmoid) of every class.
            progress: called with (stage, done, total); returning False stops with `Cancelled`.
        """
        from trtbuild.volume.io import reader_named

        paths = [Path(files)] if isinstance(files, (str, PathLike)) else [Path(f) for f in files]
        started = time.perf_counter()
        tell(progress, "read", 0, 1)
        image = reader_named(self.stage.spec.reader).read_image(paths, self.stage.spec.channels)
        tell(progress, "read", 1, 1)
        seconds = time.perf_counter() - started
        prediction = self.predict_array(
            image.data,
            image.spacing,
            step_size=step_size,
            mirroring=mirroring,
            probabilities=probabilities,
            progress=progress,
        )
        return replace(
            prediction,
            image=image,
            seconds={"read": seconds, **prediction.seconds},
            warnings=(*image.warnings, *prediction.warnings),
        )

    def predict_array(
        self,
        array: NDArray[Any],
        spacing: Sequence[float],
        *,
        step_size: float | None = None,
        mirroring: bool = True,
        probabilities: bool = False,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segments an array (C, Z, Y, X) with its spacing (z, y, x) in mm, as nnU-Net's reader would return it."""
        from threadpoolctl import threadpool_limits

        settings = Settings(
            step_size=self.stage.spec.step_size if step_size is None else step_size,
            mirroring=mirroring,
            probabilities=probabilities,
            threads=self.threads,
        )
        # resampling is a few small matrix products: BLAS threads would mostly wait for each other
        with threadpool_limits(1, user_api="blas"):
            return prediction_from_array(
                array,
                spacing,
                self.stage.spec,
                self.runners,
                self.stage.mirror_axes,
                settings,
                progress,
            )

    def describe(self) -> RunnerInfo:
        """What runs: backend, version, precision read back, batch, device."""
        return self.runners[0].describe()

    def close(self) -> None:
        """Frees the engines; a second call does nothing."""
        self._resources.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_predictor(path: Path, *, backend: str, folds: tuple[str, ...] | None, threads: int | None) -> Predictor:
    """Opens the engines of a bundle; "auto" tries them in the bundle's order and keeps every reason.

    `threads` None takes those of the engine's record, `folds` None all of the bundle; TrtbuildError or ModelError where
    they cannot be.
    """
    check_threads(threads)
    check_folds(folds)
    bundle = open_bundle(path)
    if len(bundle.manifest.stages) != 1:
        raise ModelError("This version cannot run a cascade.", where=path)
    stage = bundle.manifest.stages[0]
    networks = _chosen_folds(stage, folds, path)
    names = list(dict.fromkeys(record.backend for record in bundle.manifest.engines))
    if backend != "auto" and backend not in names:
        raise EngineError(
            "The bundle has no engine for this backend.",
            expected=", ".join(names),
            got=backend,
            where=path,
            hint=f"trtbuild compile {path} --backend {backend} -o OTHER.trtb",
        )
    refused: list[tuple[str, str]] = []
    for name in names if backend == "auto" else [backend]:
        try:
            with loops_loading(stage.spec):
                runners, resources = _open_runners(bundle, networks, name, threads)
        except (EngineError, MissingExtra) as error:
            if backend != "auto":
                raise
            refused.append((name, str(error)))
            continue
        used = threads or int(next(r for r in bundle.manifest.engines if r.backend == name).options.get("threads", 1))
        return Predictor(
            bundle=bundle,
            stage=stage,
            runners=runners,
            backend=name,
            refused=tuple(refused),
            threads=used,
            _resources=resources,
        )
    raise EngineError(
        "No engine of the bundle runs on this machine.",
        got="\n".join(f"{n}: {r}" for n, r in refused),
        where=path,
        hint="trtbuild doctor shows what is installed",
    )


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


def _open_runners(
    bundle: Bundle, networks: Sequence[NetworkRecord], backend: str, threads: int | None
) -> tuple[tuple[Runner, ...], ExitStack]:
    from trtbuild.runtime.select import open_runner

    records: dict[str, BuildRecord] = {r.network: r for r in bundle.manifest.engines if r.backend == backend}
    with ExitStack() as stack:
        runners = []
        for network in networks:
            if network.id not in records:
                raise EngineError(
                    "A fold has no engine for this backend.", expected=backend, got=network.id, where=bundle.path
                )
            record = records[network.id]
            runners.append(
                stack.enter_context(open_runner(record, bundle.file(record.file or network.file), threads=threads))
            )
        return tuple(runners), stack.pop_all()
