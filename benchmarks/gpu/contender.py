"""One contender in a process of its own: it opens a model, warms up, and then runs the case once per line it is sent.

    python benchmarks/gpu/contender.py run nnunet MODEL SHAPE SPACING LABELS.npy
    python benchmarks/gpu/contender.py run trtbuild MODEL SHAPE SPACING LABELS.npy --bundle BUNDLE
    python benchmarks/gpu/contender.py build tensorrt MODEL BUNDLE

Answers are JSON lines: {"ready": seconds of the warm-up}, then {"seconds": ...} per run. Memory that torch keeps for
later is given back between runs, so that neither contender lacks what the other one does not use.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import click
import numpy as np
from ways import body, device_path, nnunet_labels, nnunet_predictor, seconds

Three = tuple[float, float, float]


@click.group()
def main() -> None:
    """See the head of this file."""


@main.command()
@click.argument("who", type=click.Choice(["nnunet", "trtbuild"]))
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("shape")
@click.argument("spacing")
@click.argument("labels", type=click.Path(path_type=Path))
@click.option("--bundle", type=click.Path(path_type=Path), help="With a TensorRT engine; torch's network without one.")
@click.option("--device", default="cuda", show_default=True, help="nnU-Net's; without a GPU it runs on the CPU.")
def run(who: str, model: Path, shape: str, spacing: str, labels: Path, bundle: Path | None, device: str) -> None:
    """Runs the case once per line of the input, until it ends."""
    depth, height, width = map(int, shape.split(","))
    z, y, x = map(float, spacing.split(","))
    image = body((depth, height, width), (z, y, x))
    with ExitStack() as stack:
        if who == "nnunet":
            predictor = _quietly(lambda: nnunet_predictor(model, device))

            def work() -> Any:
                return _quietly(lambda: nnunet_labels(predictor, image))
        else:
            path = _quietly(lambda: stack.enter_context(device_path(model, bundle)))

            def work() -> Any:
                return path.predict(image)

        first, result = seconds(work)
        np.save(labels, result)
        _answer(ready=first)
        for _ in sys.stdin:
            _answer(seconds=seconds(work)[0])
            _give_back()


@main.command()
@click.argument("flavour", type=click.Choice(["tensorrt", "tensorrt-rtx"]))
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("bundle", type=click.Path(path_type=Path))
def build(flavour: str, model: Path, bundle: Path) -> None:
    """Compiles the model for TensorRT in FP16; fails where this card does not run the engine."""
    import trtbuild

    compiled = trtbuild.compile(model, bundle, backends=(flavour,), precision="fp16", tune=False)
    (facts,) = compiled.manifest.extensions["tensorrt"].values()
    if facts["unrun"] is not None:
        raise click.ClickException(facts["unrun"])


def _answer(**values: float) -> None:
    print(json.dumps(values), flush=True)


def _quietly(work: Callable[[], Any]) -> Any:
    with redirect_stdout(io.StringIO()):
        return work()


def _give_back() -> None:
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
