"""All networks of a model in a lower precision: calibrated, decided, gated, ready to be built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.accuracy.agreement import facts_from_agreement
from trtbuild.accuracy.gate import Verdict, facts_from_verdict, verdict
from trtbuild.atomic import write_whole
from trtbuild.bundle import Stage
from trtbuild.config import CalibrationConfig, CompileConfig
from trtbuild.engine import plain_record
from trtbuild.errors import TrtbuildError
from trtbuild.graph import clean, load_onnx, opset_from_model
from trtbuild.graph.precision import cast, fp16_sensitive
from trtbuild.machine import give_back_memory, usable_cores
from trtbuild.spec import NetworkRecord, Precision
from trtbuild.steps.compilation.networks import INFERENCE_PRECISION, Networks, Report
from trtbuild.steps.precision.calibrate import Calibration, calibrated
from trtbuild.steps.precision.data import StageData, check_previous, stage_data
from trtbuild.steps.precision.decide import Decision, Int8Job, decide, kept_layers, methods_of, with_layers
from trtbuild.steps.precision.gate import Gate, open_gate
from trtbuild_calibration import Progress, ScaleTable, Source, cache_from_scales

if TYPE_CHECKING:
    import onnx

NOTHING_LEFT = "no layer of the network is left to be quantised"
Say = Callable[[str], None]
Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TypedNetwork:
    """A network that engines are built from, beside the FP32 network that it comes from.

    Attributes:
        record: of the network; the FP32 one itself for BF16, which a CPU computes from it.
        content: its ONNX file; None where it is the FP32 network's.
        quantized: how many layers are in INT8.
        calibration: for the bundle's `calibrations`, with the files that belong to it; None where there was none.
        gates: for the bundle's `gates`, one per backend.
        failures: why it may not be used; empty where it may.
    """

    record: NetworkRecord
    content: bytes | None = field(repr=False)
    quantized: int
    calibration: Facts | None
    files: Mapping[str, bytes] = field(repr=False)
    gates: tuple[Facts, ...]
    failures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What stays the same for all networks."""

    config: CompileConfig
    data: CalibrationConfig
    backends: tuple[str, ...]
    scratch: Path
    report: Report
    say: Say

    @property
    def threads(self) -> int:
        return self.config.threads or usable_cores()

    @property
    def inference_precision(self) -> str:
        """What backends compute in besides INT8."""
        if self.config.precision == "int8":
            return INFERENCE_PRECISION[self.config.rest]
        return INFERENCE_PRECISION[self.config.precision]


def typed_networks(
    config: CompileConfig,
    networks: Networks,
    models: Mapping[str, Path],
    backends: tuple[str, ...],
    scratch: Path,
    report: Report,
    say: Say,
) -> Mapping[str, TypedNetwork]:
    """Each FP32 network's typed one, by the id of the former.

    Args:
        config: asks for a precision below FP32.
        networks: of the model, FP32.
        models: their files.
        backends: that engines are built for; the first decides, the others are gated with what it decided.
        scratch: a folder for temporary files.
        report: called with a line per step.
        say: called with what is under way, often.

    Raises:
        InputError: the calibration data cannot be used.
        EngineError: a backend does not take a candidate.
    """
    if config.calibration is None:
        raise TrtbuildError("There is no calibration data.", expected="--calibration or --calibration-images")
    check_previous(config.calibration, networks.stages)
    give_back_memory()  # what the export took and freed would lie beside the activations
    job = _Job(config=config, data=config.calibration, backends=backends, scratch=scratch, report=report, say=say)
    typed = {}
    for number, stage in enumerate(networks.stages):
        data = _data(job, networks, stage, number)
        for network in stage.networks:
            typed[network.id] = _typed(job, stage, network, models[network.id], data)
    return typed


def _data(job: _Job, networks: Networks, stage: Stage, number: int) -> StageData:
    folder = job.scratch / f"cases_{number}"
    folder.mkdir()
    plans, dataset = (_content(networks.files[name]) for name in ("plans.json", "dataset.json"))
    return stage_data(job.data, stage.spec, plans=plans, dataset=dataset, scratch=folder, report=job.report)


def _content(file: bytes | Path) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file


def _typed(job: _Job, stage: Stage, network: NetworkRecord, file: Path, data: StageData) -> TypedNetwork:
    calibration, held_out = data.split(network.fold, job.data.seed, gated=job.config.gate is not None)
    accurate = clean(load_onnx(file), rewrite_conv_transpose=False, split_instance_norm=True).model
    with ExitStack() as stack:
        gate = _gate(job, stage, network, accurate, held_out)
        if gate is not None:
            stack.callback(gate.forget)
        if job.config.precision == "bf16":
            return _bf16(job, network, file, gate)
        job.report(f"calibrating {network.id} on {job.data.patches} patches of {len(calibration)} cases")
        work = Calibration(spec=stage.spec, sources=calibration, data=data, config=job.data, threads=job.threads)
        table = calibrated(network.id, accurate, work, calibration_progress(job.say))
        for label in table.coverage.missed:
            job.report(f"no patch holds class {label}: {table.coverage.classes[label].missed}")
        return (_int8 if job.config.precision == "int8" else _fp16)(job, network, accurate, table, gate)


def _gate(
    job: _Job, stage: Stage, network: NetworkRecord, accurate: onnx.ModelProto, held_out: Sequence[Source]
) -> Gate | None:
    """FP32 on the held-out patches, by the first backend; None without a gate."""
    if job.config.gate is None:
        return None
    job.report(f"FP32 of {network.id} on {job.config.gate.patches} patches of {len(held_out)} held-out cases")
    file = job.scratch / f"{network.id}_reference.onnx"
    write_whole(file, accurate.SerializeToString())
    record = plain_record(network, backend=job.backends[0], inference_precision="f32", threads=job.threads)
    return open_gate(
        held_out,
        stage.spec,
        job.config.gate,
        seed=job.data.seed,
        reference=(record, file),
        scratch=job.scratch,
        say=job.say,
    )


def calibration_progress(say: Say) -> Callable[[Progress], None]:
    """Says how far a calibration is and how long it will take."""

    def tell(progress: Progress) -> None:
        left = (
            f"{progress.seconds_left / 60:.0f} min" if progress.seconds_left > 90 else f"{progress.seconds_left:.0f} s"
        )
        say(f"calibrating, {progress.phase}: {progress.done} of {progress.total} passes, {left} left")

    return tell


def _int8(
    job: _Job, network: NetworkRecord, accurate: onnx.ModelProto, table: ScaleTable, gate: Gate | None
) -> TypedNetwork:
    # the backends' own norm: in INT8 its rounding is a tenth of the quantisation's, and writing it out costs a tenth
    model = clean(accurate, rewrite_conv_transpose=False, split_instance_norm=False).model
    typed = _record(network, "int8", opset_from_model(model))
    record = plain_record(
        typed, backend=job.backends[0], inference_precision=job.inference_precision, threads=job.threads
    )
    work = Int8Job(
        model=model,
        table=table,
        methods=methods_of(job.config.method),
        kept=kept_layers(model, job.config.keep, ends=not job.config.quantize_ends),
        record=record,
        gate=gate,
        scratch=job.scratch,
    )
    if gate is not None:
        job.report(f"gating INT8 of {network.id}")
    decision = decide(work, job.say)
    content: bytes = decision.network.model.SerializeToString()
    gates, failures = _gated(job, typed, content, len(decision.network.quantized), gate, decision)
    layers = {"int8": list(decision.network.quantized), "kept": list(decision.network.left)}
    return TypedNetwork(
        record=typed,
        content=content,
        quantized=len(decision.network.quantized),
        calibration=calibration_facts(network, table) | {"method": decision.method, "layers": layers},
        files=_files(network, table),
        gates=gates,
        failures=failures,
    )


def _fp16(
    job: _Job, network: NetworkRecord, accurate: onnx.ModelProto, table: ScaleTable, gate: Gate | None
) -> TypedNetwork:
    result = cast(accurate, "fp16", keep=fp16_sensitive(accurate, table.ranges))
    if result.underflow:
        job.report(f"weights too small for FP16 in {len(result.underflow)} tensors (the bundle lists them)")
    layers = {"kept": list(result.left), "underflow": list(result.underflow)}
    typed = _record(network, "fp16", opset_from_model(result.model))
    content: bytes = result.model.SerializeToString()
    gates, failures = _gated(job, typed, content, 0, gate, None)
    return TypedNetwork(
        record=typed,
        content=content,
        quantized=0,
        calibration=calibration_facts(network, table) | {"layers": layers},
        files=_files(network, table),
        gates=gates,
        failures=failures,
    )


def _bf16(job: _Job, network: NetworkRecord, file: Path, gate: Gate | None) -> TypedNetwork:
    gates, failures = _gated(job, network, file.read_bytes(), 0, gate, None)
    return TypedNetwork(
        record=network, content=None, quantized=0, calibration=None, files={}, gates=gates, failures=failures
    )


def _record(network: NetworkRecord, precision: Precision, opset: int) -> NetworkRecord:
    name = f"{network.id.removesuffix('_fp32')}_{precision}"
    return replace(
        network,
        id=name,
        file=f"networks/{name}.onnx",
        precision=precision,
        zero_point="u8" if precision == "int8" else "none",
        opset=opset,
        parent=network.id,
    )


def _gated(
    job: _Job, network: NetworkRecord, content: bytes, quantized: int, gate: Gate | None, decision: Decision | None
) -> tuple[tuple[Facts, ...], tuple[str, ...]]:
    """The gate of every backend, and the reasons why one of them, or the decision, does not pass."""
    if gate is None:
        return (), () if decision is None or decision.passed else (f"{network.id}: {NOTHING_LEFT}",)
    file = job.scratch / f"{network.id}_gated.onnx"
    write_whole(file, content)
    gates, failures = [], []
    for backend in job.backends:
        if decision is not None and decision.verdict is not None and backend == job.backends[0]:
            judged, facts = decision.verdict, dict(decision.facts)
        else:
            record = plain_record(
                network, backend=backend, inference_precision=job.inference_precision, threads=job.threads
            )
            record = with_layers(record, quantized) if quantized else record
            found = gate.agreement(record, file, lambda line, backend=backend: job.say(f"{backend}: {line}"))  # type: ignore[misc]
            judged = verdict(found, gate.limits)
            facts = {"agreement": facts_from_agreement(found), "verdict": facts_from_verdict(judged)}
        reasons = _reasons(judged, decision)
        failures += [f"{network.id}, {backend}: {reason}" for reason in reasons]
        gates.append(
            {
                "network": network.id,
                "backend": backend,
                "precision": job.config.precision,
                "inference_precision": job.inference_precision,
                "cases": list(gate.cases),
                "patches": len(gate.patches),
                "passed": not reasons,
                **facts,
            }
        )
    return tuple(gates), tuple(failures)


def _reasons(judged: Verdict, decision: Decision | None) -> tuple[str, ...]:
    if not judged.passed:
        return judged.reasons
    if decision is not None and not decision.passed:
        rolled_back = decision.facts["roll_back"] is not None
        return ("only with every layer back in higher precision does it pass" if rolled_back else NOTHING_LEFT,)
    return ()


def calibration_facts(network: NetworkRecord, table: ScaleTable) -> dict[str, Any]:
    """What a bundle says of a calibration: where it is, of which patches, how large the ranges are."""
    return {
        "network": network.id,
        "file": f"calibrations/{network.id}.json",
        "cache": f"calibrations/{network.id}.cache",
        "patches": table.fingerprint.patches_used,
        "seed": table.fingerprint.seed,
        "cases": sorted(table.fingerprint.cases),
        "coverage": table.coverage.to_json(),
        "amax": {name: {"max": entry.maximum, **entry.amax} for name, entry in table.entries.items()},
    }


def _files(network: NetworkRecord, table: ScaleTable) -> Mapping[str, bytes]:
    from trtbuild.steps.precision.calibrate import CACHE_VERSION

    cache = cache_from_scales(table.scales("entropy"), version=CACHE_VERSION, kind="EntropyCalibration2")
    return {
        f"calibrations/{network.id}.json": table.to_bytes(),
        f"calibrations/{network.id}.cache": cache.to_bytes(),
    }
