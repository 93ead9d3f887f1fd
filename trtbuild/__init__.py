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
from typing import TYPE_CHECKING, Any

from trtbuild.errors import TrtbuildError

if TYPE_CHECKING:
    from trtbuild.bundle import Bundle
    from trtbuild.steps.predict import Predictor

__version__ = "0.1.0"
__all__ = ["TrtbuildError", "__version__", "compile", "open"]


def compile(  # the verb of the command line; the builtin is never wanted here
    model: str | PathLike[str],
    output: str | PathLike[str],
    *,
    folds: Sequence[str | int] | str | int | None = None,
    report: Callable[[str], None] = lambda line: None,
    **options: Any,
) -> Bundle:
    """Makes a bundle of a trained-model folder (or of another bundle, with other engines).

    Args:
        model: `<Trainer>__<Plans>__<configuration>` as nnU-Net left it, or a bundle.
        output: the bundle to write, `NAME.trtb`.
        folds: which folds (0, "all", [0, 1]); None means all numbered folds, as in nnU-Net.
        report: called with a line of text per step.
        **options: the other fields of `trtbuild.config.CompileConfig` (checkpoint, backends, precision, threads,
            tune, overwrite, trust_checkpoint, assume_plans_architecture). An unknown name is a TypeError.

    Returns:
        The written bundle, verified against PyTorch's logits.
    """
    from trtbuild.config import CompileConfig
    from trtbuild.steps.compile import compile_bundle

    return compile_bundle(
        CompileConfig(model=Path(model), output=Path(output), folds=_fold_names(folds), **options), report
    )


def open(  # as in gzip.open: trtbuild.open(bundle)
    bundle: str | PathLike[str],
    *,
    backend: str = "auto",
    folds: Sequence[str | int] | str | int | None = None,
    threads: int | None = None,
) -> Predictor:
    """Opens a bundle for prediction; use it in a `with` block.

    Args:
        bundle: a folder that `compile` wrote.
        backend: "auto" takes the first engine of the bundle that opens here and says which; a name takes that or fails.
        folds: which folds (0, "all", [0, 1]); None means all of the bundle.
        threads: CPU threads; None means those of the engine's record.
    """
    from trtbuild.steps.predict import open_predictor

    return open_predictor(Path(bundle), backend=backend, folds=_fold_names(folds), threads=threads)


def _fold_names(folds: Sequence[str | int] | str | int | None) -> tuple[str, ...] | None:
    """A single name or number means that fold; a text is not taken apart into letters."""
    if folds is None:
        return None
    return (str(folds),) if isinstance(folds, (str, int)) else tuple(str(fold) for fold in folds)
