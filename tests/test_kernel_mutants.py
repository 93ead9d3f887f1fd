"""The checks of the kernels can fail: each change of the source below is found by one; and sanitizers find nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_kernels import FLAGS, SANITIZE, HostKernels, host_library
from kernel_checks import FIXED, Host

from trtbuild.runtime.nvrtc import kernels_source

QUICK = (*FLAGS, "-O0", "-w")
"""Compiled and run once, so compiling counts; a change may leave a variable unused."""

MUTANTS: dict[str, tuple[str, str, str]] = {
    # name: (kernel whose checks must find it, a text that occurs once, what takes its place)
    "mirrored off by one": ("", "mirrored ? n - 1 - i : i", "mirrored ? n - i : i"),
    "one voxel too many is inside": ("gather", "0 <= i && i < n", "0 <= i && i <= n"),
    "no lower bound": ("gather", "0 <= i && i < n", "i < n"),
    "bounds of a row unchecked": ("gather", "within(z, depth) && within(y, height)", "within(z, depth)"),
    "flips swapped": ("", "FLIP_Z = 1, FLIP_Y = 2, FLIP_X = 4", "FLIP_Z = 4, FLIP_Y = 2, FLIP_X = 1"),
    "y mirrored as x": (
        "gather",
        "turned((int)(row % py), py, flip & FLIP_Y)",
        "turned((int)(row % py), py, flip & FLIP_X)",
    ),
    "offset missing": ("gather", "flip & FLIP_X) - offset_x", "flip & FLIP_X)"),
    "channel and tile swapped": ("gather", "(int)(plane % channels)", "(int)(plane / channels)"),
    "rows counted by the wrong axis": ("gather", "turned((int)(row / py), pz", "turned((int)(row / pz), pz"),
    "weight of the wrong axis": ("blend", "wz[z] * wy[y]", "wz[z] * wy[z]"),
    "weights multiplied in another order": ("blend", "* here);", "* wx[x] * weight);"),
    "a fused multiply-add": (
        "blend",
        "wide(sum) + wide(logits[from + turned((int)x, px, flip & FLIP_X)]) * here",
        "__builtin_fmaf(wide(logits[from + turned((int)x, px, flip & FLIP_X)]), here, wide(sum))",
    ),
    "start missing": ("blend", "depth + start_z + z)", "depth + z)"),
    "one flip for all tiles": ("blend", "tiles[4 * b + 3]", "tiles[3]"),
    "head and tile swapped": ("blend", "((i64)b * heads + head) * pz", "((i64)head * batch + b) * pz"),
    "the last tile is left out": ("blend", "for (int b = 0; b < batch; ++b)", "for (int b = 0; b < batch - 1; ++b)"),
    "the last bad tile is named": ("not finite", "if (spoilt == batch && !finite(sum))", "if (!finite(sum))"),
    "infinity passes as a half": ("not finite", "(value.bits & 0x7C00) != 0x7C00", "(value.bits & 0x7FFF) <= 0x7C00"),
    "status not offset": ("not finite", "first_tile + spoilt", "spoilt"),
    "shift off by one": ("shift", "column[(z + slices) * plane]", "column[(z + slices - 1) * plane]"),
    "shift from the back": (
        "shift",
        "for (int z = 0; z < keep; ++z)",
        "for (int z = keep - 1; z >= 0; --z)",
    ),
    "the freed end stays": ("shift", "for (int z = keep; z < depth; ++z) column[z * plane] = 0;", ""),
    "the last of equals": ("labels", "if (here > best) {", "if (here >= best) {"),
    "regions keep the best": ("labels", "if (!regions) best = here;", "best = here;"),
    "origin missing": ("labels", "(i64)(z.low - origin_z)", "(i64)z.low"),
    "interpolated in another order": (
        "labels",
        "between(between(row[0], row[1], at.y), between(row[2], row[3], at.y), at.z)",
        "between(between(row[0], row[2], at.z), between(row[1], row[3], at.z), at.y)",
    ),
    "high row for low": ("labels", "far + y.low * stride_y", "far + y.high * stride_y"),
    "wrong stride of the image": (
        "labels",
        "out[z * out_z + y * out_y + x * out_x] = (Label)label;",
        "out[z * out_y + y * out_z + x * out_x] = (Label)label;",
    ),
    "labels cut to a byte": ("labels", "label = values[head];", "label = (u8)values[head];"),
    "the first head is not summed": (
        "probabilities",
        "for (int head = 0; head < heads && !regions",
        "for (int head = 1; head < heads && !regions",
    ),
    "sigmoid of the wrong sign": ("probabilities", "expf(-here)", "expf(here)"),
}


def found(kernels: HostKernels, kernel: str) -> list[str]:
    """The fixed checks of a kernel that fail; of all kernels where none is named."""
    names = []
    for name, check in FIXED.items():
        if name.startswith(kernel):
            try:
                check(Host(kernels=kernels))
            except AssertionError:
                names.append(name)
    return names


def test_the_checks_pass_without_a_change() -> None:
    assert found(HostKernels(host_library(kernels_source(), QUICK)), "") == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_change_is_found(name: str) -> None:
    kernel, old, new = MUTANTS[name]
    source = kernels_source()
    assert source.count(old) == 1, "the source has changed: the mutant must follow"
    assert found(HostKernels(host_library(source.replace(old, new), QUICK)), kernel)


def sanitized(source: str, *names: str) -> subprocess.CompletedProcess[str]:
    """Fixed checks on sanitized kernels, in a process that loads AddressSanitizer first."""
    library = host_library(source, (*QUICK, *SANITIZE))
    command = ["g++", "-print-file-name=libasan.so"]
    runtime = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    options = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"}
    script = Path(__file__).with_name("kernels_sanitized.py")
    return subprocess.run(
        [sys.executable, str(script), str(library), *names],
        capture_output=True,
        text=True,
        env={**os.environ, **options},
        timeout=240,
    )


def test_sanitizers_find_nothing() -> None:
    done = sanitized(kernels_source())
    assert (done.returncode, done.stdout, done.stderr) == (0, "all checks passed\n", "")


def test_address_sanitizer_finds_one_voxel_too_many() -> None:
    source = kernels_source().replace("0 <= i && i < n", "0 <= i && i <= n")
    done = sanitized(source, "gather small")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_undefined_behaviour_is_found() -> None:
    source = kernels_source().replace("(i64)channel * depth", "0x7fffffff * depth * channel * depth")
    done = sanitized(source, "gather 3d")
    assert done.returncode != 0
    assert "signed integer overflow" in done.stderr
