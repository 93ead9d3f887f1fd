"""Patches: positions and padding as in nnU-Net, every class covered, and which cases calibrate at all."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from calibration_samples import DEMO_CASES, image, labels
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild_calibration import (
    ArraySource,
    CalibrationError,
    PatchSequence,
    Place,
    cases_from_folder,
    open_case,
    read_patch,
    sample_places,
    split_cases,
    validation_cases,
)
from trtbuild_calibration.coverage import coverage_from_json

SHAPES = st.tuples(*[st.integers(1, 12)] * 3)


def source(name: str = "a", shape: tuple[int, int, int] = (9, 8, 7), channels: int = 2, **options) -> ArraySource:
    return ArraySource(name=name, data=image(channels, *shape), labels=labels(*shape, **options))


def blobs(name: str, shape: tuple[int, int, int], voxels: dict[int, tuple[int, int, int]]) -> ArraySource:
    """Background with one voxel of each class."""
    seg = np.zeros(shape, np.int16)
    for label, voxel in voxels.items():
        seg[voxel] = label
    return ArraySource(name=name, data=image(1, *shape), labels=seg)


def nnunet_loader(patch: tuple[int, ...], ignore: bool = False):
    """nnU-Net's own rules for boxes, with the network's patch size as the sampled one."""
    from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader

    loader = nnUNetDataLoader.__new__(nnUNetDataLoader)
    loader.need_to_pad = np.zeros(3, int)
    loader.patch_size = (1, *patch) if len(patch) == 2 else patch
    loader.has_ignore = ignore
    loader.annotated_classes_key = (-1, 0, 1)
    return loader


@given(shape=SHAPES, patch=SHAPES, corner=st.tuples(*[st.integers(-11, 11)] * 3), seed=st.integers(0, 9))
@settings(max_examples=300, deadline=None)
def test_reading_equals_nnunets_crop_and_pad(shape, patch, corner, seed) -> None:
    from acvl_utils.cropping_and_padding.bounding_boxes import crop_and_pad_nd

    one = source(shape=shape, seed=seed)
    place = Place(case="a", corner=corner, forced=None)
    box = [[start, start + length] for start, length in zip(corner, patch, strict=True)]
    if any(stop <= 0 or start >= size for (start, stop), size in zip(box, shape, strict=True)):
        with pytest.raises(CalibrationError, match="outside its image"):
            read_patch(one, place, patch)
        return
    found = read_patch(one, place, patch)
    np.testing.assert_array_equal(found.data, crop_and_pad_nd(one.data, box, 0))
    np.testing.assert_array_equal(found.labels, crop_and_pad_nd(one.labels, box, -1))
    assert found.data.dtype == np.float32
    assert found.labels.dtype == np.int16
    image_part = tuple(slice(max(0, start), stop) for start, stop in box)
    np.testing.assert_array_equal(found.data[(slice(None), *found.inside)], one.data[(slice(None), *image_part)])
    np.testing.assert_array_equal(found.labels[found.inside], one.labels[image_part])
    outside = np.ones(patch, bool)
    outside[found.inside] = False
    assert not found.data[:, outside].any()
    assert (found.labels[outside] == -1).all()


@given(shape=SHAPES, patch=SHAPES, flat=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_free_places_lie_where_nnunets_would(shape, patch, flat, seed) -> None:
    """All of nnU-Net's random corners, drawn with the lowest and the highest number, enclose ours."""
    patch = patch[1:] if flat else patch
    loader = nnunet_loader(patch)
    lowest, _ = _with_randint(lambda low, high: low, lambda: loader.get_bbox(shape, False, None))
    highest, _ = _with_randint(lambda low, high: high - 1, lambda: loader.get_bbox(shape, False, None))
    one = ArraySource(name="a", data=image(1, *shape))
    places = sample_places([one], patch=patch, count=6, seed=seed).places
    for place in places:
        assert all(a <= c <= b for a, c, b in zip(lowest, place.corner, highest, strict=True))
    if all(high - low < 2 for low, high in zip(lowest, highest, strict=True)):
        many = sample_places([one], patch=patch, count=300, seed=seed).places
        corners = itertools.product(*(range(low, high + 1) for low, high in zip(lowest, highest, strict=True)))
        assert {place.corner for place in many} == set(corners)


def _with_randint(choice, call):
    saved = np.random.randint
    np.random.randint = choice
    try:
        return call()
    finally:
        np.random.randint = saved


@given(shape=SHAPES, patch=SHAPES, flat=st.booleans(), where=st.tuples(*[st.floats(0, 0.999)] * 3))
@settings(max_examples=300, deadline=None)
def test_forced_places_are_nnunets(shape, patch, flat, where) -> None:
    """One voxel of the class, so nnU-Net has no choice either."""
    patch = patch[1:] if flat else patch
    voxel = tuple(int(part * length) for part, length in zip(where, shape, strict=True))
    one = blobs("a", shape, {1: voxel})
    theirs, _ = nnunet_loader(patch).get_bbox(shape, True, {1: np.array([[0, *voxel]])})
    (place,) = sample_places([one], patch=patch, count=1, seed=0, foreground=1.0).places
    assert place == Place(case="a", corner=tuple(int(c) for c in theirs), forced=1)
    assert 1 in read_patch(one, place, patch).labels


def test_with_an_ignore_label_other_patches_are_centred_on_what_is_annotated() -> None:
    """nnU-Net with has_ignore; the ignored class itself is never forced and does not count."""
    seg = np.full((20, 20, 20), 9, np.int16)
    seg[13, 4, 17] = 0
    one = ArraySource(name="a", data=image(1, 20, 20, 20), labels=seg)
    locations = {(-1, 0, 1): np.array([[0, 13, 4, 17]])}
    theirs, _ = nnunet_loader((5, 5, 5), ignore=True).get_bbox((20, 20, 20), False, locations)
    sample = sample_places([one], patch=(5, 5, 5), count=4, seed=3, ignore=9)
    assert {place.corner for place in sample.places} == {tuple(theirs)}
    assert {place.forced for place in sample.places} == {None}
    assert 9 not in sample.coverage.classes


def test_a_third_of_the_patches_is_forced_the_last_ones() -> None:
    sample = sample_places([source(shape=(30, 30, 30))], patch=(4, 4, 4), count=32, seed=0)
    forced = [place.forced for place in sample.places]
    assert forced[:21] == [None] * 21  # round(32 * (1 - 0.33)), as a batch of nnU-Net's
    assert sorted((forced[21:].count(1), forced[21:].count(2))) == [5, 6]


def test_classes_take_turns_and_the_rarest_comes_first() -> None:
    seg = np.zeros((40, 40, 40), np.int16)
    seg[:20], seg[25], seg[30, 3, 3:6] = 1, 2, 3
    one = ArraySource(name="a", data=image(1, 40, 40, 40), labels=seg)
    sample = sample_places([one], patch=(4, 4, 4), count=7, seed=0, foreground=1.0)
    assert [place.forced for place in sample.places] == [3, 2, 1, 3, 2, 1, 3]


def test_every_class_is_covered_although_each_is_one_voxel() -> None:
    voxels = {label: (label * 3, 40 - label * 3, label) for label in range(1, 13)}
    cases = [blobs(f"c{i}", (41, 41, 41), {k: v for k, v in voxels.items() if k % 3 == i}) for i in range(3)]
    sample = sample_places(cases, patch=(4, 4, 4), count=14, seed=1)
    assert sample.coverage.missed == ()
    assert all(entry.cases == 1 and entry.patches >= 1 for entry in sample.coverage.classes.values())
    reader = PatchSequence(sources={case.name: case for case in cases}, places=sample.places, patch=(4, 4, 4))
    seen = set().union(*(np.unique(reader.labelled(i).labels).tolist() for i in range(len(reader))))
    assert set(voxels) <= seen


def test_too_few_patches_are_said_to_be_too_few() -> None:
    one = blobs("a", (41, 41, 41), {label: (label * 3, label * 3, label * 3) for label in range(1, 13)})
    coverage = sample_places([one], patch=(3, 3, 3), count=5, seed=1, classes=range(1, 14)).coverage
    assert len(coverage.missed) == 8
    assert coverage.classes[13].missed == "no case holds it"
    assert all("too few" in coverage.classes[label].missed for label in coverage.missed if label != 13)
    assert coverage_from_json(json.loads(json.dumps(coverage.to_json())), "x") == coverage


def test_coverage_counts_what_the_patches_hold() -> None:
    cases = [source("a", (20, 21, 22), seed=1), source("b", (3, 30, 30), seed=2, values=(-1, 0, 2))]
    sample = sample_places(cases, patch=(6, 6, 6), count=9, seed=4)
    by_name = {case.name: case for case in cases}
    read = [read_patch(by_name[place.case], place, (6, 6, 6)).labels for place in sample.places]
    for label, entry in sample.coverage.classes.items():
        assert entry.voxels == sum(int((one == label).sum()) for one in read)
        assert entry.patches == sum(bool((one == label).any()) for one in read)
    assert {label: entry.cases for label, entry in sample.coverage.classes.items()} == {1: 1, 2: 2}
    assert sum(sample.coverage.patches.values()) == 9
    assert abs(sample.coverage.patches["a"] - sample.coverage.patches["b"]) <= 4


def test_the_order_of_the_cases_does_not_matter_but_the_seed_does() -> None:
    cases = [source(name, (20, 20, 20), seed=number) for number, name in enumerate("abcde")]
    first = sample_places(cases, patch=(5, 5, 5), count=8, seed=7)
    assert sample_places(cases[::-1], patch=(5, 5, 5), count=8, seed=7) == first
    assert sample_places(cases, patch=(5, 5, 5), count=8, seed=8).places != first.places
    assert len({place.case for place in first.places[:5]}) == 5  # cases take turns


def test_without_labels_places_are_uniform_and_the_coverage_says_so() -> None:
    one = ArraySource(name="a", data=image(1, 8, 5, 5))
    sample = sample_places([one], patch=(5, 5, 5), count=4000, seed=0)
    drawn = np.bincount([place.corner[0] for place in sample.places], minlength=4)
    assert len(drawn) == 4
    assert np.abs(drawn / 4000 - 0.25).max() < 0.03
    assert "no segmentations" in sample.coverage.note
    assert sample.coverage.classes == {}
    mixed = sample_places([one, source("b", (8, 8, 8))], patch=(5, 5, 5), count=9, seed=0)
    assert "some cases have no segmentation" in mixed.coverage.note
    assert {place.case for place in mixed.places if place.forced is not None} == {"b"}


def test_the_voxel_is_drawn_uniformly_across_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small slabs and pieces: the voxel that is found is the one that NumPy counts to."""
    from trtbuild_calibration import labels as module

    monkeypatch.setattr(module, "SLAB", 40)
    monkeypatch.setattr(module, "PIECE", 7)
    one = source(shape=(11, 5, 6), seed=3)
    index = module.index_labels(one)
    assert len(index.slabs) == 11
    for label in (-1, 0, 1, 2):
        voxels = np.argwhere(one.labels == label)
        assert index.counts[label] == len(voxels)
        for number in (0, len(voxels) // 2, len(voxels) - 1):
            found = module.voxel_of(one, index, lambda value, label=label: value == label, number)
            assert found == tuple(voxels[number])


class Counting:
    """A source that keeps count of the voxels it is asked for at once."""

    def __init__(self, inner: ArraySource) -> None:
        self.name, self.shape, self._inner, self.largest = inner.name, inner.shape, inner, 0

    def read(self, box):
        return self._inner.read(box)

    def read_labels(self, box):
        found = self._inner.read_labels(box)
        self.largest = max(self.largest, found.size)
        return found


def test_labels_are_read_in_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    from trtbuild_calibration import labels as module

    monkeypatch.setattr(module, "SLAB", 1000)
    one = Counting(source(shape=(40, 20, 20)))
    sample_places([one], patch=(4, 4, 4), count=6, seed=0)
    assert one.largest <= 1000


def test_two_dimensions_take_one_slice() -> None:
    one = source(shape=(5, 30, 30))
    sample = sample_places([one], patch=(8, 9), count=6, seed=0)
    reader = PatchSequence(sources={"a": one}, places=sample.places, patch=(8, 9))
    patch = reader.labelled(5)
    z, y, x = sample.places[5].corner
    assert patch.data.shape == (2, 8, 9)
    assert patch.labels.shape == (8, 9)
    assert 0 <= z < 5
    inside = one.data[:, z, max(0, y) : y + 8, max(0, x) : x + 9]
    np.testing.assert_array_equal(patch.data[:, : inside.shape[1], : inside.shape[2]], inside)
    np.testing.assert_array_equal(patch.data[(slice(None), *patch.inside)], inside)
    np.testing.assert_array_equal(patch.labels[patch.inside], one.labels[z, max(0, y) : y + 8, max(0, x) : x + 9])
    assert sample.coverage.missed == ()


def test_two_dimensions_know_their_padding() -> None:
    found = read_patch(source(shape=(5, 6, 7)), Place(case="a", corner=(2, -1, 3), forced=None), (9, 8))
    assert found.inside == (slice(1, 7), slice(0, 4))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_patch_that_is_not_finite_is_named(bad: float) -> None:
    data = image(1, 6, 6, 6)
    data[0, 3, 3, 3] = bad
    one = ArraySource(name="case7", data=data)
    with pytest.raises(CalibrationError, match=r"NaN or infinity[^$]*1 of 64 values[^$]*case7, patch at \(1, 2, 0\)"):
        read_patch(one, Place(case="case7", corner=(1, 2, 0), forced=None), (4, 4, 4))


def test_the_demo_cases_are_sampled() -> None:
    sources = [open_case(case, channels=1) for case in cases_from_folder(DEMO_CASES)]
    sample = sample_places(sources, patch=(64, 64, 64), count=6, seed=0, classes=(1, 2))
    assert sample.coverage.missed == ()
    assert min(sample.coverage.patches.values()) >= 1
    reader = PatchSequence(sources={s.name: s for s in sources}, places=sample.places, patch=(64, 64, 64))
    assert all(reader[i].shape == (1, 64, 64, 64) and reader[i].std() > 0 for i in range(6))


def test_what_cannot_be_sampled_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no cases"):
        sample_places([], patch=(4, 4, 4), count=1, seed=0)
    with pytest.raises(CalibrationError, match="the same name"):
        sample_places([source(), source()], patch=(4, 4, 4), count=1, seed=0)
    with pytest.raises(CalibrationError, match="patch size"):
        sample_places([source()], patch=(4,), count=1, seed=0)
    with pytest.raises(CalibrationError, match="patch size"):
        sample_places([source()], patch=(4, 0, 4), count=1, seed=0)
    with pytest.raises(CalibrationError, match="number of patches"):
        sample_places([source()], patch=(4, 4, 4), count=0, seed=0)
    with pytest.raises(CalibrationError, match="seed"):
        sample_places([source()], patch=(4, 4, 4), count=1, seed=-1)
    with pytest.raises(CalibrationError, match="share"):
        sample_places([source()], patch=(4, 4, 4), count=1, seed=0, foreground=1.5)
    with pytest.raises(CalibrationError, match="no label"):
        sample_places([source()], patch=(4, 4, 4), count=1, seed=0, classes=[-1])


def test_cases_are_split_for_calibration_and_gate() -> None:
    names = [f"case{i}" for i in range(20)]
    calibration, gate = split_cases(names[::-1], 3)
    assert (len(calibration), len(gate)) == (16, 4)
    assert sorted(calibration + gate) == sorted(names)
    assert split_cases(names, 3) == (calibration, gate)
    assert split_cases(names, 4) != (calibration, gate)
    assert split_cases(names, 3, ["case5", "case11", "elsewhere"])[1] == ("case11", "case5")
    assert split_cases(["a", "b"], 0)[0] + split_cases(["a", "b"], 0)[1] in (("a", "b"), ("b", "a"))
    assert split_cases(["only"], 0) == (("only",), ())
    for validation in ([], ["elsewhere"], names):
        with pytest.raises(CalibrationError, match="leave nothing"):
            split_cases(names, 0, validation)
    with pytest.raises(CalibrationError, match="different names"):
        split_cases(["a", "a"], 0)
    with pytest.raises(CalibrationError, match="seed"):
        split_cases(["a", "b"], -1)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        "[]",
        '[{"train": ["a"]}]',
        '[{"train": ["a"], "val": ["b"], "test": []}]',
        '[{"train": ["a"], "val": "b"}]',
        '[{"train": ["a"], "val": [1]}]',
        '[{"train": ["a", "b"], "val": ["b"]}]',
        "[" * 100_000,
    ],
)
def test_a_list_of_folds_is_read_strictly(tmp_path: Path, content: str) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=r"not nnU-Net's[^$]*splits_final\.json"):
        validation_cases(path, 0)


def test_the_validation_cases_of_a_fold(tmp_path: Path) -> None:
    path = tmp_path / "splits_final.json"
    path.write_text(json.dumps([{"train": ["a", "b"], "val": ["c"]}, {"train": ["c"], "val": ["a", "b"]}]))
    assert validation_cases(path, 1) == ("a", "b")
    for fold in (2, -1):
        with pytest.raises(CalibrationError, match="folds 0 to 1"):
            validation_cases(path, fold)
    with pytest.raises(CalibrationError, match="cannot be read"):
        validation_cases(tmp_path / "none.json", 0)
