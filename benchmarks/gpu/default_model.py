"""nnU-Net's default 3d_fullres network with random weights, and an engine of it that this card runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_model import RandomModel, write_model  # it lies one folder above

PATCH, FEATURES, SPACING = (128, 128, 128), (32, 64, 128, 256, 320, 320), (1.0, 1.0, 1.0)
FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
CONTENDER = Path(__file__).resolve().parent / "contender.py"


def default_model(classes: int, folder: Path) -> Path:
    """A trained-model folder."""
    return write_model(RandomModel(classes=classes, patch=PATCH, features=FEATURES, spacing=SPACING), folder)


def built_bundle(model: Path, work: Path, flavours: Sequence[str] = tuple(FLAVOURS)) -> tuple[Path | None, str]:
    """A bundle with a TensorRT engine that this card runs, and the flavour's name; or None, and why not.

    In a process of its own: one process holds one flavour.
    """
    reasons = []
    for flavour in flavours:
        if find_spec(FLAVOURS[flavour]) is None:
            reasons.append(f"{flavour}: not installed")
            continue
        bundle = work / f"{flavour}.trtb"
        command = [sys.executable, str(CONTENDER), "build", flavour, str(model), str(bundle)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return bundle, flavour
        reasons.append(f"{flavour}: {' '.join(done.stderr.split())[-300:]}")
    return None, "; ".join(reasons)
