"""What the project's issue asks of a GPU: one row per target, which has no number yet, and why a part gives none."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from verdicts import Row

TOOLS = ("memcheck", "racecheck")
CLASSES = (3, 14, 105)
TESTS: Mapping[tuple[str, str], str] = {
    ("test_kernels_on_gpu", ""): "the kernels equal NumPy",
    ("test_gpu_prepare", ""): "preparation equals the CPU's",
    ("test_gpu_runners", "[onnxruntime-cuda-"): "contract of ONNX Runtime's CUDA provider",
    ("test_gpu_runners", "[tensorrt-f32"): "contract of TensorRT",
    ("test_gpu_runners", "[tensorrt-rtx-"): "contract of TensorRT-RTX",
    ("test_gpu_cases", ""): "parity with nnU-Net, float32 engine",
    ("test_gpu_memory", ""): "memory as planned, faults, two processes",
    ("test_gpu_arrays", "[torch]"): "arrays of torch",
    ("test_gpu_arrays", "[cupy]"): "arrays of CuPy",
}
"""What the tests with the marker `gpu` show, by file and a part of their names."""
BANDWIDTH, SHARE = 70.0, 5.0
"""Per cent."""
FASTER = {"torch": {3: 1.3, 14: 1.3, 105: 5.0}, "tensorrt": {3: 3.0, 14: 3.0, 105: 10.0}}
"""How many times faster than nnU-Net, with the engine that ours has."""
SLOWEST, OUTSIDE = "slowest kernel", "outside the network"
MISSING = re.compile(r"No module named '([\w.]+)'")


def faster_target(classes: int, engine: str) -> Row:
    """How many times faster ours is, end to end."""
    limits = FASTER["torch" if engine == "torch" else "tensorrt"]
    return Row(part="beside nnU-Net", name=f"times faster, {classes} classes", value=None, unit="x",
               limit=limits.get(classes))  # fmt: skip


def memory_target(classes: int) -> Row:
    """Our device memory as a share of theirs."""
    return Row(part="beside nnU-Net", name=f"device memory, {classes} classes", value=None, unit="%", limit=100.0,
               at_least=False)  # fmt: skip


TARGETS: Mapping[str, Sequence[Row]] = {
    "tests": [
        Row(part="tests", name=f"failed: {name}", value=None, limit=0, at_least=False) for name in TESTS.values()
    ],
    **{
        tool: [Row(part="sanitizer", name=f"{tool} found something", value=None, limit=0, at_least=False)]
        for tool in TOOLS
    },
    "kernels": [Row(part="kernels", name=SLOWEST, value=None, unit="%", limit=BANDWIDTH)],
    "share": [Row(part="share", name=OUTSIDE, value=None, unit="%", limit=SHARE, at_least=False)],
    "beside_nnunet": [
        *(faster_target(classes, "tensorrt") for classes in CLASSES),
        *(memory_target(classes) for classes in CLASSES),
    ],
}
"""By the parts of measure.py. Without TensorRT less is asked of the times (`FASTER`)."""


def with_missing(part: str, rows: Sequence[Row], why: str) -> list[Row]:
    """The rows, and every target of the part that has none among them, with the reason."""
    there = {(row.part, row.name) for row in rows}
    return [*rows, *(replace(row, note=why) for row in TARGETS[part] if (row.part, row.name) not in there)]


def reason_of(code: int, output: str) -> str:
    """Why a process failed: the package that it lacks, else the end of what it said."""
    *_, last = output.strip().splitlines() or [""]
    return package_missing(last) or f"exit code {code}: {' '.join(output.split())[-400:]}"


def package_missing(error: str) -> str | None:
    """The package that Python's error names, in words; None where it is another error."""
    found = MISSING.search(error)
    return f"{found[1].partition('.')[0]} is not installed" if found else None
