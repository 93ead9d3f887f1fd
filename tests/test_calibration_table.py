"""The ScaleTable: what is in it, the same bytes each time, and strict reading."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from calibration_samples import NumpyNetwork, image, labels

from trtbuild_calibration import (
    METHODS,
    ArraySource,
    CalibrationError,
    Fingerprint,
    PatchSequence,
    Target,
    observe,
    read_table,
    sample_places,
    table_from_bytes,
    table_from_observation,
    threshold,
    write_table,
)
from trtbuild_calibration.observe import Observation

TARGETS = (Target(name="t0", sources=("t0",)), Target(name="cat", sources=("t1", "t2")))


def observation_and_coverage(count: int = 3) -> tuple[Observation, object]:
    source = ArraySource(name="fall Ä", data=image(1, 12, 12, 12), labels=labels(12, 12, 12))
    sample = sample_places([source], patch=(6, 6, 6), count=count, seed=1, classes=(1, 2, 5))
    patches = PatchSequence(sources={source.name: source}, places=sample.places, patch=(6, 6, 6))
    return observe(NumpyNetwork(), TARGETS, patches, fingerprint={}), sample.coverage


def fingerprint(**changes) -> Fingerprint:
    values = {
        "network": "ab12",
        "cases": {"fall Ä": "cd34"},
        "seed": 1,
        "patches_asked": 3,
        "patches_used": 3,
        "percentile": 99.9,
        "versions": {"trtbuild_calibration": "1", "numpy": np.__version__},
    }
    return Fingerprint(**{**values, **changes})


def table():
    observation, coverage = observation_and_coverage()
    return table_from_observation(observation, fingerprint(), coverage)


def test_a_table_holds_what_each_method_decides() -> None:
    observation, coverage = observation_and_coverage()
    made = table_from_observation(observation, fingerprint(), coverage)
    assert list(made.entries) == ["t0", "cat"]
    for name, histogram in observation.histograms.items():
        for method in METHODS:
            expected = threshold(histogram, method, percentile=99.9)
            assert made.amax(method)[name] == expected.amax
            assert made.scales(method)[name] == expected.amax / 127
        assert made.entries[name].bins == threshold(histogram, "entropy").bins
        assert made.entries[name].maximum == histogram.top
    assert made.ranges == observation.ranges
    assert made.coverage.classes[5].missed == "no case holds it"
    with pytest.raises(CalibrationError, match="no such method"):
        made.amax("mse")


def test_a_table_comes_back_from_its_file_with_the_same_bytes(tmp_path: Path) -> None:
    made = table()
    write_table(tmp_path / "scales.json", made)
    back = read_table(tmp_path / "scales.json")
    assert back == made
    assert back.to_bytes() == made.to_bytes() == table().to_bytes() == (tmp_path / "scales.json").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["scales.json"]


def test_a_shortened_calibration_makes_no_table() -> None:
    observation, coverage = observation_and_coverage()
    for changes in ({"patches_asked": 4}, {"patches_used": 2}, {"patches_asked": 4, "patches_used": 4}):
        with pytest.raises(CalibrationError, match="another number of patches"):
            table_from_observation(observation, fingerprint(**changes), coverage)


def paths(value: object, prefix: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    found = [prefix] if prefix else []
    for key, inner in value.items() if isinstance(value, dict) else ():
        found += paths(inner, (*prefix, key))
    return found


FREE = ("entries", "ranges", "cases", "versions", "patches", "classes")
PLACES = paths(json.loads(table().to_bytes()))


def changed(place: tuple, new: object) -> bytes:
    value = json.loads(table().to_bytes())
    inner = value
    for key in place[:-1]:
        inner = inner[key]
    if new is None:
        del inner[place[-1]]
    else:
        inner[place[-1]] = new
    return json.dumps(value).encode()


@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_every_value_is_checked(place: tuple) -> None:
    """Whatever stands there, a list never may; and only names of tensors, cases and classes may be absent."""
    with pytest.raises(CalibrationError) as caught:
        table_from_bytes(changed(place, []), "t.json")
    assert ".".join(place) in str(caught.value.where)
    if len(place) == 1 or place[-2] not in FREE or place[0] == "coverage":
        if place[:-1] in (("coverage", "patches"), ("coverage", "classes")):
            return
        with pytest.raises(CalibrationError, match=rf"without {place[-1]}|format"):
            table_from_bytes(changed(place, None), "t.json")
    if isinstance(place[-1], str) and len(place) > 1 and place[-2] not in FREE:
        with pytest.raises(CalibrationError, match="unknown surplus"):
            table_from_bytes(changed((*place[:-1], "surplus"), 1), "t.json")


@pytest.mark.parametrize("new", [-1.0, True, "1", 10**400, [1.0]])
@pytest.mark.parametrize(
    "place", [("entries", "t0", "maximum"), ("entries", "t0", "amax", "entropy"), ("ranges", "t2")]
)
def test_numbers_are_finite_and_not_negative(place: tuple, new: object) -> None:
    with pytest.raises(CalibrationError, match="a finite number of at least 0"):
        table_from_bytes(changed(place, new))


@pytest.mark.parametrize(
    ("place", "new", "message"),
    [
        (("format",), 2, "format"),
        (("entries", "t0", "bins"), 2049, "at most 2048"),
        (("entries", "t0", "bins"), 1.0, "a whole number"),
        (("entries", "t0", "amax", "minmax"), 1e9, "at most the maximum"),
        (("fingerprint", "seed"), -1, "a whole number"),
        (("fingerprint", "network"), 3, "a string"),
        (("coverage", "classes", "x"), {}, "labels"),
        (("coverage", "classes", "01"), {}, "labels"),
        (("coverage", "patches", "fall Ä"), True, "a whole number"),
    ],
)
def test_wrong_values_are_named(place: tuple, new: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        table_from_bytes(changed(place, new))


@pytest.mark.parametrize(
    "raw",
    [b"", b"[]", b"{", b"null", b"\xff\xfe", b'{"format": 1, "format": 1}', b'{"format": NaN}', b"[" * 100_000],
)
def test_what_is_no_table_is_refused(raw: bytes) -> None:
    with pytest.raises(CalibrationError, match=r"t\.json"):
        table_from_bytes(raw, "t.json")


def test_a_table_that_is_cut_is_refused(tmp_path: Path) -> None:
    raw = table().to_bytes()
    for length in range(0, len(raw) - 2, 37):
        (tmp_path / "t.json").write_bytes(raw[:length])
        with pytest.raises(CalibrationError, match=r"t\.json"):
            read_table(tmp_path / "t.json")
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_table(tmp_path / "none.json")
