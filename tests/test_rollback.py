"""The search for layers to roll back: planted networks, brute force, and callers that break what it assumes."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from gate_samples import losing
from hypothesis import given, settings
from hypothesis import strategies as st

from trtbuild.accuracy.agreement import Agreement, agreement_from_patch, pooled
from trtbuild.accuracy.gate import Limits, Verdict, verdict
from trtbuild.accuracy.rollback import GIVE_BACK, RollBack, facts_from_roll_back, roll_back
from trtbuild.errors import Cancelled, InputError
from trtbuild.spec import Labels

LIMITS = Limits()
LIMIT = LIMITS.mean_loss
DAMAGES = st.lists(st.floats(0, 3 * LIMIT), min_size=1, max_size=9)


def judged(agreement: Agreement) -> Verdict:
    return verdict(agreement, LIMITS)


@dataclass
class Simulated:
    """A network whose Dice falls by `loss(rolled back layers)`; keeps what was asked of it."""

    layers: tuple[str, ...]
    loss: Callable[[frozenset[str]], float]
    alone: Callable[[str], float]
    asked: list[frozenset[str]] = field(default_factory=list)
    given: list[Agreement] = field(default_factory=list)
    measured: list[str] = field(default_factory=list)

    def evaluate(self, kept: frozenset[str]) -> Agreement:
        self.asked.append(kept)
        self.given.append(losing(min(1.0, max(0.0, self.loss(kept)))))
        return self.given[-1]

    def sensitivity(self, layer: str) -> float:
        self.measured.append(layer)
        return self.alone(layer)

    def search(self, **options: Any) -> RollBack:
        return roll_back(self.layers, self.evaluate, self.sensitivity, judged, **options)

    def passes(self, kept: frozenset[str]) -> bool:
        return judged(losing(min(1.0, max(0.0, self.loss(kept))))).passed


def additive(damages: list[float], alone: list[float] | None = None) -> Simulated:
    """Each quantised layer costs its damage; its sensitivity is that too, unless `alone` misleads."""
    names = tuple(f"conv{i:02}" for i in range(len(damages)))
    cost, seen = dict(zip(names, damages, strict=True)), dict(zip(names, alone or damages, strict=True))
    return Simulated(names, lambda kept: sum(cost[n] for n in names if n not in kept), seen.__getitem__)


def hold_to_the_contract(network: Simulated, found: RollBack, give_back: int = GIVE_BACK) -> None:
    """What every answer promises, however the network behaves."""
    n, k = len(network.layers), len(found.layers)
    at = network.asked.index(frozenset(found.layers))
    assert found.agreement is network.given[at], "the answer was not itself measured"
    assert found.verdict == judged(network.given[at])
    assert found.passed == found.verdict.passed
    assert len(set(network.asked)) == len(network.asked), "a set was run twice"
    assert frozenset() not in network.asked
    assert found.gate_runs == len(network.asked)
    assert found.sensitivity_runs == len(network.measured) == (n if found.passed else 0)
    assert found.gate_runs <= 1 + math.ceil(math.log2(n)) + found.refinements
    assert found.refinements <= min(give_back, n - 1)
    if found.passed:
        errors = [s.error for s in found.sensitivities]
        assert errors == sorted(errors, reverse=True)
        order = [s.layer for s in found.sensitivities]
        assert sorted(order) == sorted(network.layers)
        assert [order.index(layer) for layer in found.layers] == sorted(order.index(layer) for layer in found.layers)
        assert k >= 1
    else:
        assert found.layers == network.layers
        assert network.asked == [frozenset(network.layers)]


def test_one_broken_and_two_mildly_bad_layers_of_23_are_found_and_no_other() -> None:
    rng = np.random.default_rng(5)
    damages = rng.uniform(0, LIMIT / 60, 23).tolist()
    damages[7], damages[2], damages[19] = 0.6, 1.2 * LIMIT, 0.95 * LIMIT
    network = additive(damages)
    assert not network.passes(frozenset({"conv07", "conv02"}))
    found = network.search()
    hold_to_the_contract(network, found)
    assert found.passed
    assert found.layers == ("conv07", "conv02", "conv19")
    assert [s.error for s in found.sensitivities[:3]] == [0.6, 1.2 * LIMIT, 0.95 * LIMIT]
    assert (found.sensitivity_runs, found.refinements) == (23, 2)
    assert network.asked == [frozenset(s.layer for s in found.sensitivities[:k]) for k in (23, 11, 5, 2, 3)] + [
        frozenset({"conv07", "conv19"}), frozenset({"conv02", "conv19"}),
    ]  # fmt: skip


def test_a_harmless_layer_that_looks_worse_than_a_bad_one_is_given_back() -> None:
    damages, alone = [0.5, 0.0, 0.0, 0.01, 0.0], [9.0, 8.0, 7.0, 6.0, 1.0]
    found = additive(damages, alone).search()
    assert found.layers == ("conv00", "conv03")
    assert found.refinements == 3
    kept = additive(damages, alone).search(give_back=0)
    assert kept.layers == ("conv00", "conv01", "conv02", "conv03")
    assert additive(damages, alone).search(give_back=1).layers == ("conv00", "conv01", "conv03")


def test_where_rolling_back_all_does_not_help_it_says_so_after_one_run() -> None:
    network = Simulated(tuple("abcdefgh"), lambda kept: 0.3, lambda layer: 1.0)
    found = network.search()
    hold_to_the_contract(network, found)
    assert not found.passed
    assert (found.gate_runs, found.sensitivity_runs, found.sensitivities) == (1, 0, ())
    assert "falls by 0.3000" in found.verdict.reasons[0]


@settings(max_examples=200, deadline=None)
@given(damages=DAMAGES, give_back=st.integers(0, 9))
def test_with_additive_damage_it_is_the_smallest_set_that_brute_force_finds(
    damages: list[float], give_back: int
) -> None:
    network = additive([d + LIMIT / 1000 for d in damages])
    if network.passes(frozenset()):
        return  # the search is for candidates that failed
    found = network.search(give_back=give_back)
    hold_to_the_contract(network, found, give_back)
    sizes = range(1, len(damages) + 1)
    smallest = next(
        k for k in sizes if any(network.passes(frozenset(c)) for c in itertools.combinations(network.layers, k))
    )
    assert found.passed
    assert len(found.layers) == smallest  # sensitivity is the damage, so the worst k are the best k


@settings(max_examples=200, deadline=None)
@given(damages=DAMAGES, seed=st.integers(0, 2**32 - 1))
def test_with_misleading_sensitivities_every_layer_of_the_answer_is_needed(damages: list[float], seed: int) -> None:
    network = additive([d + LIMIT / 1000 for d in damages], np.random.default_rng(seed).random(len(damages)).tolist())
    if network.passes(frozenset()):
        return
    found = network.search(give_back=len(damages))
    hold_to_the_contract(network, found, len(damages))
    assert found.passed
    for layer in found.layers:
        assert not network.passes(frozenset(found.layers) - {layer})


@settings(max_examples=200, deadline=None)
@given(n=st.integers(1, 40), bad=st.sets(st.integers(0, 39), min_size=1), seed=st.integers(0, 2**32 - 1))
def test_any_set_of_bad_layers_is_rolled_back(n: int, bad: set[int], seed: int) -> None:
    bad = {i % n for i in bad}
    noise = np.random.default_rng(seed).uniform(0, LIMIT / 100, n)
    network = additive([0.1 if i in bad else float(noise[i]) for i in range(n)])
    found = network.search()
    hold_to_the_contract(network, found)
    assert set(found.layers) == {f"conv{i:02}" for i in bad}
    k = len(found.layers)
    assert found.refinements == min(GIVE_BACK, k - 1)


@settings(max_examples=400, deadline=None)
@given(
    n=st.integers(1, 33), share=st.floats(0, 1), seed=st.integers(0, 2**32 - 1), give_back=st.integers(0, 40),
    wild=st.lists(st.sampled_from([0.0, -1.0, 1.0, 5.0, math.inf, -math.inf, math.nan]), min_size=33, max_size=33),
)  # fmt: skip
def test_a_gate_that_answers_at_random_never_gets_an_answer_that_was_not_run(
    n: int, share: float, seed: int, give_back: int, wild: list[float]
) -> None:
    rng = np.random.default_rng(seed)
    names = tuple(f"n{i}" for i in range(n))
    sensitivity = dict(zip(names, wild[:n], strict=True)).__getitem__
    network = Simulated(names, lambda kept: 0.0 if rng.random() < share else 0.5, sensitivity)
    hold_to_the_contract(network, network.search(give_back=give_back), give_back)


def test_a_gate_that_only_one_middle_set_passes_misleads_the_bisection_into_layers_and_not_into_a_lie() -> None:
    names = tuple(f"n{i:02}" for i in range(16))
    only = frozenset(names[:3])
    network = Simulated(names, lambda kept: 0.0 if kept in (only, frozenset(names)) else 0.5, lambda n: -float(n[1:]))
    found = network.search()
    hold_to_the_contract(network, found)
    assert found.passed
    assert found.layers == names


def test_layers_whose_lone_quantisation_gives_nan_come_first_and_ties_keep_their_order() -> None:
    seen = {"a": 1.0, "b": math.nan, "c": 1.0, "d": math.inf, "e": 2.0}
    network = Simulated(tuple(seen), lambda kept: 0.0 if {"b", "d"} <= kept else 0.9, seen.__getitem__)
    found = network.search()
    assert [s.layer for s in found.sensitivities] == ["b", "d", "e", "a", "c"]
    assert found.layers == ("b", "d")
    facts = facts_from_roll_back(found)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["sensitivities"][:3] == [{"layer": layer, "error": error} for layer, error in
                                          (("b", None), ("d", None), ("e", 2.0))]  # fmt: skip
    assert facts["layers"] == ["b", "d"]


def test_one_layer_needs_one_run() -> None:
    found = additive([0.5]).search()
    assert (found.layers, found.gate_runs, found.sensitivity_runs) == (("conv00",), 1, 1)


@settings(max_examples=50, deadline=None)
@given(damages=DAMAGES, seed=st.integers(0, 2**32 - 1))
def test_progress_never_passes_its_total_and_every_stage_ends_full(damages: list[float], seed: int) -> None:
    calls: list[tuple[str, int, int]] = []
    network = additive(damages, np.random.default_rng(seed).random(len(damages)).tolist())
    network.search(progress=lambda *call: calls.append(call))
    stages = [stage for stage, _ in itertools.groupby(calls, key=lambda call: call[0])]
    assert stages == ["roll back all", "sensitivity", "bisection", "giving back"]
    for _, group in itertools.groupby(calls, key=lambda call: call[0]):
        done = [(d, total) for _, d, total in group]
        assert [d for d, _ in done] == sorted(d for d, _ in done)
        assert done[-1][0] == done[-1][1]
        assert all(d < total for d, total in done[:-1])


def test_the_caller_stops_the_search_by_raising() -> None:
    network = additive([0.1] * 9)

    def stop(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("sensitivity", 4):
            raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        network.search(progress=stop)
    assert len(network.measured) == 4


@pytest.mark.parametrize(
    ("layers", "give_back", "message"),
    [((), 8, "no quantised layer"), (("a", "b", "a"), 8, "listed twice"), (("a",), -1, "out of range")],
)
def test_a_search_that_cannot_start_says_why(layers: tuple[str, ...], give_back: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        roll_back(layers, lambda kept: losing(0), lambda layer: 0.0, judged, give_back=give_back)


# --- a real network, in NumPy: three linear layers with fake-quantised inputs -----------------------------------------

LABELS = Labels(decision="argmax", values=(0, 1, 2), names={"background": (0,), "a": (1,), "b": (2,)},
                foreground=(1, 2), ignore=None)  # fmt: skip
LAYERS = ("first", "second", "third")


def fake_quantised(x: Any, amax: float) -> Any:
    """x on the grid of 8 bits: round(x / scale), ties to even, clamped to -128..127, times scale."""
    scale = amax / 127
    return np.clip(np.round(x / scale), -128, 127) * scale


def linear_network(quantised: frozenset[str], scales: dict[str, float], weights: Any, x: Any) -> Any:
    """(heads, voxels) of (channels, voxels); the input of each layer in `quantised` is fake-quantised."""
    for name, weight in zip(LAYERS, weights, strict=True):
        seen = fake_quantised(x, scales[name]) if name in quantised else x
        x = weight @ seen
        if name != "third":
            x = np.maximum(x, 0.01 * x)
    return x.astype(np.float32)


def trained_network(rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Weights whose head is fitted to three clouds of voxels, and three patches of such voxels with their labels."""
    centres = rng.normal(0, 1.5, (3, 4))
    truth = [rng.integers(0, 3, 3000) for _ in range(3)]
    patches = [(centres[labels] + rng.normal(0, 0.6, (3000, 4))).T for labels in truth]
    weights = [rng.normal(0, 1 / math.sqrt(i), (o, i)) for o, i in ((16, 4), (16, 16))]
    features = linear_network(frozenset(), {}, [*weights, np.eye(16)], np.concatenate(patches, axis=1))
    wanted = np.eye(3)[np.concatenate(truth)]
    head = np.linalg.lstsq(features.T.astype(np.float64), wanted, rcond=None)[0].T
    return [*weights, head], patches, truth


def largest_inputs(weights: Any, x: Any) -> dict[str, float]:
    """amax of each layer's input: min-max calibration."""
    amax = {}
    for name, weight in zip(LAYERS, weights, strict=True):
        amax[name] = float(np.abs(x).max())
        x = weight @ x
        x = np.maximum(x, 0.01 * x)
    return amax


def test_a_scale_that_is_a_hundred_times_too_small_is_found_in_a_real_network() -> None:
    weights, patches, truth = trained_network(np.random.default_rng(11))
    none = frozenset[str]()
    amax = largest_inputs(weights, np.concatenate(patches, axis=1))
    broken = amax | {"second": amax["second"] / 100}

    def measured(quantised: frozenset[str], scales: dict[str, float]) -> Agreement:
        outputs = ([linear_network(layers, scales, weights, x) for layers in (none, quantised)] for x in patches)
        return pooled(
            agreement_from_patch(*logits, labels, LABELS) for logits, labels in zip(outputs, truth, strict=True)
        )

    everything = frozenset(LAYERS)
    assert verdict(measured(everything, amax), LIMITS).passed
    assert not verdict(measured(everything, broken), LIMITS).passed
    found = roll_back(
        LAYERS,
        lambda kept: measured(everything - kept, broken),
        lambda layer: measured(frozenset({layer}), broken).logits.error_rms,
        judged,
    )
    assert found.passed
    assert found.layers == ("second",)
    assert found.sensitivities[0].error > 10 * found.sensitivities[1].error
    assert found.agreement == measured(everything - {"second"}, broken)
