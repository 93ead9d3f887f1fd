"""trtbuild: a trained nnU-Net v2 becomes a verified bundle, the bundle becomes segmentations.

    import trtbuild

    trtbuild.compile("nnUNetTrainer__nnUNetPlans__3d_fullres", "brain.trtb")
    with trtbuild.open("brain.trtb") as predictor:
        prediction = predictor.predict(["case_0000.nii.gz"])
        prediction.segmentation  # (Z, Y, X) uint8 on the image's own grid

Importing this package loads no heavy library; each function loads what it needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trtbuild.errors import TrtbuildError

if TYPE_CHECKING:
    from trtbuild.bundle import Bundle
    from trtbuild.config import CalibrationConfig, GateConfig
    from trtbuild.steps.prediction.predictor import Predictor

__version__ = "0.1.0"
__all__ = ["CalibrationConfig", "GateConfig", "TrtbuildError", "__version__", "compile", "open"]


def compile(  # the verb of the command line; the builtin is never wanted here
    model: str | PathLike[str] | None,
    output: str | PathLike[str],
    *,
    folds: Sequence[str | int] | str | int | None = None,
    previous_stage: str | PathLike[str] | None = None,
    postprocessing: str | PathLike[str] | None = None,
    calibration: str | PathLike[str] | CalibrationConfig | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Bundle:
    """Makes a bundle of a trained model (or of another bundle, with other engines).

    Args:
        model: `<Trainer>__<Plans>__<configuration>` as nnU-Net left it, a zip of nnU-Net, or a bundle; None with
            `dataset` and `configuration`, which are then looked up below `nnUNet_results`.
        output: the bundle to write, `NAME.trtb`.
        folds: which folds (0, "all", [0, 1]); None means all numbered folds, as in nnU-Net.
        previous_stage: for a cascade, the model of its first stage.
        postprocessing: nnU-Net's postprocessing.json or .pkl.
        calibration: for `precision="int8"` and "fp16", nnUNet_preprocessed/DatasetX, or a CalibrationConfig.
        report: called with a line of text per step.
        progress: called with what is under way within a long step. What either raises ends the compilation.
        **options: the other fields of `trtbuild.config.CompileConfig` (dataset, configuration, trainer, plans, network,
            checkpoint, backends, precision, rest, method, keep, quantize_ends, gate, threads, tune, overwrite,
            trust_checkpoint, assume_plans_architecture). An unknown name is a TypeError.

    Returns:
        The written bundle, verified against PyTorch's logits and, in a lower precision, by the gate.

    Raises:
        GateFailed: the lower precision is not good enough; the bundle was written with FP32 engines.
    """
    from trtbuild.config import CalibrationConfig, CompileConfig
    from trtbuild.steps.compilation.compile import compile_bundle

    config = CompileConfig(
        model=_path(model),
        output=Path(output),
        folds=_fold_names(folds),
        previous_stage=_path(previous_stage),
        postprocessing=_path(postprocessing),
        calibration=calibration
        if calibration is None or isinstance(calibration, CalibrationConfig)
        else CalibrationConfig(data=Path(calibration)),
        **options,
    )
    return compile_bundle(config, report, progress)


def open(  # as in gzip.open: trtbuild.open(bundle)
    bundle: str | PathLike[str] | Sequence[str | PathLike[str]],
    *,
    backend: str = "auto",
    folds: Sequence[str | int] | str | int | None = None,
    threads: int | None = None,
    previous_stage: bool = False,
    weights: Sequence[float] | None = None,
    vote: Literal["soft", "hard"] = "soft",
    disagreement: bool = False,
    postprocessing: str | PathLike[str] | Literal[False] | None = None,
    device: int = 0,
    device_memory: int | None = None,
) -> Predictor:
    """Opens a bundle, or several as an ensemble, for prediction; use it in a `with` block.

    Args:
        bundle: a folder that `compile` wrote, or a sequence of them.
        backend: "auto" takes the first engine of the bundle that opens here and says which; a name takes that or fails.
        folds: which folds (0, "all", [0, 1]); None means all of the bundles.
        threads: CPU threads; None means those of the engine's record.
        previous_stage: the labels of a cascade's first stage are given with every case, in place of running it.
        weights: one per bundle of an ensemble; None counts them equally.
        vote: how an ensemble decides: "soft" averages probabilities as nnU-Net does, "hard" takes the most labels.
        disagreement: predictions also hold the entropy of the probabilities (or votes), 0 to 1.
        postprocessing: nnU-Net's postprocessing.json or .pkl in place of the bundle's own rules, False for none. None
            takes the rules of a single bundle, and none for an ensemble.
        device: number of the GPU, for engines that need one; with any but 0 nothing runs on the CPU instead.
        device_memory: bytes of its memory that a case may take; None takes what is free. A case that needs more is
            summed in float16, or is refused.
    """
    from trtbuild.steps.prediction.predictor import open_predictor, rules_from

    paths = [bundle] if isinstance(bundle, (str, PathLike)) else bundle
    return open_predictor(
        [Path(path) for path in paths],
        backend=backend,
        folds=_fold_names(folds),
        threads=threads,
        previous_stage=previous_stage,
        weights=None if weights is None else tuple(weights),
        vote=vote,
        disagreement=disagreement,
        postprocessing=() if postprocessing is False else rules_from(postprocessing),
        device=device,
        device_memory=device_memory,
    )


def __getattr__(name: str) -> Any:
    """The configurations, when they are asked for: what this module imports at once delays the handler of Ctrl-C."""
    if name in ("CalibrationConfig", "GateConfig"):
        from trtbuild import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _path(path: str | PathLike[str] | None) -> Path | None:
    return None if path is None else Path(path)


def _fold_names(folds: Sequence[str | int] | str | int | None) -> tuple[str, ...] | None:
    """A single name or number means that fold; a text is not taken apart into letters."""
    if folds is None:
        return None
    return (str(folds),) if isinstance(folds, (str, int)) else tuple(str(fold) for fold in folds)
