"""The gate's measurement against nnU-Net's own functions and float64, its decisions at their limits, its patches."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gate_samples import (
    MILLION,
    Opening,
    agreement_of,
    class_of,
    losing,
    missing,
    sums_of,
    thresholds,
    unlabelled_class,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from nnunetv2.evaluation.evaluate_predictions import compute_tp_fp_fn_tn, region_or_label_to_mask
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from runner_samples import make_record
from specs import make_spec

from trtbuild.accuracy.agreement import (
    Agreement,
    agreement_from_patch,
    facts_from_agreement,
    pooled,
    segmentation_from_logits,
)
from trtbuild.accuracy.gate import GROWTH, Limits, facts_from_verdict, score, verdict
from trtbuild.accuracy.metrics import Overlap
from trtbuild.config import GateConfig
from trtbuild.errors import InputError, NonFinite, TrtbuildError
from trtbuild.source.fields import Field
from trtbuild.source.labels import labels_from_dataset
from trtbuild.spec import Labels
from trtbuild.steps.precision import gate as gate_room
from trtbuild.steps.precision.gate import Gate, open_gate
from trtbuild_calibration import ArraySource

PLAIN: dict[str, Any] = {"labels": {"background": 0, "grey": 1, "white": 2, "fluid": 3}}
IGNORING: dict[str, Any] = {"labels": {"background": 0, "a": 1, "b": 2, "ignore": 3}}
REGIONS: dict[str, Any] = {
    "labels": {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]},
    "regions_class_order": [1, 2, 3],
}
REGIONS_IGNORING: dict[str, Any] = {
    "labels": {"background": 0, "both": [1, 2], "second": [2], "ignore": 3}, "regions_class_order": [2, 1],
}  # fmt: skip
DATASETS = [PLAIN, IGNORING, REGIONS, REGIONS_IGNORING]
TWO = Labels(decision="argmax", values=(0, 1), names={"background": (0,), "a": (1,)}, foreground=(1,), ignore=None)
LIMITS = Limits()


def labels_of(dataset: dict[str, Any]) -> Labels:
    return labels_from_dataset(Field(dataset, "dataset.json"))


def nnunet_segmentation(logits: Any, dataset: dict[str, Any]) -> Any:
    manager = LabelManager(dataset["labels"], dataset.get("regions_class_order"))
    return np.asarray(manager.convert_logits_to_segmentation(logits))


def nnunet_counts(reference: Any, prediction: Any, values: tuple[int, ...], ignore: Any = None) -> tuple[int, ...]:
    masks = [region_or_label_to_mask(a.astype(np.int64), values) for a in (reference, prediction)]
    tp, fp, fn, tn = compute_tp_fp_fn_tn(*masks, ignore)
    return int(tp), int(fp), int(fn), int(tn)


def sample(dataset: dict[str, Any], seed: int, patch: tuple[int, ...] = (4, 5, 6)) -> tuple[Any, Any, Any]:
    """Logits of FP32, of a candidate near it, and labels from -1 to the ignore label."""
    rng = np.random.default_rng(seed)
    labels = labels_of(dataset)
    reference = rng.normal(0, 3, (labels.heads, *patch)).astype(np.float32)
    candidate = reference + rng.normal(0, 1, reference.shape).astype(np.float32)
    return reference, candidate, rng.integers(-1, 4, patch).astype(np.int8)


def counts(overlap: Any) -> tuple[int, ...]:
    return overlap.tp, overlap.fp, overlap.fn, overlap.tn


# --- measurement ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(dataset=st.sampled_from(DATASETS), seed=st.integers(0, 2**32 - 1))
def test_the_counts_of_every_class_and_region_are_nnunets(dataset: dict[str, Any], seed: int) -> None:
    reference, candidate, truth = sample(dataset, seed)
    found = agreement_from_patch(reference, candidate, truth, labels_of(dataset))
    ours, theirs = (nnunet_segmentation(logits, dataset) for logits in (reference, candidate))
    ignored = truth == 3 if "ignore" in dataset["labels"] else None
    floored = np.where(truth < 0, 0, truth)
    for c in found.classes:
        assert counts(c.between) == nnunet_counts(ours, theirs, c.values)
        assert counts(c.reference) == nnunet_counts(floored, ours, c.values, ignored)
        assert counts(c.candidate) == nnunet_counts(floored, theirs, c.values, ignored)
    assert [c.name for c in found.classes] == [name for name in dataset["labels"] if name != "ignore"]
    assert [c.foreground for c in found.classes] == [False] + [True] * (len(found.classes) - 1)
    assert found.flips == pytest.approx(float(np.mean(ours != theirs)))


def test_dice_of_a_class_written_out_by_hand() -> None:
    logits = {value: np.eye(2, dtype=np.float32)[value] for value in (0, 1)}
    reference = np.stack([logits[v] for v in (1, 1, 1, 0, 0, 0)], axis=1)
    candidate = np.stack([logits[v] for v in (1, 1, 0, 1, 0, 0)], axis=1)
    a = agreement_from_patch(reference, candidate, np.array([1, 1, 1, 1, 0, -1]), TWO).classes[1]
    assert (a.dice_reference, a.dice_candidate, a.between.dice) == (6 / 7, 6 / 7, 4 / 6)
    assert (a.voxels, a.loss) == (4, 0)


def test_the_first_of_equal_heads_wins_and_later_regions_lie_over_earlier_ones() -> None:
    tie = np.zeros((4, 2), np.float32)
    tie[2:, 1] = 5
    assert segmentation_from_logits(tie, labels_of(PLAIN)).tolist() == [0, 2]
    swapped = labels_of(REGIONS_IGNORING)  # heads write 2, then 1
    logits = np.array([[1, 1, -1, 0], [1, -1, 1, 0]], np.float32)
    assert segmentation_from_logits(logits, swapped).tolist() == [1, 2, 1, 0]


@settings(max_examples=40, deadline=None)
@given(dataset=st.sampled_from(DATASETS), seed=st.integers(0, 2**32 - 1), patches=st.integers(1, 5))
def test_pooled_patches_measure_as_one_large_patch(dataset: dict[str, Any], seed: int, patches: int) -> None:
    several = [sample(dataset, seed + i, (3, 4 + i)) for i in range(patches)]
    labels = labels_of(dataset)
    found = pooled(agreement_from_patch(*patch, labels) for patch in several)
    whole = agreement_from_patch(*(np.concatenate(arrays, axis=-1) for arrays in zip(*several, strict=True)), labels)
    backwards = pooled(agreement_from_patch(*patch, labels) for patch in several[::-1])
    assert found.classes == whole.classes == backwards.classes
    assert (found.voxels, found.flipped, found.patches) == (whole.voxels, whole.flipped, patches)
    assert found.logits.error_rms == pytest.approx(whole.logits.error_rms, rel=1e-12)
    assert found.logits.error_max == whole.logits.error_max


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), offset=st.sampled_from([0.0, -40.0, 1000.0]))
def test_logit_errors_are_those_of_float64(seed: int, offset: float) -> None:
    reference, candidate, _ = sample(PLAIN, seed)
    reference, candidate = reference + np.float32(offset), candidate + np.float32(offset)
    found = agreement_from_patch(reference, candidate, None, labels_of(PLAIN)).logits
    exact = reference.astype(np.float64), candidate.astype(np.float64)
    assert found.error_rms == pytest.approx(math.sqrt(np.mean((exact[1] - exact[0]) ** 2)) / exact[0].std(), rel=1e-8)
    assert found.error_max == np.abs(exact[1] - exact[0]).max() / np.abs(exact[0]).max()


def test_equal_logits_have_no_error_even_where_they_are_constant() -> None:
    flat = np.zeros((2, 3, 3), np.float32)
    found = agreement_from_patch(flat, flat, None, TWO).logits
    assert (found.error_rms, found.error_max) == (0, 0)
    found = agreement_from_patch(flat, flat + np.float32(1), None, TWO).logits
    assert (found.error_rms, found.error_max) == (math.inf, math.inf)


def test_two_names_of_one_label_are_one_class() -> None:
    labels = replace(TWO, names={"background": (0,), "left": (1,), "side": (1,)})
    reference, candidate, _ = sample({"labels": {"background": 0, "a": 1}}, 0)
    assert [c.name for c in agreement_from_patch(reference, candidate, None, labels).classes] == [
        "background", "left, side",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r, c, t: (r[:1], c[:1], t), "do not fit the model"),
        (lambda r, c, t: (r, c[:, :2], t), "differ from FP32's in shape"),
        (lambda r, c, t: (r, c, t[:2]), "labels do not fit"),
        (lambda r, c, t: (r, c, t.astype(np.float32)), "labels do not fit"),
        (lambda r, c, t: (r, c.astype(np.int32), t), "not floating-point"),
        (lambda r, c, t: (r, c, np.full_like(t, 9)), "value that the model does not know"),
        (lambda r, c, t: (r[..., :0], c[..., :0], t[..., :0]), "do not fit the model"),
    ],
)
def test_arrays_that_do_not_belong_together_are_refused(change: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        agreement_from_patch(*change(*sample(PLAIN, 0)), labels_of(PLAIN))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_fp32_that_is_not_finite_is_an_error(wrong: float) -> None:
    reference, candidate, truth = sample(PLAIN, 0)
    reference[1, 2, 3, 4] = wrong
    with pytest.raises(NonFinite):
        agreement_from_patch(reference, candidate, truth, labels_of(PLAIN))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dataset", DATASETS)
def test_a_candidate_that_is_not_finite_is_measured_and_does_not_pass(dataset: dict[str, Any], wrong: float) -> None:
    reference, _, truth = sample(dataset, 0, (16, 16, 16))
    candidate = reference.copy()
    candidate[1, 2, 3, 4:6] = wrong
    labels = labels_of(dataset)
    good = agreement_from_patch(reference, reference, truth, labels)
    bad = pooled([good, agreement_from_patch(reference, candidate, truth, labels)])
    decision = verdict(bad, LIMITS)
    assert verdict(good, LIMITS).passed
    assert not decision.passed
    assert decision.reasons == ("The candidate returned NaN or infinity in 2 values of its logits.",)
    assert score(bad, LIMITS) > score(losing(0.9), LIMITS)
    assert json.loads(json.dumps(facts_from_agreement(bad), allow_nan=False))["error_rms"] is None
    assert json.loads(json.dumps(facts_from_verdict(decision), allow_nan=False))["damage"] is None


def test_patches_that_cannot_be_pooled_are_refused() -> None:
    reference, candidate, truth = sample(PLAIN, 0)
    labelled = agreement_from_patch(reference, candidate, truth, labels_of(PLAIN))
    with pytest.raises(InputError, match="no patch"):
        pooled([])
    with pytest.raises(InputError, match="Some patches have labels"):
        pooled([labelled, agreement_from_patch(reference, candidate, None, labels_of(PLAIN))])
    with pytest.raises(InputError, match="different classes"):
        pooled([labelled, agreement_from_patch(*sample(IGNORING, 0), labels_of(IGNORING))])


def test_facts_tell_each_class_and_hold_null_where_there_is_no_number() -> None:
    reference, candidate, truth = sample(PLAIN, 0)
    facts = facts_from_agreement(agreement_from_patch(reference, candidate, None, labels_of(PLAIN)))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert [c["dice_fp32"] for c in facts["classes"]] == [None] * 4
    found = agreement_from_patch(reference, candidate, truth, labels_of(PLAIN))
    facts = facts_from_agreement(found)
    assert [c["dice_candidate"] for c in facts["classes"]] == [c.dice_candidate for c in found.classes]
    assert facts["flips"] == found.flipped / 120


# --- decisions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"mean_loss": -0.1}, {"class_loss": math.nan}, {"agreement": 1.1}, {"mean_loss": math.inf},
        {"class_loss": "0.1"}, {"agreement": True}, {"min_voxels": 0}, {"min_voxels": 1.5}, {"min_voxels": True},
    ],
)  # fmt: skip
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrtbuildError) as caught:
        Limits(**wrong)
    assert caught.value.where == next(iter(wrong))


def test_a_class_that_loses_too_much_fails_though_the_mean_does_not() -> None:
    classes = [class_of(f"organ{i}", 10_000, 100, 100) for i in range(19)]
    found = verdict(agreement_of(*classes, class_of("gland", 10_000, 100, 700)), LIMITS)
    before, after = 2 * 9900 / 19_900, 2 * 9300 / 19_300
    assert not found.passed
    assert found.reasons == (
        f"Class gland: Dice falls by {before - after:.4f}, from {before:.4f} (FP32) to {after:.4f}; the limit is 0.02.",
    )
    assert found.damage == pytest.approx((before - after) / 0.02)


def test_a_mean_that_loses_too_much_fails_though_no_class_does() -> None:
    classes = [class_of(name, 10_000, 0, 150) for name in "abcd"]
    found = verdict(agreement_of(*classes), LIMITS)
    loss = 1 - 2 * 9850 / 19_850
    assert found.reasons == (
        f"Mean Dice of the judged classes (4) falls by {loss:.4f}, from 1.0000 (FP32) to {1 - loss:.4f}; "
        "the limit is 0.005.",
    )


def test_a_gain_of_one_class_counts_in_the_mean_and_hides_no_lost_class() -> None:
    gains, loses = class_of("a", 10_000, 500, 0), class_of("b", 10_000, 0, 300)
    assert verdict(agreement_of(gains, loses), LIMITS).passed
    lost = class_of("b", 10_000, 0, 450)
    assert [r[:7] for r in verdict(agreement_of(gains, lost), LIMITS).reasons] == ["Class b"]


def test_background_is_never_judged() -> None:
    background = class_of("background", MILLION, 0, MILLION // 2, foreground=False)
    found = verdict(agreement_of(background, class_of("a", 1000, 0, 0)), LIMITS)
    assert (found.passed, found.judged, found.notes) == (True, ("a",), ())


def test_a_class_with_too_few_voxels_is_reported_and_not_judged() -> None:
    small = class_of("nerve", 99, 0, 99, missing(99, 99, invented=7))
    found = verdict(agreement_of(small, class_of("a", 100, 0, 0)), LIMITS)
    assert (found.passed, found.judged) == (True, ("a",))
    assert found.notes == (
        "Class nerve is not judged: 99 voxels in the labels, needs 100. FP32 gives it 99 voxels, the candidate 7.",
    )
    assert not verdict(agreement_of(small, class_of("a", 100, 0, 0)), Limits(min_voxels=99)).passed


def test_a_class_that_fp32_never_finds_proves_nothing() -> None:
    found = verdict(agreement_of(class_of("a", 1000, 1000, 1000)), LIMITS)
    assert found.notes == ("Class a is not judged: FP32 finds none of its 1000 voxels in the labels.",)
    assert found.reasons == ("No class can be judged: none has 100 voxels that FP32 finds too.",)
    assert (found.passed, found.judged) == (False, ())


def grown(voxels: int, fp32: int, candidate: int, labelled: bool) -> Agreement:
    """A class of `voxels` in the labels, none of which FP32 or the candidate finds, and one that is right."""
    between = Overlap(tp=min(fp32, candidate), fp=max(0, candidate - fp32), fn=max(0, fp32 - candidate), tn=MILLION)
    found = [Overlap(tp=0, fp=n, fn=voxels, tn=MILLION) if labelled else None for n in (fp32, candidate)]
    return agreement_of(
        class_of("nerve", voxels, 0, 0, between, reference=found[0], candidate=found[1]),
        class_of("a", 10_000, 50, 50) if labelled else unlabelled_class("a", 10_000, 0),
    )


@pytest.mark.parametrize("labelled", [True, False])
def test_a_class_that_the_candidate_invents_fails(labelled: bool) -> None:
    found = verdict(grown(0, 0, MILLION // 3, labelled), LIMITS)
    assert found.reasons == (
        "Class nerve, which is not judged, grows from 0 voxels (FP32) to 333333; the limit is 100.",
    )
    assert (found.passed, found.judged, found.damage) == (False, ("a",), pytest.approx(3333.33))


@pytest.mark.parametrize(
    ("voxels", "fp32", "labelled", "most"),
    [
        (0, 0, True, 100), (99, 1, True, 101), (99, 1000, True, 1100), (99, 1009, True, 1109), (99, 1010, True, 1111),
        (5000, 12_340, True, 13_574), (0, 0, False, 100), (99, 99, False, 199),
    ],
)  # fmt: skip
def test_a_class_that_is_not_judged_may_grow_up_to_its_limit(voxels: int, fp32: int, labelled: bool, most: int) -> None:
    """A hundred voxels, or a tenth of FP32's: absent, too small, or never found by FP32; with labels and without."""
    assert GROWTH == 0.1
    for candidate, damage in ((0, 0), (fp32, 0), (most, 1), (most + 1, (most + 1 - fp32) / (most - fp32))):
        found = verdict(grown(voxels, fp32, candidate, labelled), LIMITS)
        assert found.passed == (candidate <= most)
        assert found.damage == pytest.approx(damage)
        assert found.judged == ("a",)
    assert f"(FP32) to {most + 1}; the limit is {most}." in found.reasons[0]


def test_a_candidate_that_invents_a_class_does_not_win_the_contest() -> None:
    inventing, rougher = replace(grown(0, 0, 101, True), logits=sums_of(0.01)), grown(0, 0, 0, True)
    assert score(rougher, LIMITS) < score(inventing, LIMITS)
    worse = replace(grown(0, 0, 50_000, True), logits=sums_of(0.001))
    assert score(inventing, LIMITS) < score(worse, LIMITS)


def test_background_may_grow() -> None:
    background = class_of("background", 0, 0, 0, missing(0, 0, invented=MILLION), foreground=False)
    assert verdict(agreement_of(background, class_of("a", 1000, 0, 0)), LIMITS).passed


def test_what_fails_by_little_is_printed_with_the_digits_that_show_it() -> None:
    strict = Limits(mean_loss=0, class_loss=0, agreement=0.999)
    first, second = verdict(agreement_of(class_of("a", MILLION, 10, 15)), strict).reasons
    loss = 2 * (MILLION - 10) / (2 * MILLION - 10) - 2 * (MILLION - 15) / (2 * MILLION - 15)
    assert first.startswith(f"Mean Dice of the judged classes (1) falls by {loss:.4g}, from 1.0000 (FP32) to 1.0000;")
    assert second.startswith(f"Class a: Dice falls by {loss:.4g}, from")
    (close,) = verdict(agreement_of(unlabelled_class("a", MILLION, 2000)), strict).reasons
    assert close == "Class a: Dice against FP32's output is 0.998999; the limit is 0.999."
    just_above = losing(0.020001)
    assert "Dice falls by 0.020001, " in verdict(just_above, LIMITS).reasons[1]


def test_one_voxel_and_one_value_are_singular() -> None:
    found = verdict(grown(1, 1, 103, True), LIMITS)
    assert found.notes == (
        "Class nerve is not judged: 1 voxel in the labels, needs 100. FP32 gives it 1 voxel, the candidate 103.",
    )
    assert "grows from 1 voxel (FP32) to 103; the limit is 101." in found.reasons[0]
    one_value = verdict(replace(losing(0), nonfinite=1), LIMITS)
    assert one_value.reasons == ("The candidate returned NaN or infinity in 1 value of its logits.",)
    nothing = verdict(agreement_of(class_of("a", 1, 1, 1)), Limits(min_voxels=1))
    assert nothing.reasons == ("No class can be judged: none has 1 voxel that FP32 finds too.",)


def test_without_labels_each_class_is_held_against_fp32() -> None:
    good, bad, rare = unlabelled_class("a", 1000, 20), unlabelled_class("b", 1000, 40), unlabelled_class("c", 10, 10)
    found = verdict(agreement_of(good, bad, rare), LIMITS)
    assert found.reasons == (f"Class b: Dice against FP32's output is {1920 / 1960:.4f}; the limit is 0.985.",)
    assert found.judged == ("a", "b")
    assert verdict(agreement_of(good, rare), LIMITS).passed
    assert "FP32's output, needs 100" in found.notes[0]


def test_a_limit_of_nothing_lets_an_equal_candidate_pass_and_no_other() -> None:
    strict = Limits(mean_loss=0, class_loss=0, agreement=1)
    for equal, worse in (
        (class_of("a", 1000, 5, 5), class_of("a", 1000, 5, 6)),
        (unlabelled_class("a", 1000, 0), unlabelled_class("a", 1000, 1)),
    ):
        assert verdict(agreement_of(equal), strict).passed
        assert not verdict(agreement_of(worse), strict).passed


LOSSES = st.lists(st.tuples(st.integers(100, 3000), st.integers(0, 60), st.integers(0, 99)), min_size=1, max_size=5)


def labelled(classes: list[tuple[int, int, int]], error_rms: float = 0.1) -> Agreement:
    return agreement_of(*(class_of(str(i), *c) for i, c in enumerate(classes)), error_rms=error_rms)


@settings(max_examples=300, deadline=None)
@given(LOSSES, st.sampled_from([0.0, 0.005, 0.01, 0.3]), st.sampled_from([0.0, 0.02, 0.5]))
def test_the_decision_is_the_formula_of_the_issue(
    classes: list[tuple[int, int, int]], mean_loss: float, class_loss: float
) -> None:
    found = verdict(labelled(classes), Limits(mean_loss=mean_loss, class_loss=class_loss))
    losses = [2 * (n - a) / (2 * n - a) - 2 * (n - b) / (2 * n - b) for n, a, b in classes if a < n]
    mean = math.fsum(losses) / len(losses)
    assert found.passed == (mean <= mean_loss and max(losses) <= class_loss)
    assert bool(found.reasons) != found.passed


@settings(max_examples=200, deadline=None)
@given(LOSSES, LOSSES, st.floats(0, 1), st.floats(0, 1))
def test_a_candidate_that_passes_always_comes_before_one_that_does_not(
    one: list[tuple[int, int, int]], other: list[tuple[int, int, int]], error: float, other_error: float
) -> None:
    a, b = labelled(one, error), labelled(other, other_error)
    if verdict(a, LIMITS).passed and not verdict(b, LIMITS).passed:
        assert score(a, LIMITS) < score(b, LIMITS)


def test_a_gain_within_the_noise_does_not_win_over_a_smaller_error_of_the_logits() -> None:
    lucky = agreement_of(class_of("a", 10_000, 100, 60), error_rms=0.2)
    near = agreement_of(class_of("a", 10_000, 100, 105), error_rms=0.05)
    assert lucky.classes[0].loss < 0 < near.classes[0].loss < 0.0005
    assert score(near, LIMITS) < score(lucky, LIMITS)


def test_a_loss_beyond_the_noise_decides_whatever_the_logits_say() -> None:
    exact, lossy = replace(losing(0.0004), logits=sums_of(0.3)), replace(losing(0.0021), logits=sums_of(0.01))
    assert score(exact, LIMITS) < score(lossy, LIMITS)
    assert score(losing(0.004), LIMITS) < score(losing(0.0061), LIMITS) < score(losing(0.3), LIMITS)


def test_scores_part_exactly_at_the_limit() -> None:
    at = Limits(mean_loss=losing(0.01).classes[0].loss, class_loss=1)
    above = replace(at, mean_loss=math.nextafter(at.mean_loss, 0))
    assert (verdict(losing(0.01), at).passed, verdict(losing(0.01), above).passed) == (True, False)
    assert (score(losing(0.01), at)[0], score(losing(0.01), above)[0]) == (9, 10)


def test_a_contest_without_labels_is_decided_by_the_agreement_with_fp32() -> None:
    entropy, minmax = (agreement_of(unlabelled_class("a", 10_000, missed)) for missed in (50, 120))
    assert score(entropy, LIMITS) < score(minmax, LIMITS)


def test_facts_of_a_verdict_are_plain_json_with_the_limits_that_were_used() -> None:
    facts = facts_from_verdict(verdict(losing(0.007), LIMITS))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["limits"] == {"mean_loss": 0.005, "class_loss": 0.02, "agreement": 0.985, "min_voxels": 100}
    assert facts["passed"] is False
    assert facts["damage"] == pytest.approx(0.007 / 0.005, rel=1e-4)


# --- the patches and FP32's logits ------------------------------------------------------------------------------------

FP32, CANDIDATE = "fp32.onnx", "candidate.onnx"
# outside the image FP32 finds class a and the candidate class b
FUNCTIONS = {FP32: thresholds(-0.5, 0.5, 1), CANDIDATE: thresholds(-0.45, 0.4, 2)}


def case(name: str, shape: tuple[int, ...], *, labels: Any = "drawn", seed: int = 0) -> ArraySource:
    """Values in three classes, and labels that are wrong in a tenth of the voxels."""
    rng = np.random.default_rng(seed)
    data = rng.normal(0, 1, (1, *shape)).astype(np.float32)
    truth = (data[0] > -0.5).astype(np.int16) + (data[0] > 0.5)
    wrong = rng.random(shape) < 0.1
    truth[wrong] = rng.integers(-1, 3, int(wrong.sum()))
    return ArraySource(name=name, data=data, labels=truth if isinstance(labels, str) else labels)


def opened_gate(sources: Any, scratch: Path, *, patch: tuple[int, ...] = (8, 12, 10), patches: int = 5) -> Gate:
    return open_gate(
        sources, make_spec(patch=patch, spacing=(1.0,) * len(patch)), GateConfig(patches=patches), seed=0,
        reference=(make_record("null"), Path(FP32)), scratch=scratch, say=lambda line: None,
    )  # fmt: skip


@pytest.fixture
def opening(monkeypatch: pytest.MonkeyPatch) -> Opening:
    runners = Opening(FUNCTIONS)
    monkeypatch.setattr(gate_room, "open_runner", runners)
    return runners


def regions_inside(gate: Gate, sources: Any, patch: tuple[int, ...]) -> tuple[Any, Any]:
    """Values and labels of all patches without their padding, read from the images themselves."""
    by_name, values, truth = {source.name: source for source in sources}, [], []
    for place in gate.patches.places:
        lengths = (1, *patch) if len(patch) == 2 else patch
        box = tuple(slice(max(0, c), c + n) for c, n in zip(place.corner, lengths, strict=True))
        values.append(by_name[place.case].data[0][box].ravel())
        truth.append(by_name[place.case].labels[box].ravel())
    return np.concatenate(values), np.concatenate(truth)


@pytest.mark.parametrize(
    ("shape", "patch"), [((5, 7, 6), (8, 12, 10)), ((9, 30, 11), (8, 12, 10)), ((4, 7, 30), (12, 10))]
)
def test_padding_is_not_measured(
    shape: tuple[int, ...], patch: tuple[int, ...], opening: Opening, tmp_path: Path
) -> None:
    sources = [case("x", shape, seed=1)]
    with opened_gate(sources, tmp_path, patch=patch) as gate:
        found = gate.agreement(make_record("null"), Path(CANDIDATE), lambda line: None)
        kept = sum(np.load(file).size for file in gate.reference)
        assert kept < 5 * 3 * math.prod(patch), "some of it is padding"
    values, truth = regions_inside(gate, sources, patch)
    if shape == (5, 7, 6):  # the whole image lies in every patch
        assert values.size == 5 * math.prod(shape)
    fp32, candidate = ((values > low).astype(int) + (values > high) for low, high in ((-0.5, 0.5), (-0.45, 0.4)))
    assert found.voxels == values.size
    assert found.flipped == np.count_nonzero(fp32 != candidate)
    for value, c in enumerate(found.classes):
        for a, b, overlap in (
            (truth, fp32, c.reference),
            (truth, candidate, c.candidate),
            (fp32, candidate, c.between),
        ):
            one, other = (np.maximum(x, 0) == value for x in (a, b))
            assert overlap is not None
            assert overlap.dice == 2 * np.count_nonzero(one & other) / (one.sum() + other.sum())


def test_a_gate_knows_what_its_patches_hold_and_whether_there_are_labels(opening: Opening, tmp_path: Path) -> None:
    sources = [case("x", (9, 30, 11)), case("y", (9, 13, 11), seed=2)]
    with opened_gate(sources, tmp_path) as gate:
        assert (gate.labelled, gate.cases) == (True, ("x", "y"))
        assert gate.agreement(make_record("null"), Path(CANDIDATE), lambda line: None).labelled
    truth = regions_inside(gate, sources, (8, 12, 10))[1]
    assert {v: c.voxels for v, c in gate.coverage.classes.items()} == {v: np.count_nonzero(truth == v) for v in (1, 2)}
    with opened_gate([replace(source, labels=None) for source in sources], tmp_path) as gate:
        assert not gate.labelled
        assert not gate.agreement(make_record("null"), Path(CANDIDATE), lambda line: None).labelled
        assert gate.coverage.classes == {}


def test_fp32s_logits_are_gone_at_the_end(opening: Opening, tmp_path: Path) -> None:
    def interrupted() -> None:
        with opened_gate([case("x", (5, 7, 6))], tmp_path) as gate:
            assert sorted(gate.reference) == sorted(tmp_path.iterdir())
            assert len(gate.reference) == 5
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_fp32_that_fails_half_way_leaves_no_logits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[int] = []

    def failing(image: Any) -> Any:
        calls.append(len(list(tmp_path.iterdir())))
        if len(calls) == 3:
            raise NonFinite("broken")
        return FUNCTIONS[FP32](image)

    monkeypatch.setattr(gate_room, "open_runner", Opening({FP32: failing}))
    with pytest.raises(NonFinite, match="broken"):
        opened_gate([case("x", (5, 7, 6))], tmp_path)
    assert calls == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_cases_without_labels_among_others_are_named_before_anything_runs(opening: Opening, tmp_path: Path) -> None:
    sources = [case(name, (5, 7, 6), labels=None if name in "db" else "drawn") for name in "dacb"]
    with pytest.raises(InputError, match="have labels and some have none") as caught:
        opened_gate(sources, tmp_path, patches=1)
    assert "none for 2 of 4 cases" in str(caught.value)
    assert caught.value.where == "b, d"
    assert opening.opened == []


def test_a_value_that_the_model_does_not_know_is_named_with_its_case_before_anything_runs(
    opening: Opening, tmp_path: Path
) -> None:
    strange = np.ones((5, 7, 6), np.int16)
    strange[0, 0, 0], strange[4, 6, 5], strange[2] = 9, 7, -1
    sources = [case("fine", (5, 7, 6)), case("liver_12", (5, 7, 6), labels=strange)]
    with pytest.raises(InputError, match="a value that the model does not know") as caught:
        opened_gate(sources, tmp_path)
    assert (caught.value.expected, caught.value.got) == ([0, 1, 2], "7, 9")
    assert "case liver_12, patch at (" in str(caught.value)
    assert opening.opened == []
    strange[strange > 2] = 2
    with opened_gate(sources, tmp_path) as gate:
        assert gate.labelled
    assert opening.opened == [FP32]
