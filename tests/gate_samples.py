"""Agreements with chosen numbers, and runners that are functions, for tests of what the gate makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

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


class FunctionRunner:
    """A runner of a function from an image (C, *patch) to logits (heads, *patch)."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __enter__(self) -> FunctionRunner:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def infer(self, batch: Any) -> Any:
        return np.stack([self.function(image) for image in batch]).astype(np.float32)


class Opening:
    """What `open_runner` is replaced by: opens functions by the names of model files, and keeps their names."""

    def __init__(self, functions: Mapping[str, Callable[[Any], Any]]) -> None:
        self.functions, self.opened = functions, list[str]()

    def __call__(self, record: Any, model: Path) -> FunctionRunner:
        self.opened.append(model.name)
        return FunctionRunner(self.functions[model.name])


def thresholds(low: float, high: float, outside: int) -> Callable[[Any], Any]:
    """Three classes by the value of the first channel: below `low`, up to `high`, above; `outside` where it is 0."""

    def logits(image: Any) -> Any:
        found = np.where(image[0] == 0, outside, (image[0] > low).astype(int) + (image[0] > high))
        return np.stack([found == value for value in range(3)])

    return logits
