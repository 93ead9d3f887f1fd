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
    # TF32 rounds the inputs of a convolution to 11 bits, bf16 to 8. Not measured: no GPU has run it.
    "tf32": 2e-2,
}
"""Largest |difference| of logits against the exported network's golden, as a share of the largest |logit|."""

LOWERED_TOLERANCE: Mapping[str, float] = {
    # Rounding to 11 bits gives 3e-4 to 2e-3 (demo model, nnU-Net's default networks). A head whose weights fall below
    # FP16's smallest numbers gives 0.1 and more.
    "fp16": 0.02,
    # INT8 has no such limit but its gate's: 0.1 on the demo model, more on others. As far off as the logits vary is
    # a wrong graph.
    "int8": 1.0,
}
"""Largest rms difference between the plain evaluation of a network in lower precision and the exported network's
golden, as a share of the spread of the logits, where no gate judges it."""

TYPED_TOLERANCE = 0.2
"""Largest rms difference between an engine of a typed network (INT8, FP16) and ONNX Runtime's plain evaluation of the
same graph, as a share of the spread of the logits. Two evaluations that round in other places differ by up to 0.066 on
random weights (float32 and float64 of one INT8 graph), OpenVINO with INT8's zero point 0 behind a Concat by 0.5."""


def logit_rms(logits: NDArray[np.float32], golden: NDArray[np.float32]) -> float:
    """sqrt(mean (logits - golden)²) / std golden; infinity where the shapes differ or a value is not finite."""
    if logits.shape != golden.shape or not np.isfinite(logits).all():
        return float("inf")
    spread = max(float(golden.std(dtype=np.float64)), 1e-30)
    return float(np.sqrt(np.mean((logits.astype(np.float64) - golden) ** 2))) / spread


def logit_error(logits: NDArray[np.float32], golden: NDArray[np.float32]) -> float:
    """max |logits - golden| / max |golden|; infinity where the shapes differ or a value is not finite."""
    if logits.shape != golden.shape or not np.isfinite(logits).all():
        return float("inf")
    return float(np.abs(logits.astype(np.float64) - golden).max() / max(float(np.abs(golden).max()), 1e-30))
