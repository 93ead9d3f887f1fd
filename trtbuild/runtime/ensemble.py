"""Several configurations or models become one segmentation: mean of their probabilities, or a vote of their labels.

nnU-Net writes every member's full-resolution probabilities to disk and averages the files. Here each member's logits
stay on its own grid; blocks of slices of the image are interpolated, averaged and decided one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.runtime.slabs import Logits
from trtbuild.spec import Labels, ModelSpec
from trtbuild.volume.back import WayBack, label_type, probability_block

BLOCK_BYTES = 64 << 20  # of one block of mean probabilities: large enough that its overhead does not show


@dataclass(frozen=True, kw_only=True, eq=False)
class MemberLogits:
    """What one member says: logits (heads, Z, Y, X) on its network's grid, its model, and its way back."""

    logits: Logits
    spec: ModelSpec
    way: WayBack

    @property
    def shape(self) -> tuple[int, ...]:
        """The image (Z, Y, X) in its own axis order."""
        return tuple(self.way.grid.shape[axis] for axis in self.spec.transpose_backward)


@dataclass(frozen=True, kw_only=True, eq=False)
class Consensus:
    """Labels (Z, Y, X) on the image's grid, and where asked for mean probabilities and disagreement."""

    segmentation: NDArray[Any]
    probabilities: NDArray[np.float32] | None
    disagreement: NDArray[np.float32] | None


def consensus_from_logits(
    members: Sequence[MemberLogits], weights: Sequence[float], *, probabilities: bool, disagreement: bool, threads: int
) -> Consensus:
    """The mean of the members' probabilities, decided as nnU-Net's `ensemble_folders` does.

    Args:
        members: at least one; all with the same image and the same labels.
        weights: one positive number per member; the mean is divided by their sum.
        probabilities: also return the mean (heads, Z, Y, X).
        disagreement: also return the entropy of the mean over its largest possible value.
        threads: for the interpolation.
    """
    labels, shape = members[0].spec.labels, members[0].shape
    segmentation = np.empty(shape, dtype=label_type(labels))
    mean = np.empty((labels.heads, *shape), dtype=np.float32) if probabilities else None
    entropy = np.empty(shape, dtype=np.float32) if disagreement else None
    for block in _blocks(shape, labels.heads):
        here = _mean_probabilities(members, weights, block, threads)
        segmentation[block] = decided(here, labels)
        if mean is not None:
            mean[(slice(None), *block)] = here
        if entropy is not None:
            entropy[block] = entropy_of_probabilities(here, labels)
    return Consensus(segmentation=segmentation, probabilities=mean, disagreement=entropy)


def consensus_from_votes(
    segmentations: Sequence[NDArray[Any]], labels: Labels, weights: Sequence[float], *, disagreement: bool
) -> Consensus:
    """The label with the largest weight of votes in every voxel; of equals the first in the order of `labels.values`.

    The disagreement is the entropy of the shares of the votes over that of as many labels as there are.
    """
    values = list(dict.fromkeys((0, *labels.values)))
    shape = segmentations[0].shape
    segmentation = np.empty(shape, dtype=segmentations[0].dtype)
    entropy = np.empty(shape, dtype=np.float32) if disagreement else None
    for block in _blocks(shape, 4):
        best = np.zeros(segmentation[block].shape, dtype=np.float32)
        total = np.zeros_like(best)
        for value in values:
            share = np.zeros_like(best)
            for one, weight in zip(segmentations, weights, strict=True):
                share += np.float32(weight / sum(weights)) * (one[block] == value)
            wins = share > best
            segmentation[block][wins] = value
            best[wins] = share[wins]
            total -= np.where(share > 0, share * np.log(np.maximum(share, np.float32(1e-30))), np.float32(0))
        if entropy is not None:
            entropy[block] = np.clip(total / np.log(max(2, len(values))), 0, 1)
    return Consensus(segmentation=segmentation, probabilities=None, disagreement=entropy)


def decided(probabilities: NDArray[np.float32], labels: Labels) -> NDArray[Any]:
    """Labels (…) from probabilities (heads, …): argmax, or every region above 0.5 over the ones before it."""
    values = np.array(labels.values, dtype=label_type(labels))
    if labels.decision == "argmax":
        best: NDArray[Any] = values[probabilities.argmax(axis=0)]
        return best
    result = np.zeros(probabilities.shape[1:], dtype=values.dtype)
    for value, region in zip(values, probabilities, strict=True):
        result[region > 0.5] = value
    return result


def entropy_of_probabilities(probabilities: NDArray[np.float32], labels: Labels) -> NDArray[np.float32]:
    """0 where one label is certain, 1 where all are equally likely; for regions the mean of each one's own."""

    def surprise(p: NDArray[np.float32]) -> NDArray[np.float32]:
        result: NDArray[np.float32] = -p * np.log(np.maximum(p, np.float32(1e-30)))
        return result

    if labels.decision == "argmax":
        share = surprise(probabilities).sum(axis=0) / np.float32(np.log(max(2, labels.heads)))
    else:
        both = surprise(probabilities) + surprise(1 - probabilities)
        share = both.mean(axis=0) / np.float32(np.log(2))
    result: NDArray[np.float32] = np.clip(share, 0, 1)
    return result


def _blocks(shape: tuple[int, ...], heads: int) -> Iterator[tuple[slice, slice, slice]]:
    z, y, x = shape
    depth = max(1, BLOCK_BYTES // (4 * heads * y * x))
    for first in range(0, z, depth):
        yield slice(first, min(first + depth, z)), slice(0, y), slice(0, x)


def _mean_probabilities(
    members: Sequence[MemberLogits], weights: Sequence[float], block: tuple[slice, slice, slice], threads: int
) -> NDArray[np.float32]:
    equal = len(set(weights)) == 1  # then summed and divided, as nnU-Net does
    mean: NDArray[np.float32] | None = None
    for member, weight in zip(members, weights, strict=True):
        here = _block_probabilities(member, block, threads)
        if not equal:
            here *= np.float32(weight / sum(weights))
        mean = here if mean is None else np.add(mean, here, out=mean)
    if mean is None:
        raise ValueError("an ensemble has at least one member")
    if equal:
        mean /= np.float32(len(members))
    return mean


def _block_probabilities(member: MemberLogits, block: tuple[slice, slice, slice], threads: int) -> NDArray[np.float32]:
    """Probabilities (heads, z, y, x) of a block of the image; outside the crop all background."""
    spec, grid = member.spec, member.way.grid
    turned = [block[axis] for axis in spec.transpose_forward]
    result = np.zeros((spec.labels.heads, *(s.stop - s.start for s in turned)), dtype=np.float32)
    if spec.labels.decision == "argmax":
        result[0] = 1
    common = [slice(max(s.start, b.start), min(s.stop, b.stop)) for s, b in zip(turned, grid.box, strict=True)]
    if all(s.start < s.stop for s in common):
        inside = tuple(slice(c.start - s.start, c.stop - s.start) for c, s in zip(common, turned, strict=True))
        z, y, x = (slice(c.start - b.start, c.stop - b.start) for c, b in zip(common, grid.box, strict=True))
        result[(slice(None), *inside)] = probability_block(member.logits, member.way, (z, y, x), threads=threads)
    return np.ascontiguousarray(result.transpose(0, *(axis + 1 for axis in spec.transpose_backward)))
