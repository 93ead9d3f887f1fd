"""compile for TensorRT and inspect from the outside: words, exit codes, files, messages."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from models import subject
from runner_samples import CHANNELS, small_unet

from trtbuild.bundle import open_bundle
from trtbuild.cli import run

PATCH = (64, 64)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRTBUILD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def network(tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(small_unet(2, PATCH), path)
    return path


def test_any_network_becomes_an_engine_its_typed_graph_and_its_facts(
    network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    patches = np.random.default_rng(0).standard_normal((3, CHANNELS, *PATCH)).astype(np.float32)
    np.save(tmp_path / "patches.npy", patches)
    words = ["--precision", "int8", "--calibration-arrays", str(tmp_path / "patches.npy"), "--max-batch", "8"]
    words += ["--emit-script", str(tmp_path / "build.sh"), "-o", str(tmp_path / "n8.engine")]
    assert run(["compile", str(network), *words]) == 0
    said = "".join(capsys.readouterr())
    assert "building with tensorrt-rtx" in said, "auto says what it took"
    assert "2 layers in INT8" in said
    assert (tmp_path / "n8.engine").read_bytes()[:4] == b"vtrt"
    kinds = [node.op_type for node in onnx.load(tmp_path / "n8.onnx").graph.node]
    assert "ConvTranspose" not in kinds
    facts = json.loads((tmp_path / "n8.engine.json").read_text())
    assert facts["record"]["profile"]["max"] == [8, CHANNELS, *PATCH]
    assert "--maxShapes=input:8x2x64x64" in (tmp_path / "build.sh").read_text()
    assert run(["inspect", str(tmp_path / "n8.engine")]) == 0
    assert "INT8" in capsys.readouterr().out
    (tmp_path / "n8.engine").write_bytes((tmp_path / "n8.engine").read_bytes()[:-1])
    assert run(["inspect", str(tmp_path / "n8.engine")]) == 1
    assert "not the one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-d", "5"], "-d is for trained models"),
        (["--gate-patches", "3"], "--gate-patches is for trained models"),
        (["--calibration", "."], "--calibration is for trained models"),
        (["--no-tune"], "--no-tune is for trained models"),
    ],
)
def test_what_belongs_to_trained_models_is_refused_beside_an_onnx_file(
    words: list[str], message: str, network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["compile", str(network), *words, "-o", str(tmp_path / "n.engine")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "n.engine").exists()


@pytest.mark.parametrize("backends", [["openvino"], ["tensorrt-rtx", "tensorrt"]])
def test_an_onnx_file_has_one_backend_of_tensorrt(
    backends: list[str], network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for name in backends for word in ("--backend", name)]
    assert run(["compile", str(network), *words, "-o", str(tmp_path / "n.engine")]) == 1
    assert "becomes an engine of TensorRT" in capsys.readouterr().err


def test_shapes_of_an_onnx_file_beside_a_model_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--optShapes", "image:1x1x64x64x64", "-o", str(tmp_path / "b.trtb")]
    assert run(["compile", str(subject("demo").bundle), *words]) == 2
    assert "--optShapes is for NET.onnx" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--fp16-norms"], ["--noTimingCache"], ["--noTF32"], ["--emit-script", "x.sh"]])
def test_options_of_tensorrt_need_it(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compile", str(subject("demo").bundle), *words, "-o", str(tmp_path / "b.trtb")]) == 2
    assert f"{words[0]} is for TensorRT" in capsys.readouterr().err


def test_norms_compute_in_fp16_where_that_is_asked_for(tmp_path: Path) -> None:
    casts = {}
    for option in ("", "--fp16-norms"):
        path = tmp_path / f"b{option}.trtb"
        words = ["--backend", "tensorrt-rtx", "--precision", "fp16", *([option] if option else []), "-o", str(path)]
        assert run(["compile", str(subject("lowres3d").bundle), *words]) == 0
        bundle = open_bundle(path)
        (network,) = (n for n in bundle.manifest.stages[0].networks if n.parent)
        model = onnx.load(bundle.file(network.file))
        casts[option] = sum(node.op_type == "Cast" for node in model.graph.node)
    assert casts["--fp16-norms"] == 2, "input and output alone"
    assert casts[""] > 2


def test_plain_inspect_shows_no_hashes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "b.trtb"
    assert run(["compile", str(subject("lowres3d").bundle), "--backend", "tensorrt-rtx", "-o", str(path)]) == 0
    (engine,) = open_bundle(path).manifest.engines
    capsys.readouterr()
    assert run(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out.replace("\n", "").replace(" ", "")
    assert "tensorrt-rtx" in shown
    for key in ("key", "sha256"):
        assert str(engine.options[key])[:16] not in shown
