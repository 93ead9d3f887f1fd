"""Everything that needs a GPU, in one command: the tests, the sanitizers and the benchmarks, and a table of the targets.

    make gpu          installs what is needed
    make gpu-here     with what PYTHON has, and nothing is fetched
    python benchmarks/gpu/measure.py [--only kernels]
    python benchmarks/gpu/measure.py --check

Each part is a process of its own; one that fails leaves rows that say why (a package that is missing, too), and the
others run all the same. Writes JSON lines and a table with every target under benchmarks/results/gpu/. Exit code 1: no
GPU, or a target was missed or did not run.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
from gpu_tests import counted, rows_of_tests
from targets import TARGETS, TESTS, TOOLS, reason_of, with_missing
from verdicts import Row, line_of, markdown, record, row_from_json

from trtbuild.nvinfer import gpu_description, no_driver

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu"
KERNEL_TESTS = "test_kernels_on_gpu"
SANITIZER = "compute-sanitizer"
FOUND = 86
"""The sanitizers' exit code where they found something; other codes mean that the tests themselves failed."""
LIMIT = 3600.0
"""Seconds of a part; a hang must not keep the table back."""
PACKAGES = ("pycuda", "nvidia-cuda-nvrtc", "tensorrt", "tensorrt-rtx", "onnxruntime-gpu")
HOW = (
    "Kernels: bytes that must move / median time by CUDA events, as a share of what the card copies. Share: 100 % less the "
    "network's calls on the stream, of an image in host memory to labels in host memory, default 3d_fullres network, no "
    "mirroring. Beside nnU-Net: its predictor with autocast and cudnn.benchmark, in the order ABBA, median of the pairs' "
    "ratios; device memory by NVML, each alone. Random weights: the voxels that are equal show that both do the same work."
)
Part = Callable[[Path], list[Row]]


def why_not() -> str | None:
    """Why nothing can be measured here; None where there is a GPU and pycuda."""
    reason = no_driver()
    if reason is not None:
        return f"{reason}: this needs an NVIDIA GPU, and was not run"
    return None if find_spec("pycuda") else "pycuda is not installed: pip install 'trtbuild[gpu]'"


def machine() -> dict[str, Any]:
    """As in the other records, with the GPU and the packages that use it."""
    sys.path.insert(0, str(HERE.parent))
    from machine import describe, versions

    found = describe()
    return {**found, **gpu_description(), "versions": {**found["versions"], **versions(PACKAGES)}}


def tests_part(work: Path) -> list[Row]:
    """All tests with the marker `gpu`; each file in a process of its own, as a fault on the GPU ends its process."""
    found = {file: _pytest([], file, work / f"{file}.xml") for file in dict.fromkeys(file for file, _ in TESTS)}
    return rows_of_tests(
        {file: report for file, (_, report) in found.items()},
        {file: _reason(done) for file, (done, _) in found.items()},
    )


def sanitizer_part(tool: str) -> Part:
    """The kernels' tests under one of the sanitizers."""

    def part(work: Path) -> list[Row]:
        if shutil.which(SANITIZER) is None:
            return with_missing(tool, [], f"{SANITIZER} is not on the PATH")
        command = [SANITIZER, "--tool", tool, "--target-processes", "all", "--error-exitcode", str(FOUND)]
        done, report = _pytest(command, KERNEL_TESTS, work / f"{tool}.xml")
        ran, (target,) = counted(report, KERNEL_TESTS), TARGETS[tool]
        if done.returncode == FOUND:  # whatever became of the tests
            return [replace(target, value=1, note=_reason(done))]
        if done.returncode or ran.skipped or not ran.passed:
            return [replace(target, note=_reason(done))]
        return [replace(target, value=0, note=f"{len(ran.passed)} tests")]

    return part


def script_part(name: str, *options: str) -> Part:
    """One of the scripts beside this one, which writes its rows as it goes; what it wrote counts even where it fails."""

    def part(work: Path) -> list[Row]:
        output = work / f"{name}.jsonl"
        done = _run(
            [sys.executable, str(HERE / f"{name}.py"), "--output", str(output), *_options(options, work / name)]
        )
        rows = [row_from_json(json.loads(line)) for line in output.read_text().splitlines()] if output.is_file() else []
        if done.returncode == 0:
            return with_missing(name, rows, "the script gave no number")
        why = _reason(done)
        found = with_missing(name, rows, why)
        return found if len(found) > len(rows) else [*rows, Row(part=name, name="all of it", value=None, note=why)]

    return part


def _options(options: Sequence[str], folder: Path) -> list[str]:
    return [option.replace("WORK", str(folder)) for option in options]


PARTS: Mapping[str, Part] = {
    "tests": tests_part,
    **{tool: sanitizer_part(tool) for tool in TOOLS},
    "kernels": script_part("kernels"),
    "share": script_part("share", "--work", "WORK"),
    "beside_nnunet": script_part("beside_nnunet", "--work", "WORK"),
}


def write(rows: Sequence[Row], described: Mapping[str, Any], folder: Path) -> str:
    """The record; returns the table."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"machine": described}), *(json.dumps(record(row)) for row in rows)]
    (folder / "gpu.jsonl").write_text("\n".join(lines) + "\n")
    table = markdown(rows, described, HOW)
    (folder / "gpu.md").write_text(table)
    return table


def _pytest(before: Sequence[str], file: str, report: Path) -> tuple[subprocess.CompletedProcess[str], str]:
    """What became of the tests for a GPU in this file, and pytest's report, empty where it wrote none."""
    done = _run(
        [*before, sys.executable, "-m", "pytest", "-m", "gpu", "-q", f"--junitxml={report}", f"tests/{file}.py"]
    )
    return done, report.read_text() if report.is_file() else ""


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    print(" ".join(command), flush=True)
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -1, stdout="", stderr=f"not ready after {LIMIT} s")


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    return reason_of(done.returncode, done.stderr.strip() or done.stdout)


@click.command()
@click.option("--only", multiple=True, type=click.Choice(list(PARTS)), help="Repeat it for several; by default all.")
@click.option("--check", is_flag=True, help="Only say whether there is a GPU.")
@click.option("--results", type=click.Path(path_type=Path), default=RESULTS, help="Where the record goes.")
def main(only: tuple[str, ...], check: bool, results: Path) -> None:
    """Runs the parts and writes the record."""
    reason = no_driver() if check else why_not()
    if reason is not None:
        raise click.ClickException(reason)
    if check:
        return
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as work:
        for name in only or PARTS:
            found = PARTS[name](Path(work))
            print(*map(line_of, found), sep="\n", flush=True)
            rows += found
            table = write(rows, machine(), results)
        print(f"\n{table}", flush=True)
    if any(row.verdict in ("missed", "not run") for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
