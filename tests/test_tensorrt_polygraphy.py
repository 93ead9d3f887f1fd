"""A plan that Polygraphy builds from our ONNX and ours are the same: what TensorRT-RTX says while it builds each."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

if __name__ != "__main__":
    from precision_samples import network_model
    from tensorrt_samples import typed
from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt import EngineTable, plan_from_onnx
from trtbuild.engine.tensorrt.table import table_from_log

PRECISIONS = ("fp32", "fp16", "int8+fp16")
PATCH = (16, 16, 16)
SHAPES = {"image": ((1, 1, *PATCH), (2, 1, *PATCH), (4, 1, *PATCH))}
HEAD = "I/O Tensors:\n"


@dataclass(frozen=True, kw_only=True)
class Built:
    """What an engine is by the log of its build: its layers, its I/O as the log writes it, and its length in bytes."""

    table: EngineTable
    io: str
    size: int


def built_from_log(rows: list[str], size: int) -> Built:
    table = table_from_log(rows)
    assert table is not None
    (listed,) = (row for row in rows if row.startswith("Layers:\n"))
    return Built(table=table, io=listed[listed.index(HEAD) :], size=size)


def ours(model: bytes) -> Built:
    """Built by trtbuild, whose logger keeps every row."""
    from trtbuild.engine.tensorrt import build
    from trtbuild.engine.tensorrt.logger import Rows
    from trtbuild.nvinfer import nvinfer

    kept: list[Rows] = []

    def rows() -> Rows:
        kept.append(Rows())
        return kept[-1]

    # Polygraphy leaves TF32 on, as TensorRT does, and has no switch for it on TensorRT-RTX
    config = TensorRTConfig(tf32=True)
    with patch.object(build, "Rows", rows):
        plan = plan_from_onnx(model, nvinfer=nvinfer("tensorrt-rtx"), config=config, shapes=SHAPES)
    found = built_from_log(list(kept[0].messages()), len(plan.content))
    assert plan.table == found.table
    return found


def polygraphys(model: bytes) -> Built:
    """Built by Polygraphy's own functions, with what trtbuild's defaults are called there."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import NetworkFromOnnxBytes, Profile, engine_bytes_from_network, util
    from polygraphy.mod.trt_importer import lazy_import_trt

    trt: Any = lazy_import_trt()
    rows: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            rows.append(msg)

    util.TRT_LOGGER = Log()  # what util.get_trt_logger() gives: its own drops rows that it thinks are spam
    profile = Profile()
    for name, (smallest, usual, largest) in SHAPES.items():
        profile.add(name, smallest, usual, largest)
    config = CreateConfigRTX(profiles=[profile], profiling_verbosity=trt.ProfilingVerbosity.DETAILED)
    content = engine_bytes_from_network(NetworkFromOnnxBytes(model, strongly_typed=True), config=config)
    return built_from_log(rows, len(bytes(content)))


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, tuple[Built, Built]]:
    """Ours and Polygraphy's of one typed ONNX file per precision, each from a process of its own."""
    result = {}
    for precision in PRECISIONS:
        path = tmp_path_factory.mktemp("polygraphy") / "network.onnx"
        path.write_bytes(typed(network_model("plain3d"), precision).model.SerializeToString())
        result[precision] = (_apart("ours", path), _apart("polygraphy", path))
    return result


def _apart(which: str, path: Path) -> Built:
    found = path.with_name(which)
    told = subprocess.run([sys.executable, __file__, which, str(path), str(found)], capture_output=True, timeout=120,
                          env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"})  # fmt: skip
    assert told.returncode == 0, told.stderr.decode()
    table, io, size = pickle.loads(found.read_bytes())
    return Built(table=table, io=io, size=size)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_have_the_same_inputs_and_outputs(precision: str, builds: Mapping[str, tuple[Built, Built]]) -> None:
    own, theirs = builds[precision]
    assert own.io == theirs.io
    assert all(f"Name: {name}," in own.io for name in ("image", "logits"))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_have_the_same_layers(precision: str, builds: Mapping[str, tuple[Built, Built]]) -> None:
    """Names, kinds, tactics, tensors with shapes and types, and the ONNX nodes of each layer."""
    own, theirs = builds[precision]
    assert len(own.table.layers) > 10
    assert any(layer.nodes for layer in own.table.layers)
    assert own.table.layers == theirs.table.layers


@pytest.mark.parametrize("precision", PRECISIONS)
def test_both_take_the_same_memory(precision: str, builds: Mapping[str, tuple[Built, Built]]) -> None:
    own, theirs = builds[precision]
    assert own.table.activation_memory == theirs.table.activation_memory is not None
    assert own.table.weights_memory == theirs.table.weights_memory is not None
    assert own.size == theirs.size


def test_the_table_tells_precisions_apart(builds: Mapping[str, tuple[Built, Built]]) -> None:
    """Else equal tables would say nothing of what is computed."""
    types = {
        precision: {tensor.dtype for layer in own.table.layers for tensor in layer.inputs}
        for precision, (own, _) in builds.items()
    }
    assert types["fp32"] == {"Float"}
    assert {"Float", "Half"} <= types["fp16"]
    assert "Int8" not in types["fp16"]
    assert {"Half", "Int8"} <= types["int8+fp16"]


def main(which: str, path: Path, found: Path) -> None:
    """As a program: build an ONNX file by one of the two, and write what came out."""
    result = {"ours": ours, "polygraphy": polygraphys}[which](path.read_bytes())
    found.write_bytes(pickle.dumps((result.table, result.io, result.size)))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
