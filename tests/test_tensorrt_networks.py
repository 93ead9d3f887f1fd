"""nnU-Net's default networks through TensorRT-RTX without a GPU: what a build costs, and what the layer table proves.

Each build runs in a process of its own that reads the finished ONNX, with batches 1 to 4. The bounds on time and memory
are what was asked for; seen were 1 to 12 s on two busy cores, 30 s on very busy ones, and 0.4 to 2.2 GB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import onnx
import pytest
from tensorrt_samples import NETWORKS, PRECISIONS, Measured, built_apart, default_network, typed

from trtbuild.engine.tensorrt import EngineLayer, EngineTable

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of memory from /proc")

SECONDS, PEAK = 30, 2_500_000_000
HALF = {"fp16": "Half", "bf16": "BFloat16"}
CASES = [
    pytest.param(name, precision, marks=pytest.mark.slow if precision == "int8+bf16" else ())
    for name in NETWORKS
    for precision in PRECISIONS
]
every = pytest.mark.parametrize(("name", "precision"), CASES)


@dataclass(frozen=True, kw_only=True)
class Built:
    """A build, the graph that it was made of, and the names of its layers that compute in INT8."""

    model: onnx.ModelProto
    quantized: tuple[str, ...]
    measured: Measured

    @property
    def table(self) -> EngineTable:
        assert self.measured.table is not None, self.measured.warnings
        return self.measured.table

    def layers_of(self, node: str) -> list[EngineLayer]:
        return [layer for layer in self.table.layers if node in layer.nodes]

    def nodes(self, *operators: str) -> list[str]:
        return [entry.name for entry in self.model.graph.node if entry.op_type in operators]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Built]:
    """Exports a network once, and builds it once in a precision."""
    folder = tmp_path_factory.mktemp("networks")
    exported = cache(default_network)

    @cache
    def result(name: str, precision: str) -> Built:
        form = typed(exported(name), precision)
        path = folder / f"{name}.onnx"
        path.write_bytes(form.model.SerializeToString())
        graph = onnx.ModelProto()
        graph.CopyFrom(form.model)
        del graph.graph.initializer[:]  # not to keep the weights of all networks
        return Built(model=graph, quantized=form.quantized, measured=built_apart(path))

    return result


@every
def test_builds_in_seconds_and_little_memory(
    built: Callable[[str, str], Built], name: str, precision: str, record_property: Callable[[str, object], None]
) -> None:
    measured = built(name, precision).measured
    record_property("seconds", round(measured.seconds, 2))
    record_property("peak MB", measured.peak // 10**6)
    assert measured.seconds < SECONDS
    assert measured.peak < PEAK
    assert measured.warnings == ()


@every
def test_no_transposed_convolution_is_left(built: Callable[[str, str], Built], name: str, precision: str) -> None:
    """nnU-Net has one per stage of the decoder; as Conv and depth-to-space they are products like the others."""
    found = built(name, precision)
    assert not [layer for layer in found.table.layers if layer.kind == "deconv" or "deconv" in layer.tactic.lower()]
    rewritten = [node for node in found.nodes("Conv") if "transpconvs" in node]
    assert len(rewritten) == (5 if name.endswith("3d") else 7)
    assert all(found.layers_of(node) for node in rewritten)


@every
def test_what_is_not_quantised_computes_in_its_own_type(
    built: Callable[[str, str], Built], name: str, precision: str
) -> None:
    found = built(name, precision)
    rest = HALF.get(precision.rpartition("+")[2], "Float")
    others = set(found.nodes("Conv")) - set(found.quantized)
    assert len(others) >= 2
    products = [layer for layer in found.table.layers if others & set(layer.nodes) and is_product(layer)]
    assert products
    assert {layer.inputs[0].dtype for layer in products} == {rest}


@pytest.mark.parametrize(("name", "precision"), [case for case in CASES if case.values[1].startswith("int8")])
def test_every_quantised_conv_reads_int8(built: Callable[[str, str], Built], name: str, precision: str) -> None:
    found = built(name, precision)
    assert len(found.quantized) == len(found.nodes("Conv")) - 2  # stem and head are kept
    for node in found.quantized:
        products = [layer for layer in found.layers_of(node) if is_product(layer)]
        assert len(products) == 1, node
        assert products[0].inputs[0].dtype == "Int8", products[0]


@pytest.mark.parametrize(("name", "precision"), [case for case in CASES if "16" in case.values[1]])
def test_norms_keep_their_statistics_in_float32(built: Callable[[str, str], Built], name: str, precision: str) -> None:
    """Where a norm is several kernels, as it is on large tensors, mean and variance go from one to the next, one number
    per channel: in float32; or the variance does beside the tensor less its mean, where two norms end in one kernel. On
    small tensors a norm is a single kernel, of whose inside nothing is told."""
    found = built(name, precision)
    norms = found.nodes("InstanceNormalization")
    assert len(norms) > 10
    apart = 0
    for node in norms:
        layers = found.layers_of(node)
        assert layers, node
        statistics = [tensor for layer in layers for tensor in layer.outputs if is_per_channel(tensor.shape)]
        assert {tensor.dtype for tensor in statistics} <= {"Float"}, node
        if statistics:
            apart += 1
        else:
            assert any("Inor" in layer.tactic for layer in layers), node
    assert apart >= 4, "the first two stages and the last two"


def is_product(layer: EngineLayer) -> bool:
    """A kernel that multiplies by weights; what moves and casts around it is generated (kgen)."""
    return layer.kind in ("correlation", "runtime_fusion", "gemm")


def is_per_channel(shape: tuple[int, ...]) -> bool:
    """(batch, C, 1, 1[, 1]) or what the patch is split into: nothing of it is as large as a tensor of the network."""
    return len(shape) >= 4 and all(n == 1 for n in shape[2:])


def test_the_samples_are_nnunets_default_sizes(built: Callable[[str, str], Built]) -> None:
    """So that the numbers above are those of real networks: 31 and 102 million weights in 3D."""
    from tensorrt_samples import _torch_network

    counts = {
        name: sum(p.numel() for p in _torch_network(name).parameters()) / 1e6 for name in ("plain3d", "residual3d")
    }
    assert counts["plain3d"] == pytest.approx(31.2, abs=0.3)
    assert counts["residual3d"] == pytest.approx(102.4, abs=0.5)
