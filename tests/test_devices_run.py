"""Whole folder runs on two (fake) GPUs, through the device path: the files are those of one GPU."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_bundles import NamedEngine, device_bundle, give_engines, networks_of
from device_samples import check_unharmed, fake_gpu
from fake_cuda import Cuda
from null_bundles import END, FIRST, SECOND, SPEC, write_cases
from reference import segmentation_from_file

from trtbuild.cli import run
from trtbuild.config import PredictConfig
from trtbuild.errors import EngineError
from trtbuild.steps.folder_run.cases import predict_cases
from trtbuild.steps.folder_run.flow import Events
from trtbuild.steps.folder_run.planning import CasePlan
from trtbuild.steps.folder_run.record import RECORD

PATIENCE = 60.0


@pytest.fixture
def cuda() -> Iterator[Cuda]:
    """Several fake GPUs, which must be as they were after the test."""
    with fake_gpu() as fake:
        fake.gpus = 8
        yield fake
        check_unharmed(fake)


@pytest.fixture
def engines(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> list[NamedEngine]:
    """Those that are open on a GPU, of every bundle of this file."""
    return give_engines(monkeypatch, cuda, networks_of() | networks_of(FIRST, SECOND))


def words(bundle: Path, images: Path, out: Path, devices: str) -> list[str]:
    """Nothing is read or written by another process."""
    more = ["--devices", devices, "--backend", "tensorrt", "-npp", "0", "--save_probabilities"]
    return ["predict", str(bundle), "-i", str(images), "-o", str(out), *more]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != RECORD}


@pytest.mark.parametrize("specs", [(SPEC,), (FIRST, SECOND)])
def test_cases_over_two_gpus_give_the_files_of_one(
    tmp_path: Path, engines: list[NamedEngine], monkeypatch: pytest.MonkeyPatch, specs: Any
) -> None:
    """The first cases of both GPUs meet in their networks."""
    bundle, images = device_bundle(tmp_path / "b.trtb", *specs), write_cases(tmp_path / "images", *"abcd")
    assert run(words(bundle, images, tmp_path / "one", "0")) == 0
    both, met = threading.Barrier(2), set[int]()
    enqueue = NamedEngine.enqueue

    def meeting(self: NamedEngine, *values: int) -> None:
        if threading.get_ident() not in met:
            met.add(threading.get_ident())
            both.wait(PATIENCE)
        enqueue(self, *values)

    monkeypatch.setattr(NamedEngine, "enqueue", meeting)
    assert run(words(bundle, images, tmp_path / "two", "0,1")) == 0
    assert len(met) == 2
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    assert engines == [], "all are closed"
    labels = segmentation_from_file(tmp_path / "two" / f"a{END}")
    assert len(np.unique(labels)) > 1


@pytest.mark.parametrize("specs", [(SPEC,), (FIRST, SECOND)])
def test_the_gpus_share_the_windows_of_a_single_case(
    tmp_path: Path, engines: list[NamedEngine], specs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage of a cascade as well; what a case of its own GPU gives differs by rounding of the probabilities."""
    bundle, images = (
        device_bundle(tmp_path / "b.trtb", *specs),
        write_cases(tmp_path / "images", "a", shape=(30, 14, 11)),
    )
    assert run(words(bundle, images, tmp_path / "one", "0")) == 0
    gpus: set[int] = set()
    enqueue = NamedEngine.enqueue

    def noting(self: NamedEngine, *values: int) -> None:
        gpus.add(id(self))
        enqueue(self, *values)

    monkeypatch.setattr(NamedEngine, "enqueue", noting)
    assert run(words(bundle, images, tmp_path / "two", "0,1")) == 0
    assert len(gpus) == 2 * len(specs), "each stage has run on both"
    one, two = (segmentation_from_file(tmp_path / name / f"a{END}") for name in ("one", "two"))
    np.testing.assert_array_equal(one, two)
    assert len(np.unique(one)) > 1
    maps = [np.load(tmp_path / name / "a.npz")["probabilities"] for name in ("one", "two")]
    np.testing.assert_allclose(maps[0], maps[1], rtol=0, atol=1e-5)
    assert engines == []


def test_the_logits_of_a_shared_case_count_on_the_host(tmp_path: Path, engines: list[NamedEngine]) -> None:
    """What the GPUs have found, and what it adds up to; one GPU gives labels, and a second case has one to itself."""
    bundle, shape = device_bundle(tmp_path / "b.trtb"), (60, 20, 20)
    images = write_cases(tmp_path / "images", "a", shape=shape, spacing=(1.0, 1.0, 1.0))

    def network_bytes(devices: tuple[int, ...]) -> int:
        plans: list[CasePlan] = []
        config = PredictConfig(
            bundles=(bundle,), inputs=(images,), output=tmp_path / "out", backend="tensorrt", devices=devices,
            preparing=0,
        )  # fmt: skip
        predict_cases(config, Events(case_started=plans.append))
        assert plans[0].bytes is not None
        return plans[0].bytes.network

    alone = network_bytes((0,))
    logits = 4 * SPEC.labels.heads * int(np.prod(shape))
    assert network_bytes((0, 1)) > 2 * logits > 4 * alone / 3
    write_cases(tmp_path / "images", "b", shape=shape, spacing=(1.0, 1.0, 1.0))
    assert network_bytes((0, 1)) == alone


def record_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / RECORD).read_bytes())["trtbuild"]
    return found


def test_how_many_gpus_shared_a_case_and_their_memory_stand_in_the_record(
    tmp_path: Path, engines: list[NamedEngine], capsys: pytest.CaptureFixture[str]
) -> None:
    """Sums round otherwise where the GPUs' windows meet, and little memory makes them float16."""
    bundle, images = device_bundle(tmp_path / "b.trtb"), write_cases(tmp_path / "images", "a")
    out = tmp_path / "out"
    both = words(bundle, images, out, "0,1")
    assert run(both) == 0
    assert record_of(out)["gpus_per_case"] == 2
    assert run([*both, "--continue_prediction"]) == 0
    for key, changed in (
        ("gpus_per_case", words(bundle, images, out, "0")),
        ("gpus_per_case", words(bundle, images, out, "0,1,2")),
        ("device_memory", [*both, "--max-device-memory", "1G"]),
    ):
        capsys.readouterr()
        assert run([*changed, "--continue_prediction"]) == 1
        assert key in capsys.readouterr().err
    write_cases(tmp_path / "images", "b")
    assert run(both) == 0
    assert record_of(out)["gpus_per_case"] == 1


def test_parts_of_a_run_compute_in_one_way_however_many_cases_each_has(
    tmp_path: Path, engines: list[NamedEngine]
) -> None:
    """Of three cases in two parts the second has one: its GPUs do not share it, and it may be continued with them."""
    bundle, images = device_bundle(tmp_path / "b.trtb"), write_cases(tmp_path / "images", *"abc")
    assert run(words(bundle, images, tmp_path / "one", "0")) == 0
    for part in "01":
        more = ["-num_parts", "2", "-part_id", part, "--continue_prediction"]
        assert run([*words(bundle, images, tmp_path / "parts", "0,1"), *more]) == 0
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")


def test_two_gpus_that_are_not_there_are_no_reason_to_take_the_cpu(
    tmp_path: Path, engines: list[NamedEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`auto` takes the CPU where nobody names a GPU, and says why; here the user did."""
    monkeypatch.setattr("trtbuild.runtime.device.no_driver", lambda: "no driver is installed")
    bundle, images = device_bundle(tmp_path / "b.trtb"), write_cases(tmp_path / "images", "a")
    some = ["predict", str(bundle), "-i", str(images), "-npp", "0"]
    for number, devices in enumerate(("0,1", "1,0", "1")):
        out = tmp_path / str(number)
        assert run([*some, "-o", str(out), "--devices", devices]) == 1
        assert "no driver is installed" in capsys.readouterr().err
        assert not list(out.glob(f"*{END}"))
    assert run([*some, "-o", str(tmp_path / "cpu")]) == 0
    assert "no driver is installed" in capsys.readouterr().err


@pytest.mark.parametrize("cases", ["a", "abcd"])
def test_a_gpu_that_fails_is_named(
    tmp_path: Path, engines: list[NamedEngine], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    cases: str,
) -> None:  # fmt: skip
    """Whether it has a case of its own, or a part of the only one."""
    bundle = device_bundle(tmp_path / "b.trtb")
    images = write_cases(tmp_path / "images", *cases, shape=(30, 14, 11))
    failed = threading.Event()
    enqueue = NamedEngine.enqueue

    def failing(self: NamedEngine, *values: int) -> None:
        if self is engines[1]:
            failed.set()
            raise EngineError("The engine is broken.")
        assert failed.wait(PATIENCE)
        enqueue(self, *values)

    monkeypatch.setattr(NamedEngine, "enqueue", failing)
    assert run(words(bundle, images, tmp_path / "out", "5,7")) == 1
    error = capsys.readouterr().err
    assert "The engine is broken." in error
    assert "GPU 7" in error
    assert engines == []
