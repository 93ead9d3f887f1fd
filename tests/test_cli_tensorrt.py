"""compile for TensorRT and inspect from the outside: words, exit codes, files, messages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from models import subject
from runner_samples import CHANNELS, small_unet

from trtbuild.bundle import open_bundle
from trtbuild.cli import run
from trtbuild.config import TensorRTConfig
from trtbuild.config.tensorrt import MOST_WORKSPACE
from trtbuild.errors import TrtbuildError

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
    assert facts["precision"]["method"] == "percentile", "auto says what it took"
    assert "thresholds by percentile" in said
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


def refused(words: list[str], network: Path, capsys: pytest.CaptureFixture[str]) -> str:
    output = network.with_name("n.engine")
    assert run(["compile", str(network), "--backend", "tensorrt-rtx", *words, "-o", str(output)]) in (1, 2)
    assert not output.exists()
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workspace", "99999999999999999"], "--workspace"),
        (["--workspace", "8796093022208"], "--workspace"),
        (["--max-batch", "4097"], "--max-batch"),
        (["--max-batch", "4000000"], "--max-batch"),
        (["--optShapes", "input:1x2x64x64", "--max-batch", "8"], "--max-batch"),
        (["--optShapes", "input:1x2x64x64", "--min-batch", "1"], "--min-batch"),
        (["--noTimingCache"], "--noTimingCache"),
    ],
)
def test_what_cannot_be_done_is_an_error_that_names_the_option(
    words: list[str], message: str, network: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(words, network, capsys)


def test_the_largest_workspace_builds(network: Path, tmp_path: Path) -> None:
    words = ["--backend", "tensorrt-rtx", "--workspace", str(MOST_WORKSPACE), "-o", str(tmp_path / "n.engine")]
    assert run(["compile", str(network), *words]) == 0


def test_a_batch_that_is_fixed_takes_no_option_of_the_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_unet(2, PATCH)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 1
    del model.graph.value_info[:]
    path = tmp_path / "fixed.onnx"
    onnx.save(model, path)
    assert "--opt-batch" in refused(["--opt-batch", "1"], path, capsys), "given, though it is the default"
    assert run(["compile", str(path), "--backend", "tensorrt-rtx", "-o", str(tmp_path / "n.engine")]) == 0


@pytest.mark.parametrize("capabilities", [("",), ("86", ""), ("86", "86"), (86,), "86"])
def test_a_list_of_capabilities_that_is_none(capabilities: Any) -> None:
    with pytest.raises(TrtbuildError, match="--compute-capability"):
        TensorRTConfig(compute_capabilities=capabilities)


def test_a_script_replaces_no_input(network: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = network.read_bytes()
    assert "--emit-script" in refused(["--emit-script", str(network), "--overwrite"], network, capsys)
    assert network.read_bytes() == before


def test_json_says_what_nobody_knows(network: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--backend", "tensorrt-rtx", "--precision", "fp16", "-o", str(tmp_path / "n.engine"), "--json"]
    assert run(["compile", str(network), *words]) == 0
    assert [line for line in json.loads(capsys.readouterr().out)["warnings"] if "without calibration" in line]


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
