"""trtbuild beside nnU-Net on the demo case, in one interleaved run: tile loop, whole command, memory.

    python benchmarks/end_to_end.py --repeats 5 --repeats-tta 3

Every round runs each contender once, in an order that turns from round to round, so that drifts of the machine hit all
of them. Ratios are medians over rounds of (nnU-Net / trtbuild) in the same round. Memory (sum of PSS over the process
tree) is sampled in one extra round, so that the sampling disturbs no time. Writes JSON lines and a summary under
benchmarks/results/.
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
from machine import Measured, describe, measure

HERE = Path(__file__).resolve().parent
MODEL = HERE / "demo" / "model" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
INPUT = HERE / "demo" / "input"


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to predict the demo case; `run(tta, memory)` gives the measurement and the tile loop's seconds."""

    name: str
    run: Callable[[bool, bool], tuple[Measured, float]]


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

    return Contender(name=name, run=run)


def ours(work: Path, name: str, *options: str) -> Contender:
    """`trtbuild predict` with a bundle that is compiled here, before any measurement."""
    bundle = work / f"{name}.trtb"
    measure([sys.executable, "-m", "trtbuild", "compile", str(MODEL), "-o", str(bundle), *options], sample_memory=False)

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

    return Contender(name=name, run=run)


def rows_of(contenders: list[Contender], tta: bool, repeats: int) -> list[Row]:
    """`repeats` timed rounds after one warm-up, and one round for memory (round -1)."""
    rows = []
    for number in range(-2, repeats):
        turn = number % len(contenders)
        for contender in contenders[turn:] + contenders[:turn]:
            measured, network = contender.run(tta, number == -1)
            print(
                f"{'tta' if tta else 'no tta'} round {number}: {contender.name} {measured.wall:.2f} s, tiles {network:.2f} s"
            )
            if number > -2:
                rows.append(Row(contender=contender.name, tta=tta, round=number, network=network, **asdict(measured)))
    return rows


def ratios(
    rows: list[Row], tta: bool, field: str, ours_name: str, theirs: tuple[str, ...]
) -> tuple[float, float, float]:
    """(min, median, max) over rounds of the faster of `theirs` / ours."""
    values = []
    for number in sorted({r.round for r in rows if r.round >= 0 and r.tta == tta}):
        here = {r.contender: getattr(r, field) for r in rows if r.round == number and r.tta == tta}
        values.append(min(here[name] for name in theirs) / here[ours_name])
    return min(values), statistics.median(values), max(values)


def summary(rows: list[Row], machine: dict[str, Any], repeats: dict[bool, int]) -> str:
    """The record as Markdown: ratios first, then every contender's median."""
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
        "/ trtbuild in the same round: median (min to max). Memory = peak of the sum of PSS over the process tree.",
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
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds without mirroring.")
@click.option("--repeats-tta", type=click.IntRange(0), default=3, show_default=True, help="Rounds with mirroring.")
@click.option("--no-bf16", is_flag=True, help="Leave bf16 out (the CPU lacks it).")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def main(repeats: int, repeats_tta: int, no_bf16: bool, output: Path) -> None:
    """Measures and writes end_to_end.jsonl and end_to_end.md."""
    machine = describe()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        contenders = [ours(work, "openvino-f32", "--backend", "openvino")]
        if not no_bf16:
            contenders.append(ours(work, "openvino-bf16", "--backend", "openvino", "--precision", "bf16"))
        contenders += [nnunet(work, "nnunet-default"), nnunet(work, "nnunet-npp1", "-npp", "1", "-nps", "1")]
        rows = rows_of(contenders, False, repeats)
        if repeats_tta:
            rows += rows_of(contenders, True, repeats_tta)
    output.mkdir(parents=True, exist_ok=True)
    record = [json.dumps({"machine": machine})] + [json.dumps(asdict(row)) for row in rows]
    (output / "end_to_end.jsonl").write_text("\n".join(record) + "\n")
    text = summary(rows, machine, {False: repeats, True: repeats_tta})
    (output / "end_to_end.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
