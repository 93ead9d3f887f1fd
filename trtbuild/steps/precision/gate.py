"""The gate's measurement: FP32 once, every candidate beside it, patch by patch, on cases that calibrated nothing."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trtbuild.accuracy.agreement import Agreement, agreement_from_patch, pooled
from trtbuild.accuracy.gate import Limits
from trtbuild.config import GateConfig
from trtbuild.errors import InputError
from trtbuild.runtime.select import open_runner
from trtbuild.spec import BuildRecord, ModelSpec
from trtbuild.steps.precision.calibrate import classes_of
from trtbuild.steps.precision.data import as_input_errors
from trtbuild_calibration import PatchSequence, Source, sample_places

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Gate:
    """Patches with labels, and FP32's logits for them in files (a volume of logits is far larger than its image)."""

    patches: PatchSequence = field(repr=False)
    reference: tuple[Path, ...] = field(repr=False)
    spec: ModelSpec
    limits: Limits
    cases: tuple[str, ...]
    roll_back: bool

    def agreement(self, record: BuildRecord, model: Path, say: Say) -> Agreement:
        """How far an engine agrees with FP32 and with the labels.

        Raises:
            EngineError: the engine does not open or fails.
        """

        def measured(index: int, logits: NDArray[np.float32]) -> Agreement:
            truth = self.patches.labelled(index).labels
            return agreement_from_patch(self._logits(index), logits, truth, self.spec.labels)

        with open_runner(record, model) as runner, as_input_errors():
            found = []
            for index in range(len(self.patches)):
                say(f"patch {index + 1} of {len(self.patches)}")
                found.append(measured(index, runner.infer(self.patches[index][None])[0]))
            return pooled(found)

    def forget(self) -> None:
        """Removes FP32's logits from the disk."""
        for file in self.reference:
            file.unlink(missing_ok=True)

    def _logits(self, index: int) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = np.load(self.reference[index], allow_pickle=False)
        return logits


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
    """Draws the patches, and runs FP32 on them.

    Args:
        sources: cases that calibrated nothing.
        spec: of the stage.
        config: how many patches, and the limits.
        seed: of the patches.
        reference: the FP32 engine and its file.
        scratch: a folder for FP32's logits.
        say: called with one line per patch.

    Raises:
        InputError: no cases, or some with labels and some without.
    """
    if not sources:
        raise InputError(
            "There are no cases left for the gate: it needs some that the calibration does not see.",
            expected="two cases at least",
            got="one",
            hint="add cases, or --no-gate with a --method of your choice",
        )
    _check_room(spec, config, scratch)
    with as_input_errors():
        sample = sample_places(
            sources,
            patch=spec.patch,
            count=config.patches,
            seed=seed,
            classes=classes_of(spec.labels),
            ignore=spec.labels.ignore,
        )
        patches = PatchSequence(
            sources={source.name: source for source in sources}, places=sample.places, patch=spec.patch
        )
        files = []
        with open_runner(*reference) as runner:
            for index in range(len(patches)):
                say(f"FP32, patch {index + 1} of {len(patches)}")
                files.append(scratch / f"{reference[0].network}_{index}.npy")
                np.save(files[-1], runner.infer(patches[index][None])[0], allow_pickle=False)
    return Gate(
        patches=patches,
        reference=tuple(files),
        spec=spec,
        limits=Limits(mean_loss=config.mean_loss, class_loss=config.class_loss, agreement=config.agreement),
        cases=tuple(sorted({place.case for place in sample.places})),
        roll_back=config.roll_back,
    )


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
