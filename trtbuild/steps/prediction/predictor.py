"""Opened bundles, ready for one case after the other: what `trtbuild.open` returns."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from trtbuild.config import Vote, check_devices, check_ensemble, check_folds, check_step_size, check_threads
from trtbuild.errors import EngineError, InputError, ModelError, TrtbuildError
from trtbuild.runtime import Prediction, Progress, Recipe, Settings, prediction_from_models
from trtbuild.runtime.on_device import prepared_for_member
from trtbuild.runtime.predictor import EMPTY, tell
from trtbuild.spec import KeepLargestComponent, ModelSpec
from trtbuild.steps.compilation.networks import check_postprocessing
from trtbuild.steps.prediction.on_gpu import member_for_image_on_gpu
from trtbuild.steps.prediction.opening import Model, Wishes, open_model

if TYPE_CHECKING:
    from trtbuild.runtime.device import Buffer
    from trtbuild.runtime.gpu.entry import DevicePrediction
    from trtbuild.runtime.gpu.prepare import DevicePrepared
    from trtbuild.runtime.runner import RunnerInfo
    from trtbuild.volume import Prepared

Files = str | PathLike[str] | Sequence[str | PathLike[str]]


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """Opened bundles: one, or the members of an ensemble. Use it in a `with` block, or call `close`."""

    models: tuple[Model, ...]
    recipe: Recipe
    given_previous: bool
    threads: int
    _resources: ExitStack
    _closed: Event

    @property
    def spec(self) -> ModelSpec:
        """The model whose labels, reader and file ending hold for the output."""
        return self.models[0].stages[-1].spec

    @property
    def identity(self) -> str:
        """Of the bundles, in their order."""
        return "+".join(model.bundle.identity for model in self.models)

    @property
    def on_device(self) -> bool:
        """Whether every stage of every model runs on the GPU, so that no case needs the CPU's way."""
        return all(stage.device is not None for model in self.models for stage in model.stages)

    def predict(
        self,
        files: Files,
        *,
        step_size: float | None = None,
        mirroring: bool = True,
        probabilities: bool = False,
        previous: str | PathLike[str] | None = None,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segments one case.

        Args:
            files: the file, or the files of all channels in order (`case_0000…`, `case_0001…`), or the folder of a
                DICOM series (one per channel).
            step_size: distance between windows as a share of the patch; None takes the model's (0.5).
            mirroring: average over the mirror axes that the model was trained with.
            probabilities: also return softmax (or sigmoid) of every class.
            previous: the label file of a cascade's first stage, where the predictor was opened for that.
            progress: called with (stage, done, total); returning False stops with `Cancelled`.
        """
        from trtbuild.volume.io import reader_named
        from trtbuild.volume.io.previous import labels_for_image

        paths = [Path(files)] if isinstance(files, (str, PathLike)) else [Path(f) for f in files]
        if not paths:
            raise InputError("No file was given.", expected="one file per channel, or the folder of a DICOM series")
        started = time.perf_counter()
        tell(progress, "read", 0, 1)
        reader = reader_named(self.spec.reader)
        if os.path.isdir(paths[0]):
            from trtbuild.volume.io.dicom_io import read_series

            image = read_series(paths, self.spec.channels, self.spec.reader)
        else:
            image = reader.read_image(paths, self.spec.channels)
        before = None if previous is None else labels_for_image(Path(previous), self.spec.reader, image)
        tell(progress, "read", 1, 1)
        seconds = time.perf_counter() - started
        prediction = self.predict_array(
            image.data,
            image.spacing,
            step_size=step_size,
            mirroring=mirroring,
            probabilities=probabilities,
            previous=None if before is None else before.labels,
            progress=progress,
        )
        return replace(
            prediction,
            image=image,
            seconds={"read": seconds, **prediction.seconds},
            warnings=(*image.warnings, *(() if before is None else before.warnings), *prediction.warnings),
        )

    def predict_array(
        self,
        array: NDArray[Any],
        spacing: Sequence[float],
        *,
        step_size: float | None = None,
        mirroring: bool = True,
        probabilities: bool = False,
        previous: NDArray[Any] | None = None,
        progress: Progress | None = None,
    ) -> Prediction:
        """Segments an array (C, Z, Y, X) with its spacing (z, y, x) in mm, as nnU-Net's reader would return it.

        `previous` holds the labels (Z, Y, X) of a cascade's first stage, where the predictor was opened for that.
        """
        import numpy as np

        if (previous is not None) != self.given_previous:
            raise InputError(
                "Labels of a previous stage " + ("are missing." if self.given_previous else "are not wanted."),
                expected="the labels of the stage before" if self.given_previous else None,
                hint="pass previous=" if self.given_previous else "open the bundle with previous_stage=True",
            )
        if probabilities and self.recipe.vote == "hard":
            raise TrtbuildError("A hard vote has no probabilities.", got="probabilities=True", hint="leave it out")
        settings = replace(self._settings(step_size, mirroring), probabilities=probabilities)

        def prepare(model: int, stage: int, labels: NDArray[Any] | None) -> Prepared | DevicePrepared:
            spec = self.models[model].stages[stage].spec
            before = labels if spec.previous_stage is None or labels is not None else previous
            return self.prepared(model, stage, array, spacing, before)

        prediction = self.predict_prepared(prepare, settings, progress)
        return prediction if np.any(array) else replace(prediction, warnings=(*prediction.warnings, EMPTY))

    def predict_device_array(
        self,
        array: Any,
        spacing: Sequence[float],
        *,
        step_size: float | None = None,
        mirroring: bool = True,
        progress: Progress | None = None,
    ) -> DevicePrediction:
        """Segments an image (C, Z, Y, X) that is in the memory of the predictor's GPU; its labels stay there.

        One thread uses a predictor at a time. The labels are to be used while it is open.

        Args:
            array: anything with `__dlpack__` or `__cuda_array_interface__` (torch, CuPy, JAX, Numba) on that GPU, of
                float32, float16, int32, bool, or integers of 8 or 16 bits; left unchanged.
            spacing: (z, y, x) in mm.
            step_size: as in `predict`.
            mirroring: as in `predict`.
            progress: as in `predict`.

        Raises:
            EngineError: the model does not run on a GPU, or the GPU failed.
            TrtbuildError: it is an ensemble, a cascade, or comes with post-processing or disagreement.
            InputError: the array or the spacing is wrong, or the array is somewhere else.
            OutOfMemory: the GPU has no memory for it.
        """
        from threadpoolctl import threadpool_limits

        from trtbuild.runtime.gpu.entry import prediction_from_device_array

        self._check_open()
        member = member_for_image_on_gpu(self.models, self.recipe, self.given_previous)
        with threadpool_limits(1, user_api="blas"):  # as in `predict_prepared`
            return prediction_from_device_array(array, spacing, member, self._settings(step_size, mirroring), progress)

    def _settings(self, step_size: float | None, mirroring: bool) -> Settings:
        if step_size is not None:
            check_step_size(step_size)
        step_size = self.spec.step_size if step_size is None else step_size
        return Settings(step_size=step_size, mirroring=mirroring, threads=self.threads)

    def _check_open(self) -> None:
        if self._closed.is_set():
            raise EngineError(
                "The predictor is closed.", where=self.models[0].bundle.path, hint="open the bundle again"
            )

    def prepared(
        self,
        model: int,
        stage: int,
        data: NDArray[Any],
        spacing: Sequence[float],
        labels: NDArray[Any] | None,
        uploaded: Buffer | None = None,
    ) -> Prepared | DevicePrepared:
        """An image (C, Z, Y, X) with its spacing (z, y, x) in mm, as a stage of a model sees it.

        `labels` (Z, Y, X) are those of the stage before, for the second one of a cascade; `uploaded` is the image on
        the GPU, where it went ahead. What is prepared on the GPU goes into `predict_prepared`, which gives it back.
        """
        self._check_open()
        return prepared_for_member(data, spacing, self.models[model].stages[stage], labels, uploaded)

    def predict_prepared(
        self,
        prepare: Callable[[int, int, NDArray[Any] | None], Prepared | DevicePrepared],
        settings: Settings,
        progress: Progress | None,
    ) -> Prediction:
        """Segments a case that `prepare(model, stage, labels)` hands out as each stage of each model sees it."""
        from threadpoolctl import threadpool_limits

        stages = [model.stages for model in self.models]
        # resampling is a few small matrix products: BLAS threads would mostly wait for each other
        with threadpool_limits(1, user_api="blas"):
            return prediction_from_models(stages, prepare, self.recipe, settings, progress)

    def describe(self) -> RunnerInfo:
        """What runs (the first model's last stage): backend, version, precision read back, batch, device."""
        return self.models[0].stages[-1].runners[0].describe()

    def close(self) -> None:
        """Frees the engines; a second call does nothing."""
        self._resources.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_predictor(
    paths: Sequence[Path],
    *,
    backend: str = "auto",
    folds: tuple[str, ...] | None = None,
    threads: int | None = None,
    previous_stage: bool = False,
    weights: tuple[float, ...] | None = None,
    vote: Vote = "soft",
    disagreement: bool = False,
    postprocessing: tuple[KeepLargestComponent, ...] | None = None,
    device: int = 0,
    device_memory: int | None = None,
) -> Predictor:
    """Opens one bundle, or several as an ensemble.

    Args:
        paths: the bundles.
        backend: "auto", or a name that is used or fails.
        folds: of every bundle and stage; None takes all.
        threads: CPU threads; None takes those of the first engine's record.
        previous_stage: the labels of a cascade's first stage will be given with every case.
        weights: of the ensemble's members; None counts them equally.
        vote: "soft" averages probabilities, "hard" counts labels.
        disagreement: also make the entropy map.
        postprocessing: in place of the bundle's own; None takes that of a single bundle, and none for an ensemble.
        device: number of the GPU, for engines that need one; all bundles share it. With any but 0 no engine for a CPU
            is taken.
        device_memory: bytes of its memory that a case may take, beside the engines' weights; None takes what is free.

    Raises:
        TrtbuildError: an argument is wrong, or the members do not fit each other.
        BundleError, EngineError, ModelError: a bundle cannot be opened or run here.
    """
    check_threads(threads)
    check_folds(folds)
    check_devices((device,), device_memory, backend)
    weights = check_ensemble(weights, vote, len(paths))
    wishes = Wishes(
        backend=backend, folds=folds, threads=threads, second_stage_only=previous_stage, device=device,
        device_memory=device_memory,
    )  # fmt: skip
    with ExitStack() as stack:
        models = _opened_models(paths, stack, wishes)
        _check_members(models)
        if previous_stage and not any(model.stages[0].spec.previous_stage for model in models):
            raise ModelError(
                "No bundle is the second stage of a cascade.",
                got="predictions of a previous stage",
                where=", ".join(str(path) for path in paths),
                hint="leave -prev_stage_predictions out",
            )
        if postprocessing is None:
            postprocessing = models[0].bundle.manifest.postprocessing if len(models) == 1 else ()
        check_postprocessing(postprocessing, models[0].stages[-1].spec, None)
        closed = Event()
        stack.callback(closed.set)
        return Predictor(
            models=models,
            recipe=Recipe(weights=weights, vote=vote, disagreement=disagreement, postprocessing=postprocessing),
            given_previous=previous_stage,
            threads=models[0].threads,
            _resources=stack.pop_all(),
            _closed=closed,
        )


def _opened_models(paths: Sequence[Path], stack: ExitStack, wishes: Wishes) -> tuple[Model, ...]:
    """All bundles; those that need a GPU share one."""
    models: list[Model] = []
    for path in paths:
        gpu = next((model.gpu for model in models if model.gpu is not None), None)
        models.append(open_model(path, stack, wishes, gpu))
    return tuple(models)


def rules_from(file: str | PathLike[str] | None) -> tuple[KeepLargestComponent, ...] | None:
    """The rules in nnU-Net's postprocessing file; None where there is no file."""
    if file is None:
        return None
    from trtbuild.volume.postprocessing import postprocessing_from_file

    return postprocessing_from_file(Path(file))


def _check_members(models: Sequence[Model]) -> None:
    """The members of an ensemble read the same images and mean the same labels."""
    first = models[0].stages[-1].spec
    for model in models[1:]:
        spec = model.stages[-1].spec
        for what in ("channels", "reader", "file_ending", "labels"):
            if getattr(spec, what) != getattr(first, what):
                raise ModelError(
                    f"The members of the ensemble differ in their {what.replace('_', ' ')}.",
                    expected=getattr(first, what),
                    got=getattr(spec, what),
                    where=model.bundle.path,
                    hint="combine models that were trained on the same dataset.json",
                )
