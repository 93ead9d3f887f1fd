"""OpenVINO's settings for a network on a CPU: which precisions there are, and which settings are worth measuring."""

from __future__ import annotations

from trtbuild.engine.tune import Options

PRECISIONS = ("f32", "bf16")


def openvino_candidates(threads: int) -> tuple[Options, ...]:
    """Settings to measure for `threads` threads, the simplest and smallest first.

    One stream with all threads computes one patch at a time. More streams compute as many patches at once, each with
    its share of the threads (only even shares: every stream then gives the same bits) and with activations of its
    own. Batch 2 is the only larger batch: 4 was no faster (64³ PlainConvUNet, two cores), and memory grows with it.
    """
    streams = [2**n for n in range(1, threads.bit_length()) if threads % 2**n == 0]
    if threads > 1 and threads not in streams:
        streams.append(threads)
    return (
        {"threads": threads, "streams": 1, "batch": 1},
        *({"threads": threads, "streams": count, "batch": 1} for count in streams),
        {"threads": threads, "streams": 1, "batch": 2},
    )
