"""A shared library whose every function returns 0, written byte by byte: the tests need no compiler.

The bindings of TensorRT are ordinary packages, the libraries below them are not. At import the bindings want nine
functions of those libraries; they get these, and then every class, enum and signature of theirs can be looked at.
"""

from __future__ import annotations

import platform
import struct
from collections.abc import Sequence
from pathlib import Path

NVINFER = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
LIBRARIES = ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser")
MACHINES = {  # e_machine, and "return 0" in its instructions
    "x86_64": (62, bytes.fromhex("31c0c3")),  # xor eax, eax; ret
    "aarch64": (183, bytes.fromhex("000080d2c0035fd6")),  # mov x0, #0; ret
}
PAGE = 0x10000  # the largest page of these machines


def write_stubs(folder: Path, major: str) -> list[Path]:
    """The three libraries of one major version of TensorRT, under the names that its bindings ask for."""
    paths = [folder / f"{name}.so.{major}" for name in LIBRARIES]
    for path in paths:
        path.write_bytes(library(path.name, NVINFER))
    return paths


def library(soname: str, functions: Sequence[str]) -> bytes:
    """The least that the loader takes (System V ABI, "Object Files"): a hash table, symbols, their names, code.

    The dynamic section lies on a page of its own, as the loader writes its addresses into it.
    """
    if platform.machine() not in MACHINES:
        raise NotImplementedError(f"TensorRT's bindings are for Linux on {', '.join(MACHINES)}")
    machine, code = MACHINES[platform.machine()]
    names, offsets = b"\0", []
    for name in (soname, *functions):
        offsets.append(len(names))
        names += name.encode() + b"\0"
    count = len(functions) + 1
    chain = [0, *range(2, count), 0]  # one bucket: each symbol leads to the next
    table = struct.pack(f"<{3 + count}I", 1, count, 1, *chain)
    at_hash = 64 + 4 * 56
    at_symbols = _aligned(at_hash + len(table))
    at_names = at_symbols + 24 * count
    at_code = _aligned(at_names + len(names))
    symbols = (
        bytes(24)
        + b"".join(
            struct.pack("<IBBHQQ", offset, 0x12, 0, 1, at_code, len(code))  # a global function, defined here
            for offset in offsets[1:]
        )
    )
    entries = ((14, offsets[0]), (4, at_hash), (5, at_names), (6, at_symbols), (10, len(names)), (11, 24), (0, 0))
    dynamic = b"".join(struct.pack("<QQ", *entry) for entry in entries)
    segments = (
        (1, 5, 0, at_code + len(code)),  # PT_LOAD, read and execute
        (1, 6, PAGE, len(dynamic)),  # PT_LOAD, read and write
        (2, 6, PAGE, len(dynamic)),  # PT_DYNAMIC
        (0x6474E551, 6, 0, 0),  # PT_GNU_STACK: without it the loader would want a stack that can execute
    )
    header = b"\x7fELF\2\1\1" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, len(segments), 64, 0, 0)
    for kind, flags, at, size in segments:
        header += struct.pack("<IIQQQQQQ", kind, flags, at, at, at, size, size, PAGE if kind == 1 else 8)
    content = bytearray(PAGE)
    for at, part in ((0, header), (at_hash, table), (at_symbols, symbols), (at_names, names), (at_code, code)):
        content[at : at + len(part)] = part
    return bytes(content) + dynamic


def _aligned(at: int) -> int:
    return -(-at // 16) * 16
