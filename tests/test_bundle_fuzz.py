"""Whatever stands in bundle.json, opening it gives exactly that or a BundleError, and nothing else."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bundle_samples import write_sample
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trtbuild.bundle import open_bundle
from trtbuild.errors import BundleError
from trtbuild.spec import json_from_value

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
    | st.sampled_from([0, 1, -1, 2**31, 2**63, 10**30, 1e308, "", "../x", "fold_0_fp32", "plans.json",
                       "networks/a.onnx", "\ud800", "\0", "0" * 64, "zscore", "argmax", 1, 8, True])
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(scope="module")
def sample() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield write_sample(Path(folder)).path


def exact(value: Any) -> Any:
    """A form in which true is not 1, but 1 is 1.0 (as JSON has it)."""
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, list):
        return [exact(item) for item in value]
    return (type(value).__name__, value) if isinstance(value, bool) else value


def opens_equal_or_raises(sample: Path, text: bytes) -> bool:
    (sample / "bundle.json").write_bytes(text)
    try:
        bundle = open_bundle(sample)
    except BundleError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        str(refused).encode("utf-8")
        assert refused.hint
        return False
    assert exact(json_from_value(bundle.manifest)) == exact(json.loads(text))
    return True


def places(data: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value."""
    keys = list(data) if isinstance(data, dict) else list(range(len(data))) if isinstance(data, list) else []
    return [(data, key) for key in keys] + [place for key in keys for place in places(data[key])]


@pytest.fixture(scope="module")
def good(sample: Path) -> bytes:
    return (sample / "bundle.json").read_bytes()


@FUZZ
@given(data=st.data(), seed=st.integers(0, 2**32), rounds=st.integers(1, 4))
def test_values_keys_and_lists_changed_at_random(sample: Path, good: bytes, data: Any, seed: int, rounds: int) -> None:
    tree, choose = json.loads(good), random.Random(seed)
    for _ in range(rounds):
        found = places(tree)
        if not found:
            break
        container, key = choose.choice(found)
        match choose.randrange(5):
            case 0 | 1:
                container[key] = data.draw(VALUES)
            case 2:
                del container[key]
            case 3:
                other, other_key = choose.choice(found)
                container[key] = json.loads(json.dumps(other[other_key]))
            case 4 if isinstance(container, dict):
                container[data.draw(st.text(max_size=10))] = data.draw(VALUES)
            case _:
                container.append(container[key]) if isinstance(container, list) else None
    opens_equal_or_raises(sample, json.dumps(tree).encode())


@FUZZ
@given(seed=st.integers(0, 2**32), rounds=st.integers(1, 5))
def test_bytes_changed_at_random(sample: Path, good: bytes, seed: int, rounds: int) -> None:
    text, choose = bytearray(good), random.Random(seed)
    for _ in range(rounds):
        at = choose.randrange(len(text))
        match choose.randrange(4):
            case 0:
                text[at] ^= 1 << choose.randrange(8)
            case 1:
                text[at] = choose.choice(b'{}[]",:0123456789eE+-.\\untf ')
            case 2:
                del text[at : at + choose.randrange(1, 30)]
            case _:
                text[at:at] = text[at : at + choose.randrange(1, 60)]
    opens_equal_or_raises(sample, bytes(text))


@FUZZ
@given(text=st.binary(max_size=200) | VALUES.map(lambda value: json.dumps(value).encode()))
def test_anything_at_all(sample: Path, text: bytes) -> None:
    opens_equal_or_raises(sample, text)


@FUZZ
@given(extensions=st.dictionaries(st.text(max_size=10), VALUES, max_size=4))
def test_extensions_keep_every_json_value(sample: Path, good: bytes, extensions: Any) -> None:
    text = json.dumps(json.loads(good) | {"extensions": extensions}).encode()
    wide = any(isinstance(value, int) and not -(2**63) <= value < 2**63 for value in scalars(extensions))
    numbers = all(abs(value) < float("inf") for value in scalars(extensions) if isinstance(value, float))
    whole = not any("\ud800" <= character <= "\udfff" for text in scalars(extensions) if isinstance(text, str)
                    for character in text)  # fmt: skip
    assert opens_equal_or_raises(sample, text) == (whole and numbers and not wide)


def scalars(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *(scalar for item in value.values() for scalar in scalars(item))]
    return [scalar for item in value for scalar in scalars(item)] if isinstance(value, list) else [value]


def test_the_sample_itself_opens(sample: Path, good: bytes) -> None:
    assert opens_equal_or_raises(sample, good)
