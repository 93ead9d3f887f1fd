"""Engines from real ONNX files: what the record says is what opens again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper
from runner_samples import (
    CHANNELS,
    HEADS,
    PATCHES,
    make_network,
    model_from_nodes,
    patches,
    reference_logits,
    small_unet,
    write_model,
)

import trtbuild.engine.build as build
from trtbuild.engine import engine_from_onnx
from trtbuild.engine.memory import peak_bytes
from trtbuild.errors import EngineError, NonFinite
from trtbuild.machine import cpu_description, usable_cpus
from trtbuild.runtime.select import open_runner
from trtbuild.spec import BuildRecord, json_from_value, value_from_json

BACKENDS = ["openvino", "onnxruntime"]


@pytest.fixture(scope="module", params=[2, 3])
def dimensions(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def model(dimensions: int, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("engine") / "small.onnx", small_unet(dimensions))


def engine(model: Path, dimensions: int, backend: str, **changes: Any) -> BuildRecord:
    values: dict[str, Any] = {"backend": backend, "inference_precision": "f32", "threads": None, "tune": False}
    return engine_from_onnx(model, make_network(dimensions), **(values | changes))


@pytest.mark.parametrize("tune", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_record_opens_again_and_computes_the_network(
    backend: str, tune: bool, model: Path, dimensions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "fastest", lambda *a, **k: _fast(*a, **k))
    record = engine(model, dimensions, backend, tune=tune)
    batch = patches(3, dimensions)
    want = reference_logits(batch)
    with open_runner(record, model) as runner:
        info = runner.describe()
        assert np.abs(runner.infer(batch) - want).max() <= 3e-6 * np.abs(want).max()
    assert (info.backend, info.version, info.inference_precision) == (backend, record.version, "f32")
    assert not [key for key in info.details if key.startswith("note.")]
    assert (record.network, record.flavour, record.file, record.precision) == ("fold_0_fp32", "cpu", None, "fp32")
    assert record.profile.max == (record.options["batch"], CHANNELS, *PATCHES[dimensions])
    assert record.profile.min == (1, CHANNELS, *PATCHES[dimensions])
    assert record.device == {**cpu_description(), "cpus": str(usable_cpus())}
    assert ("streams 1, batch 2" in str(record.options["tuning"])) is tune
    assert value_from_json(BuildRecord, json_from_value(record)) == record


def _fast(*args: Any, **kwargs: Any) -> Any:
    """The real measurement, in a twentieth of its time."""
    from trtbuild.engine.tune import fastest

    return fastest(*args, seconds=0.2, **kwargs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_untuned_engines_are_the_simplest_and_repeat_exactly(backend: str, model: Path, dimensions: int) -> None:
    first, second = (engine(model, dimensions, backend, threads=1) for _ in range(2))
    assert first.options == second.options
    assert (first.options["threads"], first.options["streams"], first.options["batch"]) == (1, 1, 1)
    assert first.options["tuning"] == "off"


@pytest.mark.skipif("bf16" not in cpu_description()["isa"], reason="the CPU has no bf16")
def test_bf16_is_its_own_precision_in_the_record(model: Path, dimensions: int) -> None:
    record = engine(model, dimensions, "openvino", inference_precision="bf16")
    assert (record.precision, record.inference_precision) == ("bf16", "bf16")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "openvin"}, "Did you mean openvino"),
        ({"backend": "null"}, "no such backend"),
        ({"backend": "onnxruntime", "inference_precision": "bf16"}, "precision"),
        ({"backend": "openvino", "inference_precision": "f16"}, "f32 or bf16"),
        ({"threads": 0}, "threads"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    values: dict[str, Any] = {"backend": "openvino", "inference_precision": "f32", "threads": None, "tune": False}
    with pytest.raises(EngineError, match=message):
        engine_from_onnx(tmp_path / "never read", make_network(), **(values | changes))


def test_threads_are_capped_by_the_usable_cpus(model: Path, dimensions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "usable_cpus", lambda: 2)
    monkeypatch.setattr(build, "usable_cores", lambda: 1)
    assert engine(model, dimensions, "openvino", threads=64).options["threads"] == 2
    assert engine(model, dimensions, "openvino").options["threads"] == 1


def test_a_network_without_a_fixed_patch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="fixed patch"):
        engine_from_onnx(
            tmp_path / "never read", make_network(patch=("z", 8, 8)), backend="openvino", inference_precision="f32",
            threads=None, tune=False,
        )  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_network_that_overflows_is_found_at_once(backend: str, tmp_path: Path) -> None:
    shape = ("batch", CHANNELS, *PATCHES[3])
    big = {"big": np.float32([1e38]).reshape(1, 1, 1, 1, 1)}
    nodes = [helper.make_node("Mul", ["input", "big"], ["a"]), helper.make_node("Mul", ["a", "big"], ["logits"])]
    path = write_model(tmp_path / "overflow.onnx", model_from_nodes(nodes, shape, shape, big))
    with pytest.raises(NonFinite, match=r"overflow\.onnx"):
        engine(path, 3, backend)


@pytest.mark.skipif(sys.platform == "linux", reason="Linux can measure")
def test_elsewhere_memory_is_unknown() -> None:
    assert peak_bytes(lambda: None) is None


ALLOCATES = """
import numpy as np
from trtbuild.engine.memory import peak_bytes

def allocate():
    return [np.ones({block}, dtype=np.uint8) for _ in range({size} // {block})]

held = allocate()
last = np.ones(1000, dtype=np.uint8)  # above the blocks, so that freeing them does not shrink the heap by itself
del held
print(peak_bytes(lambda: allocate().clear()))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux only")
@pytest.mark.parametrize("block", [48 * 2**20, 64 * 2**10])
def test_the_measured_memory_is_about_what_is_allocated(block: int) -> None:
    """In a process of its own: in the heap that other tests have left in pieces, some of it would find room."""
    size = 48 * 2**20
    code = ALLOCATES.format(block=block, size=size)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # the kernel counts resident pages per CPU, in lots of up to 64 pages, hence the little less
    assert 0.98 * size <= int(done.stdout) < 1.2 * size


def test_memory_that_cannot_be_measured_is_said_to_be_unknown(
    model: Path, dimensions: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("trtbuild.engine.memory.CLEAR", tmp_path / "no" / "such")
    memory = engine(model, dimensions, "openvino").memory
    assert (memory.host, memory.measured) == (None, False)


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux only")
def test_the_memory_of_an_engine_is_measured(model: Path, dimensions: int) -> None:
    memory = engine(model, dimensions, "openvino").memory
    assert memory.measured
    assert memory.host is not None
    assert 0 <= memory.host < 500 * 2**20  # this network is so small that the kernel's lots of 64 pages may hide it


def test_heads_are_those_of_the_network(model: Path, dimensions: int) -> None:
    with open_runner(engine(model, dimensions, "openvino"), model) as runner:
        assert runner.describe().outputs.shape[1] == HEADS
