"""What calibrating nnU-Net's default 3-D network costs: memory of the whole process, and time with each stage's share.

    python benchmarks/calibration.py --patches 32

The network (patch 128^3, features 32 to 320, one channel, two classes) has random weights, and the cases are synthetic,
written by nnU-Net's own writer: what is measured depends on their sizes alone. `calibrated` runs as in `trtbuild
compile`, in a fresh process that has not loaded torch; its network and its patches are replaced by ones that take the
time and call the original. Memory is the process's peak of RSS (VmHWM, kept by the kernel) and the peak of PSS over its
process tree (sampled). The whole command, which loads torch and exports before it calibrates, is run once more with few
patches, for its memory alone (PSS, since building an engine resets VmHWM). Writes calibration.jsonl and calibration.md.
"""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import click
import numpy as np
from int8_network import DEFAULT, exported_default
from machine import describe
from numpy.typing import NDArray
from process_tree import run_sampled

HERE = Path(__file__).resolve().parent
CASES, SHAPE = 4, (200, 205, 210)
LIMIT = 3.0e9
"""Bytes of RSS in total."""
STAGES = (
    "preparation",
    "sampling",
    "opening graphs",
    "reading patches",
    "maxima, forward",
    "histograms, forward",
    "histograms, counting",
    "thresholds",
    "rest",
)


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Seconds and passes per stage, and the largest RSS of the process up to its end; the same after each graph."""

    seconds: dict[str, float] = field(default_factory=dict)
    passes: Counter[str] = field(default_factory=Counter)
    peaks: dict[str, int] = field(default_factory=dict)
    graphs: list[int] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of the block to a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.passes[name] += 1
            self.peaks[name] = peak_rss()

    def timed(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, its time added to a stage."""

        def run(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return work(*args, **kwargs)

        return run


@dataclass(frozen=True, kw_only=True)
class TimedNetwork:
    """`ObservedNetwork` with a clock at each of its passes."""

    network: Any
    clock: Clock

    def maxima(self) -> AbstractContextManager[Callable[[Any], Mapping[str, float]]]:
        """As `ObservedNetwork`."""
        return self._opened(self.network.maxima(), "maxima, forward")

    def outputs(self, names: Sequence[str]) -> AbstractContextManager[Callable[[Any], Mapping[str, NDArray[Any]]]]:
        """As `ObservedNetwork`."""
        return self._opened(self.network.outputs(names), "histograms, forward")

    def sizes(self) -> Mapping[str, int]:
        """As `ObservedNetwork`."""
        sizes: Mapping[str, int] = self.network.sizes()
        return sizes

    def targets(self) -> Any:
        """As `ObservedNetwork`."""
        return self.network.targets()

    @contextmanager
    def _opened(self, opened: AbstractContextManager[Any], stage: str) -> Iterator[Callable[[Any], Any]]:
        with self.clock.stage("opening graphs"):
            run = opened.__enter__()
        try:
            yield self.clock.timed(stage, run)
        finally:
            opened.__exit__(*sys.exc_info())
            self.clock.graphs.append(peak_rss())


def peak_rss() -> int:
    """Bytes: the largest resident set that this process ever had."""
    line = next(one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def write_cases(folder: Path) -> None:
    """Cases as nnU-Net leaves them: noise around two blobs, labels -1 outside a body, 0, and 1 in a blob."""
    import warnings

    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    folder.mkdir(parents=True)
    z, y, x = (np.linspace(-1, 1, length, dtype=np.float32) for length in SHAPE)
    distance = z[:, None, None] ** 2 + y[:, None] ** 2 + x**2
    for number in range(CASES):
        blob = (distance - (0.2 + 0.1 * number)) < 0
        data = np.random.default_rng(number).normal(0, 0.5, SHAPE).astype(np.float32) + blob
        labels = np.where(distance > 1.5, -1, blob).astype(np.int16)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for sizes of chunks, and takes those for patches of 128^3
            nnUNetDatasetBlosc2.save_case(
                data[None].astype(np.float32), labels[None], {}, str(folder / f"case{number}")
            )


def prepare(work: Path) -> None:
    """network.onnx, spec.pickle, plans.json, dataset.json and the preprocessed dataset below `work`."""
    from trtbuild.graph import clean, model_from_bytes

    exported = exported_default(work)
    network = clean(
        model_from_bytes(next(iter(exported.networks)).model), rewrite_conv_transpose=False, split_instance_norm=True
    )
    (work / "network.onnx").write_bytes(network.model.SerializeToString())
    (work / "spec.pickle").write_bytes(pickle.dumps(exported.spec))
    for name, content in (("plans", exported.plans), ("dataset", exported.dataset)):
        (work / f"{name}.json").write_bytes(content)
    dataset = work / "preprocessed" / exported.spec.dataset
    write_cases(dataset / f"{exported.spec.plans}_{DEFAULT.configuration}")
    (dataset / "dataset.json").write_bytes(exported.dataset)


def calibrate(work: Path, patches: int, threads: int) -> dict[str, Any]:
    """Calibrates what `prepare` left, in this process: the record of it."""
    clock, began = Clock(), time.perf_counter()
    with clock.stage("preparation"):
        import trtbuild_calibration as library
        from trtbuild.config import CalibrationConfig
        from trtbuild.graph import load_onnx
        from trtbuild.steps.precision import calibrate as step
        from trtbuild.steps.precision.calibrate import Calibration, calibrated
        from trtbuild.steps.precision.data import stage_data
        from trtbuild.steps.precision.network import ObservedNetwork

        spec = pickle.loads((work / "spec.pickle").read_bytes())
        plans, dataset = (work / "plans.json").read_bytes(), (work / "dataset.json").read_bytes()
        config = CalibrationConfig(data=work / "preprocessed" / spec.dataset, patches=patches)
        data = stage_data(config, spec, plans=plans, dataset=dataset, scratch=work, report=print_to_stderr)
        model = load_onnx(work / "network.onnx")
        job = Calibration(spec=spec, sources=tuple(data.sources.values()), data=data, config=config, threads=threads)

    class TimedPatches(library.PatchSequence):
        def __getitem__(self, index: int) -> NDArray[np.float32]:
            with clock.stage("reading patches"):
                return self.labelled(index).data

    with (
        replaced.object(
            step, "ObservedNetwork", lambda **kwargs: TimedNetwork(network=ObservedNetwork(**kwargs), clock=clock)
        ),
        replaced.object(step, "PatchSequence", TimedPatches),
        replaced.object(step, "sample_places", clock.timed("sampling", library.sample_places)),
        replaced.object(step, "observe", clock.timed("observe", library.observe)),
        replaced.object(step, "table_from_observation", clock.timed("thresholds", library.table_from_observation)),
    ):
        table = calibrated(
            "fold_0", model, job, lambda done: print_to_stderr(f"{done.phase} {done.done} of {done.total}")
        )
    seconds = dict(clock.seconds)
    total, observed = time.perf_counter() - began, seconds.pop("observe")
    inside = ("opening graphs", "reading patches", "maxima, forward", "histograms, forward")
    # what an observation does besides these is counting: the maxima pass leaves it nothing but 100 comparisons a patch
    seconds["histograms, counting"] = observed - sum(seconds[name] for name in inside)
    seconds["rest"] = total - sum(seconds.values())
    return {
        "patches": patches,
        "threads": threads,
        "seconds": total,
        "stages": {name: seconds[name] for name in STAGES},
        "groups": clock.passes["opening graphs"] - 1,
        "targets": len(table.entries),
        "peak_rss": peak_rss(),
        "peak_rss_after_graph": clock.graphs,
        "peak_rss_after": {name: clock.peaks[name] for name in STAGES if name in clock.peaks},
    }


def command_peak(work: Path, patches: int) -> int:
    """Peak PSS of `trtbuild compile --precision int8` from the checkpoint, over its process tree."""
    model = next(work.glob(f"*__{DEFAULT.configuration}"))
    dataset = next((work / "preprocessed").iterdir())
    options = ["--precision", "int8", "--method", "entropy", "--no-gate", "--no-tune", "--backend", "openvino"]
    peak, _ = run_sampled(
        [sys.executable, "-m", "trtbuild", "compile", str(model), "-o", str(work / "int8.trtb"), *options,
         "--calibration", str(dataset), "--calibration-patches", str(patches)]
    )  # fmt: skip
    return peak.bytes


def print_to_stderr(line: str) -> None:
    """Progress; the record alone goes to the standard output."""
    print(line, file=sys.stderr, flush=True)


def summary(record: dict[str, Any], machine: dict[str, Any]) -> str:
    """The record as Markdown."""
    total, peak = record["seconds"], record["peak_rss"]
    lines = [
        "# Calibrating the default 3-D network",
        "",
        f"{machine['cpu']}, {machine['processors']} processors, {machine['date']}, commit {machine['commit']}.  ",
        ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + f", Python {machine['python']}.",
        "",
        f"Patch 128^3, features {', '.join(map(str, DEFAULT.features))}, one channel, random weights; {record['patches']} "
        f"patches of {CASES} synthetic cases of {' x '.join(map(str, SHAPE))} (float32, .b2nd); {record['targets']} "
        f"tensors counted in {record['groups']} groups; {record['threads']} threads; a fresh process.",
        "",
        f"**Peak RSS {peak / 1e9:.2f} GB** (limit {LIMIT / 1e9:.1f} GB: {'holds' if peak < LIMIT else 'does not hold'}); "
        f"peak PSS of its process tree, sampled, {record['peak_pss'] / 1e9:.2f} GB. "
        f"Time {total:.0f} s, {total / record['patches']:.1f} s per patch. Peak PSS of the whole command `trtbuild compile "
        f"--precision int8 --no-gate` from the checkpoint, with {record['command_patches']} patches: "
        f"{record['command_peak_pss'] / 1e9:.2f} GB.",
        "",
        "| stage | s | share | peak RSS by its end, GB |",
        "|---|---|---|---|",
    ]
    for name, seconds in record["stages"].items():
        after = record["peak_rss_after"].get(name)
        lines.append(
            f"| {name} | {seconds:.1f} | {seconds / total:.1%} | {'' if after is None else f'{after / 1e9:.2f}'} |"
        )
    return "\n".join(lines) + "\n"


@click.command()
@click.option("--patches", type=click.IntRange(1), default=32, show_default=True)
@click.option("--command-patches", type=click.IntRange(1), default=2, show_default=True, help="Of the whole command.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
@click.option("--worker", type=click.Path(path_type=Path), hidden=True, help="Calibrate in this process.")
def main(patches: int, command_patches: int, threads: int, output: Path, worker: Path | None) -> None:
    """Measures and writes calibration.jsonl and calibration.md."""
    if worker is not None:
        print(json.dumps(calibrate(worker, patches, threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        # torch and nnU-Net, which preparing needs, shall not count
        program = "import sys; from pathlib import Path; from calibration import prepare; prepare(Path(sys.argv[1]))"
        environment = {"PYTHONPATH": str(HERE)}
        print("preparing network and cases", flush=True)
        run_sampled([sys.executable, "-c", program, folder], environment)
        print(f"calibrating with {patches} patches", flush=True)
        words = ["--worker", folder, "--patches", str(patches), "--threads", str(threads)]
        peak, printed = run_sampled([sys.executable, str(Path(__file__).resolve()), *words])
        print(f"the whole command with {command_patches} patches", flush=True)
        record = {
            **json.loads(printed),
            "peak_pss": peak.bytes,
            "command_patches": command_patches,
            "command_peak_pss": command_peak(Path(folder), command_patches),
        }
    machine = describe()
    output.mkdir(parents=True, exist_ok=True)
    (output / "calibration.jsonl").write_text(json.dumps({"machine": machine}) + "\n" + json.dumps(record) + "\n")
    text = summary(record, machine)
    (output / "calibration.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
