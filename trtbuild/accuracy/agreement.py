"""How far a candidate's logits, and the segmentations made of them, are from FP32's and from the labels.

A measurement is a value that holds only counts and sums, so that patches are measured one at a time and pooled:
`pooled(agreement_from_patch(...) for ... in patches)` keeps no logits. Dice is taken of the pooled counts, as one
segmentation of all patches together: a mean of the patches' own Dice would let a patch with ten voxels decide.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.accuracy.logit_sums import LogitSums, sums_from_logits
from trtbuild.accuracy.metrics import Overlap, differing_voxels, overlaps
from trtbuild.errors import InputError, NonFinite
from trtbuild.spec import Labels


@dataclass(frozen=True, kw_only=True)
class ClassAgreement:
    """Of one label or region: counts against the labels (None without labels) and between the two outputs.

    `reference` is FP32 against the labels, `candidate` the candidate against the labels, `between` the candidate
    against FP32's output. `foreground` is False for the background, which is measured and not judged.
    """

    name: str
    values: tuple[int, ...]
    foreground: bool
    reference: Overlap | None
    candidate: Overlap | None
    between: Overlap

    @property
    def voxels(self) -> int:
        """Voxels of the class in the labels; without labels in FP32's output."""
        return self.between.n_ref if self.reference is None else self.reference.n_ref

    @property
    def dice_reference(self) -> float:
        """Dice of FP32 against the labels; NaN without labels, and where neither holds the class."""
        return math.nan if self.reference is None else self.reference.dice

    @property
    def dice_candidate(self) -> float:
        """Dice of the candidate against the labels; NaN as for `dice_reference`."""
        return math.nan if self.candidate is None else self.candidate.dice

    @property
    def loss(self) -> float:
        """What the candidate's Dice against the labels lacks of FP32's; negative for a gain, NaN as for these."""
        return self.dice_reference - self.dice_candidate


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of a candidate with FP32 and the labels over `patches`. `classes` are in the order of the label names.

    `labelled` tells whether there were labels, `nonfinite` is the number of NaN and infinite values among the
    candidate's logits, `flipped` of `voxels` have another label than in FP32's segmentation.
    """

    classes: tuple[ClassAgreement, ...]
    labelled: bool
    patches: int
    voxels: int
    flipped: int
    nonfinite: int
    logits: LogitSums

    @property
    def flips(self) -> float:
        """Share of voxels with another label than FP32's."""
        return self.flipped / self.voxels


def agreement_from_patch(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], truth: NDArray[np.integer[Any]] | None,
    labels: Labels,
) -> Agreement:  # fmt: skip
    """What one patch shows.

    Args:
        reference: logits of FP32 (heads, *patch).
        candidate: logits of the candidate, of the same shape. NaN and infinity are counted, not refused.
        truth: label values (*patch), or None. Values below 0 (nnU-Net's -1 outside the nonzero mask) are background;
            voxels with the ignore label do not count against the labels.
        labels: what heads and values mean.

    Raises:
        InputError: the shapes do not fit, or `truth` holds a value that the model does not know.
        NonFinite: FP32's own logits are not finite.
    """
    _require_shapes(reference, candidate, truth, labels)
    if not np.isfinite(reference).all():
        raise NonFinite("The FP32 network returned NaN or infinity: there is nothing to compare with.")
    ours, theirs = segmentation_from_logits(reference, labels), segmentation_from_logits(candidate, labels)
    named = _named_regions(labels)
    regions = tuple(named.values())
    known = None if truth is None else _known_truth(truth, labels)
    between = overlaps(ours, theirs, regions)
    first, second = (
        (None,) * len(regions) if known is None else overlaps(known, output, regions, labels.ignore)
        for output in (ours, theirs)
    )
    return Agreement(
        classes=tuple(
            ClassAgreement(name=name, values=values, foreground=set(values) != {0}, reference=a, candidate=b, between=c)
            for (name, values), a, b, c in zip(named.items(), first, second, between, strict=True)
        ),
        labelled=known is not None,
        patches=1,
        voxels=ours.size,
        flipped=differing_voxels(ours, theirs),
        nonfinite=int(candidate.size - np.count_nonzero(np.isfinite(candidate))),
        logits=sums_from_logits(reference, candidate),
    )


def pooled(agreements: Iterable[Agreement]) -> Agreement:
    """All patches as one: counts and sums added. The order of the patches changes sums by rounding only.

    Raises:
        InputError: there is none, they are of different models, or only some have labels.
    """
    total: Agreement | None = None
    for agreement in agreements:
        total = agreement if total is None else _sum(total, agreement)
    if total is None:
        raise InputError("There is no patch to measure.", expected="at least one patch", got="none")
    return total


def segmentation_from_logits(logits: NDArray[np.float32], labels: Labels) -> NDArray[np.uint16]:
    """Labels (*patch) by the runtime's rule: argmax, the first of equals; or each head above 0 (sigmoid above 0.5)
    writes its value, later heads over earlier ones. NaN wins an argmax and is no region."""
    values = np.array(labels.values, np.uint16)
    if labels.decision == "argmax":
        best: NDArray[np.uint16] = values[logits.argmax(axis=0)]
        return best
    result = np.zeros(logits.shape[1:], np.uint16)
    for value, region in zip(values, logits, strict=True):
        result[region > 0] = value
    return result


def require_known_values(truth: NDArray[np.integer[Any]], labels: Labels, where: object = None) -> None:
    """Checks labels against the values that the model knows; those below 0 are background.

    Args:
        truth: label values, any shape.
        labels: of the model.
        where: what the error names: a case, a file.

    Raises:
        InputError: there are others; it names them.
    """
    known = {0, *(value for values in labels.names.values() for value in values)}
    known |= set() if labels.ignore is None else {labels.ignore}
    strange = truth[(truth > 0) & ~np.isin(truth, sorted(known))]
    if strange.size:
        raise InputError("The labels hold a value that the model does not know.", expected=sorted(known),
                         got=", ".join(map(str, np.unique(strange).tolist())), where=where,
                         hint="take the labels of its own dataset")  # fmt: skip


def facts_from_agreement(agreement: Agreement) -> dict[str, Any]:
    """For the bundle's `gates`: plain dicts, lists and scalars, numbers finite or None."""
    return {
        "classes": [_class_facts(c) for c in agreement.classes],
        "labelled": agreement.labelled,
        "patches": agreement.patches,
        "voxels": agreement.voxels,
        "flips": agreement.flips,
        "nonfinite": agreement.nonfinite,
        "error_rms": _finite(agreement.logits.error_rms),
        "error_max": _finite(agreement.logits.error_max),
    }


def _class_facts(c: ClassAgreement) -> dict[str, Any]:
    return {
        "name": c.name,
        "values": list(c.values),
        "foreground": c.foreground,
        "voxels": c.voxels,
        "dice_fp32": _finite(c.dice_reference),
        "dice_candidate": _finite(c.dice_candidate),
        "dice_between": _finite(c.between.dice),
        "voxels_fp32": c.between.n_ref,
        "voxels_candidate": c.between.n_pred,
    }


def _sum(a: Agreement, b: Agreement) -> Agreement:
    if a.labelled != b.labelled:
        raise InputError("Some patches have labels and some have not.", expected="labels for all patches or for none")
    if [(c.name, c.values) for c in a.classes] != [(c.name, c.values) for c in b.classes]:
        raise InputError("The patches are of models with different classes.",
                         expected=[c.name for c in a.classes], got=[c.name for c in b.classes])  # fmt: skip
    return Agreement(
        classes=tuple(_class_sum(one, other) for one, other in zip(a.classes, b.classes, strict=True)),
        labelled=a.labelled,
        patches=a.patches + b.patches,
        voxels=a.voxels + b.voxels,
        flipped=a.flipped + b.flipped,
        nonfinite=a.nonfinite + b.nonfinite,
        logits=a.logits + b.logits,
    )


def _class_sum(a: ClassAgreement, b: ClassAgreement) -> ClassAgreement:
    return replace(
        a,
        reference=None if a.reference is None or b.reference is None else _overlap_sum(a.reference, b.reference),
        candidate=None if a.candidate is None or b.candidate is None else _overlap_sum(a.candidate, b.candidate),
        between=_overlap_sum(a.between, b.between),
    )


def _overlap_sum(a: Overlap, b: Overlap) -> Overlap:
    return Overlap(tp=a.tp + b.tp, fp=a.fp + b.fp, fn=a.fn + b.fn, tn=a.tn + b.tn)


def _named_regions(labels: Labels) -> dict[str, tuple[int, ...]]:
    """The values of each class by its name; names that cover the same values are one class, named together."""
    names: dict[tuple[int, ...], list[str]] = {}
    for name, values in labels.names.items():
        names.setdefault(tuple(sorted(set(values))), []).append(name)
    return {", ".join(several): values for values, several in names.items()}


def _known_truth(truth: NDArray[np.integer[Any]], labels: Labels) -> NDArray[np.uint16]:
    """Labels with background where they are below 0."""
    require_known_values(truth, labels)
    floored: NDArray[np.uint16] = np.maximum(truth, 0).astype(np.uint16)
    return floored


def _require_shapes(
    reference: NDArray[Any], candidate: NDArray[Any], truth: NDArray[Any] | None, labels: Labels
) -> None:
    if reference.ndim < 2 or reference.shape[0] != labels.heads or reference.size == 0:
        raise InputError("The FP32 logits do not fit the model.", expected=f"({labels.heads}, *patch)",
                         got=reference.shape)  # fmt: skip
    if candidate.shape != reference.shape:
        raise InputError("The candidate's logits differ from FP32's in shape.", expected=reference.shape,
                         got=candidate.shape)  # fmt: skip
    for logits in (reference, candidate):
        if not np.issubdtype(logits.dtype, np.floating):
            raise InputError("Logits are not floating-point numbers.", expected="float32", got=logits.dtype)
    if truth is not None and (truth.shape != reference.shape[1:] or not np.issubdtype(truth.dtype, np.integer)):
        raise InputError("The labels do not fit the logits.", expected=f"whole numbers of shape {reference.shape[1:]}",
                         got=f"{truth.dtype} of shape {truth.shape}")  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
