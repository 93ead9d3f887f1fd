"""The contract of every runner on a real GPU: ONNX Runtime's CUDA provider, TensorRT and TensorRT-RTX.

On the fake GPU the same tests are in tests/test_runners.py and tests/test_runner_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gpu_places import REAL, opened_place, skip_without_float32_engine, skip_without_gpu
from runner_contract import contract_of
from runner_samples import PATCHES, make_network, make_record, patches, reference_logits, small_unet, write_model
from test_runner_cuda import enqueued
from test_runners import Subject

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt import plan_from_onnx, shapes_from_io
from trtbuild.engine.tensorrt.record import record_from_plan, target_device
from trtbuild.engine.tensorrt.reuse import engine_key
from trtbuild.errors import EngineError, MissingExtra
from trtbuild.graph.precision import tensorrt_form
from trtbuild.nvinfer import Backend, nvinfer
from trtbuild.runtime.gpu.shared import Gpu
from trtbuild.runtime.runner import Runner
from trtbuild.runtime.select import open_runner
from trtbuild.spec import BuildRecord

CUDA = Subject("onnxruntime-cuda", "f32", 3e-6)
# TensorRT's float32 sums in another order than the reference, with other operators fused, as on CPUs
SUBJECTS = [CUDA, Subject("tensorrt", "f32", 3e-6), Subject("tensorrt-rtx", "f32", 3e-6)]
Open = Callable[..., Runner]

on_gpu = [pytest.param(subject, marks=pytest.mark.gpu) for subject in SUBJECTS]
globals().update(contract_of(on_gpu))


def built(backend: Backend, dimensions: int, batch: int, folder: Path) -> tuple[BuildRecord, Path]:
    """A float32 engine of the small network, without TF32."""
    try:
        flavour = nvinfer(backend)
    except (EngineError, MissingExtra) as error:
        pytest.skip(" ".join(str(error).split()))
    config = TensorRTConfig(min_batch=1, opt_batch=batch, max_batch=batch)
    device, network = target_device(config, flavour), make_network(dimensions)
    model = write_model(folder / f"{dimensions}d_{batch}.onnx", tensorrt_form(small_unet(dimensions)))
    shapes = shapes_from_io(network.io[:1], config)
    plan = plan_from_onnx(model.read_bytes(), nvinfer=flavour, config=config, shapes=shapes)
    engine = model.with_suffix(".engine")
    engine.write_bytes(plan.content)
    record = record_from_plan(
        plan, network=network.id, file=engine.name, precision="fp32", rest="fp32", nvinfer=flavour, config=config,
        shapes=shapes, device=device, key=engine_key(model, config, flavour, shapes, device),
    )  # fmt: skip
    return record, engine


def engine_of(subject: Subject, dimensions: int, batch: int, folder: Path) -> tuple[BuildRecord, Path]:
    if subject == CUDA:
        skip_without_float32_engine()
        record = make_record(subject.backend, dimensions, batch=batch)
        return record, write_model(folder / f"{dimensions}d.onnx", small_unet(dimensions))
    skip_without_gpu()
    return built(subject.backend, dimensions, batch, folder)  # type: ignore[arg-type]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Open]:
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path / "cache"))
    opened: list[Runner] = []

    def start(
        subject: Subject, dimensions: int = 3, threads: int | None = None, batch: int = 2, **ignored: Any
    ) -> Runner:
        opened.append(open_runner(*engine_of(subject, dimensions, batch, tmp_path), threads=threads))
        return opened[-1]

    yield start
    for runner in opened:
        runner.close()


@pytest.fixture
def gpu() -> Iterator[Gpu]:
    with opened_place(REAL) as opened:
        yield opened


@pytest.mark.parametrize("dimensions", [2, 3])
@pytest.mark.parametrize("subject", on_gpu, ids=str)
def test_device_memory_goes_in_and_comes_out(subject: Subject, dimensions: int, gpu: Gpu, tmp_path: Path) -> None:
    batch = patches(2, dimensions)
    with open_runner(*engine_of(subject, dimensions, 2, tmp_path), gpu=gpu) as runner:
        logits = enqueued(runner, gpu, batch, dimensions)  # type: ignore[arg-type]
        want = reference_logits(batch)
        assert np.abs(logits - want).max() <= subject.tolerance * np.abs(want).max()


def test_the_engine_for_the_contract_is_built_and_described(tmp_path: Path) -> None:
    """Where TensorRT-RTX is installed, without a GPU."""
    pytest.importorskip("tensorrt_rtx")
    record, engine = built("tensorrt-rtx", 3, 2, tmp_path)
    assert record.inference_precision == "f32", "TF32 is off"
    assert record.profile.max == (2, 2, *PATCHES[3])
    assert engine.read_bytes()[:4] == b"vtrt"
    assert replace(record, options={}).file == engine.name
