"""nnU-Net's default 3-D network, one patch: torch, OpenVINO in float32, bf16 and INT8, and the CPU's own INT8 peak.

    python benchmarks/int8_network.py --rounds 7

The network (patch 128^3, features 32 to 320, one channel, two classes) has random weights: the time does not depend on
them. The graphs are those that `trtbuild compile` makes; INT8 has the Q/DQ of `trtbuild.graph.precision.quantize` with
min-max scales of one patch, stem and head in higher precision, and its runner checks that every quantised layer is
executed in INT8. torch is nnU-Net's own predictor's network, in inference mode.

Every contender stays open in a process of its own and waits for its turn; a round runs each once (as many passes as fill
`--seconds`), in an order that turns. The peak (benchmarks/cpu_peak.cpp: vpdpbusd and FMA on registers, all threads)
takes part in each round. What got less than 0.9 CPUs per thread was disturbed by other processes and does not count.
Needs g++ and a CPU with AVX-512 VNNI; where the CPU has AMX, that is faster than the peak measured here.
Writes int8_network.jsonl and int8_network.md.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from machine import describe
from numpy.typing import NDArray
from random_model import RandomModel, write_model

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from trtbuild.source import ExportedModel
    from trtbuild.spec import BuildRecord, NetworkRecord

HERE = Path(__file__).resolve().parent
DEFAULT = RandomModel(classes=2, patch=(128, 128, 128), spacing=(1.0, 1.0, 1.0), features=(32, 64, 128, 256, 320, 320))
LEAST_LOAD = 0.95
"""Of the most CPUs that the same contender kept busy in any turn: torch does not keep two busy by itself."""
TORCH = "torch f32"
PEAKS = {"peak INT8 (vpdpbusd)": "int8", "peak f32 (FMA)": "f32"}
TARGETS = {"INT8 over torch": 7.0, "INT8, share of the peak": 0.65}

Pass = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One turn of a contender: `passes` in `wall` seconds with `cpu` seconds; for a peak, what it reached."""

    contender: str
    round: int
    passes: int
    wall: float
    cpu: float
    gops: float
    disturbed: bool

    @property
    def seconds(self) -> float:
        """Per patch."""
        return self.wall / self.passes


def exported_default(work: Path) -> ExportedModel:
    """The default network as a trained-model folder below `work`, read as `trtbuild compile` reads it."""
    from trtbuild.source import SourceConfig, export_model

    return export_model(SourceConfig(folder=write_model(DEFAULT, work)))


def operations(model: Any) -> float:
    """Of one patch: 2 for each multiply-accumulate of a Conv or ConvTranspose (norms and activations add 1 % or so)."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    values = (*graph.input, *graph.output, *graph.value_info)
    voxels = {v.name: math.prod(d.dim_value for d in v.type.tensor_type.shape.dim[2:]) for v in values}
    total = 0
    for node in graph.node:
        if node.op_type == "Conv":  # weights (out, in, *kernel) at each voxel of the output
            total += 2 * voxels[node.output[0]] * math.prod(weights[node.input[1]])
        elif node.op_type == "ConvTranspose":  # weights (in, out, *kernel) at each voxel of the input
            total += 2 * voxels[node.input[0]] * math.prod(weights[node.input[1]])
    return float(total)


def prepare(work: Path, threads: int) -> tuple[float, dict[str, tuple[BuildRecord, Path]]]:
    """Operations per patch, and the engines by name: how they run, and their files. The patch goes to patch.npy."""
    from trtbuild.engine import plain_record
    from trtbuild.graph import clean, io_from_model, model_from_bytes, opset_from_model
    from trtbuild.graph.precision import keep_ends, quantize
    from trtbuild.spec import NetworkRecord

    exported = exported_default(work)
    plain = model_from_bytes(next(iter(exported.networks)).model)
    accurate = clean(plain, rewrite_conv_transpose=False, split_instance_norm=True).model
    joined = clean(plain, rewrite_conv_transpose=False, split_instance_norm=False).model
    patch = np.random.default_rng(0).normal(size=(1, DEFAULT.channels, *DEFAULT.patch)).astype(np.float32)
    np.save(work / "patch.npy", patch)
    quantized = quantize(joined, largest(accurate, patch[0], threads), keep=keep_ends, zero_point="u8")

    def network(name: str, model: Any, precision: Any) -> NetworkRecord:
        (work / f"{name}.onnx").write_bytes(model.SerializeToString())
        return NetworkRecord(
            id=name, fold="0", file=f"{name}.onnx", precision=precision, opset=opset_from_model(model),
            zero_point="u8" if precision == "int8" else "none", io=io_from_model(model), parent=None,
        )  # fmt: skip

    def engine(network: NetworkRecord, inference_precision: str) -> tuple[BuildRecord, Path]:
        record = plain_record(network, backend="openvino", inference_precision=inference_precision, threads=threads)
        if network.precision == "int8":
            record.options["quantized_layers"] = len(quantized.quantized)  # type: ignore[index]
        return record, work / network.file

    int8 = network("int8", quantized.model, "int8")
    return operations(joined), {
        "OpenVINO f32": engine(network("f32", accurate, "fp32"), "f32"),
        "OpenVINO bf16": engine(network("joined", joined, "fp32"), "bf16"),
        "OpenVINO INT8, rest f32": engine(int8, "f32"),
        "OpenVINO INT8, rest bf16": engine(int8, "bf16"),
    }


def largest(model: Any, patch: NDArray[np.float32], threads: int) -> dict[str, float]:
    """The largest |x| of every tensor that layers read."""
    from trtbuild.steps.precision.network import ObservedNetwork

    network = ObservedNetwork(model=model, patch=patch.shape, threads=threads)
    with network.maxima() as run:
        found = run(patch)
    return {target.name: max(found[source] for source in target.sources) for target in network.targets()}


@contextmanager
def open_torch(folder: Path, patch: Path, threads: int) -> Iterator[Pass]:
    """The network that nnU-Net's predictor builds and loads, and its forward pass on a CPU."""
    for name in ("raw", "preprocessed", "results"):
        os.environ.setdefault(f"nnUNet_{name}", "/nonexistent")
    import torch
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    torch.set_num_threads(threads)
    predictor = nnUNetPredictor(perform_everything_on_device=False, device=torch.device("cpu"))
    predictor.initialize_from_trained_model_folder(str(folder), (0,), "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    predictor.network.eval()
    image = torch.from_numpy(np.load(patch))
    with torch.inference_mode():
        yield lambda: predictor.network(image).numpy()


@contextmanager
def open_engine(record: BuildRecord, model: Path, patch: Path) -> Iterator[Pass]:
    """trtbuild's runner."""
    from trtbuild.runtime.select import open_runner

    batch = np.load(patch)
    with open_runner(record, model) as runner:
        yield lambda: runner.infer(batch)


def serve(connection: Connection, opened: Callable[[], Any], seconds: float) -> None:
    """A contender's process: opens, sends its logits, and then passes, wall and CPU seconds for each number received."""
    with opened() as run:
        connection.send(np.array(run()))
        while connection.recv() is not None:
            passes, wall, cpu = 0, time.perf_counter(), time.process_time()
            while not passes or time.perf_counter() - wall < seconds:
                run()
                passes += 1
            connection.send((passes, time.perf_counter() - wall, time.process_time() - cpu))


@contextmanager
def served(opened: Callable[[], Any], seconds: float) -> Iterator[tuple[Callable[[], tuple[int, float, float]], Any]]:
    """A contender in a new process: its turn, and its logits."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, opened, seconds))
    process.start()
    there.close()  # so that the end of the process is the end of the file

    def turn() -> tuple[int, float, float]:
        here.send(1)
        passes, wall, cpu = here.recv()
        return passes, wall, cpu

    try:
        yield turn, here.recv()
    finally:
        here.send(None) if process.is_alive() else None
        process.join()


def built_peak(work: Path) -> Path:
    """cpu_peak.cpp, compiled for this CPU."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
    if "avx512_vnni" not in flags.split():
        raise click.ClickException("this CPU has no AVX-512 VNNI: there is no INT8 peak to compare with")
    program = work / "cpu_peak"
    subprocess.run(
        ["g++", "-O3", "-march=native", "-std=c++17", "-pthread", str(HERE / "cpu_peak.cpp"), "-o", str(program)],
        check=True,
    )
    return program


def peak_turn(program: Path, kind: str, threads: int, seconds: float) -> dict[str, float]:
    """One measurement of the peak."""
    done = subprocess.run([program, kind, str(threads), str(seconds)], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout)
    return found


def measured(
    turns: dict[str, Callable[[], tuple[int, float, float]]],
    program: Path,
    *,
    rounds: int,
    threads: int,
    seconds: float,
    operations: float,
) -> list[Row]:
    """One warm-up round and `rounds` timed ones."""

    def row(name: str, number: int) -> Row:
        if name in PEAKS:
            found = peak_turn(program, PEAKS[name], threads, seconds)
            passes, wall, cpu, gops = 1, found["wall"], found["cpu"], found["gops"]
        else:
            passes, wall, cpu = turns[name]()
            gops = operations * passes / wall / 1e9
        return Row(contender=name, round=number, passes=passes, wall=wall, cpu=cpu, gops=gops, disturbed=False)

    names, rows = [*turns, *PEAKS], []
    for number in range(-1, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            one = row(name, number)
            print(
                f"round {number}: {name}, {one.seconds:.3f} s, {one.gops:.0f} GOP/s, {one.cpu / one.wall:.2f} CPUs",
                flush=True,
            )
            if number >= 0:
                rows.append(one)
    return marked(rows)


def marked(rows: Sequence[Row]) -> list[Row]:
    """The rows, with those `disturbed` in which other processes took CPUs away."""
    most: dict[str, float] = {}
    for row in rows:
        most[row.contender] = max(most.get(row.contender, 0.0), row.cpu / row.wall)
    return [replace(row, disturbed=row.cpu / row.wall < LEAST_LOAD * most[row.contender]) for row in rows]


def spread(values: Sequence[float], form: str) -> str:
    """Median (min to max)."""
    if not values:
        return "none"
    low, middle, high = (format(value, form) for value in (min(values), statistics.median(values), max(values)))
    return f"{middle} ({low} to {high})"


def compared(rows: Sequence[Row], name: str, other: str, ratio: Callable[[Row, Row], float]) -> list[float]:
    """`ratio(row, other's row)` of every round in which neither was disturbed."""
    usable = {(row.contender, row.round): row for row in rows if not row.disturbed}
    numbers = sorted({row.round for row in rows})
    return [
        ratio(usable[name, number], usable[other, number])
        for number in numbers
        if (name, number) in usable and (other, number) in usable
    ]


def summary(
    rows: Sequence[Row], errors: dict[str, float], operations: float, layers: int, machine: dict[str, Any], threads: int
) -> str:
    """The record as Markdown."""
    names = [name for name in dict.fromkeys(row.contender for row in rows) if name not in PEAKS]
    names.sort(key=lambda name: list(errors).index(name))
    int8_peak, f32_peak = PEAKS
    lines = [
        "# The default 3-D network, one patch",
        "",
        f"{machine['cpu']}, {machine['processors']} processors, {machine['date']}, commit {machine['commit']}.  ",
        ", ".join(f"{k} {v}" for k, v in machine["versions"].items()) + f", Python {machine['python']}.",
        "",
        f"Patch 128^3, features {', '.join(map(str, DEFAULT.features))}, one channel, two classes, random weights: "
        f"{operations / 1e9:.1f} GFLOP in Convs per patch; {threads} threads; {layers} layers in INT8. Median (min to max) "
        f"over rounds; a ratio is of one round. A turn in which a contender kept less than {LEAST_LOAD:.0%} of the CPUs busy that it "
        "did in its best turn does not count. "
        "rms = difference from torch's logits over their standard deviation (random weights: no accuracy to judge, but "
        "a wrong graph would show).",
        "",
        f"Targets: INT8 at least {TARGETS['INT8 over torch']:g} times torch, and {TARGETS['INT8, share of the peak']:.0%} "
        "of the INT8 peak.",
        "",
        "| | s per patch | times torch | GOP/s | of the INT8 peak | of the f32 peak | CPUs | turns that count | rms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        good = [row for row in rows if row.contender == name and not row.disturbed]
        total = sum(row.contender == name for row in rows)
        faster = compared(rows, name, TORCH, lambda a, b: b.seconds / a.seconds)
        shares = [compared(rows, name, peak, lambda a, b: a.gops / b.gops) for peak in (int8_peak, f32_peak)]
        lines.append(
            f"| {name} | {spread([row.seconds for row in good], '.3f')} | {spread(faster, '.2f')} | "
            f"{spread([row.gops for row in good], '.0f')} | {spread(shares[0], '.1%')} | "
            f"{'' if 'INT8' in name else spread(shares[1], '.1%')} | {spread([r.cpu / r.wall for r in good], '.2f')} | "
            f"{len(good)} of {total} | {errors[name]:.1e} |"
        )
    for name in PEAKS:
        good = [row for row in rows if row.contender == name and not row.disturbed]
        total = sum(row.contender == name for row in rows)
        loads = spread([row.cpu / row.wall for row in good], ".2f")
        rate = spread([row.gops for row in good], ".0f")
        lines.append(f"| {name} | | | {rate} | | | {loads} | {len(good)} of {total} | |")
    return "\n".join(lines) + "\n"


def logits_rms(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> float:
    """rms of the difference over the standard deviation of the reference."""
    difference = logits.astype(np.float64) - reference
    return float(np.sqrt(np.mean(difference**2)) / reference.std(dtype=np.float64))


@click.command()
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True, help="Per turn.")
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=HERE / "results", show_default=True)
def main(rounds: int, seconds: float, threads: int, output: Path) -> None:
    """Measures and writes int8_network.jsonl and int8_network.md."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        work = Path(folder)
        program = built_peak(work)
        total, engines = prepare(work, threads)
        print(f"{total / 1e9:.1f} GFLOP per patch", flush=True)
        patch = work / "patch.npy"
        model = next(work.glob("*__3d_fullres"))
        contenders: dict[str, Callable[[], Any]] = {TORCH: partial(open_torch, model, patch, threads)}
        contenders |= {name: partial(open_engine, *engine, patch) for name, engine in engines.items()}
        turns, logits = {}, {}
        for name, opened in contenders.items():
            turns[name], logits[name] = stack.enter_context(served(opened, seconds))
        errors = {name: logits_rms(found, logits[TORCH]) for name, found in logits.items()}
        rows = measured(turns, program, rounds=rounds, threads=threads, seconds=seconds, operations=total)
        layers = int(engines["OpenVINO INT8, rest f32"][0].options["quantized_layers"])
    machine = describe()
    output.mkdir(parents=True, exist_ok=True)
    records = [{"machine": machine}, {"operations": total, "rms": errors}, *(asdict(row) for row in rows)]
    (output / "int8_network.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    text = summary(rows, errors, total, layers, machine, threads)
    (output / "int8_network.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
