"""What TensorRT-RTX compiled for an engine on a GPU, kept in the user's cache folder, so that it is compiled once.

TensorRT-RTX itself checks that a cache is of its version, GPU and driver, and refuses it otherwise.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

from trtbuild.cachefolder import Damaged, Foreign, bound, cache_folder, read_kept, write_kept
from trtbuild.errors import OutputError

PART, ENDING = "runtime", ".kernels"
LIMIT = 1 << 30
"""Bytes that the folder may hold."""


@dataclass(frozen=True, kw_only=True)
class KeptCache:
    """Where a runtime cache is kept (None: nowhere), what was there, and in words what became of it."""

    path: Path | None
    content: bytes
    note: str


def kept_cache(*, engine: str, version: str, gpu: str, capability: str) -> KeptCache:
    """The cache of an engine (its SHA-256) for a version of TensorRT-RTX and a GPU.

    Without a folder that can be written to, or with a damaged file, kernels are compiled again, and the note says so.
    """
    name = hashlib.sha256(json.dumps([engine, version, gpu, capability]).encode()).hexdigest()[:32]
    try:
        path = cache_folder(PART) / f"{name}{ENDING}"
    except OutputError as error:
        return KeptCache(path=None, content=b"", note=f"none: {' '.join(str(error).split())}")
    try:
        return KeptCache(path=path, content=read_kept(path)[1], note=str(path))
    except FileNotFoundError:
        return KeptCache(path=path, content=b"", note=f"{path}, new")
    except Foreign as error:
        return KeptCache(path=None, content=b"", note=f"none: {path} is not yours ({error})")
    except Damaged as error:
        return KeptCache(path=path, content=b"", note=f"{path}, made anew: it was damaged ({error})")


def keep_cache(kept: KeptCache, content: bytes | None) -> None:
    """Write the cache back where it changed; None is what TensorRT-RTX gives where it fails.

    The logits are right without it: a failure is a warning.
    """
    if kept.path is None or content == kept.content or content == b"":
        return
    if content is None:
        warnings.warn("TensorRT-RTX gave no compiled kernels to keep.", RuntimeWarning, stacklevel=2)
        return
    try:
        write_kept(kept.path, {}, content)
        bound(kept.path.parent, (ENDING,), newest=kept.path, limit=LIMIT)
    except OutputError as error:
        warnings.warn(f"TensorRT-RTX's compiled kernels are not kept: {error}", RuntimeWarning, stacklevel=2)
