"""Engines of all networks for all backends, each held to what its network should compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trtbuild.accuracy import LOGIT_TOLERANCE, LOWERED_TOLERANCE, TYPED_TOLERANCE, logit_error, logit_rms
from trtbuild.atomic import write_whole
from trtbuild.config import CompileConfig
from trtbuild.errors import EngineError
from trtbuild.spec import BuildRecord, NetworkRecord, Precision
from trtbuild.steps.compilation.backends import Backends
from trtbuild.steps.compilation.networks import INFERENCE_PRECISION, GoldenPair, Networks, Report

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner
    from trtbuild.steps.precision.job import TypedNetwork


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """One network to build engines from: its file, and the golden (input, logits) that its engines are compared with.

    An FP32 network's golden is PyTorch's; that of one `is_typed` in lower precision is ONNX Runtime's. `rest` is what
    is computed besides the `quantized` layers. `on_device` jobs are a GPU's, the others a CPU's.
    """

    stage: int
    on_device: bool
    rest: Precision
    network: NetworkRecord
    model: Path
    golden: GoldenPair
    quantized: int

    @property
    def computed(self) -> str:
        """What a CPU backend computes in."""
        return INFERENCE_PRECISION[self.rest]

    @property
    def is_typed(self) -> bool:
        return self.network.precision != "fp32"


def engine_jobs(
    config: CompileConfig,
    backends: Backends,
    networks: Networks,
    models: Mapping[str, Path],
    typed: Sequence[TypedNetwork],
    scratch: Path,
    report: Report,
) -> tuple[EngineJob, ...]:
    """What is built: for a target the typed networks where there are any, on CPUs the FP32 ones else.

    Args:
        config: what to compile; after a failed gate, FP32.
        backends: whose jobs these are.
        networks: FP32.
        models: their files.
        typed: what was made of them; for GPUs one of each.
        scratch: a folder for files that backends open.
        report: called with a line per network for GPUs: how far it is from what was exported.

    Raises:
        EngineError: a network for GPUs does not compute what was exported.
    """
    found = {(network.record.parent or network.record.id, network.target): network for network in typed}
    jobs = []
    for number, stage in enumerate(networks.stages):
        for network in stage.networks:
            plain = EngineJob(
                stage=number,
                on_device=False,
                rest=config.precision,
                network=network,
                model=models[network.id],
                golden=networks.goldens[network.id],
                quantized=0,
            )
            if backends.cpu:
                lower = found.get((network.id, "cpu"))
                rest = config.cpu_rest if config.precision == "int8" else config.precision
                jobs.append(_job(replace(plain, rest=rest), lower, scratch, report))
            if backends.for_gpu:
                rest = config.device_rest if config.precision == "int8" else config.precision
                device = replace(plain, on_device=True, rest=rest)
                jobs.append(_job(device, found[network.id, "device"], scratch, report))
    return tuple(jobs)


def _job(plain: EngineJob, typed: TypedNetwork | None, scratch: Path, report: Report) -> EngineJob:
    if typed is None or typed.content is None:
        return plain
    model = scratch / Path(typed.record.file).name
    write_whole(model, typed.content)
    job = replace(plain, network=typed.record, model=model, quantized=typed.quantized)
    reference = model
    if typed.reference is not None:
        reference = scratch / f"{typed.record.id}_reference.onnx"
        write_whole(reference, typed.reference)
    logits = _logits_of(typed.record, reference, plain.golden[0])
    if job.on_device:
        _check_lowered(typed, logits, plain.golden[1], report)
    return replace(job, golden=(plain.golden[0], logits)) if job.is_typed else job


def _check_lowered(
    typed: TypedNetwork, logits: NDArray[np.float32], golden: NDArray[np.float32], report: Report
) -> None:
    """Holds a network for GPUs, as ONNX Runtime computes it on the CPU, to PyTorch's logits: there may be no GPU here.

    FP32, and the graph that BF16 is cast from, within float32's rounding; FP16 and INT8 roughly, where no gate judged
    them.
    """
    precision = typed.record.precision
    if precision in ("fp32", "bf16"):
        error, limit, unit = logit_error(logits, golden), LOGIT_TOLERANCE["f32"], "of the largest"
    else:
        error, unit = logit_rms(logits, golden), "of their spread (rms)"
        limit = float("inf") if typed.gates else LOWERED_TOLERANCE[precision]
    report(f"logits of {typed.record.id} differ from PyTorch's by {error:.1e} {unit}")
    if not error <= limit:
        raise EngineError(
            f"A network for GPUs in {precision.upper()} does not compute what was exported.",
            expected=f"at most {limit:.0e} {unit}",
            got=f"a difference of {error:.2e}",
            where=typed.record.id,
            hint="compile with --precision fp32; with --calibration a gate judges by Dice"
            if precision != "fp32"
            else "compile with --backend openvino, and report the model",
        )


def build_engines(
    config: CompileConfig, backends: tuple[str, ...], jobs: tuple[EngineJob, ...], report: Report
) -> Iterable[BuildRecord]:
    """One engine per CPU backend and network. All folds of a stage share the settings measured for the first."""
    from trtbuild.engine import engine_from_onnx
    from trtbuild.runtime.select import open_runner

    for backend in backends:
        first: dict[int, BuildRecord] = {}
        for job in (job for job in jobs if not job.on_device):
            report(f"building {job.network.id} for {backend} ({job.computed})")
            if job.stage not in first:
                first[job.stage] = engine_from_onnx(
                    job.model,
                    job.network,
                    backend=backend,
                    threads=config.threads,
                    inference_precision=job.computed,
                    tune=config.tune,
                )
            record = replace(first[job.stage], network=job.network.id)
            if job.quantized:
                record = replace(record, options={**record.options, "quantized_layers": job.quantized})
            with open_runner(record, job.model) as runner:
                check_against_golden(record, job, runner, report)
            yield record


def check_against_golden(record: BuildRecord, job: EngineJob, runner: Runner, report: Report) -> None:
    """The engine's logits for the golden input must be about those of the golden.

    Raises:
        EngineError: they are not.
    """
    logits = runner.infer(job.golden[0])
    if job.is_typed:
        error, limit, unit = logit_rms(logits, job.golden[1]), TYPED_TOLERANCE, "of their spread (rms)"
        reference = "ONNX Runtime"
    else:
        error, limit = logit_error(logits, job.golden[1]), LOGIT_TOLERANCE[record.inference_precision]
        reference, unit = "PyTorch", "of the largest"
    report(f"logits differ from {reference} by {error:.1e} {unit} (limit {limit:.0e})")
    if not error <= limit:
        raise EngineError(
            "An engine does not compute what the network computes.",
            got=f"a difference of {error:.2e} {unit} to {reference}",
            expected=f"at most {limit:.0e}",
            where=f"{record.backend} ({record.inference_precision}), {record.network}",
            hint="compile with --backend onnxruntime, and report the model",
        )


def _logits_of(network: NetworkRecord, model: Path, golden: NDArray[np.float32]) -> NDArray[np.float32]:
    """What ONNX Runtime computes with a typed network, in float32 wherever the graph does not say otherwise."""
    from trtbuild.engine import plain_record
    from trtbuild.runtime.select import open_runner

    record = plain_record(network, backend="onnxruntime", inference_precision="f32", threads=None)
    with open_runner(record, model) as runner:
        return np.array(runner.infer(golden))
