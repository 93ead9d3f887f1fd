"""Whole cases on a GPU, from a model's bundle to its files: nnU-Net's results within the limits of a float32 engine.

`pytest -m gpu` runs all models on a real one. The same tests run here with some of them on the fake GPU, whose network
is ONNX Runtime's on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import test_parity
from gpu_places import BOTH, FAKE, REAL, fake_place, skip_without_float32_engine
from models import Subject, root, subject
from test_parity import LIMITS, NAMES, assert_equal, cases_of

import trtbuild
from trtbuild.bundle import open_bundle
from trtbuild.cli import run
from trtbuild.config import CalibrationConfig, CompileConfig
from trtbuild.errors import EngineError
from trtbuild.graph import load_onnx
from trtbuild.nvinfer import no_driver
from trtbuild.spec import Precision
from trtbuild.steps.compilation.compile import compile_bundle

CUDA = "onnxruntime-cuda"


@functools.cache
def compiled(name: str, place: str) -> Subject:
    """The model with a bundle for the GPU; compiled there, so that its networks are held to their goldens."""
    who, bundle = subject(name), root() / f"{name}_{place}.trtb"
    trtbuild.compile(who.bundle, bundle, backends=(CUDA,), tune=False)
    facts = open_bundle(bundle).manifest.extensions[CUDA]
    assert all(fact["unrun"] is None for fact in facts.values()), facts
    return replace(who, bundle=bundle)


@pytest.fixture(params=BOTH)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setitem(test_parity.LIMITS, CUDA, LIMITS["onnxruntime"])
    if request.param == REAL:
        skip_without_float32_engine()
        yield REAL
    else:
        with fake_place():
            yield FAKE


CASES = [(name, kind) for name in NAMES for kind in cases_of(name)]
ON_FAKE = ["regions2d", pytest.param("iso3d", marks=pytest.mark.slow)]


@pytest.mark.parametrize("place", BOTH[:1], indirect=True)
@pytest.mark.parametrize("name", ON_FAKE)
def test_the_device_path_equals_nnunet_on_the_fake_gpu(place: str, name: str, tmp_path: Path) -> None:
    assert_equal(compiled(name, place), "main", CUDA, tmp_path)


@pytest.mark.parametrize("place", BOTH[1:], indirect=True)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_device_path_equals_nnunet(place: str, name: str, kind: str, tmp_path: Path) -> None:
    who = compiled(name, place)
    if kind not in who.model.cases:
        assert kind != "main", "every model has a main case"
        return  # a kind that this reader cannot express
    assert_equal(who, kind, CUDA, tmp_path)


@pytest.mark.parametrize("place", BOTH, indirect=True)
def test_the_whole_case_runs_on_the_gpu(place: str) -> None:
    with trtbuild.open(compiled("regions2d", place).bundle, backend=CUDA) as predictor:
        assert predictor.on_device
        assert predictor.describe().backend == CUDA


# --- compiling for it, without a GPU


@pytest.mark.skipif(no_driver() is None, reason="with a GPU the networks are run")
def test_a_bundle_compiled_without_a_gpu_says_that_nothing_was_run(tmp_path: Path) -> None:
    lines: list[str] = []
    config = CompileConfig(model=subject("regions2d").bundle, output=tmp_path / "cuda.trtb", backends=(CUDA,))
    bundle = compile_bundle(config, lines.append)
    assert [record.backend for record in bundle.manifest.engines] == [CUDA] * len(subject("regions2d").model.folds)
    for record in bundle.manifest.engines:
        assert (record.flavour, record.file) == ("cuda", None)
        assert (record.precision, record.inference_precision) == ("fp32", "f32")
        assert (record.profile.min[0], record.profile.max[0]) == (1, 4)
        reason = bundle.manifest.extensions[CUDA][record.network]["unrun"]
        assert "onnxruntime-gpu" in reason or "driver" in reason
        assert any(record.network in line and "not run on a GPU" in line for line in lines)
    with pytest.raises(EngineError, match=r"onnxruntime-gpu|driver"):
        trtbuild.open(bundle.path, backend=CUDA)


def test_its_engines_stand_before_those_of_a_cpu(tmp_path: Path) -> None:
    config = CompileConfig(
        model=subject("regions2d").bundle, output=tmp_path / "x.trtb", backends=("onnxruntime", CUDA), tune=False
    )
    backends = [record.backend for record in compile_bundle(config).manifest.engines]
    assert list(dict.fromkeys(backends)) == [CUDA, "onnxruntime"]


@pytest.mark.parametrize("place", BOTH, indirect=True)
def test_fp16_networks_are_typed_and_held_to_their_goldens(place: str, tmp_path: Path) -> None:
    lines: list[str] = []
    config = CompileConfig(
        model=subject("regions2d").bundle, output=tmp_path / "x.trtb", backends=(CUDA,), precision="fp16"
    )
    bundle = compile_bundle(config, lines.append)
    record = bundle.manifest.engines[0]
    assert (record.precision, record.inference_precision) == ("fp16", "f16")
    assert bundle.manifest.extensions[CUDA][record.network]["unrun"] is None
    (network,) = [n for stage in bundle.manifest.stages for n in stage.networks if n.id == record.network]
    model = load_onnx(bundle.file(network.file))
    assert {tensor.data_type for tensor in model.graph.initializer if tensor.dims} >= {onnx.TensorProto.FLOAT16}
    assert not [node.op_type for node in model.graph.node if node.op_type == "Shape"], "it would run on the CPU"
    with trtbuild.open(bundle.path, backend=CUDA) as predictor:
        assert predictor.on_device


@pytest.mark.parametrize(("option", "code"), [("--max-batch", 0), ("--workspace", 2)])
def test_its_batch_is_chosen_as_for_tensorrt_and_nothing_else(option: str, code: int, tmp_path: Path) -> None:
    output = tmp_path / "x.trtb"
    given = ["compile", str(subject("regions2d").bundle), "-o", str(output), "--backend", CUDA, option, "2"]
    assert run(given) == code
    if code == 0:
        assert open_bundle(output).manifest.engines[0].profile.max[0] == 2


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_other_precisions_are_refused_before_the_work(precision: Precision, tmp_path: Path) -> None:
    calibration = CalibrationConfig(data=tmp_path) if precision == "int8" else None
    config = CompileConfig(
        model=subject("regions2d").bundle, output=tmp_path / "x.trtb", backends=(CUDA,), precision=precision,
        calibration=calibration,
    )  # fmt: skip
    with pytest.raises(EngineError, match="tensorrt") as caught:
        compile_bundle(config)
    assert caught.value.got == f"--precision {precision}"
