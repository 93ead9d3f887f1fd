"""Observation: what is counted, in how much memory, and that an interruption leaves no trace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from calibration_samples import NumpyNetwork, image

from trtbuild_calibration import BINS, CalibrationError, Progress, Target, observe
from trtbuild_calibration.network import pack

PATCHES = [image(2, 6, 7, 5, seed=seed) * np.float32(seed + 1) for seed in range(3)]
TARGETS = (
    Target(name="t0", sources=("t0",)),
    Target(name="joined", sources=("t1", "t3")),
    Target(name="t3", sources=("t3",)),
)
ASKED = {"network": "abc", "seed": 4}
BUDGET = 4000  # bytes: t0 (1000) and t1 (2000) in one group, t3 (4000) in another


def run(network: NumpyNetwork | None = None, patches=PATCHES, targets=TARGETS, **options):
    options = {"budget_bytes": BUDGET, "fingerprint": ASKED, **options}
    return observe(network or NumpyNetwork(), targets, patches, **options)


def content(observation) -> tuple:
    counts = {name: (one.top, one.counts.tobytes()) for name, one in observation.histograms.items()}
    return dict(observation.ranges), counts, observation.patches


def test_ranges_and_histograms_are_numpys() -> None:
    network, found = NumpyNetwork(), run()
    values = {name: np.stack([np.abs(network.tensor(p, name)) for p in PATCHES]) for name in network.names}
    assert found.ranges == {name: float(array.max()) for name, array in values.items()}  # of t2 too
    assert found.patches == 3
    for target in TARGETS:
        joined = np.concatenate([values[source].ravel() for source in target.sources]).astype(np.float64)
        histogram = found.histograms[target.name]
        assert histogram.top == joined.max()
        np.testing.assert_array_equal(histogram.counts, np.histogram(joined, BINS, (0, joined.max()))[0])


def test_sources_are_packed_by_bytes_in_the_order_of_the_network() -> None:
    sizes = {"a": 100, "b": 50, "c": 60, "huge": 999, "unused": 1, "d": 10}
    targets = [Target(name=name, sources=(name,)) for name in ("d", "huge", "c", "b", "a")]
    targets.append(Target(name="cat", sources=("a", "d")))
    assert pack(targets, sizes, 150) == (("a", "b"), ("c",), ("huge",), ("d",))
    assert pack(targets, sizes, 10**6) == (("a", "b", "c", "huge", "d"),)
    assert pack(targets, sizes, 1) == (("a",), ("b",), ("c",), ("huge",), ("d",))


def test_a_source_of_several_targets_runs_once() -> None:
    network = NumpyNetwork()
    run(network)
    assert network.opened == [("maxima",), ("t0", "t1"), ("t3",)]
    assert network.passes == 3 * len(PATCHES)


def test_the_budget_does_not_change_the_result() -> None:
    assert content(run(budget_bytes=1)) == content(run(budget_bytes=10**9)) == content(run())


def test_no_activation_is_kept() -> None:
    network = NumpyNetwork()
    run(network, patches=PATCHES * 4)
    assert network.alive_at_call == [0] * 24  # without the help of the garbage collector


class Drawn:
    """Patches that are made when they are asked for; it knows how many are alive then."""

    def __init__(self) -> None:
        self.alive: list[int] = []
        self._made: list = []

    def __len__(self) -> int:
        return len(PATCHES)

    def __getitem__(self, index: int) -> np.ndarray:
        import weakref

        self.alive.append(sum(made() is not None for made in self._made))
        patch = PATCHES[index].copy()
        self._made.append(weakref.ref(patch))
        return patch


def test_one_patch_at_a_time() -> None:
    patches = Drawn()
    assert content(run(patches=patches)) == content(run())
    assert patches.alive == [0] * 9


@pytest.mark.parametrize("passes", range(10))
def test_an_observation_goes_on_where_it_was_interrupted(tmp_path: Path, passes: int) -> None:
    """An interruption of any forward pass, and another one right after: the result is the same to the bit."""
    state = tmp_path / "state.npz"
    if passes < 9:
        with pytest.raises(KeyboardInterrupt):
            run(NumpyNetwork(fail_after=passes), state=state)
        with pytest.raises(KeyboardInterrupt):
            run(NumpyNetwork(fail_after=0), state=state)
    network = NumpyNetwork()
    assert content(run(network, state=state)) == content(run())
    assert network.passes == 9 - (passes if passes < 9 else 0)
    assert [path.name for path in tmp_path.iterdir()] == ["state.npz"]
    again = NumpyNetwork(fail_after=0)
    assert content(run(again, state=state)) == content(run())
    assert again.opened == []  # all is done


@pytest.mark.parametrize("step", range(1, 10))
def test_progress_may_stop_it_too(tmp_path: Path, step: int) -> None:
    def stop(progress: Progress) -> None:
        if progress.done == step:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        run(state=tmp_path / "state.npz", progress=stop)
    network = NumpyNetwork()
    assert content(run(network, state=tmp_path / "state.npz")) == content(run())
    assert network.passes == 9 - step


def test_an_interruption_in_the_middle_of_counting_leaves_no_half_counted_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    module = sys.modules["trtbuild_calibration.observe"]
    expected, real, calls = content(run()), module.add, []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 4:  # the second tensor of a pass whose first one is counted
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(state=tmp_path / "state.npz")
    assert content(run(state=tmp_path / "state.npz")) == expected


def test_progress_says_what_is_left() -> None:
    seen: list[Progress] = []
    run(progress=seen.append)
    assert [one.phase for one in seen] == ["maxima"] * 3 + ["histograms"] * 6
    assert [one.done for one in seen] == list(range(1, 10))
    assert {one.total for one in seen} == {9}
    assert all(one.seconds_left >= 0 for one in seen)
    assert seen[-1].seconds_left == 0


def test_the_state_is_written_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed can write nothing any more: what counts is what lies on the disk at that moment."""
    import sys

    monkeypatch.setattr(sys.modules["trtbuild_calibration.observe"], "INTERVAL", 0.0)
    path, kept = tmp_path / "state.npz", []

    def look(progress: Progress) -> None:
        if path.exists():
            kept.append((progress.done, path.read_bytes()))

    expected = content(run(state=path, progress=look))
    assert [done for done, _ in kept] == list(range(2, 10))
    for done, raw in kept:
        path.write_bytes(raw)
        network = NumpyNetwork()
        assert content(run(network, state=path)) == expected
        assert network.passes == 9 - (done - 1)


def interrupted_state(folder: Path) -> Path:
    path = folder / "state.npz"
    with pytest.raises(KeyboardInterrupt):
        run(NumpyNetwork(fail_after=5), state=path)
    return path


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fingerprint": {**ASKED, "seed": 5}}, "seed"),
        ({"fingerprint": {"network": "abc"}}, "observation"),
        ({"patches": PATCHES[:2]}, "patches: 2"),
        ({"targets": TARGETS[:2]}, "targets"),
        ({"budget_bytes": 10**9}, "groups"),
    ],
)
def test_a_state_of_another_observation_is_not_thrown_away(tmp_path: Path, options: dict, named: str) -> None:
    path = interrupted_state(tmp_path)
    before = path.read_bytes()
    with pytest.raises(CalibrationError, match=f"of another observation[^$]*{named}"):
        run(state=path, **options)
    assert path.read_bytes() == before


def test_a_damaged_state_says_to_delete_it(tmp_path: Path) -> None:
    path = interrupted_state(tmp_path)
    content_before = path.read_bytes()
    damaged = [content_before[:length] for length in (0, 1, 100, len(content_before) // 2, len(content_before) - 1)]
    for place in range(0, len(content_before), 997):
        flipped = bytearray(content_before)
        flipped[place] ^= 0x10
        damaged.append(bytes(flipped))
    damaged.append(b"{}")
    outcomes = [outcome(path, wrong) for wrong in damaged]
    refused = [one for one in outcomes if isinstance(one, str)]
    assert all("delete state.npz" in message for message in refused)
    assert len(refused) > 0.9 * len(damaged)
    # the rest is a bit that nothing reads, such as one of a time stamp
    assert all(one == content(run()) for one in outcomes if not isinstance(one, str))


def outcome(path: Path, wrong: bytes) -> object:
    """What an observation with this state gives: its content, or its message, and then the file is as it was."""
    path.write_bytes(wrong)
    try:
        found = content(run(state=path))
    except CalibrationError as error:
        return str(error) if path.read_bytes() == wrong else "the state was changed"
    return found


def test_a_state_with_wrong_values_is_damaged(tmp_path: Path) -> None:
    import json

    path = interrupted_state(tmp_path)
    with np.load(path) as archive:
        arrays = dict(archive)
    meta = json.loads(arrays["meta"].tobytes())

    def packed(**changes) -> dict[str, np.ndarray]:
        return {"meta": np.frombuffer(json.dumps({**meta, **changes}).encode(), np.uint8)}

    for change in (
        {"maxima": -arrays["maxima"]},
        {"maxima": arrays["maxima"] * np.nan},
        {"maxima": arrays["maxima"][:-1]},
        {"counts": -1 - arrays["counts"]},
        {"counts": arrays["counts"][:-1]},
        {"counts": arrays["counts"].astype(float)},
        packed(passes=-1),
        packed(passes=10),
        packed(passes=2.0),
        packed(passes="3"),
        packed(format=99),
        packed(tensors=["other"] * len(meta["tensors"])),
        packed(fingerprint=[]),
        {"meta": np.frombuffer(b"[]", np.uint8)},
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(CalibrationError, match=r"delete state\.npz"):
            run(state=path)


def spoil_at(number: int, change):
    return lambda passes, result: change(result) if passes == number else result


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (2, lambda r: {**r, "t1": np.nan}, "not finite[^$]*tensor t1, patch 1"),
        (2, lambda r: {**r, "t1": -1.0}, "not finite[^$]*tensor t1, patch 1"),
        (1, lambda r: {"t0": 1.0}, "other tensors than it should[^$]*tensor t1, patch 0"),
        (3, lambda r: {**r, "new": 1.0}, "other tensors than it should[^$]*tensor new, patch 2"),
        (5, lambda r: {"t0": r["t0"]}, "did not return a tensor[^$]*tensor t1, patch 1"),
        (5, lambda r: {**r, "t1": r["t1"].astype(np.float64)}, "else than activations[^$]*float64[^$]*t1, patch 1"),
        (5, lambda r: {**r, "t1": r["t1"][:0]}, "else than activations[^$]*t1, patch 1"),
        (5, lambda r: {**r, "t1": [1.0]}, "else than activations[^$]*t1, patch 1"),
        (9, lambda r: {**r, "t3": r["t3"] * np.float32(np.nan)}, "NaN or infinite[^$]*tensor t3, patch 2"),
        (9, lambda r: {**r, "t3": r["t3"] * 2}, "larger than in the first pass[^$]*tensor t3, patch 2"),
    ],
)
def test_what_a_network_must_not_return_is_named(number: int, change, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        run(NumpyNetwork(spoil=spoil_at(number, change)))


def test_what_cannot_be_observed_is_refused() -> None:
    with pytest.raises(CalibrationError, match="no patches"):
        run(patches=[])
    with pytest.raises(CalibrationError, match=r"no such tensor[^$]*nowhere"):
        run(targets=[Target(name="x", sources=("t0", "nowhere"))])
    with pytest.raises(CalibrationError, match="no tensor to look at"):
        run(targets=[Target(name="x", sources=())])
    for targets in ([], [TARGETS[0], TARGETS[0]]):
        with pytest.raises(CalibrationError, match="different names"):
            run(targets=targets)


def test_a_state_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="cannot be written"):
        run(state=tmp_path / "missing" / "state.npz")
