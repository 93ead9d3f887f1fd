"""Twenty demo cases through one command: is the network ever kept waiting, and does memory stay the same?

    python benchmarks/folder_run.py

Two runs of the same folder take turns: everything in flight at once (the default), and all in turn (`-npp 0 -nps 0`),
whose tile loops nothing disturbs. A run is the command's own step with callbacks that note times, CPU time and memory.
Writes benchmarks/results/folder_run.{md,jsonl}.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import click
from machine import describe
from process_tree import cpu_seconds, proportional_set, tree, waiting_seconds

HERE = Path(__file__).resolve().parent
MODEL = HERE / "demo" / "model" / "nnUNetTrainer__nnUNetPlans__3d_fullres"
IMAGE = HERE / "demo" / "input" / "mni152_0000.nii.gz"
STEADY = 3  # the case whose memory the later ones are compared with


@dataclass
class Notes:
    """What the callbacks saw; times are `time.time()`, CPU seconds those of the whole process tree."""

    first_case: float = 0.0
    first_window: tuple[float, float, float] = (0.0, 0.0, 0.0)
    last_window: tuple[float, float, float] = (0.0, 0.0, 0.0)
    memory: list[int] = field(default_factory=list)
    seconds: list[Mapping[str, float]] = field(default_factory=list)


def noted(bundle: Path, images: Path, output: Path, together: bool) -> Notes:
    """Predicts the folder in this process; memory is taken when a case has left the network."""
    from trtbuild.config import PredictConfig
    from trtbuild.steps.folder_run.cases import predict_cases
    from trtbuild.steps.folder_run.flow import Events

    notes = Notes()

    def now() -> tuple[float, float, float]:
        processes = tree(os.getpid())
        return time.time(), cpu_seconds(processes), waiting_seconds(processes)

    def case_started(plan: object) -> None:
        notes.first_case = notes.first_case or time.time()

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "network" and not notes.first_window[0]:
            notes.first_window = now()
        if stage == "network" and done == total:
            notes.last_window = now()
        if stage == "back":
            notes.memory.append(proportional_set(tree(os.getpid())))

    config = PredictConfig(
        bundles=(bundle,), inputs=(images,), output=output, mirroring=False,
        preparing=int(together), writing=int(together),
    )  # fmt: skip
    summary = predict_cases(config, Events(case_started=case_started, progress=progress))
    if summary.failed:
        raise RuntimeError(summary.failed[0].error)
    notes.seconds = [dict(outcome.seconds) for outcome in summary.outcomes]
    return notes


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run from outside: when it began and ended, and its notes."""

    together: bool
    round: int
    began: float
    ended: float
    notes: Notes

    @property
    def wall(self) -> float:
        """Of the whole process."""
        return self.ended - self.began

    @property
    def startup(self) -> float:
        """Until the engines are open and the first case is asked for."""
        return self.notes.first_case - self.began

    def stage(self, name: str) -> float:
        """Seconds of one stage, summed over the cases."""
        return sum(seconds[name] for seconds in self.notes.seconds)

    @property
    def busy(self) -> float:
        """CPU time over wall time x processors between the first and the last window."""
        (begin, before, _), (end, after, _) = self.notes.first_window, self.notes.last_window
        return (after - before) / (end - begin) / len(os.sched_getaffinity(0))

    @property
    def robbed(self) -> float:
        """The share of that time in which a processor was wanted, but other programs had it, per processor."""
        (begin, _, before), (end, _, after) = self.notes.first_window, self.notes.last_window
        return (after - before) / (end - begin) / len(os.sched_getaffinity(0))

    @property
    def drift(self) -> float:
        """The largest relative difference of memory to that of case 3, over the later cases but the last, beside which
        no other case is in flight."""
        steady = self.notes.memory[STEADY - 1]
        return max((abs(size / steady - 1) for size in self.notes.memory[STEADY:-1]), default=0.0)


def run(bundle: Path, images: Path, work: Path, together: bool, number: int) -> Run:
    """One run in a process of its own."""
    command = [sys.executable, __file__, "--child", str(bundle), str(images), str(work / f"out{together}")]
    began = time.time()
    done = subprocess.run([*command, str(int(together))], capture_output=True, text=True, check=False)
    ended = time.time()
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return Run(together=together, round=number, began=began, ended=ended, notes=Notes(**json.loads(done.stdout)))


def folder_of_copies(folder: Path, count: int) -> Path:
    """The demo image under `count` names."""
    folder.mkdir()
    for number in range(count):
        (folder / f"case{number:02}_0000.nii.gz").write_bytes(IMAGE.read_bytes())
    return folder


def summary(runs: Sequence[Run], count: int, machine: dict[str, Any]) -> str:
    """The record as Markdown."""
    overlapped, in_turn = [[r for r in runs if r.together == together] for together in (True, False)]
    undisturbed = min(r.stage("network") for r in in_turn)
    lines = [
        f"# {count} demo cases through one command",
        "",
        f"{machine['cpu']}, {machine['processors']} processors, {machine['date']}, commit {machine['commit']}.  ",
        ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + f", Python {machine['python']}.",
        "",
        "The demo image under other names, no mirroring, OpenVINO f32. Start-up: until the engines are open and the first "
        "case is asked for. Overhead: (whole command - start-up) / sum of the tile loops, once with the tile loops of "
        "the same run, which share the processors with the cases before and after them, once with the fastest tile loops of the runs "
        "in turn, which share them with nothing. Busy: CPU time of all its processes / (wall time x processors) between "
        "the first and the last window; robbed: the share in which it was ready to run, but other programs were "
        f"running. Memory: sum of PSS when a case leaves the network, largest difference to case {STEADY}.",
        "",
        "| run | whole command, s | start-up, s | tile loops, s | overhead (limit 1.10) | beside undisturbed loops | busy (limit 90 %) | robbed | memory, MB | drift (limit 5 %) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for r in runs:
        tiles = r.stage("network")
        lines.append(
            f"| {'together' if r.together else 'in turn'}, round {r.round} | {r.wall:.1f} | {r.startup:.1f} | {tiles:.1f} | "
            f"{(r.wall - r.startup) / tiles:.3f} | {(r.wall - r.startup) / undisturbed:.3f} | {r.busy:.0%} | {r.robbed:.0%} | "
            f"{r.notes.memory[STEADY - 1] / 1e6:.0f} | {r.drift:.1%} |"
        )
    stages = list(runs[0].notes.seconds[0])
    lines += ["", "Median seconds per case:", "", f"| run | {' | '.join(stages)} |", "|---" * (len(stages) + 1) + "|"]
    for name, some in (("together", overlapped), ("in turn", in_turn)):
        medians = [statistics.median(s[stage] for r in some for s in r.notes.seconds) for stage in stages]
        lines.append(f"| {name} | {' | '.join(f'{m:.2f}' for m in medians)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--cases", type=click.IntRange(STEADY + 2), default=20, show_default=True)
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True, help="Rounds of both runs.")
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def main(cases: int, repeats: int, output: Path) -> None:
    """Measures and writes folder_run.jsonl and folder_run.md."""
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        images, bundle = folder_of_copies(work / "images", cases), work / "demo.trtb"
        command = [sys.executable, "-m", "trtbuild", "compile", str(MODEL), "-o", str(bundle), "--backend", "openvino"]
        subprocess.run(command, check=True, capture_output=True)
        for number in range(repeats):
            for together in (True, False) if number % 2 == 0 else (False, True):
                runs.append(run(bundle, images, work, together, number))
                print(f"together {together}: {runs[-1].wall:.1f} s, busy {runs[-1].busy:.0%}", flush=True)
    machine = describe()
    output.mkdir(parents=True, exist_ok=True)
    record = [json.dumps({"machine": machine, "cases": cases}), *(json.dumps(asdict(r)) for r in runs)]
    (output / "folder_run.jsonl").write_text("\n".join(record) + "\n")
    text = summary(runs, cases, machine)
    (output / "folder_run.md").write_text(text)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        bundle, images, out, together = sys.argv[2:]
        print(json.dumps(asdict(noted(Path(bundle), Path(images), Path(out), bool(int(together))))))
    else:
        main()
