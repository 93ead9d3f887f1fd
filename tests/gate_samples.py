"""Agreements with chosen numbers, for tests of what is decided by them."""

from __future__ import annotations

from typing import Any

from trtbuild.accuracy.agreement import Agreement, ClassAgreement
from trtbuild.accuracy.logit_sums import LogitSums
from trtbuild.accuracy.metrics import Overlap

MILLION = 10**6


def missing(voxels: int, missed: int, invented: int = 0) -> Overlap:
    """`missed` of `voxels` are not found, `invented` are found elsewhere."""
    return Overlap(tp=voxels - missed, fp=invented, fn=missed, tn=MILLION)


def class_of(
    name: str, voxels: int, missed: int, candidate_missed: int, between: Overlap | None = None, **changes: Any
) -> ClassAgreement:
    values: dict[str, Any] = {
        "name": name, "values": (hash(name) % 1000 + 1,), "foreground": True,
        "reference": missing(voxels, missed), "candidate": missing(voxels, candidate_missed),
        "between": between or missing(voxels, abs(candidate_missed - missed)),
    }  # fmt: skip
    return ClassAgreement(**(values | changes))


def unlabelled_class(name: str, voxels: int, missed: int) -> ClassAgreement:
    return class_of(name, voxels, 0, 0, missing(voxels, missed), reference=None, candidate=None)


def sums_of(error_rms: float) -> LogitSums:
    """FP32's logits have mean 0 and standard deviation 1."""
    return LogitSums(values=1, total=0.0, squares=1.0, largest=1.0, difference_squares=error_rms**2,
                     largest_difference=error_rms)  # fmt: skip


def agreement_of(*classes: ClassAgreement, error_rms: float = 0.1, nonfinite: int = 0) -> Agreement:
    return Agreement(
        classes=classes, labelled=any(c.reference is not None for c in classes), patches=1, voxels=MILLION, flipped=0,
        nonfinite=nonfinite, logits=sums_of(error_rms),
    )  # fmt: skip


def losing(loss: float) -> Agreement:
    """One class of ten million voxels, all of which FP32 finds; the candidate's Dice is `loss` below 1.

    Missing k of n voxels gives a Dice of 2 (n - k) / (2 n - k), which is solved for k.
    """
    voxels = 10 * MILLION
    return agreement_of(class_of("organ", voxels, 0, round(2 * voxels * loss / (1 + loss))))
