"""The memory planner: its sums against NumPy's own count, its rungs, and real runs that stay below their limit."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import tracemalloc
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from models import REPOSITORY
from numpy.typing import NDArray
from specs import make_spec, spline
from test_tiles import null_runner

import trtbuild
from trtbuild.errors import InputError, OutOfMemory
from trtbuild.runtime import Member, Recipe, Settings, prediction_from_models
from trtbuild.runtime.memory import CaseBytes, CaseShape, case_bytes
from trtbuild.spec import KeepLargestComponent, Labels, ModelSpec, NoNormalization
from trtbuild.steps.folder_run.planning import ALONE, HALF, MARGIN, CasePlan, Planner
from trtbuild.volume import Prepared, prepared_from_array

sys.path.insert(0, str(REPOSITORY / "benchmarks"))

from process_tree import proportional_set, tree
from random_model import RandomModel, write_case, write_model

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory of processes is read from Linux's /proc")
LIMIT = 0.15
"""Of NumPy's count: the windows under way and the temporaries of a slab are small but not nothing in cases that are
small enough for a test."""
MB = 1 << 20


def labels(heads: int) -> Labels:
    values = tuple(range(heads))
    names = {f"organ{value}" if value else "background": (value,) for value in values}
    return Labels(decision="argmax", values=values, names=names, foreground=values[1:], ignore=None)


def spec_of(heads: int = 12, **changes: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "normalization": (NoNormalization(),),
        "labels": labels(heads),
        "spacing": (1.5, 1.5, 1.5),
    }
    return make_spec(**(values | changes))


def member(spec: ModelSpec, stack: ExitStack) -> Member:
    return Member(spec=spec, runners=(stack.enter_context(null_runner(spec)),), mirror_axes=())


ISO, THICK = (1.0, 1.0, 1.0), (4.0, 1.0, 1.0)
FLAT = {"patch": (80, 80), "spacing": (0.8, 0.8), "configuration": "2d"}
SOFT, HARD = Recipe(weights=(1.0, 1.0)), Recipe(weights=(1.0, 1.0), vote="hard")
ONE = Recipe(weights=(1.0,))
PLAIN = Settings(threads=2)
CASES: dict[str, tuple[tuple[int, int, int], tuple[float, float, float], list[list[ModelSpec]], Recipe, Settings]] = {
    "labels leave slab by slab": ((160, 90, 90), ISO, [[spec_of()]], ONE, PLAIN),
    "float16": ((160, 90, 90), ISO, [[spec_of()]], ONE, replace(PLAIN, accumulator="float16")),
    "probabilities": ((90, 70, 80), ISO, [[spec_of()]], ONE, replace(PLAIN, probabilities=True)),
    "2-D": ((40, 160, 150), THICK, [[spec_of(**FLAT)]], ONE, PLAIN),
    "thick slices": ((40, 120, 110), THICK, [[spec_of(spacing=(4.0, 0.8, 0.8))]], ONE, PLAIN),
    "logits resampled with a spline": (
        (80, 80, 90), ISO, [[spec_of(resample_probabilities=spline(3))]], ONE, PLAIN
    ),
    "smaller than the patch": (
        (30, 90, 80), ISO, [[spec_of(heads=6, patch=(48, 48, 48), spacing=(1.0, 1.0, 1.0))]], ONE, PLAIN
    ),
    "disagreement": ((120, 90, 90), ISO, [[spec_of()]], replace(ONE, disagreement=True), PLAIN),
    "an ensemble": ((120, 90, 90), ISO, [[spec_of()], [spec_of(spacing=(1.2, 1.2, 1.2))]], SOFT, PLAIN),
    "an ensemble of votes": ((120, 90, 90), ISO, [[spec_of()], [spec_of(spacing=(1.2, 1.2, 1.2))]], HARD, PLAIN),
    "a cascade": (
        (120, 90, 90), ISO,
        [[spec_of(heads=3, spacing=(3.0, 3.0, 3.0)), spec_of(heads=3, previous_stage="3d_lowres")]], ONE, PLAIN,
    ),
}  # fmt: skip


def traced(work: Any) -> int:
    """The most bytes of arrays that `work` holds at a time."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", CASES)
def test_the_bytes_in_the_network_are_those_that_numpy_counts(name: str) -> None:
    shape, spacing, specs, recipe, settings = CASES[name]

    def run(array: NDArray[np.float32], models: list[tuple[Member, ...]]) -> int:
        first = [prepared_from_array(array, spacing, stages[0].spec) for stages in models]

        def prepare(model: int, stage: int, before: NDArray[Any] | None) -> Prepared:
            return (
                first[model] if stage == 0 else prepared_from_array(array, spacing, models[model][stage].spec, before)
            )

        peak = traced(lambda: prediction_from_models(models, prepare, recipe, settings, None))
        kept = array.nbytes if any(len(stages) > 1 for stages in models) else 0
        return peak + sum(one.data.nbytes for one in first) + kept

    rng = np.random.default_rng(0)
    array = rng.uniform(1, 2.4, size=(1, *shape)).astype(np.float32)
    with ExitStack() as stack:
        models = [tuple(member(spec, stack) for spec in stages) for stages in specs]
        run(array[:, :25, :25, :25], models)  # loads the compiled loops
        measured = run(array, models)
        case = CaseShape(shape=shape, spacing=spacing, voxel_bytes=2)
        predicted = case_bytes(case, models, recipe, settings).network
    assert measured * (1 - LIMIT) < predicted < measured * (1 + LIMIT), f"{predicted / measured:.2f}"


def test_post_processing_may_take_more_than_the_network() -> None:
    case = CaseShape(shape=(240, 180, 180), spacing=ISO, voxel_bytes=2)
    largest = KeepLargestComponent(labels=(1,), background=0)
    with ExitStack() as stack:
        models = [(member(spec_of(heads=2), stack),)]
        without = case_bytes(case, models, ONE, PLAIN).network
        with_it = case_bytes(case, models, replace(ONE, postprocessing=(largest,)), PLAIN).network
    # a copy of the labels, a mask, and a component number of four bytes per voxel, at least
    assert without < case.voxels * 7 < with_it


def case_plan(name: str, preparing: int, network: int, writing: int, base: int = 100) -> CasePlan:
    size = CaseBytes(preparing=preparing, network=network, writing=writing)
    return CasePlan(case=name, settings=PLAIN, bytes=size, peak=base + size.alone)


def planner(limit: int | None, spec: ModelSpec, stack: ExitStack, base: int = 100) -> Planner:
    model = SimpleNamespace(stages=(member(spec, stack),), records=())
    predictor = SimpleNamespace(models=(model,), recipe=ONE, spec=spec)
    return Planner(predictor=cast(Any, predictor), settings=PLAIN, base=base, limit=limit)


def test_cases_in_flight_add_up_each_with_what_it_takes_in_its_own_stage() -> None:
    with ExitStack() as stack:
        run = planner(180, spec_of(), stack)
    a, b, c = case_plan("a", 10, 1, 2), case_plan("b", 1, 40, 3), case_plan("c", 3, 5, 20)
    assert run.together(a, b, c) == 170
    assert run.together(None, None, None) == 100
    assert run.fits(a, b, c)
    assert not run.fits(replace(a, bytes=CaseBytes(preparing=21, network=0, writing=0)), b, c)
    assert run.in_flight(a, b, None, alone=False).peak == 150
    assert run.in_flight(None, c, None, alone=True) == replace(c, peak=120, adapted=(ALONE,))


def test_a_case_of_unknown_size_shares_the_memory_with_no_other() -> None:
    unknown, known = CasePlan(case="u", settings=PLAIN, bytes=None, peak=None), case_plan("k", 1, 1, 1)
    with ExitStack() as stack:
        run = planner(None, spec_of(), stack)
    assert not run.fits(unknown, known, None)
    assert not run.fits(known, unknown, None)
    assert run.fits(None, known, None)
    assert run.in_flight(None, unknown, known, alone=False).peak is None


def test_the_accumulator_is_halved_before_a_case_is_refused_by_name() -> None:
    case = CaseShape(shape=(120, 150, 150), spacing=ISO, voxel_bytes=2)
    with ExitStack() as stack:
        free = planner(None, spec_of(heads=60, patch=(32, 32, 32)), stack)
        full = free.plan_shape("case7", case)
        assert full.settings.accumulator == "float32"
        assert full.adapted == ()
        assert full.peak is not None
        half = replace(free, limit=full.peak - 1).plan_shape("case7", case)
        assert half.settings.accumulator == "float16"
        assert half.adapted == (HALF,)
        assert half.peak is not None
        assert full.peak * 0.4 < half.peak < full.peak * 0.75
        with pytest.raises(OutOfMemory) as error:
            replace(free, limit=half.peak - 1).plan_shape("case7", case)
    text = str(error.value)
    for part in ("case7", "120 x 150 x 150", f"{half.peak / 1e9:.2f} GB predicted", "--max-memory", "spacing"):
        assert part in text


def test_probabilities_are_named_among_the_levers_only_where_they_are_asked_for() -> None:
    case = CaseShape(shape=(60, 60, 60), spacing=ISO, voxel_bytes=2)
    with ExitStack() as stack:
        run = planner(101, spec_of(), stack)
        with pytest.raises(OutOfMemory) as plain:
            run.plan_shape("c", case)
        with pytest.raises(OutOfMemory) as asked:
            replace(run, settings=replace(PLAIN, probabilities=True)).plan_shape("c", case)
    assert "--save_probabilities" not in str(plain.value)
    assert "--save_probabilities" in str(asked.value)


def test_a_grid_that_a_wrong_spacing_makes_absurd_is_bad_input_and_not_lack_of_memory() -> None:
    with ExitStack() as stack, pytest.raises(InputError):
        planner(None, spec_of(), stack).plan_shape("c", CaseShape(shape=(9, 9, 9), spacing=(1e9,) * 3, voxel_bytes=2))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of many classes, and three cases: large enough that a run's memory is mostly theirs."""
    root = tmp_path_factory.mktemp("planning")
    model = RandomModel(classes=60, patch=(32, 48, 48), spacing=(1.5, 1.5, 1.5), features=(4, 8))
    trtbuild.compile(write_model(model, root), root / "many.trtb", backends=("openvino",), tune=False)
    for number in range(3):
        write_case(root / "images", f"c{number}", (110, 150, 150), (1.5, 1.5, 1.5))
        write_case(root / "single", "c0", (110, 150, 150), (1.5, 1.5, 1.5))
    return root


def predict(work: Path, images: Path, *options: str) -> tuple[int, dict[str, Any], int, str]:
    """Exit code, summary, measured peak and stderr of the command."""
    command = [sys.executable, "-m", "trtbuild", "predict", str(work / "many.trtb"), "-i", str(images), "-o",
               str(work / "out"), "--disable_tta", "-step_size", "1", "--json", *options]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    peak, over = 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, proportional_set(tree(process.pid)))

    sampler = threading.Thread(target=sample)
    sampler.start()
    output, said = process.communicate()
    over.set()
    sampler.join()
    return process.returncode, json.loads(output or "{}"), peak, said


@LINUX
@pytest.mark.slow
def test_every_rung_is_taken_and_the_run_stays_below_its_limit(work: Path) -> None:
    code, free, measured, _ = predict(work, work / "images")
    assert code == 0
    together = max(outcome["predicted"] for outcome in free["outcomes"])
    assert all(outcome["adapted"] == [] for outcome in free["outcomes"])
    assert 0.8 < together / measured < 1.2
    alone = predict(work, work / "single")[1]["outcomes"][0]["predicted"]
    assert alone < together - 20 * MB, "the rungs would be too close to tell them apart"

    limit = int((alone + together) / 2 * (1 + MARGIN))
    code, tight, measured, _ = predict(work, work / "images", "--max-memory", str(limit))
    assert code == 0
    assert measured < limit
    assert [ALONE] in [outcome["adapted"] for outcome in tight["outcomes"]]
    assert all(HALF not in outcome["adapted"] for outcome in tight["outcomes"])

    limit = int((alone - 40 * MB) * (1 + MARGIN))
    code, tighter, measured, _ = predict(work, work / "images", "--max-memory", str(limit))
    assert code == 0
    assert measured < limit
    assert all(HALF in outcome["adapted"] for outcome in tighter["outcomes"])
    assert all(outcome["predicted"] < limit for outcome in tighter["outcomes"])


@LINUX
@pytest.mark.slow
def test_a_case_that_cannot_fit_is_refused_before_a_voxel_is_read(work: Path, tmp_path: Path) -> None:
    whole = (work / "images" / "c0_0000.nii.gz").read_bytes()
    (tmp_path / "huge_0000.nii.gz").write_bytes(whole[: len(whole) // 2])  # reading it would say that it is damaged
    code, _, _, said = predict(work, tmp_path, "--max-memory", "200M")
    assert code == 1
    assert "needs more memory" in said
    assert "huge" in said
    assert "damaged" not in said
    code, _, _, said = predict(work, tmp_path)
    assert code == 1
    assert "needs more memory" not in said
