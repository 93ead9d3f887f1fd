"""ONNX Runtime's settings for a network on a CPU."""

from __future__ import annotations

from trtbuild.engine.tune import Options

PRECISIONS = ("f32",)


def onnxruntime_candidates(threads: int) -> tuple[Options, ...]:
    """Settings to measure for `threads` threads, the simplest first.

    One call at a time: concurrent calls of a session share its one thread pool, so they only cost memory.
    """
    one: Options = {
        "threads": threads,
        "streams": 1,
        "batch": 1,
        "providers": "CPUExecutionProvider",
    }
    return (one, {**one, "batch": 2})
