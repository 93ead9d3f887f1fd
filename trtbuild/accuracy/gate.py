"""The gate: is a candidate (a network in lower precision) as good as FP32? Limits, verdict, and a key for a contest.

Pure decisions over what `trtbuild.accuracy.agreement` measured. One number carries them all: the *damage*, the largest
loss in units of its limit. A candidate passes if and only if its damage is at most 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from trtbuild.accuracy.agreement import Agreement, ClassAgreement
from trtbuild.errors import TrtbuildError
from trtbuild.spec import json_from_value

STEP = 0.1
"""Damages within one tenth of the limits count as equal in `score`: by default .0005 of mean Dice, the bound for FP16
and BF16, which differ from FP32 by rounding alone, and .002 of one class."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a candidate may lose.

    - `mean_loss`, of the mean Dice over the judged foreground classes against the labels: .005. MedPTQ (Qu et al. 2026)
      measured .006 for nnU-Net in INT8 with plain maxima (TotalSegmentator, 104 classes), which a calibration worth
      its name must beat. MLPerf asks 99.9 % and 99 % of FP32 (a loss of .00086 and .0086 for its 3D U-Net's .8617).
    - `class_loss`, of the Dice of any judged class: .02, so that a mean over many classes hides no lost organ.
    - `agreement`, the least Dice of any judged class against the output of FP32: .985. It judges where there are no
      labels. Min-max INT8 of a small trained nnU-Net measured .991 to .996.
    - `min_voxels` of the labels (without labels: of FP32's output) over all patches, below which a class is not judged:
      100. Missing k of n voxels costs k / (2n - k) of Dice; with n = 100 the class limit is reached at four, and with
      fewer voxels the rounding of two or three at a border would decide.

    Raises:
        TrtbuildError: a loss or the agreement is outside 0..1, or `min_voxels` is no whole number >= 1.
    """

    mean_loss: float = 0.005
    class_loss: float = 0.02
    agreement: float = 0.985
    min_voxels: int = 100

    def __post_init__(self) -> None:
        for name in ("mean_loss", "class_loss", "agreement"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
                raise TrtbuildError("A limit of the gate is out of range.", expected="0 <= limit <= 1", got=value,
                                    where=name)  # fmt: skip
        if isinstance(self.min_voxels, bool) or not isinstance(self.min_voxels, int) or self.min_voxels < 1:
            raise TrtbuildError("A limit of the gate is out of range.", expected="a whole number >= 1",
                                got=self.min_voxels, where="min_voxels")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision. `reasons` says why it did not pass, one sentence each, and is empty where it did.

    `judged` names the classes that counted, `notes` says of each other foreground class why it did not. Where `judged`
    is empty no precision can pass: the patches or the labels are at fault, not the candidate.
    """

    passed: bool
    reasons: tuple[str, ...]
    notes: tuple[str, ...]
    judged: tuple[str, ...]
    damage: float
    limits: Limits


@dataclass(frozen=True, kw_only=True)
class _Check:
    """One comparison of a measured value with its limit; `damage` is their ratio."""

    damage: float
    sentence: str


def verdict(agreement: Agreement, limits: Limits) -> Verdict:
    """Whether the candidate passes.

    With labels the loss of a class is Dice(FP32, labels) - Dice(candidate, labels), a gain being negative: the mean
    over the judged classes and each of them have a limit. Without labels each judged class's Dice between the two
    outputs has one. A class is judged if it is foreground, has `min_voxels`, and FP32 finds a voxel of it: one that
    FP32 never finds cannot get worse, and would hide labels that do not belong to the images.
    """
    objections = {c.name: _not_judged(c, limits) for c in agreement.classes if c.foreground}
    judged = tuple(c for c in agreement.classes if c.foreground and not objections[c.name])
    notes = tuple(sentence for sentence in objections.values() if sentence)
    checks = _checks(agreement, judged, limits)
    return Verdict(
        passed=all(check.damage <= 1 for check in checks),
        reasons=tuple(check.sentence for check in checks if not check.damage <= 1),
        notes=notes,
        judged=tuple(c.name for c in judged),
        damage=max(check.damage for check in checks),
        limits=limits,
    )


def score(agreement: Agreement, limits: Limits) -> tuple[int | float, float]:
    """A key for the contest between calibration methods; the smallest wins.

    First the damage in whole steps of a tenth of the limits, a gain being no damage: a candidate that passes comes
    before one that does not, and neither a lucky gain nor a difference within the noise of a few patches decides.
    Among equals the smaller error of the logits does. That is measured on every voxel and not on the few that change
    sides, so it tells candidates apart where Dice cannot. Non-finite or unjudged candidates come last.
    """
    damage = verdict(agreement, limits).damage
    step = max(0, math.ceil(damage / STEP) - 1) if math.isfinite(damage) else math.inf
    return step, agreement.logits.error_rms


def facts_from_verdict(decision: Verdict) -> dict[str, Any]:
    """For the bundle's `gates`: plain dicts, lists and scalars, numbers finite or None."""
    facts: dict[str, Any] = json_from_value(decision)
    return facts | {"damage": decision.damage if math.isfinite(decision.damage) else None}


def _not_judged(c: ClassAgreement, limits: Limits) -> str:
    """Why a foreground class is not judged; empty where it is."""
    where = "FP32's output" if c.reference is None else "the labels"
    if c.voxels < limits.min_voxels:
        return (
            f"Class {c.name} is not judged: {c.voxels} voxels in {where}, needs {limits.min_voxels}. FP32 gives it "
            f"{c.between.n_ref} voxels, the candidate {c.between.n_pred}."
        )
    if c.reference is not None and c.reference.tp == 0:
        return f"Class {c.name} is not judged: FP32 finds none of its {c.voxels} voxels in the labels."
    return ""


def _checks(agreement: Agreement, judged: tuple[ClassAgreement, ...], limits: Limits) -> tuple[_Check, ...]:
    if agreement.nonfinite:
        sentence = f"The candidate returned NaN or infinity in {agreement.nonfinite} values of its logits."
        return (_Check(damage=math.inf, sentence=sentence),)
    if not judged:
        sentence = f"No class can be judged: none has {limits.min_voxels} voxels that FP32 finds too."
        return (_Check(damage=math.inf, sentence=sentence),)
    if not agreement.labelled:
        return tuple(_agreement_check(c, limits) for c in judged)
    return (_mean_check(judged, limits), *(_class_check(c, limits) for c in judged))


def _mean_check(judged: tuple[ClassAgreement, ...], limits: Limits) -> _Check:
    loss = _mean(c.loss for c in judged)
    before, after = _mean(c.dice_reference for c in judged), _mean(c.dice_candidate for c in judged)
    sentence = (
        f"Mean Dice of the judged classes ({len(judged)}) falls by {loss:.4f}, from {before:.4f} (FP32) to "
        f"{after:.4f}; the limit is {limits.mean_loss:g}."
    )
    return _Check(damage=_share(loss, limits.mean_loss), sentence=sentence)


def _class_check(c: ClassAgreement, limits: Limits) -> _Check:
    sentence = (
        f"Class {c.name}: Dice falls by {c.loss:.4f}, from {c.dice_reference:.4f} (FP32) to {c.dice_candidate:.4f}; "
        f"the limit is {limits.class_loss:g}."
    )
    return _Check(damage=_share(c.loss, limits.class_loss), sentence=sentence)


def _agreement_check(c: ClassAgreement, limits: Limits) -> _Check:
    dice = c.between.dice
    sentence = f"Class {c.name}: Dice against FP32's output is {dice:.4f}; the limit is {limits.agreement:g}."
    return _Check(damage=_share(1 - dice, 1 - limits.agreement), sentence=sentence)


def _share(loss: float, limit: float) -> float:
    """A loss in units of its limit: 0 for a gain, infinity for any loss where none is allowed."""
    if loss <= 0:
        return 0.0
    return loss / limit if limit > 0 else math.inf


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
