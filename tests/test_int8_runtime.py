"""INT8 at run time: CPUs that would saturate, layers that do not run in int8, and what killed runs leave behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from runner_samples import make_record, small_unet, write_model

from trtbuild import atomic
from trtbuild.atomic import scratch_folder
from trtbuild.errors import EngineError, PrecisionMismatch
from trtbuild.graph import clean
from trtbuild.graph.precision import quantize, targets
from trtbuild.machine import NO_ISA, cpu_description
from trtbuild.runtime import fit
from trtbuild.runtime.fit import check_int8, fit_from_record
from trtbuild.runtime.select import open_runner
from trtbuild.spec import BuildRecord

QUANTIZED = 3  # Convs of `small_unet`


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory) -> tuple[BuildRecord, Path]:
    model = clean(small_unet(3), rewrite_conv_transpose=False, split_instance_norm=False).model
    amax = {name: 4.0 for name, _ in targets(model)}
    quantized = quantize(model, amax, keep=(), zero_point="u8")
    assert len(quantized.quantized) == QUANTIZED
    path = write_model(tmp_path_factory.mktemp("int8") / "int8.onnx", quantized.model)
    return replace(make_record("openvino"), precision="int8"), path


def _with_cpu(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    description: Mapping[str, str] = {"model": "some CPU", "isa": isa}
    monkeypatch.setattr(fit, "cpu_description", lambda: description)


@pytest.mark.parametrize("isa", ["avx2", "avx2 avx512f", NO_ISA, "asimdhp"])
def test_a_cpu_whose_sums_saturate_is_refused(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    record = replace(make_record("null"), precision="int8")
    _with_cpu(monkeypatch, isa)
    with pytest.raises(EngineError, match="saturate"):
        fit_from_record(record, version="0", threads=None)
    fit_from_record(replace(record, precision="fp32"), version="0", threads=None)


@pytest.mark.parametrize("isa", ["avx2 avx512_vnni", "avx_vnni", "amx_int8", "asimddp", ""])
def test_a_cpu_that_has_it_or_does_not_tell_is_taken(isa: str) -> None:
    check_int8(isa, "test")


def test_a_cpu_without_any_known_instruction_set_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a virtual machine that masks them: that is not the same as a system that does not tell."""
    lines: list[str] = ["model name: QEMU", "flags : fpu sse2"]
    monkeypatch.setattr("trtbuild.machine._lines", lambda path: lines)
    cpu_description.cache_clear()
    try:
        assert cpu_description()["isa"] == NO_ISA
        lines.clear()
        cpu_description.cache_clear()
        assert cpu_description()["isa"] == ""
    finally:
        cpu_description.cache_clear()


def test_the_number_of_layers_in_int8_is_checked(int8: tuple[BuildRecord, Path]) -> None:
    record, path = int8
    with open_runner(replace(record, options={**record.options, "quantized_layers": QUANTIZED}), path) as runner:
        assert "3 x u8" in runner.describe().details["executed"] or "3 x i8" in runner.describe().details["executed"]
    for wrong in (QUANTIZED - 1, QUANTIZED + 1):
        with pytest.raises(PrecisionMismatch, match=f"{wrong} layers in int8"):
            open_runner(replace(record, options={**record.options, "quantized_layers": wrong}), path)
    for strange in (0, "x", True):
        with pytest.raises(EngineError, match="option is wrong"):
            open_runner(replace(record, options={**record.options, "quantized_layers": strange}), path)


def test_a_graph_without_int8_does_not_pass_for_one(tmp_path: Path) -> None:
    path = write_model(tmp_path / "fp32.onnx", small_unet(3))
    record = replace(make_record("openvino", quantized_layers=QUANTIZED), precision="int8")
    with pytest.raises(PrecisionMismatch):
        open_runner(record, path)


def test_onnxruntime_and_openvino_agree_on_uint8(int8: tuple[BuildRecord, Path]) -> None:
    record, path = int8
    batch = np.random.default_rng(0).standard_normal((2, *record.profile.max[1:])).astype(np.float32)
    with open_runner(record, path) as first:
        one = np.array(first.infer(batch))
    other = replace(record, backend="onnxruntime", options={**record.options, "providers": "CPUExecutionProvider"})
    with open_runner(other, path) as second:
        np.testing.assert_allclose(second.infer(batch), one, atol=0.1 * one.std())


def test_scratch_folders_go_with_the_block_and_those_of_the_dead_at_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.tempfile, "gettempdir", lambda: str(tmp_path))
    code = f"""
import os, signal, tempfile
tempfile.tempdir = {str(tmp_path)!r}
from trtbuild.atomic import scratch_folder
with scratch_folder() as folder:
    (folder / "large").write_bytes(b"x" * 100)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (dead,) = tmp_path.iterdir()
    assert (dead / "large").exists()
    (tmp_path / "trtbuild-scratch-young").mkdir()  # not locked yet: its process is about to
    with scratch_folder() as mine:
        assert not dead.exists()
        with scratch_folder() as other:
            assert mine.is_dir()
            assert other != mine
        assert not other.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["trtbuild-scratch-young"]


def test_importing_onnxruntime_leaves_no_file(tmp_path: Path) -> None:
    code = "from trtbuild.runtime.onnxruntime import onnxruntime_version as v; print(v())"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    assert list(tmp_path.iterdir()) == []
