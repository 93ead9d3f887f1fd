"""Peak memory: trtbuild beside nnU-Net where classes are many, and what the planner predicts beside what is measured.

    python benchmarks/memory.py                 both; nnU-Net alone takes about a quarter of an hour and 20 GB
    python benchmarks/memory.py --only planner  what the planner predicts, some minutes

Memory is the peak of the sum of PSS over the process tree, sampled every 20 ms. The networks are small and their weights
random: what comes after them is the point. Writes benchmarks/results/memory.{md,jsonl}.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
from machine import describe
from process_tree import run_sampled
from random_model import RandomModel, write_case, write_model

HERE = Path(__file__).resolve().parent
NNUNET = {"default": (), "-npp 1 -nps 1": ("-npp", "1", "-nps", "1")}


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One row of the planner's table."""

    name: str
    model: RandomModel
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    cases: int = 1
    options: tuple[str, ...] = ()


MANY = RandomModel(classes=60)
HEADLINE = Shape(name="60 classes", model=MANY, shape=(300, 400, 400), spacing=(0.8, 0.8, 0.8))
SHAPES = (
    HEADLINE,
    Shape(name="60 classes, folder", model=MANY, shape=(200, 240, 240), spacing=(1.2, 1, 1), cases=3),
    Shape(
        name="4 channels, folder",
        model=RandomModel(classes=3, channels=4, spacing=(1.0, 1.0, 1.0), patch=(96, 96, 96)),
        shape=(170, 240, 240),
        spacing=(0.8, 0.9, 0.9),
        cases=3,
    ),
    Shape(
        name="2-D, folder",
        model=RandomModel(classes=20, channels=2, spacing=(0.8, 0.8), patch=(256, 256)),
        shape=(90, 512, 512),
        spacing=(3, 0.6, 0.6),
        cases=3,
    ),
    Shape(
        name="probabilities",
        model=RandomModel(classes=14, spacing=(2.0, 2.0, 2.0)),
        shape=(130, 200, 200),
        spacing=(1.5, 1.5, 1.5),
        options=("--save_probabilities",),
    ),
    Shape(
        name="thick slices, probabilities, folder",
        model=RandomModel(classes=8, spacing=(4.0, 1.2, 1.2), patch=(24, 96, 96)),
        shape=(50, 320, 320),
        spacing=(5, 0.9, 0.9),
        cases=3,
        options=("--save_probabilities",),
    ),
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run: bytes that were measured, and that the planner said (0 for nnU-Net, which has none)."""

    name: str
    contender: str
    peak: int
    predicted: int
    seconds: float


def trtbuild(*words: str) -> list[str]:
    """The command line."""
    return [sys.executable, "-m", "trtbuild", *words]


def planner_row(shape: Shape, work: Path) -> Row:
    """Compiles, predicts, and compares the largest prediction with the peak."""
    bundle, images = work / "model.trtb", work / "images"
    folder = write_model(shape.model, work)
    run_sampled(trtbuild("compile", str(folder), "-o", str(bundle), "--backend", "openvino", "--no-tune"))
    for number in range(shape.cases):
        write_case(images, f"case{number}", shape.shape, shape.spacing, shape.model.channels)
    started = time.perf_counter()
    command = trtbuild("predict", str(bundle), "-i", str(images), "-o", str(work / "out"), "--disable_tta", "--json")
    peak, output = run_sampled([*command, *shape.options])
    predicted = max(outcome["predicted"] for outcome in json.loads(output)["outcomes"])
    seconds = time.perf_counter() - started
    return Row(name=shape.name, contender="trtbuild", peak=peak.bytes, predicted=predicted, seconds=seconds)


def nnunet_row(name: str, extra: Sequence[str], work: Path) -> Row:
    """nnU-Net's own command on the headline case."""
    folder = write_model(HEADLINE.model, work)
    write_case(work / "images", "case0", HEADLINE.shape, HEADLINE.spacing)
    command = [
        sys.executable, str(HERE / "nnunet_predict.py"), str(work / "times.json"), "--", "-i", str(work / "images"),
        "-o", str(work / "out"), "-m", str(folder), "-f", "0", "-device", "cpu", "--disable_progress_bar",
        "--disable_tta", *extra,
    ]  # fmt: skip
    # where memory runs out, the system should end this one and nothing else
    victim = ["sh", "-c", 'echo 1000 > /proc/self/oom_score_adj; exec "$0" "$@"']
    started = time.perf_counter()
    peak, _ = run_sampled([*victim, *command])
    seconds = time.perf_counter() - started
    return Row(name=HEADLINE.name, contender=f"nnU-Net, {name}", peak=peak.bytes, predicted=0, seconds=seconds)


def in_words(shape: Shape) -> str:
    """The conditions of a row."""
    model = shape.model
    return (
        f"{' x '.join(map(str, shape.shape))} at {' x '.join(f'{s:g}' for s in shape.spacing)} mm, "
        f"{model.channels} channel{'s' * (model.channels > 1)}, {model.classes} classes, patch "
        f"{' x '.join(map(str, model.patch))} at {' x '.join(f'{s:g}' for s in model.spacing)} mm, "
        f"{shape.cases} case{'s' * (shape.cases > 1)}{', ' * bool(shape.options)}{' '.join(shape.options)}"
    )


def summary(rows: Sequence[Row], machine: dict[str, Any]) -> str:
    """The record as Markdown."""
    lines = [
        "# Peak memory",
        "",
        f"{machine['cpu']}, {machine['processors']} processors, {machine['date']}, commit {machine['commit']}.  ",
        ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + f", Python {machine['python']}.",
        "",
        "Peak of the sum of PSS over the process tree, sampled every 20 ms; OpenVINO f32, no mirroring, step 0.5, fold 0; "
        "U-Nets of 8, 16, 32 features with random weights. MB are 10^6 bytes.",
    ]
    theirs = [row for row in rows if row.contender != "trtbuild"]
    ours = {row.name: row for row in rows if row.contender == "trtbuild"}
    if theirs and HEADLINE.name in ours:
        mine, best = ours[HEADLINE.name].peak, min(row.peak for row in theirs)
        lines += [
            "",
            f"## Beside nnU-Net: {mine / best:.3f} of the smaller one's (limit 0.25)",
            "",
            in_words(HEADLINE) + ".",
            "",
            "| command | peak, MB | whole command, s |",
            "|---|---|---|",
            *(f"| {r.contender} | {r.peak / 1e6:.0f} | {r.seconds:.0f} |" for r in (ours[HEADLINE.name], *theirs)),
        ]
    lines += [
        "",
        "## The planner's prediction beside the measured peak (limit: within 20 %)",
        "",
        "| | conditions | predicted, MB | measured, MB | predicted / measured |",
        "|---|---|---|---|---|",
    ]
    for shape in (shape for shape in SHAPES if shape.name in ours):
        row = ours[shape.name]
        lines.append(
            f"| {shape.name} | {in_words(shape)} | {row.predicted / 1e6:.0f} | {row.peak / 1e6:.0f} | "
            f"{row.predicted / row.peak:.2f} |"
        )
    return "\n".join(lines) + "\n"


def kept_rows(record: Path) -> list[Row]:
    """The rows of an earlier run, for the half that is not measured now."""
    lines = record.read_text().splitlines()[1:] if record.exists() else []
    return [Row(**json.loads(line)) for line in lines]


@click.command()
@click.option(
    "--only", type=click.Choice(["planner", "nnunet"]), help="Measure half, keep the other of an earlier run."
)
@click.option("--shape", "names", multiple=True, help="Print only these rows of the planner's table; writes nothing.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def main(only: str | None, names: tuple[str, ...], output: Path) -> None:
    """Measures and writes memory.jsonl and memory.md."""
    record = output / "memory.jsonl"
    rows = [] if only is None else [r for r in kept_rows(record) if (r.contender == "trtbuild") == (only == "nnunet")]
    for shape in SHAPES:
        if only != "nnunet" and (not names or shape.name in names):
            with tempfile.TemporaryDirectory() as work:
                rows.append(planner_row(shape, Path(work)))
            print(f"{rows[-1]}: {rows[-1].predicted / rows[-1].peak:.2f}", flush=True)
    if names:
        return
    for name, extra in NNUNET.items():
        if only != "planner":
            with tempfile.TemporaryDirectory() as work:
                rows.append(nnunet_row(name, extra, Path(work)))
            print(rows[-1], flush=True)
    machine = describe()
    output.mkdir(parents=True, exist_ok=True)
    record.write_text("\n".join([json.dumps({"machine": machine}), *(json.dumps(asdict(row)) for row in rows)]) + "\n")
    text = summary(rows, machine)
    (output / "memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
