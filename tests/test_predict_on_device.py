"""Whole bundles on the fake GPU, as users open them: the results are those of the same bundle on a CPU.

The engines are null engines with logits in closed form (tests/device_bundles.py), so that both compute the same, and at
last the real TensorRT runner on a fake of TensorRT. Images are prepared on the GPU as well; `test_device_prepare.py`
says how closely.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_bundles import NamedEngine, device_bundle, give_cubin, give_engines, networks_of, noise
from device_samples import FLAT, REGIONS, SPLINE, TURNED, assert_same, check_unharmed, fake_gpu
from fake_cuda import Cuda
from fake_nvinfer import device_record, install, plan_of
from gpu_arrays import Interface, OnCpu, Shared, on_gpu
from null_bundles import END, FIRST, SECOND, SPEC, null_bundle, write_cases
from reference import segmentation_from_file
from runner_samples import CHANNELS, HEADS, PATCHES

import trtbuild
from trtbuild.cli import run
from trtbuild.config import PredictConfig
from trtbuild.errors import Cancelled, EngineError, InputError, MissingExtra, OutOfMemory, TrtbuildError
from trtbuild.runtime import Prediction, Settings
from trtbuild.runtime.gpu.attempts import IN_HALF
from trtbuild.runtime.gpu.case import NOT_LINEAR
from trtbuild.runtime.gpu.entry import DevicePrediction
from trtbuild.runtime.null import null_logits
from trtbuild.runtime.on_device import member_prediction
from trtbuild.spec import KeepLargestComponent, ModelSpec
from trtbuild.steps.prediction.predictor import Predictor
from trtbuild.volume import Prepared

SHAPE, SPACING = (1, 17, 22, 19), (1.2, 0.9, 1.1)


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """A fake GPU, which must be as it was after the test."""
    with fake_gpu() as fake:
        yield fake
        check_unharmed(fake)


@dataclass(frozen=True, kw_only=True)
class Whole:
    """What is opened: of each bundle the specs of its stages; folds, and what `trtbuild.open` takes."""

    bundles: tuple[tuple[ModelSpec, ...], ...] = ((SPEC,),)
    folds: tuple[str, ...] = ("0",)
    axes: tuple[int, ...] = (0,)
    rules: tuple[KeepLargestComponent, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)


OTHER = replace(SPEC, spacing=(1.4, 1.1, 1.3))
TWO = ((SPEC,), (OTHER,))
WHOLES = {
    "3D": Whole(),
    "2D": Whole(bundles=((FLAT,),), axes=(0, 1)),
    "folds": Whole(folds=("0", "1", "2"), axes=()),
    "one of the folds": Whole(folds=("0", "1", "2"), options={"folds": [2]}),
    "transposed": Whole(bundles=((replace(SPEC, **TURNED),),)),
    "regions": Whole(bundles=((replace(SPEC, labels=REGIONS),),)),
    "largest component": Whole(rules=(KeepLargestComponent(labels=(1,), background=0),)),
    "cascade": Whole(bundles=((FIRST, SECOND),)),
    "cascade with folds": Whole(bundles=((FIRST, SECOND),), folds=("0", "1")),
    "soft ensemble": Whole(bundles=TWO, options={"weights": (2, 1)}),
    "hard ensemble": Whole(bundles=TWO, options={"vote": "hard", "weights": (1, 2)}),
    "ensemble with a cascade": Whole(bundles=((OTHER,), (FIRST, SECOND))),
    "disagreement": Whole(options={"disagreement": True}),
}


class Bench:
    """Bundles of a test, with their engines, opened on the CPU or on the GPU."""

    def __init__(self, cuda: Cuda, folder: Path, patch: pytest.MonkeyPatch, whole: Whole) -> None:
        self.cuda, self.whole, self.patch = cuda, whole, patch
        self.paths = [
            device_bundle(folder / f"{n}.trtb", *specs, folds=whole.folds, axes=whole.axes, postprocessing=whole.rules)
            for n, specs in enumerate(whole.bundles)
        ]
        known: dict[str, ModelSpec] = {}
        self.engines: list[NamedEngine] = []
        for specs in whole.bundles:
            known |= networks_of(*specs, folds=whole.folds)
        self.engines = give_engines(patch, cuda, known)

    def open(self, backend: str, **options: Any) -> Predictor:
        paths = self.paths if len(self.paths) > 1 else self.paths[0]
        return trtbuild.open(paths, backend=backend, **{"threads": 2, **self.whole.options, **options})

    def on_cpu(self, data: np.ndarray, **how: Any) -> Prediction:
        with self.open("null") as predictor:
            assert not predictor.on_device
            return predictor.predict_array(data, SPACING, **how)

    def on_gpu(self, data: np.ndarray, **how: Any) -> Prediction:
        with self.open("tensorrt") as predictor:
            assert predictor.on_device
            result = predictor.predict_array(data, SPACING, **how)
            assert self.engines
            assert all(engine.batches for engine in self.engines), "every network ran on the GPU"
            assert self.cuda.live == {}, "a case leaves nothing"
            assert len(self.cuda.streams) == 1, "bundles, stages and folds share one GPU"
        assert self.engines == []
        return result


@pytest.fixture
def bench(cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Bench]:
    def made(whole: Whole = WHOLES["3D"]) -> Bench:
        return Bench(cuda, tmp_path, monkeypatch, whole)

    return made


# --- the same results


@pytest.mark.parametrize("name", WHOLES)
def test_a_bundle_gives_the_labels_of_the_cpu(bench: Callable[..., Bench], name: str) -> None:
    one = bench(WHOLES[name])
    found, expected = one.on_gpu(noise(SHAPE)), one.on_cpu(noise(SHAPE))
    assert_same(found, expected)
    assert found.warnings == expected.warnings == ()
    assert found.grid == expected.grid
    assert set(found.seconds) == set(expected.seconds)
    assert (found.disagreement is None) == (expected.disagreement is None)
    if found.disagreement is not None and expected.disagreement is not None:
        np.testing.assert_allclose(found.disagreement, expected.disagreement, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["3D", "2D", "folds", "transposed", "regions", "cascade", "soft ensemble"])
def test_probabilities_come_with_them(bench: Callable[..., Bench], name: str) -> None:
    one = bench(WHOLES[name])
    found = one.on_gpu(noise(SHAPE), probabilities=True)
    expected = one.on_cpu(noise(SHAPE), probabilities=True)
    np.testing.assert_array_equal(found.segmentation, expected.segmentation)
    assert found.probabilities is not None
    # the image is resampled on the GPU, with errors of a few 1e-6, which logits of up to 2 h m - h^2 multiply by 4
    np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=0, atol=2e-5)


def test_a_first_stage_makes_labels_only(bench: Callable[..., Bench]) -> None:
    one, asked = bench(WHOLES["cascade"]), []

    def noting(prepared: Any, member: Any, settings: Settings, *more: Any) -> Prediction:
        asked.append(settings.probabilities)
        return member_prediction(prepared, member, settings, *more)

    one.patch.setattr("trtbuild.runtime.case.member_prediction", noting)
    one.on_gpu(noise(SHAPE), probabilities=True)
    assert asked == [False, True]


def test_labels_of_a_first_stage_may_be_given(bench: Callable[..., Bench]) -> None:
    one = bench(Whole(bundles=((FIRST, SECOND),), options={"previous_stage": True}))
    previous = (noise(SHAPE[1:], seed=1) > 1.2).astype(np.uint8)
    assert_same(one.on_gpu(noise(SHAPE), previous=previous), one.on_cpu(noise(SHAPE), previous=previous))


def test_files_are_read_and_an_empty_image_is_told(bench: Callable[..., Bench], tmp_path: Path) -> None:
    one = bench()
    (file,) = write_cases(tmp_path / "in", "a").iterdir()
    with one.open("tensorrt") as on_gpu, one.open("null") as on_cpu:
        assert_same(on_gpu.predict(file), on_cpu.predict(file))
        assert on_gpu.predict_array(np.zeros(SHAPE, np.float32), SPACING).warnings == ("every voxel of the image is 0",)


def test_an_image_is_prepared_where_the_network_runs(bench: Callable[..., Bench]) -> None:
    one = bench(WHOLES["cascade"])
    labels = np.zeros(SHAPE[1:], np.uint8)
    with one.open("tensorrt") as on_gpu, one.open("null") as on_cpu:
        assert isinstance(on_cpu.prepared(0, 0, noise(SHAPE), SPACING, None), Prepared)
        assert isinstance(on_gpu.prepared(0, 1, noise(SHAPE), SPACING, labels), Prepared), "its labels are on the host"
        there = on_gpu.prepared(0, 0, noise(SHAPE), SPACING, None)
        assert not isinstance(there, Prepared)
        assert one.cuda.live
        there.close()


def test_a_case_on_the_gpu_does_not_reach_a_cpu(bench: Callable[..., Bench]) -> None:
    one = bench()
    with one.open("tensorrt") as on_gpu, one.open("null") as on_cpu:
        there = on_gpu.prepared(0, 0, noise(SHAPE), SPACING, None)
        with pytest.raises(TypeError, match="cannot run on a CPU"):
            on_cpu.predict_prepared(lambda *which: there, Settings(), None)
        assert one.cuda.live == {}


@pytest.mark.parametrize("what", ["labels", "nan", "channels"])
def test_a_wrong_image_is_the_error_of_the_cpu(bench: Callable[..., Bench], what: str) -> None:
    one, data = bench(), noise(SHAPE)
    labels = np.zeros(SHAPE[1:], np.uint8) if what == "labels" else None
    if what == "nan":
        data[0, 3, 4, 5] = np.nan
    if what == "channels":
        data = np.concatenate([data, data])
    errors = []
    for backend in ("null", "tensorrt"):
        with one.open(backend) as predictor, pytest.raises(TrtbuildError) as caught:
            predictor.prepared(0, 0, data, SPACING, labels)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


# --- the command line


def predicted(bundle: Path, images: Path, out: Path, *options: str) -> int:
    return run(["predict", str(bundle), "-i", str(images), "-o", str(out), "--threads", "2", *options])


def summary(capsys: pytest.CaptureFixture[str]) -> Any:
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("way", [(), ("-npp", "0", "-nps", "0")], ids=["beside", "in turn"])
@pytest.mark.parametrize("name", ["3D", "cascade"])
def test_a_folder_on_the_gpu_is_the_folder_of_the_cpu(
    bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, way: tuple[str, ...]
) -> None:
    one = bench(WHOLES[name])
    images = write_cases(tmp_path / "in", "a", "b")
    for backend in ("tensorrt", "null"):
        extra = ("--save_probabilities",) if name == "3D" else ()
        assert predicted(one.paths[0], images, tmp_path / backend, "--backend", backend, "--json", *way, *extra) == 0
        facts = summary(capsys)
        assert [outcome["warnings"] for outcome in facts["outcomes"]] == [[], []]
        assert all({"read", "prepare", "network", "back", "write"} <= set(o["seconds"]) for o in facts["outcomes"])
    for case in ("a", "b"):
        found, expected = (segmentation_from_file(tmp_path / b / (case + END)) for b in ("tensorrt", "null"))
        np.testing.assert_array_equal(found, expected)
        assert len(np.unique(found)) > 1
    assert sorted(p.name for p in (tmp_path / "tensorrt").iterdir()) == sorted(
        p.name for p in (tmp_path / "null").iterdir()
    )


def test_one_case_that_the_gpu_cannot_hold_fails_alone(
    cuda: Cuda, bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    cuda.memory = 1 << 20
    one = bench()
    images = write_cases(tmp_path / "in", "small")
    write_cases(images, "large", shape=(40, 90, 90))
    assert predicted(one.paths[0], images, tmp_path / "out", "--backend", "tensorrt", "-npp", "0", "--json") == 4
    outcomes = {outcome["case"]: outcome for outcome in summary(capsys)["outcomes"]}
    assert outcomes["small"]["error"] is None
    assert "GPU" in outcomes["large"]["error"]
    assert "memory" in outcomes["large"]["error"]
    assert (tmp_path / "out" / f"small{END}").is_file()
    assert not (tmp_path / "out" / f"large{END}").exists()


def test_a_limit_of_device_memory_is_the_users(
    bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = bench()
    images = write_cases(tmp_path / "in", "a")
    limited = ("--backend", "tensorrt", "-npp", "0", "--max-device-memory")
    assert predicted(one.paths[0], images, tmp_path / "out", *limited, "1M") == 1
    assert "does not fit into the GPU's memory" in capsys.readouterr().err
    assert predicted(one.paths[0], images, tmp_path / "out", *limited, "100M") == 0


@pytest.mark.parametrize("devices", ["", "a", "-1", "0,", "0,,1", "0,0", "0 1", "1.0", "0\n", "٣", "99999"])
def test_devices_are_distinct_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str], devices: str) -> None:
    assert predicted(tmp_path, tmp_path, tmp_path, f"--devices={devices}") == 2
    assert "--devices" in capsys.readouterr().err


def test_devices_of_the_command_line_reach_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PredictConfig] = []

    def predict_cases(config: PredictConfig, events: Any) -> Any:
        seen.append(config)
        raise Cancelled("enough")

    monkeypatch.setattr("trtbuild.steps.folder_run.cases.predict_cases", predict_cases)
    predicted(tmp_path, tmp_path, tmp_path)
    predicted(tmp_path, tmp_path, tmp_path, "--devices", "2,0", "--max-device-memory", "4G")
    assert [(each.devices, each.device_memory) for each in seen] == [((0,), None), ((2, 0), 4 << 30)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"devices": ()}, {"devices": [0]}, {"devices": (0, 0)}, {"devices": (-1,)}, {"devices": (True,)},
        {"devices": ("0",)}, {"devices": ([0],)}, {"device_memory": 0}, {"device_memory": 1.5},
        {"devices": (0, 1), "backend": "openvino"}, {"device_memory": 1 << 30, "backend": "onnxruntime"},
        {"devices": (1,), "backend": "openvino"},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_with_wrong_devices_cannot_be_built(wrong: dict[str, Any]) -> None:
    with pytest.raises(TrtbuildError):
        PredictConfig(bundles=(Path("a"),), inputs=(Path("b"),), output=Path("c"), **wrong)


@pytest.mark.parametrize("wrong", [{"device": -1}, {"device": "0"}, {"device": True}, {"device_memory": 0}])
def test_wrong_devices_are_refused_before_anything_is_opened(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(TrtbuildError, match="out of range") as caught:
        trtbuild.open(tmp_path / "missing.trtb", **wrong)
    assert caught.value.where == next(iter(wrong))


@pytest.mark.parametrize("named", [{"device": 1}, {"device_memory": 1 << 30}])
def test_a_backend_for_cpus_takes_neither_a_gpu_nor_its_memory(tmp_path: Path, named: dict[str, Any]) -> None:
    with pytest.raises(TrtbuildError, match="Only engines for a GPU"):
        trtbuild.open(tmp_path / "missing.trtb", backend="openvino", **named)


# --- what cannot be opened


def test_without_a_driver_auto_takes_the_cpu_and_keeps_the_reason(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench()
    monkeypatch.setattr("trtbuild.runtime.device.no_driver", lambda: "no NVIDIA driver (libcuda.so.1 is not there)")
    with one.open("auto") as predictor:
        assert not predictor.on_device
        ((name, reason),) = predictor.models[0].refused
    assert name == "tensorrt"
    assert "no NVIDIA driver" in reason
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        one.open("tensorrt")


def test_without_a_compiler_of_kernels_auto_takes_the_cpu(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = bench()

    def missing(capability: str) -> bytes:
        raise MissingExtra("cuda-bindings", "gpu", "compile kernels for a GPU")

    monkeypatch.setattr("trtbuild.runtime.nvrtc.kernels_cubin", missing)
    with one.open("auto") as predictor:
        assert "trtbuild[gpu]" in predictor.models[0].refused[0][1]
        assert one.cuda.leaks() == [], "what was opened before is closed"
    with pytest.raises(MissingExtra):
        one.open("tensorrt")


def test_an_engine_that_is_refused_closes_what_was_opened_before(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    from trtbuild.runtime import select

    one = bench(WHOLES["folds"])
    original = select.DEVICE_OPENERS["tensorrt"]

    def opener(record: Any, *more: Any) -> Any:
        if record.network.startswith("fold_1"):
            raise EngineError("It is of another version.")
        return original(record, *more)

    monkeypatch.setitem(select.DEVICE_OPENERS, "tensorrt", opener)  # type: ignore[arg-type]
    with one.open("auto") as predictor:
        assert [reason for _, reason in predictor.models[0].refused] == ["It is of another version."]
        assert one.engines == []
        assert one.cuda.leaks() == []


def test_a_gpu_that_is_not_there_is_named(bench: Callable[..., Bench]) -> None:
    with pytest.raises(EngineError) as caught:
        bench().open("tensorrt", device=1)
    assert caught.value.where == "GPU 1"


def test_a_gpu_that_the_user_named_is_no_other_and_no_cpu(
    bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor where "auto" is asked for, which takes the CPU for the GPU that nobody named."""
    one = bench()
    with pytest.raises(EngineError, match="No engine of the bundle runs on GPU 1") as caught:
        one.open("auto", device=1)
    text = str(caught.value)
    assert "tensorrt: The GPU failed." in text
    assert "null: It runs on the CPU." in text
    assert "trtbuild doctor" in text
    assert one.cuda.leaks() == []
    images = write_cases(tmp_path / "in", "a")
    assert predicted(one.paths[0], images, tmp_path / "out", "--devices", "1") == 1
    assert "GPU 1" in capsys.readouterr().err
    monkeypatch.setattr("trtbuild.runtime.device.no_driver", lambda: "no NVIDIA driver")
    with pytest.raises(EngineError, match="no NVIDIA driver"):
        one.open("auto", device=1)


def test_a_bundle_without_an_engine_for_gpus_does_not_run_on_a_named_one(tmp_path: Path) -> None:
    bundle = null_bundle(tmp_path / "a.trtb")
    with pytest.raises(EngineError, match="runs on GPU 1"):
        trtbuild.open(bundle, device=1)
    with trtbuild.open(bundle, device=0) as predictor:
        assert not predictor.on_device


def test_a_predictor_that_was_closed_says_so(bench: Callable[..., Bench]) -> None:
    one = bench()
    for backend in ("tensorrt", "null"):
        with one.open(backend) as predictor:
            pass
        with pytest.raises(EngineError, match="predictor is closed"):
            predictor.predict_array(noise(SHAPE), SPACING)
        with pytest.raises(EngineError, match="predictor is closed"):
            predictor.predict_device_array(noise(SHAPE), SPACING)


def test_a_gpu_without_memory_is_no_reason_for_the_cpu(bench: Callable[..., Bench], cuda: Cuda) -> None:
    """It would have some at another time."""
    cuda.allocations_left = 0
    with pytest.raises(OutOfMemory):
        bench().open("auto")


def test_members_on_the_gpu_and_on_the_cpu_make_one_ensemble(
    bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As "auto" opens bundles of which one has no engine that runs here."""
    from trtbuild.runtime import select

    one = bench(WHOLES["soft ensemble"])
    expected = one.on_cpu(noise(SHAPE))
    original, calls = select.DEVICE_OPENERS["tensorrt"], 0

    def second_fails(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise EngineError("Not on this GPU.")
        return original(*arguments)

    monkeypatch.setitem(select.DEVICE_OPENERS, "tensorrt", second_fails)  # type: ignore[arg-type]
    with one.open("auto") as predictor:
        assert [model.backend for model in predictor.models] == ["tensorrt", "null"]
        assert not predictor.on_device
        assert_same(predictor.predict_array(noise(SHAPE), SPACING), expected)


# --- what runs otherwise, or not at all


def test_memory_that_is_short_while_preparing_is_told(bench: Callable[..., Bench], cuda: Cuda) -> None:
    one = bench()
    expected = one.on_cpu(noise(SHAPE))
    with one.open("tensorrt") as predictor:
        cuda.allocations_left, cuda.recovers = 1, True
        found = predictor.predict_array(noise(SHAPE), SPACING)
    assert_same(found, expected)
    (warning,) = found.warnings
    assert "the host prepared it" in warning


def test_preparing_keeps_to_the_limit_too(bench: Callable[..., Bench], monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of 1 MB becomes 17 kB on the network's grid."""
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    one, data = bench(), noise((1, 64, 64, 64))
    with one.open("tensorrt", device_memory=1 << 20) as predictor, one.open("null") as on_cpu:
        found = predictor.predict_array(data, (0.25, 0.25, 0.25))
        assert_same(found, on_cpu.predict_array(data, (0.25, 0.25, 0.25)))
    (warning,) = found.warnings
    assert "the host prepared it" in warning


def test_memory_that_is_short_in_the_network_is_told(
    bench: Callable[..., Bench], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.SLAB_BYTES", 2000)
    one = bench(WHOLES["soft ensemble"])
    expected = one.on_cpu(noise(SHAPE))
    with one.open("tensorrt") as predictor:
        for engine in one.engines:
            engine.out_of_memory = 1
        found = predictor.predict_array(noise(SHAPE), SPACING)
    assert_same(found, expected)
    assert found.warnings
    assert all("begins again" in warning for warning in found.warnings)


def test_float16_that_a_limit_brings_is_a_warning_of_the_case(
    bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.SLAB_BYTES", 2000)
    one, warned = bench(), []
    images = write_cases(tmp_path / "in", "a")
    for limit in ("50K", "36K"):
        limited = ("--backend", "tensorrt", "-npp", "0", "--json", "--max-device-memory", limit)
        assert predicted(one.paths[0], images, tmp_path / limit, *limited) == 0
        warned.append(summary(capsys)["outcomes"][0]["warnings"])
    assert warned == [[], [IN_HALF]]


def test_members_of_an_ensemble_keep_to_the_limit_in_float32(
    bench: Callable[..., Bench], cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trtbuild.runtime.gpu.plan.GRAIN", 1)
    one = bench(WHOLES["soft ensemble"])
    expected = one.on_cpu(noise(SHAPE))
    for limit in (130_000, 100_000):
        with one.open("tensorrt", device_memory=limit) as predictor:
            before = cuda.peak = sum(each.size for each in cuda.live.values())
            found = predictor.predict_array(noise(SHAPE), SPACING)
            assert cuda.peak - before <= limit
        assert_same(found, expected)
        assert all("the host prepared it" in warning for warning in found.warnings)
    with one.open("tensorrt", device_memory=60_000) as predictor, pytest.raises(OutOfMemory, match="smallest plan"):
        predictor.predict_array(noise(SHAPE), SPACING)


def test_members_that_end_on_the_host_say_so_once(bench: Callable[..., Bench]) -> None:
    spec = replace(SPLINE, configuration="3d_lowres")
    one = bench(Whole(bundles=((spec, replace(SPLINE, previous_stage="3d_lowres")),)))
    found = one.on_gpu(noise(SHAPE))
    assert_same(found, one.on_cpu(noise(SHAPE)))
    assert found.warnings == (NOT_LINEAR,)


def test_a_summary_has_the_warnings_of_the_gpu(
    bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = bench(Whole(bundles=((SPLINE,),)))
    images = write_cases(tmp_path / "in", "a")
    assert predicted(one.paths[0], images, tmp_path / "out", "--backend", "tensorrt", "-npp", "0", "--json") == 0
    assert summary(capsys)["outcomes"][0]["warnings"] == [NOT_LINEAR]


@pytest.mark.parametrize("stop_at", range(8))
@pytest.mark.parametrize("name", ["cascade", "soft ensemble"])
def test_a_case_that_is_stopped_leaves_nothing(bench: Callable[..., Bench], stop_at: int, name: str) -> None:
    one = bench(WHOLES[name])
    calls = 0

    def progress(stage: str, done: int, total: int) -> bool:
        nonlocal calls
        calls += 1
        return calls <= stop_at

    with one.open("tensorrt") as predictor:
        with pytest.raises(Cancelled):
            predictor.predict_array(noise(SHAPE), SPACING, progress=progress)
        assert calls == stop_at + 1
        assert one.cuda.live == {}
        assert_same(predictor.predict_array(noise(SHAPE), SPACING), one.on_cpu(noise(SHAPE)))


def test_an_engine_that_fails_ends_the_run(
    bench: Callable[..., Bench], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = bench()
    images = write_cases(tmp_path / "in", "a", "b")
    enqueue = NamedEngine.enqueue

    def failing(self: NamedEngine, *arguments: int) -> None:
        self.fail_at = 1
        enqueue(self, *arguments)

    one.patch.setattr(NamedEngine, "enqueue", failing)
    assert predicted(one.paths[0], images, tmp_path / "out", "--backend", "tensorrt", "-npp", "0") == 1
    assert "TensorRT failed" in capsys.readouterr().err
    assert one.engines == []


# --- an image that is on the GPU already


@contextmanager
def image_there(predictor: Predictor, data: np.ndarray) -> Iterator[np.ndarray]:
    gpu = predictor.models[0].gpu
    assert gpu is not None
    with on_gpu(data, gpu) as there:
        yield there


def values(found: DevicePrediction) -> np.ndarray:
    return np.array(np.from_dlpack(OnCpu(shared=found.labels)))


@pytest.mark.parametrize("name", ["3D", "2D", "folds", "transposed", "regions"])
def test_an_image_on_the_gpu_has_the_labels_of_one_on_the_host(bench: Callable[..., Bench], name: str) -> None:
    one, data = bench(WHOLES[name]), noise(SHAPE)
    with one.open("tensorrt") as predictor, image_there(predictor, data) as there:
        hows: tuple[dict[str, Any], ...] = ({}, {"step_size": 1.0, "mirroring": False})
        for how in hows:
            expected = predictor.predict_array(data, SPACING, **how)
            for image in (Shared(array=there), Interface(array=there)):
                found = predictor.predict_device_array(image, SPACING, **how)
                np.testing.assert_array_equal(values(found), expected.segmentation)
                assert found.grid == expected.grid
                assert found.warnings == ()
                found.labels.close()
        np.testing.assert_array_equal(there, data)
        assert len(one.cuda.live) == 1, "the image"


def test_its_progress_is_told_and_stops_it(bench: Callable[..., Bench]) -> None:
    one, seen = bench(), list[str]()

    def progress(stage: str, done: int, total: int) -> bool:
        seen.append(stage)
        return stage != "back"

    with one.open("tensorrt") as predictor, image_there(predictor, noise(SHAPE)) as there:
        with pytest.raises(Cancelled):
            predictor.predict_device_array(Shared(array=there), SPACING, progress=progress)
        assert set(seen) == {"prepare", "network", "back"}
        assert len(one.cuda.live) == 1, "the image"


@pytest.mark.parametrize(
    ("name", "instead"),
    [
        ("cascade", "open a bundle of one stage"), ("soft ensemble", "open one bundle"),
        ("hard ensemble", "open one bundle"), ("largest component", "postprocessing=False"),
        ("disagreement", "without disagreement"),
    ],
)  # fmt: skip
def test_what_is_more_than_one_network_is_refused_there(bench: Callable[..., Bench], name: str, instead: str) -> None:
    with bench(WHOLES[name]).open("tensorrt") as predictor, image_there(predictor, noise(SHAPE)) as there:
        with pytest.raises(TrtbuildError, match="goes through one network") as caught:
            predictor.predict_device_array(Shared(array=there), SPACING)
        assert instead in str(caught.value)
        assert "predict_array" in str(caught.value)


def test_given_labels_of_a_first_stage_and_the_cpu_are_refused_there(bench: Callable[..., Bench]) -> None:
    one = bench(Whole(bundles=((FIRST, SECOND),), options={"previous_stage": True}))
    with one.open("tensorrt") as predictor, pytest.raises(TrtbuildError, match="one network") as caught:
        predictor.predict_device_array(noise(SHAPE), SPACING)
    assert caught.value.__class__ is TrtbuildError
    one.patch.setattr("trtbuild.runtime.device.no_driver", lambda: "no NVIDIA driver")
    with one.open("auto") as predictor, pytest.raises(EngineError, match="does not run on a GPU") as caught:
        predictor.predict_device_array(noise(SHAPE), SPACING)
    assert "null (tensorrt: " in str(caught.value)
    assert "no NVIDIA driver" in str(caught.value)


def test_wrong_arguments_are_refused_there_too(bench: Callable[..., Bench]) -> None:
    with bench().open("tensorrt") as predictor, image_there(predictor, noise(SHAPE)) as there:
        with pytest.raises(TrtbuildError, match="step size"):
            predictor.predict_device_array(Shared(array=there), SPACING, step_size=0)
        with pytest.raises(InputError, match="three positive numbers"):
            predictor.predict_device_array(Shared(array=there), (1.0, 1.0))
        with pytest.raises(InputError, match="not on the model's GPU"):
            predictor.predict_device_array(noise(SHAPE), SPACING)


# --- TensorRT's own runner, on a fake of TensorRT with the names of its bindings


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_tensorrt_bundle_is_predicted_on_the_gpu(
    cuda: Cuda, backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tuple(f"T{number}" for number in range(CHANNELS))
    spec = replace(SPEC, channels=names, normalization=SPEC.normalization * CHANNELS, patch=PATCHES[3])
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fake_nvinfer.reference_logits", lambda batch: null_logits(batch, HEADS))
    give_cubin(monkeypatch)
    fake = install(monkeypatch, backend, cuda=cuda)
    record = device_record(backend, plan_of())
    bundle = device_bundle(tmp_path / "a.trtb", spec, folds=("0", "1"), record=record, plan=plan_of())
    images = write_cases(tmp_path / "in", "a")
    (images / f"a_0001{END}").write_bytes((images / f"a_0000{END}").read_bytes())
    for each in (backend, "null"):
        assert predicted(bundle, images, tmp_path / each, "--backend", each, "-npp", "0", "--json") == 0
    assert "Test GPU" in capsys.readouterr().out
    found, expected = (segmentation_from_file(tmp_path / each / f"a{END}") for each in (backend, "null"))
    np.testing.assert_array_equal(found, expected)
    assert len(np.unique(found)) == HEADS
    assert len(fake.seen) > 1
    gc.collect()
    assert fake.leaks() == []


def test_tensorrt_without_memory_for_its_activations_fails_the_case(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every plan of the case is tried; the bundle stays open, and serves the next case."""
    spec = replace(SPEC, channels=("A", "B"), normalization=SPEC.normalization * 2, patch=PATCHES[3])
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fake_nvinfer.reference_logits", lambda batch: null_logits(batch, HEADS))
    give_cubin(monkeypatch)
    fake = install(monkeypatch, "tensorrt", cuda=cuda)
    record = device_record("tensorrt", plan_of())
    bundle = device_bundle(tmp_path / "a.trtb", spec, record=record, plan=plan_of())
    data = noise((2, *SHAPE[1:]))
    with trtbuild.open(bundle, backend="tensorrt") as predictor:
        fake.no_memory = True
        with pytest.raises(OutOfMemory):
            predictor.predict_array(data, SPACING)
        fake.no_memory = False
        found = predictor.predict_array(data, SPACING)
    with trtbuild.open(bundle, backend="null") as predictor:
        assert_same(found, predictor.predict_array(data, SPACING))
    gc.collect()
    assert fake.leaks() == []
