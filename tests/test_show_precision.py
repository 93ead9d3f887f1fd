"""inspect's view of calibrations and gates: the format leaves their keys open, so anything may stand there."""

from __future__ import annotations

import copy
import random
import unicodedata
from collections.abc import Iterator
from typing import Any

import pytest

from trtbuild import show, show_precision

CLASSES = [
    {"name": name, "voxels": 1000, "dice_candidate": 0.9, "dice_fp32": 0.91, "dice_between": 0.99}
    for name in ("background", "grey", "white")
]
AGREEMENT = {"classes": CLASSES, "labelled": True, "flips": 0.01, "error_rms": 0.1}
VERDICT = {"passed": True, "reasons": [], "notes": ["Class x is not judged."], "judged": ["grey", "white"]}
GATE: dict[str, Any] = {
    "network": "fold_0_int8", "backend": "openvino", "precision": "int8", "inference_precision": "f32",
    "cases": ["a", "b"], "patches": 2, "passed": True, "method": "minmax", "agreement": AGREEMENT, "verdict": VERDICT,
    "contest": [{"method": name, "agreement": AGREEMENT, "verdict": VERDICT} for name in ("entropy", "minmax")],
    "roll_back": {"layers": ["conv.3"], "sensitivity_runs": 3, "gate_runs": 1},
}  # fmt: skip
CALIBRATION: dict[str, Any] = {
    "network": "fold_0_fp32", "patches": 3, "seed": 0, "cases": ["a"],
    "coverage": {"patches": {"a": 3}, "forced": 1, "note": None, "classes": {
        "1": {"cases": 1, "patches": 2, "voxels": 10, "missed": None},
        "2": {"cases": 0, "patches": 0, "voxels": 0, "missed": "no case has it"}}},
    "amax": {"image": {"max": 3.0, "entropy": 2.0, "percentile": 2.5, "minmax": 3.0}},
    "method": "minmax", "layers": {"int8": ["conv.1", "conv.2"], "kept": ["conv.0: first or last layer"]},
}  # fmt: skip
HUGE = 10**5000
HOSTILE: tuple[Any, ...] = (
    5, HUGE, -1, 1e400, float("nan"), True, None, "", "\x1b[31mred", "\u202egnp", "x" * 10_000, [], [[]], [HUGE], {},
    {"a": []}, [{}] * 100,
)  # fmt: skip


def bundle(*, gates: list[Any], calibrations: list[Any], precision: str = "int8", rest: str = "f32") -> dict[str, Any]:
    engine = {
        "network": "fold_0", "backend": "openvino", "version": "1", "precision": precision,
        "inference_precision": rest, "options": {},
    }  # fmt: skip
    return {
        "path": "b.trtb", "bytes": 1, "identity": "0" * 64, "stages": [], "engines": [engine], "gates": gates,
        "calibrations": calibrations,
    }  # fmt: skip


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is wrapped."""
    monkeypatch.setenv("COLUMNS", "400")


def shown(capsys: pytest.CaptureFixture[str], **facts: Any) -> str:
    show_precision.bundle(bundle(**facts))
    return capsys.readouterr().out


def test_a_gated_bundle_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    text = shown(capsys, gates=[GATE], calibrations=[CALIBRATION])
    for line in (
        "calibration of fold_0_fp32: 3 patches of 1 case\n",
        "2 layers in INT8, thresholds by minmax:\n  conv.1\n  conv.2\n",
        "in higher precision:\n  conv.0: first or last layer\n",
        "gate of fold_0_int8 in int8, openvino: passed on 2 patches of a, b\n",
        "rolled back to higher precision: conv.3 (3 sensitivity and 1 gate run)\n",
        "  Class x is not judged.\n",
        "int8, rest f32",
    ):
        assert line in text
    assert "no gate" not in text
    assert "no case has it" in text


def test_one_patch_is_no_patches(capsys: pytest.CaptureFixture[str]) -> None:
    gate, calibration = {**GATE, "patches": 1}, {**CALIBRATION, "patches": 1, "layers": {"int8": ["conv.1"]}}
    text = shown(capsys, gates=[gate], calibrations=[calibration])
    assert "1 patch of 1 case\n" in text
    assert "passed on 1 patch of" in text
    assert "1 layer in INT8" in text


def test_a_failed_gate_leaves_no_layer_in_int8(capsys: pytest.CaptureFixture[str]) -> None:
    gate = {**GATE, "passed": False}
    text = shown(capsys, gates=[gate], calibrations=[CALIBRATION], precision="fp32")
    assert "2 layers would be in INT8 (the gate did not pass: engines are FP32), thresholds by minmax:" in text
    assert "layers in INT8" not in text
    assert "NOT PASSED" in text
    assert "no gate" not in text


@pytest.mark.parametrize(
    ("precision", "rest", "said"), [("int8", "f32", "int8"), ("fp16", "f32", "fp16"), ("fp32", "bf16", "bf16")]
)
def test_the_gate_names_the_precision_that_it_judged(
    precision: str, rest: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = {**GATE, "passed": False, "precision": precision, "inference_precision": rest, "network": "fold_0_fp32"}
    text = shown(capsys, gates=[gate], calibrations=[], precision="fp32")
    assert f"gate of fold_0_fp32 in {said}, openvino: NOT PASSED" in text


@pytest.mark.parametrize(
    ("precision", "rest", "said"),
    [("int8", "f32", True), ("fp16", "f32", True), ("fp32", "bf16", True), ("fp32", "f32", False)],
)
def test_an_ungated_bundle_below_fp32_says_so(
    precision: str, rest: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown(capsys, gates=[], calibrations=[], precision=precision, rest=rest)
    assert ("no gate judged this bundle" in text) == said


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something stands in nested dicts and lists."""
    if path:
        yield path
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield from places(value[key], (*path, key))


def changed(entry: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    """A copy with another value there; without the key where it is `KeyError`."""
    result = copy.deepcopy(entry)
    place: Any = result
    for key in path[:-1]:
        place = place[key]
    if value is KeyError:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return result


def assert_harmless(text: str) -> None:
    assert len(text) < 100_000
    assert not [c for c in text if unicodedata.category(c) in ("Cc", "Cf") and c != "\n"]


@pytest.mark.parametrize("kind", ["gates", "calibrations"])
@pytest.mark.parametrize("number", range(len(HOSTILE) + 1))
def test_whatever_stands_anywhere_is_shown_and_obeyed_by_no_terminal(
    kind: str, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    value = HOSTILE[number] if number < len(HOSTILE) else KeyError
    entry = GATE if kind == "gates" else CALIBRATION
    for path in places(entry):
        text = shown(capsys, **{"gates": [], "calibrations": [], kind: [changed(entry, path, value)]})
        assert_harmless(text)
    for whole in (value, [value]):
        if value is not KeyError:
            assert_harmless(shown(capsys, **{"gates": [], "calibrations": [], kind: [whole]}))


@pytest.mark.parametrize("seed", range(20))
def test_several_wrong_values_at_once_are_shown(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    random_ = random.Random(seed)
    gate, calibration = GATE, CALIBRATION
    for _ in range(4):
        gate = changed(gate, random_.choice(list(places(gate))), random_.choice(HOSTILE))
        calibration = changed(calibration, random_.choice(list(places(calibration))), random_.choice(HOSTILE))
    assert_harmless(shown(capsys, gates=[gate], calibrations=[calibration]))


def test_what_is_not_understood_is_shown_as_it_is_but_not_endlessly(capsys: pytest.CaptureFixture[str]) -> None:
    missed = changed(CALIBRATION, ("coverage", "classes", "1", "missed"), 5)
    assert "'network': 'fold_0_fp32'" in shown(capsys, gates=[], calibrations=[missed])
    assert "<integer of 16610 bits>" in shown(capsys, gates=[], calibrations=[{"patches": HUGE}])
    assert len(show_precision.bounded([["x" * 10_000] * 1000] * 1000)) <= show_precision.LONGEST + 1
    assert show_precision.bounded({"a": "\x1b[31m\u202e"}) == r"{'a': '\x1b[31m\u202e'}"


def test_text_of_a_bundle_is_printed_harmlessly(capsys: pytest.CaptureFixture[str]) -> None:
    escape = "\x1b[31m"
    facts = bundle(gates=[], calibrations=[])
    facts["engines"][0] |= dict.fromkeys(("network", "backend", "version", "inference_precision"), escape)
    facts["engines"][0]["options"] = {escape: escape}
    show.bundle(facts)
    assert_harmless(capsys.readouterr().out)
    show_precision.quantized({"output": escape, "int8": ["a"], "left": [escape]})
    assert_harmless(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("precision", "rest", "phrase"),
    [("int8", "f32", "int8, rest f32"), ("fp32", "bf16", "bf16"), ("fp16", "f32", "f32")],
)
def test_what_an_engine_computes_in(precision: str, rest: str, phrase: str) -> None:
    assert show.computes_in(precision, rest) == phrase
