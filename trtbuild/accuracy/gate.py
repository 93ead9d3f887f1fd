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
from trtbuild.config import GateConfig, check_limit
from trtbuild.errors import TrtbuildError
from trtbuild.spec import json_from_value

STEP = 0.1
"""Damages within one tenth of the limits count as equal in `score`: by default .0005 of mean Dice, the bound for FP16
and BF16, which differ from FP32 by rounding alone, and .002 of one class."""
GROWTH = 0.1
"""A class that is not judged may have a tenth more voxels than FP32 gives it, or `Limits.min_voxels` more if that is
the larger. Nothing tells whether its voxels are right, so the bound is wide: a border that moves by a quarter of a
voxel lets a ball of 4000 voxels grow by 8 %. What it forbids is a class that appears where FP32 sees none."""


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
      fewer voxels the rounding of two or three at a border would decide. A class that is not judged may grow by as
      many (`GROWTH`).

    Raises:
        TrtbuildError: a loss or the agreement is outside 0..1, or `min_voxels` is no whole number >= 1.
    """

    mean_loss: float = GateConfig.mean_loss
    class_loss: float = GateConfig.class_loss
    agreement: float = GateConfig.agreement
    min_voxels: int = 100

    def __post_init__(self) -> None:
        for name in ("mean_loss", "class_loss", "agreement"):
            check_limit(getattr(self, name), name)
        if isinstance(self.min_voxels, bool) or not isinstance(self.min_voxels, int) or self.min_voxels < 1:
            raise TrtbuildError("A limit of the gate is out of range.", expected="a whole number >= 1",
                                got=self.min_voxels, where="min_voxels")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The decision. `reasons` says why it did not pass, one sentence each, and is empty where it did.

    `judged` names the classes whose Dice counted, `notes` says of each other foreground class why it did not; of these
    only the growth counts. Where `judged` is empty no precision can pass: the patches or the labels are at fault, not
    the candidate.
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
    FP32 never finds cannot lose, and would hide labels that do not belong to the images. Dice says nothing of the other
    foreground classes; what a candidate could do is to invent them, so their growth over FP32 has a limit (`GROWTH`).
    """
    objections = {c.name: _not_judged(c, limits) for c in agreement.classes if c.foreground}
    judged = tuple(c for c in agreement.classes if c.foreground and not objections[c.name])
    others = tuple(c for c in agreement.classes if c.foreground and objections[c.name])
    notes = tuple(sentence for sentence in objections.values() if sentence)
    checks = _checks(agreement, judged, others, limits)
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
            f"Class {c.name} is not judged: {_counted(c.voxels, 'voxel')} in {where}, needs {limits.min_voxels}. FP32 "
            f"gives it {_counted(c.between.n_ref, 'voxel')}, the candidate {c.between.n_pred}."
        )
    if c.reference is not None and c.reference.tp == 0:
        found = f"FP32 finds none of its {_counted(c.voxels, 'voxel')} in the labels"
        return f"Class {c.name} is not judged: {found}."
    return ""


def _checks(
    agreement: Agreement, judged: tuple[ClassAgreement, ...], others: tuple[ClassAgreement, ...], limits: Limits
) -> tuple[_Check, ...]:
    if agreement.nonfinite:
        values = _counted(agreement.nonfinite, "value")
        sentence = f"The candidate returned NaN or infinity in {values} of its logits."
        return (_Check(damage=math.inf, sentence=sentence),)
    if not judged:
        voxels = _counted(limits.min_voxels, "voxel")
        sentence = f"No class can be judged: none has {voxels} that FP32 finds too."
        return (_Check(damage=math.inf, sentence=sentence),)
    growth = tuple(_growth_check(c, limits) for c in others)
    if not agreement.labelled:
        return (*(_agreement_check(c, limits) for c in judged), *growth)
    return (_mean_check(judged, limits), *(_class_check(c, limits) for c in judged), *growth)


def _mean_check(judged: tuple[ClassAgreement, ...], limits: Limits) -> _Check:
    loss = _mean(c.loss for c in judged)
    before, after = _mean(c.dice_reference for c in judged), _mean(c.dice_candidate for c in judged)
    subject = f"Mean Dice of the judged classes ({len(judged)})"
    return _loss_check(subject, loss, before, after, limits.mean_loss)


def _class_check(c: ClassAgreement, limits: Limits) -> _Check:
    return _loss_check(f"Class {c.name}: Dice", c.loss, c.dice_reference, c.dice_candidate, limits.class_loss)


def _loss_check(subject: str, loss: float, before: float, after: float, limit: float) -> _Check:
    sentence = (
        f"{subject} falls by {_beside(limit, loss)}, from {before:.4f} (FP32) to {after:.4f}; the limit is {limit}."
    )
    return _Check(damage=_share(loss, limit), sentence=sentence)


def _agreement_check(c: ClassAgreement, limits: Limits) -> _Check:
    dice = _beside(limits.agreement, c.between.dice)
    sentence = f"Class {c.name}: Dice against FP32's output is {dice}; the limit is {limits.agreement}."
    return _Check(damage=_share(1 - c.between.dice, 1 - limits.agreement), sentence=sentence)


def _growth_check(c: ClassAgreement, limits: Limits) -> _Check:
    fp32, candidate = c.between.n_ref, c.between.n_pred
    allowed = max(limits.min_voxels, int(GROWTH * fp32))
    sentence = (
        f"Class {c.name}, which is not judged, grows from {_counted(fp32, 'voxel')} (FP32) to {candidate}; the limit "
        f"is {fp32 + allowed}."
    )
    return _Check(damage=_share(candidate - fp32, allowed), sentence=sentence)


def _beside(limit: float, value: float) -> str:
    """A value with four decimals, or as many digits as show on which side of the limit it lies."""
    for form in (".4f", *(f".{digits}g" for digits in range(4, 17))):
        shown = float(f"{value:{form}}")
        if (shown < limit, shown > limit) == (value < limit, value > limit):
            return f"{value:{form}}"
    return f"{value:.17g}"


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _share(loss: float, limit: float) -> float:
    """A loss in units of its limit: 0 for a gain, infinity for any loss where none is allowed."""
    if loss <= 0:
        return 0.0
    return loss / limit if limit > 0 else math.inf


def _mean(values: Iterable[float]) -> float:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers)
