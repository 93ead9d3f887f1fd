"""trtbuild beside nnU-Net on the demo case, in one interleaved run: tile loop, whole command, memory, Dice.

    python benchmarks/end_to_end.py --repeats 5 --repeats-tta 3
    python benchmarks/end_to_end.py --only openvino-int8 --only nnunet-npp1 --repeats-tta 0

Every round runs each contender once, in an order that turns from round to round, so that drifts of the machine hit all
of them. Ratios are medians over rounds of (nnU-Net / trtbuild) in the same round. Memory (sum of PSS over the process
tree) is sampled in one extra round, so that the sampling disturbs no time. INT8 is calibrated and gated with the demo's
own preprocessed cases, none of which is the measured one. Dice is that of the last round's segmentation, against the
labels and against trtbuild's float32. Writes JSON lines and a summary under benchmarks/results/.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from machine import Measured, describe, measure
from numpy.typing import NDArray

HERE = Path(__file__).resolve().parent
MODEL = HERE / "demo" / "model" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
INPUT = HERE / "demo" / "input"
CASES = HERE / "demo" / "preprocessed" / "Dataset501_MNI152Tissue"
LABELS = HERE / "demo" / "labels" / "mni152.nii.gz"
CLASSES = {1: "grey matter", 2: "white matter"}
REFERENCE = "openvino-f32"
"""Whose segmentation the others are compared with, beside the labels."""
INT8 = ("--precision", "int8", "--calibration", str(CASES))
OURS = {
    REFERENCE: (),
    "openvino-bf16": ("--precision", "bf16"),
    "openvino-int8": INT8,
    "openvino-int8-bf16": (*INT8, "--rest", "bf16"),
}
NNUNET = {"nnunet-default": (), "nnunet-npp1": ("-npp", "1", "-nps", "1")}
BF16 = ("openvino-bf16", "openvino-int8-bf16")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to predict the demo case; `run(tta, memory)` gives the measurement and the tile loop's seconds.

    `folder` gets its segmentation, anew in each run.
    """

    name: str
    run: Callable[[bool, bool], tuple[Measured, float]]
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run in the record."""

    contender: str
    tta: bool
    round: int
    wall: float
    cpu: float
    network: float
    pss: int


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Dice of a contender's segmentation, by class: against the labels, and against the reference's (None without it)."""

    contender: str
    tta: bool
    labels: dict[str, float]
    reference: dict[str, float] | None


def nnunet(work: Path, name: str, *extra: str) -> Contender:
    """nnU-Net's own command, stock settings; its tile loop is timed inside the process."""

    def run(tta: bool, memory: bool) -> tuple[Measured, float]:
        times = work / f"{name}.json"
        command = [
            sys.executable,
            str(HERE / "nnunet_predict.py"),
            str(times),
            "--",
            "-i",
            str(INPUT),
            "-o",
            str(work / name),
            "-m",
            str(MODEL),
            "-f",
            "0",
            "-device",
            "cpu",
            "--disable_progress_bar",
            *extra,
        ]
        measured = measure(command + ([] if tta else ["--disable_tta"]), sample_memory=memory)
        return measured, float(json.loads(times.read_text())["network"])

    return Contender(name=name, run=run, folder=work / name)


def ours(work: Path, name: str, *options: str) -> Contender:
    """`trtbuild predict` with a bundle that is compiled here, before any measurement."""
    bundle = work / f"{name}.trtb"
    print(f"compiling {name}", flush=True)
    command = [sys.executable, "-m", "trtbuild", "compile", str(MODEL), "-o", str(bundle), "--backend", "openvino"]
    measure([*command, *options], sample_memory=False)

    def run(tta: bool, memory: bool) -> tuple[Measured, float]:
        out = work / f"{name}.out"
        command = [
            "sh",
            "-c",
            f'exec "$0" "$@" > {out}',
            sys.executable,
            "-m",
            "trtbuild",
            "predict",
            str(bundle),
            "-i",
            str(INPUT),
            "-o",
            str(work / name),
            "--json",
        ]
        measured = measure(command + ([] if tta else ["--disable_tta"]), sample_memory=memory)
        outcome = json.loads(out.read_text())["outcomes"][0]
        return measured, float(outcome["seconds"]["network"])

    return Contender(name=name, run=run, folder=work / name)


def rows_of(contenders: list[Contender], tta: bool, repeats: int) -> list[Row]:
    """`repeats` timed rounds after one warm-up, and one round for memory (round -1)."""
    rows = []
    for number in range(-2, repeats):
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            measured, network = contender.run(tta, number == -1)
            print(
                f"{'tta' if tta else 'no tta'} round {number}: {contender.name} {measured.wall:.2f} s, tiles {network:.2f} s",
                flush=True,
            )
            if number > -2:
                rows.append(Row(contender=contender.name, tta=tta, round=number, network=network, **asdict(measured)))
    return rows


def accuracies(contenders: list[Contender], tta: bool) -> list[Accuracy]:
    """Dice of what the last runs wrote."""
    import SimpleITK

    from trtbuild.accuracy.metrics import overlaps

    def volume(path: Path) -> NDArray[Any]:
        return np.asarray(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))

    def dice(reference: NDArray[Any], segmentation: NDArray[Any]) -> dict[str, float]:
        found = overlaps(reference, segmentation, [(label,) for label in CLASSES])
        return {name: one.dice for name, one in zip(CLASSES.values(), found, strict=True)}

    truth = volume(LABELS)
    found = {contender.name: volume(contender.folder / LABELS.name) for contender in contenders}
    reference = found.get(REFERENCE)
    return [
        Accuracy(
            contender=name,
            tta=tta,
            labels=dice(truth, segmentation),
            reference=None if reference is None else dice(reference, segmentation),
        )
        for name, segmentation in found.items()
    ]


def ratios(
    rows: list[Row], tta: bool, field: str, ours_name: str, theirs: tuple[str, ...]
) -> tuple[float, float, float]:
    """(min, median, max) over rounds of the faster of `theirs` / ours."""
    values = []
    for number in sorted({r.round for r in rows if r.round >= 0 and r.tta == tta}):
        here = {r.contender: getattr(r, field) for r in rows if r.round == number and r.tta == tta}
        values.append(min(here[name] for name in theirs) / here[ours_name])
    return min(values), statistics.median(values), max(values)


def summary(rows: list[Row], accuracy: list[Accuracy], machine: dict[str, Any], repeats: dict[bool, int]) -> str:
    """The record as Markdown: ratios first, then every contender's median, then Dice."""
    theirs = tuple(dict.fromkeys(r.contender for r in rows if r.contender.startswith("nnunet")))
    mine = [n for n in dict.fromkeys(r.contender for r in rows) if n not in theirs]
    lines = [
        "# Demo case: trtbuild beside nnU-Net",
        "",
        f"{machine['cpu']}, {machine['processors']} processors, {machine['date']}, commit {machine['commit']}.  ",
        ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + f", Python {machine['python']}.",
        "",
        f"MNI152 T1 1 mm (197 x 233 x 189), model at 1.5 mm, patch 64^3, fold 0, step 0.5; {repeats[False]} rounds without and "
        f"{repeats[True]} with mirroring, interleaved, one warm-up. Ratio = the faster of nnU-Net's default and `-npp 1 -nps 1` "
        "/ trtbuild in the same round: median (min to max). Memory = peak of the sum of PSS over the process tree. "
        "int8 is calibrated and gated with the demo's three preprocessed cases; int8-bf16 computes the rest in bf16.",
        "",
        "| trtbuild | mirroring | tile loop | whole command | memory |",
        "|---|---|---|---|---|",
    ]
    for tta in sorted({r.tta for r in rows}):
        memory = {r.contender: r.pss for r in rows if r.round == -1 and r.tta == tta}
        for name in mine:
            cells = [ratios(rows, tta, field, name, theirs) for field in ("network", "wall")]
            text = " | ".join(f"{m:.2f}x ({low:.2f} to {high:.2f})" for low, m, high in cells)
            share = memory[name] / min(memory[t] for t in theirs)
            lines.append(f"| {name} | {'on' if tta else 'off'} | {text} | {share:.2f} of nnU-Net's |")
    lines += [
        "",
        "| contender | mirroring | tile loop, s | whole command, s | CPU, s | peak PSS, MB |",
        "|---|---|---|---|---|---|",
    ]
    for tta in sorted({r.tta for r in rows}):
        for name in (*mine, *theirs):
            here = [r for r in rows if r.contender == name and r.tta == tta and r.round >= 0]
            pss = next(r.pss for r in rows if r.contender == name and r.tta == tta and r.round == -1)
            medians = [statistics.median(getattr(r, f) for r in here) for f in ("network", "wall", "cpu")]
            lines.append(
                f"| {name} | {'on' if tta else 'off'} | "
                + " | ".join(f"{m:.2f}" for m in medians)
                + f" | {pss / 1e6:.0f} |"
            )
    return "\n".join([*lines, *accuracy_table(accuracy)]) + "\n"


def accuracy_table(accuracy: list[Accuracy]) -> list[str]:
    """Dice by class, as Markdown lines."""
    classes = list(CLASSES.values())
    lines = [
        "",
        f"Dice of the segmentations, against the labels and against {REFERENCE}'s (the brain is the parent of the training "
        "copies: no claim of generalisation). Mean = over classes, against the labels.",
        "",
        "| contender | mirroring | "
        + " | ".join([*(f"{name}, labels" for name in classes), "mean", *(f"{name}, f32" for name in classes)])
        + " |",
        "|---|---|" + "---|" * (2 * len(classes) + 1),
    ]
    for one in accuracy:
        cells = [f"{one.labels[name]:.4f}" for name in classes]
        cells.append(f"{statistics.mean(one.labels.values()):.4f}")
        cells += ["" if one.reference is None else f"{one.reference[name]:.4f}" for name in classes]
        lines.append(f"| {one.contender} | {'on' if one.tta else 'off'} | " + " | ".join(cells) + " |")
    return lines


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds without mirroring.")
@click.option("--repeats-tta", type=click.IntRange(0), default=3, show_default=True, help="Rounds with mirroring.")
@click.option("--no-bf16", is_flag=True, help="Leave bf16 out (the CPU lacks it).")
@click.option("--only", multiple=True, type=click.Choice([*OURS, *NNUNET]), help="These contenders alone; repeatable.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def main(repeats: int, repeats_tta: int, no_bf16: bool, only: tuple[str, ...], output: Path) -> None:
    """Measures and writes end_to_end.jsonl and end_to_end.md."""
    names = [name for name in (only or (*OURS, *NNUNET)) if not (no_bf16 and name in BF16)]
    if not set(names) & set(OURS) or not set(names) & set(NNUNET):
        raise click.UsageError("a ratio needs one of trtbuild's contenders and one of nnU-Net's")
    machine = describe()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        contenders = [ours(work, name, *options) for name, options in OURS.items() if name in names]
        contenders += [nnunet(work, name, *extra) for name, extra in NNUNET.items() if name in names]
        rows, accuracy = rows_of(contenders, False, repeats), accuracies(contenders, False)
        if repeats_tta:
            rows += rows_of(contenders, True, repeats_tta)
            accuracy += accuracies(contenders, True)
    output.mkdir(parents=True, exist_ok=True)
    record = [{"machine": machine}, *map(asdict, rows), *map(asdict, accuracy)]
    (output / "end_to_end.jsonl").write_text("\n".join(map(json.dumps, record)) + "\n")
    text = summary(rows, accuracy, machine, {False: repeats, True: repeats_tta})
    (output / "end_to_end.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
