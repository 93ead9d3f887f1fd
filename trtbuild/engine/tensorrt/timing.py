"""Timing caches: what TensorRT measured of its kernels, kept per version and GPU in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from trtbuild.atomic import locked
from trtbuild.cachefolder import Damaged, Foreign, bound, cache_folder, discard, read_kept, write_kept
from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.values import Plan
from trtbuild.errors import OutputError
from trtbuild.nvinfer import Nvinfer, kept_logger

Report = Callable[[str], None]
ENDING, SET_ASIDE = ".timing", ".damaged"
LIMIT = 1 << 30
"""Bytes that the folder may hold: a cache has some megabytes per version and GPU."""


def timing_cache(nvinfer: Nvinfer, config: TensorRTConfig, device: Mapping[str, str], report: Report) -> bytes:
    """The kept cache, b"" where there is none, the flavour has none, or it is not wanted.

    A damaged one is reported and set aside.

    Raises:
        OutputError: the cache folder cannot be used.
    """
    if not _is_used(nvinfer, config):
        return b""
    return _read(_path(nvinfer, device), report)


def keep_timing_cache(
    nvinfer: Nvinfer, config: TensorRTConfig, device: Mapping[str, str], plan: Plan, known: bytes, report: Report
) -> None:
    """Keeps what a build measured, together with what other processes measured in the meantime.

    Args:
        nvinfer, config, device: of the build.
        plan: the built engine, with its cache.
        known: the cache that the build was given, and which is part of the engine's.
        report: called with a line where something is wrong.

    Raises:
        OutputError: it cannot be written.
    """
    if not plan.timing_cache or not _is_used(nvinfer, config):
        return
    path = _path(nvinfer, device)
    with locked(path.parent):
        kept = _read(path, report)
        merged = plan.timing_cache if kept in (known, b"") else combined(nvinfer, kept, plan.timing_cache, report)
        write_kept(path, {}, merged)
    bound(path.parent, (ENDING, SET_ASIDE), newest=path, limit=LIMIT)


def combined(nvinfer: Nvinfer, kept: bytes, new: bytes, report: Report) -> bytes:
    """Both caches in one; `new` alone where TensorRT does not take the kept one, which is reported."""
    trt = nvinfer.module
    logger = kept_logger(trt.Logger(trt.Logger.ERROR))
    config = trt.Builder(logger).create_builder_config()
    ours, theirs = (config.create_timing_cache(content) for content in (new, kept))
    if ours is None or theirs is None or not ours.combine(theirs, ignore_mismatch=False):
        report("TensorRT does not take the kept timing cache; it is replaced")
        return new
    written = ours.serialize()
    if written is None:
        report("TensorRT does not write the timing caches as one; the kept one is replaced")
        return new
    return bytes(written)


def _is_used(nvinfer: Nvinfer, config: TensorRTConfig) -> bool:
    return config.timing_cache and nvinfer.features.timing_cache


def _path(nvinfer: Nvinfer, device: Mapping[str, str]) -> Path:
    """One file per version and GPU: times of another GPU or another TensorRT are no times of this one."""
    text = json.dumps([nvinfer.backend, nvinfer.version, device.get("gpu"), device.get("capability")])
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    return cache_folder("timing") / f"{nvinfer.flavour}-{name}{ENDING}"


def _read(path: Path, report: Report) -> bytes:
    try:
        return read_kept(path)[1]
    except FileNotFoundError:
        return b""
    except Foreign as error:
        report(f"the timing cache is not yours and is not used: {error} ({path})")
        return b""
    except Damaged as error:
        aside = path.with_suffix(SET_ASIDE)
        report(f"the timing cache is damaged, and goes on empty: {error} (set aside as {aside.name})")
        if not discard(path, aside):
            raise OutputError("A damaged timing cache cannot be set aside.", where=path,
                              hint="remove it")  from error  # fmt: skip
        return b""
