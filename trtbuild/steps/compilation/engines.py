"""Engines of all networks for all backends, each held to what its network should compute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trtbuild.accuracy import LOGIT_TOLERANCE, TYPED_TOLERANCE, logit_error, logit_rms
from trtbuild.atomic import write_whole
from trtbuild.config import CompileConfig
from trtbuild.errors import EngineError
from trtbuild.machine import cpu_description
from trtbuild.spec import BuildRecord, NetworkRecord
from trtbuild.steps.compilation.networks import INFERENCE_PRECISION, GoldenPair, Networks, Report

if TYPE_CHECKING:
    from trtbuild.steps.precision.typed import TypedNetwork


@dataclass(frozen=True, kw_only=True)
class EngineJob:
    """One network to build engines from: its file, and the golden (input, logits) that its engines are compared with.

    An FP32 network's golden is PyTorch's; that of one `is_typed` in lower precision is ONNX Runtime's. `computed` is
    what backends compute in, besides the `quantized` layers.
    """

    stage: int
    computed: str
    network: NetworkRecord
    model: Path
    golden: GoldenPair
    quantized: int

    @property
    def is_typed(self) -> bool:
        return self.network.parent is not None


def engine_jobs(
    config: CompileConfig,
    networks: Networks,
    models: Mapping[str, Path],
    typed: Mapping[str, TypedNetwork] | None,
    scratch: Path,
) -> tuple[EngineJob, ...]:
    """What is built: the networks in lower precision where there are any, FP32 where `typed` is None."""
    jobs = []
    for number, stage in enumerate(networks.stages):
        for network in stage.networks:
            own, model, quantized, golden = network, models[network.id], 0, networks.goldens[network.id]
            lower = None if typed is None else typed.get(network.id)
            if lower is not None and lower.content is not None:
                own, quantized = lower.record, lower.quantized
                model = scratch / Path(own.file).name
                write_whole(model, lower.content)
                golden = golden[0], _logits_of(own, model, golden[0])
            precision = "fp32" if typed is None else config.rest if own.precision == "int8" else config.precision
            jobs.append(
                EngineJob(
                    stage=number,
                    computed=INFERENCE_PRECISION[precision],
                    network=own,
                    model=model,
                    golden=golden,
                    quantized=quantized,
                )
            )
    return tuple(jobs)


def chosen_backends(config: CompileConfig, report: Report) -> tuple[str, ...]:
    """The backends by name, each of which runs here and computes in the precision."""
    from trtbuild.runtime.fit import check_int8
    from trtbuild.runtime.select import choose_backend

    names = []
    for asked in config.backends:
        choice = choose_backend(asked)
        for name, reason in choice.refused:
            report(f"not {name}: {reason}")
        names.append(choice.name)
    if len(set(names)) != len(names):
        raise EngineError(
            "Two of the backends are the same one, and a bundle holds one engine per network and backend.",
            expected="distinct backends",
            got=", ".join(f"{a} (here {n})" if a != n else a for a, n in zip(config.backends, names, strict=True)),
            hint="leave auto out",
        )
    if config.precision == "int8":
        check_int8(cpu_description()["isa"], "--precision int8")
    for name in names:
        for precision in dict.fromkeys((config.precision, config.rest)):
            _check_precision(name, precision)
    return tuple(names)


def _check_precision(backend: str, precision: str) -> None:
    """Whether the backend has the precision, and, where it says so, whether this CPU has it."""
    from trtbuild.engine.build import BACKENDS

    wanted, known = INFERENCE_PRECISION[precision], BACKENDS[backend].precisions
    if backend == "openvino":
        from trtbuild.runtime.openvino import PRECISIONS, openvino_module

        capable = openvino_module().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        known = tuple(name for name in known if PRECISIONS[name][0] in capable)
    if wanted not in known:
        raise EngineError(
            "The backend does not compute in this precision here.",
            expected=" or ".join(name for name, inference in INFERENCE_PRECISION.items() if inference in known),
            got=precision,
            where=backend,
            hint="compile with --precision fp32, in INT8 with --rest fp32",
        )


def build_engines(
    config: CompileConfig, backends: tuple[str, ...], jobs: tuple[EngineJob, ...], report: Report
) -> Iterable[BuildRecord]:
    """One engine per backend and network. All folds of a stage share the settings that were measured for the first."""
    from trtbuild.engine import engine_from_onnx

    for backend in backends:
        first: dict[int, BuildRecord] = {}
        for job in jobs:
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
            _checked_against_golden(record, job, report)
            yield record


def _checked_against_golden(record: BuildRecord, job: EngineJob, report: Report) -> None:
    """The engine's logits for the golden input must be about those of the golden."""
    from trtbuild.runtime.select import open_runner

    with open_runner(record, job.model) as runner:
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
