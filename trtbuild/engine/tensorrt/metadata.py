"""What the log and the inspector have in common: a layer's ONNX nodes, and the error for what cannot be read."""

from __future__ import annotations

import re

from trtbuild.errors import EngineError

NODE = re.compile(r"\[ONNX Layer: (.*)\](__\w+)?", re.DOTALL)
"""A node, and what TensorRT-RTX adds where it replaced it: "__gemm_from_conv1x1"."""
SEPARATORS = re.compile("[\x1e\x1f]")
SHOWN = 300


def nodes_from_metadata(metadata: str) -> tuple[str, ...] | None:
    """The ONNX nodes that a layer's Metadata names, None where it holds something else."""
    parts = SEPARATORS.split(metadata) if metadata else []
    found = [NODE.fullmatch(part) for part in parts]
    names = [match.group(1) for match in found if match is not None]
    return tuple(names) if len(names) == len(parts) else None


def unreadable(what: str, expected: object, got: object, where: object) -> EngineError:
    short = [None if part is None else f"{part}"[:SHOWN] for part in (got, where)]
    return EngineError(what, expected=expected, got=short[0], where=short[1],
                       hint="report it with the TensorRT version: its form of the table is not known yet")  # fmt: skip
