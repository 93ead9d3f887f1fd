"""The command lines for trtexec, tensorrt_rtx and Polygraphy: every option that they hold is one of these tools."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from precision_samples import PATCHES, network_model

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.script import check_script, equivalent_commands, script
from trtbuild.errors import OutputError

VARIABLE = "POLYGRAPHY_USE_TENSORRT_RTX"
SHAPES = {"x": ((1, 1, 8, 8), (2, 1, 8, 8), (4, 1, 8, 8)), "y:0": ((1, 3), (1, 3), (1, 3))}
# samples/common/sampleOptions.cpp of github.com/NVIDIA/TensorRT (11.x, a892d222); --stronglyTyped does nothing in 11,
# and is needed in 10
TRTEXEC = {
    "--onnx", "--saveEngine", "--skipInference", "--stronglyTyped", "--minShapes", "--optShapes", "--maxShapes",
    "--memPoolSize", "--builderOptimizationLevel", "--noTF32", "--sparsity", "--allowWeightStreaming", "--stripWeights",
    "--profilingVerbosity", "--verbose", "--hardwareCompatibilityLevel", "--versionCompatible",
    "--timingCacheFile", "--noBuilderCache",
}  # fmt: skip
# docs.nvidia.com/deeplearning/tensorrt-rtx/latest: inference-library/cpu-engines.html has --computeCapabilities and
# --useGpu; the shapes and --skipInference are in performance/optimization.html, the rest is trtexec's
TENSORRT_RTX = TRTEXEC - {
    "--stronglyTyped", "--hardwareCompatibilityLevel", "--versionCompatible", "--timingCacheFile", "--noBuilderCache"
} | {"--computeCapabilities", "--useGpu"}  # fmt: skip
EVERYTHING: dict[str, Any] = {
    "workspace": 512, "optimization_level": 5, "tf32": True, "sparsity": True, "weight_streaming": True,
    "strip_plan": True, "refit": True, "verbose": True,
}  # fmt: skip
ONLY_TENSORRT: dict[str, Any] = {"hardware_compatibility": "ampere+", "version_compatible": True}


def commands(backend: str, **config: Any) -> tuple[list[str], list[str], list[str]]:
    """The tool's words, Polygraphy's words (variables among them), and the comments."""
    lines = equivalent_commands(TensorRTConfig(**config), SHAPES, onnx="a net.onnx", engine="e.engine", backend=backend)
    tool, polygraphy = (shlex.split(line) for line in lines if not line.startswith("#"))
    return tool, polygraphy, [line for line in lines if line.startswith("#")]


def options(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("-")}


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
@pytest.mark.parametrize("config", [{}, EVERYTHING, ONLY_TENSORRT, {"compute_capabilities": ("86", "120")},
                                    {"compute_capabilities": ("current",)}, {"timing_cache": False}],
                         ids=["plain", "all", "compatible", "capabilities", "current", "no cache"])  # fmt: skip
def test_the_tools_know_every_option(backend: str, config: dict[str, Any]) -> None:
    tool, polygraphy, _ = commands(backend, **config)
    assert tool[0] == {"tensorrt": "trtexec", "tensorrt-rtx": "tensorrt_rtx"}[backend]
    assert options(tool) <= (TRTEXEC if backend == "tensorrt" else TENSORRT_RTX)
    assert options(polygraphy) - {"-o", "-vv"} <= polygraphy_options(rtx=backend == "tensorrt-rtx")


@cache
def polygraphy_options(*, rtx: bool) -> set[str]:
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    command = [str(Path(sys.executable).parent / "polygraphy"), "convert", "--help"]
    environment |= {VARIABLE: "1"} if rtx else {}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"--[a-z0-9-]+", text))


def test_every_setting_is_in_the_commands_of_tensorrt() -> None:
    tool, polygraphy, comments = commands("tensorrt", **EVERYTHING, **ONLY_TENSORRT)
    assert tool == [
        "trtexec", "--onnx=a net.onnx", "--saveEngine=e.engine", "--skipInference", "--stronglyTyped",
        "--minShapes=x:1x1x8x8,'y:0':1x3", "--optShapes=x:2x1x8x8,'y:0':1x3", "--maxShapes=x:4x1x8x8,'y:0':1x3",
        "--memPoolSize=workspace:512", "--builderOptimizationLevel=5", "--sparsity=enable", "--allowWeightStreaming",
        "--stripWeights", "--profilingVerbosity=detailed", "--verbose",
        "--hardwareCompatibilityLevel=ampere+", "--versionCompatible", "--timingCacheFile=timing.cache",
    ]  # fmt: skip
    assert polygraphy == [
        "polygraphy", "convert", "a net.onnx", "--convert-to", "trt", "-o", "e.engine", "--strongly-typed",
        "--trt-min-shapes", "x:[1,1,8,8]", "y:0:[1,3]", "--trt-opt-shapes", "x:[2,1,8,8]", "y:0:[1,3]",
        "--trt-max-shapes", "x:[4,1,8,8]", "y:0:[1,3]", "--pool-limit", "workspace:512M",
        "--builder-optimization-level", "5", "--tf32", "--sparse-weights", "--weight-streaming", "--strip-plan",
        "--profiling-verbosity", "detailed", "-vv", "--hardware-compatibility-level", "ampere_plus",
        "--version-compatible", "--load-timing-cache", "timing.cache", "--save-timing-cache", "timing.cache",
    ]  # fmt: skip
    assert comments == ["# trtexec", "# Polygraphy"]


def test_tf32_is_off_unless_asked_for() -> None:
    """trtexec lets it on by itself, Polygraphy does not."""
    tool, polygraphy, _ = commands("tensorrt")
    assert "--noTF32" in tool
    assert "--tf32" not in polygraphy
    assert "--noTF32" not in commands("tensorrt", tf32=True)[0]


def test_capabilities_are_written_as_each_tool_wants_them() -> None:
    tool, polygraphy, _ = commands("tensorrt-rtx", compute_capabilities=("86", "89", "120"))
    assert "--computeCapabilities=86,89,120" in tool
    place = polygraphy.index("--compute-capabilities")
    assert polygraphy[place + 1 : place + 4] == ["8.6", "8.9", "12.0"]
    assert polygraphy[0] == "POLYGRAPHY_USE_TENSORRT_RTX=1"
    tool, polygraphy, _ = commands("tensorrt-rtx", compute_capabilities=("current",))
    assert ("--useGpu" in tool, "--use-gpu" in polygraphy) == (True, True)


def test_what_has_no_option_is_a_comment() -> None:
    _, _, comments = commands("tensorrt-rtx", **ONLY_TENSORRT)
    assert [line for line in comments if "hardware_compatibility=ampere+" in line]
    assert [line for line in comments if "version_compatible" in line]
    _, _, comments = commands("tensorrt", compute_capabilities=("86",), timing_cache=False, refit=True)
    assert len([line for line in comments if "REFIT_IDENTICAL" in line]) == 2
    assert [line for line in comments if "compute_capabilities=86" in line]
    assert [line for line in comments if "timing_cache" in line]


def test_names_cannot_leave_the_command() -> None:
    evil = "x; touch evil #'\n"
    lines = equivalent_commands(
        TensorRTConfig(), {"$(touch evil)": ((1,), (1,), (1,))}, onnx=f"{evil}.onnx", engine=evil, backend="tensorrt"
    )
    found = [shlex.split(line) for line in lines if not line.startswith("#")]
    assert len(found) == 2
    for words in found:
        assert any(evil in word for word in words)
        assert any("$(touch evil)" in word for word in words)
        assert "touch" not in words


EVIL = "x\ntouch evil\r\x1b[31m\u2028touch evil #"


def test_no_name_ends_a_comment(tmp_path: Path) -> None:
    """The shell runs the script; the tools are not there, and nothing else is to happen."""
    lines = equivalent_commands(
        TensorRTConfig(compute_capabilities=(EVIL,)), {f"a,{EVIL}": ((1,), (1,), (1,))}, onnx=EVIL, engine=EVIL,
        backend="tensorrt",
    )  # fmt: skip
    content = script(f"Builds {EVIL}.engine of {EVIL}.onnx.", [f"# {EVIL}, fp32", *lines])
    (tmp_path / "build.sh").write_bytes(content)
    for shell in ("sh", "bash"):
        subprocess.run([shell, "build.sh"], cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}, capture_output=True)
    assert [path.name for path in tmp_path.iterdir()] == ["build.sh"]
    comments = [line for line in content.decode().split("\n") if line.startswith("#")]
    assert all(line.isprintable() for line in comments)
    assert content.startswith(b"#!/bin/sh\n")


@pytest.mark.parametrize("name", ["a,b", "it's"])
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_a_name_that_trtexec_cannot_take_is_said_in_place_of_its_command(backend: str, name: str) -> None:
    shapes = {"x": ((1, 2),) * 3, name: ((1, 3),) * 3}
    lines = equivalent_commands(TensorRTConfig(), shapes, onnx="n.onnx", engine="e.engine", backend=backend)
    (polygraphy,) = (shlex.split(line) for line in lines if not line.startswith("#"))
    assert [line for line in lines if line.startswith("# no command") and name in line]
    assert f"{name}:[1,3]" in polygraphy
    assert "polygraphy" in polygraphy


# where a script may go


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for name in ("net.onnx", "images/a.nii", "images/case.sh", "old.sh"):
        (tmp_path / name).write_text("mine")
    (tmp_path / "b.trtb" / "networks").mkdir(parents=True)
    (tmp_path / "link.sh").symlink_to("net.onnx")
    (tmp_path / "hard.sh").hardlink_to(tmp_path / "net.onnx")
    (tmp_path / "to_bundle").symlink_to("b.trtb")
    (tmp_path / "dangling.sh").symlink_to("b.trtb/none.sh")
    (tmp_path / "nowhere.sh").symlink_to("gone")
    (tmp_path / "folder.sh").mkdir()
    return tmp_path


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name",
    [
        "net.onnx", "images/../net.onnx", "link.sh", "hard.sh", "images/case.sh", "images", "out.engine", "new.trtb",
        "b.trtb/build.sh", "b.trtb/networks/n.sh", "to_bundle/build.sh", "dangling.sh", "nowhere.sh", "folder.sh",
        "none/build.sh",
        "net.onnx/build.sh",
    ],
)  # fmt: skip
def test_a_script_replaces_no_input_no_output_and_nothing_of_a_bundle(name: str, overwrite: bool, place: Path) -> None:
    taken = [place / "net.onnx", place / "images", place / "out.engine"]
    with pytest.raises(OutputError, match="next:"):
        check_script(place / name, taken=taken, overwrite=overwrite)


def test_a_script_replaces_another_file_if_asked_to(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = [place / "net.onnx", place / "images", place / "none.trtb"]
    for name in ("new.sh", "images/new.sh"):
        check_script(place / name, taken=taken, overwrite=False)
    with pytest.raises(OutputError, match="--overwrite"):
        check_script(place / "old.sh", taken=taken, overwrite=False)
    check_script(place / "old.sh", taken=taken, overwrite=True)
    monkeypatch.chdir(place)
    check_script(Path("new.sh"), taken=[Path("net.onnx")], overwrite=False)
    with pytest.raises(OutputError, match="replace an input"):
        check_script(place / "net.onnx", taken=[Path("net.onnx")], overwrite=True)
    monkeypatch.chdir(place / "b.trtb")
    with pytest.raises(OutputError, match="bundle"):
        check_script(Path("new.sh"), taken=[], overwrite=False)


@pytest.mark.parametrize("config", [{}, {"workspace": 512, "optimization_level": 2, "compute_capabilities": ("86",),
                                         "weight_streaming": True, "sparsity": True}],
                         ids=["plain", "with options"])  # fmt: skip
def test_polygraphy_builds_an_engine_by_the_line(config: dict[str, Any], tmp_path: Path) -> None:
    model = network_model("plain2d")
    (tmp_path / "a net.onnx").write_bytes(model.SerializeToString())
    shape = (1, *PATCHES["plain2d"])
    shapes = {model.graph.input[0].name: ((1, *shape), (2, *shape), (4, *shape))}
    lines = equivalent_commands(
        TensorRTConfig(**config), shapes, onnx="a net.onnx", engine="an engine", backend="tensorrt-rtx"
    )
    text = "\n".join(["set -e", *(line for line in lines if not line.startswith("tensorrt_rtx"))])
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(["sh", "-c", text], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True,
                          text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "an engine").read_bytes()[:4] == b"vtrt"
    log = done.stdout + done.stderr
    assert "[1, 1, 48, 32]" in log or "(1, 1, 48, 32)" in log
    assert "STRONGLY_TYPED" in log.upper()
