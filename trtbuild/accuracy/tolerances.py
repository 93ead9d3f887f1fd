"""Every tolerance of the project, with the reason for its number."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

LOGIT_TOLERANCE: Mapping[str, float] = {
    # OpenVINO's f32 kernels (Winograd, other summation orders) measured up to 3.3e-4 of the largest logit against
    # torch on nnU-Net's default network, and another number of threads changes them by 4e-4. ONNX Runtime: 4.2e-5.
    "f32": 1e-3,
    # bf16 has 8 bits of mantissa: 2**-9 = 2e-3 per operation, 1.2e-2 of the largest logit measured on the default
    # network. Four times that is a wrong graph, not rounding.
    "bf16": 5e-2,
    # FP16 weights are off by 2**-11 each; computed in float32 as on a CPU, 3e-3 measured on the demo network.
    "fp16": 2e-2,
    # INT8 has 7 bits: 4e-2 measured on the demo network. The gate judges INT8; this only finds a graph that computes
    # something else, as OpenVINO's int8 behind a Concat does (0.5 of the logits' spread).
    "int8": 0.5,
}
"""Largest |difference| of logits against the exported network's golden, as a share of the largest |logit|, by what an
engine's network is typed in, or for an FP32 network by the precision that its backend computes in."""


def logit_error(logits: NDArray[np.float32], golden: NDArray[np.float32]) -> float:
    """max |logits - golden| / max |golden|; infinity where the shapes differ or a value is not finite."""
    if logits.shape != golden.shape or not np.isfinite(logits).all():
        return float("inf")
    return float(np.abs(logits.astype(np.float64) - golden).max() / max(float(np.abs(golden).max()), 1e-30))
