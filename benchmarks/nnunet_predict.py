"""Runs nnU-Net's own command line and reports the seconds of its tile loop.

    python benchmarks/nnunet_predict.py TIMES.json [--float32] -- -i IN -o OUT -m MODEL -f 0 -device cpu ...

Everything after `--` goes to nnU-Net's `nnUNetv2_predict_from_modelfolder` unchanged. With `--float32` its accumulators
are float32 instead of float16, which is what equality is judged against (its float16 buffers alone change 1e-4 of the
voxels). TIMES.json gets {"network": seconds in the tile loop}.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class Float32Torch:
    """The torch module as nnU-Net's predictor sees it, with `half` meaning float32."""

    def __getattr__(self, name: str) -> Any:
        import torch

        return torch.float32 if name == "half" else getattr(torch, name)


def use_float32_accumulators(module: Any) -> None:
    """Makes nnU-Net's predict_from_raw_data module accumulate windows, weights and Gaussian in float32."""
    import torch

    original = module.compute_gaussian

    def compute_gaussian(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **{**kwargs, "dtype": torch.float32})

    compute_gaussian.cache_clear = original.cache_clear  # type: ignore[attr-defined]
    module.compute_gaussian, module.torch = compute_gaussian, Float32Torch()


def main() -> None:
    split = sys.argv.index("--")
    own, theirs = sys.argv[1:split], sys.argv[split + 1 :]
    for name in ("raw", "preprocessed", "results"):
        os.environ.setdefault(f"nnUNet_{name}", "/nonexistent")
    from nnunetv2.inference import predict_from_raw_data as module

    if "--float32" in own:
        use_float32_accumulators(module)
    times: list[float] = []
    loop = module.nnUNetPredictor.predict_sliding_window_return_logits

    def timed(self: Any, image: Any) -> Any:
        started = time.perf_counter()
        result = loop(self, image)
        times.append(time.perf_counter() - started)
        return result

    module.nnUNetPredictor.predict_sliding_window_return_logits = timed
    sys.argv = ["nnUNetv2_predict_from_modelfolder", *theirs]
    module.predict_entry_point_modelfolder()
    Path(own[0]).write_text(json.dumps({"network": sum(times)}))


if __name__ == "__main__":
    main()
