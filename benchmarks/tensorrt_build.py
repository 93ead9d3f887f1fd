"""What it costs to build nnU-Net's default networks with TensorRT-RTX, without a GPU: seconds, memory, kernels.

    python benchmarks/tensorrt_build.py --rounds 2

Patch 128^3 with features 32 to 320 and 512^2 with 32 to 512, as PlainConvUNet and as ResidualEncoderUNet M, random
weights, batch 1 to 4. Each build runs in a process of its own that reads the finished ONNX; the rounds go through all
of them in turn, and the least time and the largest peak of RSS count. Writes tensorrt_build.jsonl and .md.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import click
from machine import describe

HERE = Path(__file__).resolve().parent
sys.path.append(str(HERE.parent / "tests"))  # the networks are those of the tests


@dataclass(frozen=True, kw_only=True)
class Build:
    """One network in one precision: seconds, bytes, kernels, and the share of its operations in INT8."""

    network: str
    precision: str
    seconds: float
    peak: int
    plan: int
    kernels: int
    activations: int
    int8: float


def measured(folder: Path, rounds: int) -> list[Build]:
    """All builds, `rounds` times in turn."""
    from tensorrt_samples import (  # type: ignore[import-not-found]  # of the tests
        NETWORKS,
        PRECISIONS,
        built_apart,
        default_network,
        typed,
    )

    from trtbuild.engine.tensorrt.coverage import coverage
    from trtbuild.graph.cost import operations

    files, counted = {}, {}
    for name in NETWORKS:
        model = default_network(name)
        for precision in PRECISIONS:
            written = typed(model, precision).model
            counted[name, precision] = operations(written)
            files[name, precision] = folder / f"{name}_{precision}.onnx"
            files[name, precision].write_bytes(written.SerializeToString())
    best: dict[tuple[str, str], Build] = {}
    for _ in range(rounds):
        for key, file in files.items():
            built = built_apart(file)
            if built.table is None:
                raise RuntimeError(f"no layer table: {built.warnings}")
            before = best.get(key)
            best[key] = Build(
                network=key[0],
                precision=key[1],
                seconds=min(built.seconds, before.seconds if before else built.seconds),
                peak=max(built.peak, before.peak if before else 0),
                plan=built.size,
                kernels=len(built.table.layers),
                activations=built.table.activation_memory or 0,
                int8=coverage(built.table, counted[key]).share("int8"),
            )
            print(f"{key[0]} {key[1]}: {built.seconds:.1f} s, {built.peak / 1e6:.0f} MB", flush=True)
    return list(best.values())


def summary(builds: list[Build], rounds: int, machine: dict[str, object]) -> str:
    """The record as Markdown."""
    lines = [
        "# Building nnU-Net's default networks with TensorRT-RTX, without a GPU\n",
        f"{machine['cpu']}, {machine['processors']} processors, {machine['date']}, commit {machine['commit']}.\n",
        f"Python {machine['python']}, tensorrt-rtx {machine['tensorrt_rtx']}; batch 1 to 4, random weights; least seconds and largest peak of {rounds} rounds in turn, on a machine that others use, too. Activations are those of batch 4. No engine was run.\n",
        "| network | precision | build, s | peak RSS, MB | plan, MB | kernels | activations, MB | operations in INT8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for b in builds:
        lines.append(
            f"| {b.network} | {b.precision} | {b.seconds:.1f} | {b.peak / 1e6:.0f} | {b.plan / 1e6:.0f} | {b.kernels} "
            f"| {b.activations / 1e6:.0f} | {b.int8:.1%} |"
        )
    return "\n".join(lines) + "\n"


@click.command(help=(__doc__ or "").split("\n\n")[0])
@click.option("--rounds", type=click.IntRange(1), default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def main(rounds: int, output: Path) -> None:
    """Measures and writes tensorrt_build.jsonl and tensorrt_build.md."""
    from importlib import metadata

    with tempfile.TemporaryDirectory() as folder:
        builds = measured(Path(folder), rounds)
    machine = {**describe(), "tensorrt_rtx": metadata.version("tensorrt-rtx")}
    output.mkdir(parents=True, exist_ok=True)
    rows = [machine, *map(asdict, builds)]
    (output / "tensorrt_build.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (output / "tensorrt_build.md").write_text(summary(builds, rounds, machine))
    print((output / "tensorrt_build.md").read_text())


if __name__ == "__main__":
    main()
