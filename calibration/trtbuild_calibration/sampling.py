"""Which patches: positions as nnU-Net's training samples them.

Positions, the share of patches with a forced class, clipping and padding are those of `nnunetv2`'s `data_loader.py`
with the network's own patch size (training samples a larger one and cuts it after augmentation). Three things differ,
all for the sake of coverage: cases take turns in shuffled order instead of being drawn with replacement; a forced
class is the next in turn, the rarest first, instead of a drawn one; and as long as a class is in no patch, one more
patch is forced to hold it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trtbuild_calibration.coverage import Coverage, coverage_of
from trtbuild_calibration.errors import CalibrationError
from trtbuild_calibration.labels import LabelIndex, count_labels, index_labels, voxel_of
from trtbuild_calibration.patches import Corner, Place, read_labels_at, spatial
from trtbuild_calibration.sources import Source

FOREGROUND = 0.33
"""nnU-Net's `oversample_foreground_percent`: the share of patches that are centred on a voxel of a class."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Places in the order in which they are read, and what they cover."""

    places: tuple[Place, ...]
    coverage: Coverage


def sample_places(
    sources: Sequence[Source],
    *,
    patch: Sequence[int],
    count: int,
    seed: int,
    classes: Sequence[int] | None = None,
    ignore: int | None = None,
    foreground: float = FOREGROUND,
) -> Sample:
    """Draws `count` places, the same ones for the same cases and seed in whatever order the cases come.

    Args:
        sources: the cases.
        patch: (Z, Y, X), or (Y, X) for a 2-D network, whose patch is one slice of Z.
        classes: labels that the patches shall cover; None takes those above 0 that occur.
        ignore: nnU-Net's ignore label: never forced, and other patches are centred on a voxel that is annotated.
        foreground: share of forced patches, at the end of the list as in a batch of nnU-Net's.

    Raises:
        CalibrationError: no sources, two of one name, a wrong patch, a count below 1, or a damaged segmentation.
    """
    ordered = sorted(sources, key=lambda source: source.name)
    _check(ordered, count, seed, foreground, classes)
    shape = spatial(patch)
    indices = {source.name: index_labels(source) for source in ordered}
    held = {name: None if index is None else index.counts for name, index in indices.items()}
    wanted = _rarest_first(held, classes, ignore)
    present = [label for label in wanted if any(counts and counts.get(label) for counts in held.values())]
    draw = _Draw(ordered, indices, shape, ignore, np.random.default_rng(seed))
    free = round(count * (1 - foreground)) if present else count
    places = [draw.free() for _ in range(free)]
    places += [draw.forced(present[turn % len(present)]) for turn in range(count - free)]
    counted = [_count(draw.by_name[place.case], place, shape) for place in places]
    while free and (missing := [label for label in present if not any(counts.get(label) for counts in counted)]):
        free -= 1
        places[free] = draw.forced(missing[0])
        counted[free] = _count(draw.by_name[places[free].case], places[free], shape)
    drawn = [(place.case, place.forced is not None) for place in places]
    coverage = coverage_of([source.name for source in ordered], drawn, held, counted, sorted(wanted))
    return Sample(places=tuple(places), coverage=coverage)


class _Draw:
    """The random choices, in the order in which they are asked for."""

    def __init__(
        self,
        sources: Sequence[Source],
        indices: Mapping[str, LabelIndex | None],
        patch: Corner,
        ignore: int | None,
        generator: np.random.Generator,
    ) -> None:
        self.by_name = {source.name: source for source in sources}
        self._indices, self._patch, self._ignore, self._generator = indices, patch, ignore, generator
        self._turns: dict[int | None, list[str]] = {}

    def free(self) -> Place:
        """A patch that need not hold any class: anywhere, or where something is annotated."""
        source = self.by_name[self._next_case(None)]
        if self._ignore is not None and (place := self._centred(source, lambda label: label != self._ignore)):
            return place
        z, y, x = (int(self._generator.integers(low, high + 1)) for low, high in _bounds(source, self._patch))
        return Place(case=source.name, corner=(z, y, x), forced=None)

    def forced(self, label: int) -> Place:
        """A patch centred on a voxel of this class, in a case that holds it."""
        place = self._centred(self.by_name[self._next_case(label)], lambda found: found == label)
        if place is None:
            raise IndexError(label)
        return replace(place, forced=label)

    def _centred(self, source: Source, wanted: Callable[[int], bool]) -> Place | None:
        """Centred on a drawn voxel whose label is wanted; None where there is none."""
        index = self._indices[source.name]
        number = sum(count for label, count in index.counts.items() if wanted(label)) if index else 0
        if index is None or not number:
            return None
        voxel = voxel_of(source, index, wanted, int(self._generator.integers(number)))
        bounds = _bounds(source, self._patch)
        # not clipped at the other end, as in nnU-Net: a patch may reach beyond the image and is padded there
        z, y, x = (max(low, v - p // 2) for v, p, (low, _) in zip(voxel, self._patch, bounds, strict=True))
        return Place(case=source.name, corner=(z, y, x), forced=None)

    def _next_case(self, label: int | None) -> str:
        """Cases take turns; each round has an order of its own."""
        turn = self._turns.setdefault(label, [])
        if not turn:
            names = [name for name, index in self._indices.items() if label is None or _holds(index, label)]
            turn += [names[int(i)] for i in self._generator.permutation(len(names))]
        return turn.pop()


def _bounds(source: Source, patch: Corner) -> list[tuple[int, int]]:
    """Lowest and highest corner of a free patch on each axis.

    An image that is smaller than the patch is padded on both sides (nnU-Net's `get_bbox`): both bounds are then below
    0, and the image lies in the middle give or take a voxel.
    """
    bounds = []
    for size, length in zip(source.shape[1:], patch, strict=True):
        pad = max(0, length - size)
        bounds.append((-pad // 2, size + pad // 2 + pad % 2 - length))
    return bounds


def _holds(index: LabelIndex | None, label: int) -> bool:
    return index is not None and index.counts.get(label, 0) > 0


def _rarest_first(
    held: Mapping[str, Mapping[int, int] | None], classes: Sequence[int] | None, ignore: int | None
) -> list[int]:
    """The labels to cover, those with the fewest voxels in all cases first."""
    total: Counter[int] = Counter()
    for counts in held.values():
        total.update(counts or {})
    labels = {int(label) for label in classes} if classes is not None else {label for label in total if label > 0}
    return sorted(labels - {ignore}, key=lambda label: (total[label], label))


def _count(source: Source, place: Place, patch: Corner) -> Mapping[int, int]:
    labels = read_labels_at(source, place, patch)
    return {} if labels is None else count_labels(labels)


def _check(sources: Sequence[Source], count: int, seed: int, foreground: float, classes: Sequence[int] | None) -> None:
    names = [source.name for source in sources]
    if not names:
        raise CalibrationError("There are no cases to take patches from.", hint="give at least one preprocessed case")
    twice = [name for name, following in itertools.pairwise(names) if name == following]
    if twice:
        raise CalibrationError("Two cases have the same name.", got=", ".join(twice), hint="rename one of them")
    if count < 1:
        raise CalibrationError("The number of patches is wrong.", expected="at least 1", got=count)
    if seed < 0:
        raise CalibrationError("The seed is wrong.", expected="at least 0", got=seed)
    if not 0 <= foreground <= 1:
        raise CalibrationError("The share of forced patches is wrong.", expected="0 to 1", got=foreground)
    if classes is not None and min(classes, default=0) < 0:
        raise CalibrationError("A class is no label.", expected="labels of at least 0", got=min(classes))
