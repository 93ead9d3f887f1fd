"""The gate's measurement: FP32 once, every candidate beside it, patch by patch, on cases that calibrated nothing."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from trtbuild.accuracy.agreement import Agreement, agreement_from_patch, pooled, require_known_values
from trtbuild.accuracy.gate import Limits
from trtbuild.config import GateConfig
from trtbuild.errors import InputError
from trtbuild.runtime.runner import Runner
from trtbuild.runtime.select import open_runner
from trtbuild.spec import BuildRecord, ModelSpec
from trtbuild.steps.precision.calibrate import classes_of
from trtbuild.steps.precision.data import as_input_errors
from trtbuild_calibration import Coverage, Patch, PatchSequence, Source, sample_places

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Patches with labels, and FP32's logits for them in files (a volume of logits is far larger than its image).

    The files are the gate's own: `with open_gate(...) as gate` removes them at the end.

    Attributes:
        patches: what is measured. Of each only what lies inside its image: nnU-Net crops the padding away too.
        reference: FP32's logits (heads, *inside), float32, one file per patch.
        spec: of the stage.
        limits: of the verdict.
        cases: that the patches are of.
        coverage: which classes the patches hold, and which not.
        labelled: whether candidates are judged by Dice against labels; else by their agreement with FP32.
        roll_back: whether layers may go back to higher precision.
    """

    patches: PatchSequence = field(repr=False)
    reference: tuple[Path, ...] = field(repr=False)
    spec: ModelSpec
    limits: Limits
    cases: tuple[str, ...]
    coverage: Coverage = field(repr=False)
    labelled: bool
    roll_back: bool

    def agreement(self, record: BuildRecord, model: Path, say: Say) -> Agreement:
        """How far an engine agrees with FP32 and with the labels.

        Raises:
            EngineError: the engine does not open or fails.
        """
        with open_runner(record, model) as runner, as_input_errors():
            found = []
            for index in range(len(self.patches)):
                say(f"patch {index + 1} of {len(self.patches)}")
                patch = self.patches.labelled(index)
                truth = None if patch.labels is None else patch.labels[patch.inside]
                found.append(agreement_from_patch(self._fp32(index), _logits(runner, patch), truth, self.spec.labels))
            return pooled(found)

    def _fp32(self, index: int) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = np.load(self.reference[index], allow_pickle=False)
        return logits

    def __enter__(self) -> Gate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _remove(self.reference)


def open_gate(
    sources: Sequence[Source],
    spec: ModelSpec,
    config: GateConfig,
    *,
    seed: int,
    reference: tuple[BuildRecord, Path],
    scratch: Path,
    say: Say,
) -> Gate:
    """Draws the patches, and runs FP32 on them. Whatever is wrong with the labels is found before that.

    With labels the gate judges by Dice against them; where no case has any, by the agreement with FP32's output, which
    is another criterion (`Gate.labelled`).

    Args:
        sources: cases that calibrated nothing.
        spec: of the stage.
        config: how many patches, and the limits.
        seed: of the patches.
        reference: the FP32 engine and its file.
        scratch: a folder for FP32's logits.
        say: called with one line per patch.

    Raises:
        InputError: no cases, some with labels and some without, labels of another dataset, or too little room.
        EngineError: FP32 does not open or fails. None of its logits stay on the disk.
    """
    _require_cases(sources)
    _check_room(spec, config, scratch)
    with as_input_errors():
        labelled = _labelled(sources)
        patches, coverage = _drawn(sources, spec, config, seed)
        if labelled:
            _require_known_labels(patches, spec)
        files = _fp32_files(reference, patches, scratch, say)
    return Gate(
        patches=patches,
        reference=files,
        spec=spec,
        limits=Limits(mean_loss=config.mean_loss, class_loss=config.class_loss, agreement=config.agreement),
        cases=tuple(sorted({place.case for place in patches.places})),
        coverage=coverage,
        labelled=labelled,
        roll_back=config.roll_back,
    )


def _require_cases(sources: Sequence[Source]) -> None:
    if not sources:
        raise InputError(
            "There are no cases left for the gate: it needs some that the calibration does not see.",
            expected="two cases at least",
            got="one",
            hint="add cases, or --no-gate with a --method of your choice",
        )


def _labelled(sources: Sequence[Source]) -> bool:
    """Whether the cases have labels: all or none. A file that is missing must not change what the gate judges by."""
    voxel = ((0, 1), (0, 1), (0, 1))
    without = [source.name for source in sources if source.read_labels(voxel) is None]
    if without and len(without) < len(sources):
        raise InputError(
            "Some of the gate's cases have labels and some have none.",
            expected="labels for all of them, or for none",
            got=f"none for {len(without)} of {len(sources)} cases",
            where=", ".join(sorted(without)),
            hint="give the missing segmentations, or leave these cases out",
        )
    return not without


def _drawn(sources: Sequence[Source], spec: ModelSpec, config: GateConfig, seed: int) -> tuple[PatchSequence, Coverage]:
    sample = sample_places(
        sources,
        patch=spec.patch,
        count=config.patches,
        seed=seed,
        classes=classes_of(spec.labels),
        ignore=spec.labels.ignore,
    )
    by_name = {source.name: source for source in sources}
    return PatchSequence(sources=by_name, places=sample.places, patch=spec.patch), sample.coverage


def _require_known_labels(patches: PatchSequence, spec: ModelSpec) -> None:
    for index, place in enumerate(patches.places):
        labels = patches.labelled(index).labels
        if labels is not None:
            require_known_values(labels, spec.labels, where=f"case {place.case}, patch at {place.corner}")


def _fp32_files(
    reference: tuple[BuildRecord, Path], patches: PatchSequence, scratch: Path, say: Say
) -> tuple[Path, ...]:
    """FP32's logits of each patch as a file; no file stays where it fails."""
    files = tuple(scratch / f"{reference[0].network}_{index}.npy" for index in range(len(patches)))
    try:
        with open_runner(*reference) as runner:
            for index, file in enumerate(files):
                say(f"FP32, patch {index + 1} of {len(files)}")
                np.save(file, _logits(runner, patches.labelled(index)), allow_pickle=False)
    except BaseException:
        _remove(files)
        raise
    return files


def _logits(runner: Runner, patch: Patch) -> NDArray[np.float32]:
    """Logits of the part of a patch that lies in the image, (heads, *inside); they hold until the next call."""
    logits: NDArray[np.float32] = runner.infer(patch.data[None])[0][(slice(None), *patch.inside)]
    return logits


def _remove(files: Iterable[Path]) -> None:
    for file in files:
        file.unlink(missing_ok=True)


def _check_room(spec: ModelSpec, config: GateConfig, scratch: Path) -> None:
    """FP32's logits of all patches go to the disk: 14 GB for 105 classes and 16 patches of 128³."""
    each = 4 * spec.labels.heads * math.prod(spec.patch)
    free = shutil.disk_usage(scratch).free
    if config.patches * each > free:
        raise InputError(
            "There is too little room for FP32's logits of the gate's patches.",
            expected=f"{config.patches * each / 1e9:.1f} GB",
            got=f"{free / 1e9:.1f} GB free",
            where=scratch,
            hint=f"--gate-patches {max(1, free // each)} or fewer, or set TMPDIR to a larger disk",
        )
