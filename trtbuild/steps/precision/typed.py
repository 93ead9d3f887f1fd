"""All networks of a model in a lower precision: calibrated, decided, gated, ready to be built."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from trtbuild.atomic import write_whole
from trtbuild.bundle import Stage
from trtbuild.config import CalibrationConfig, CompileConfig
from trtbuild.engine import plain_record
from trtbuild.errors import TrtbuildError
from trtbuild.graph import clean, load_onnx, opset_from_model
from trtbuild.graph.precision import cast, fp16_sensitive
from trtbuild.machine import give_back_memory, usable_cores
from trtbuild.spec import BuildRecord, NetworkRecord, Precision
from trtbuild.steps.compilation.networks import INFERENCE_PRECISION, Networks, Report
from trtbuild.steps.precision.calibrate import (
    Calibration,
    calibrated,
    make_scales_folder,
    observed_form,
    what_is_done,
)
from trtbuild.steps.precision.data import StageData, check_previous, stage_data
from trtbuild.steps.precision.decide import Decision, Int8Job, decide, kept_layers, methods_of, with_layers
from trtbuild.steps.precision.facts import Facts, calibration_facts, calibration_files
from trtbuild.steps.precision.gate import Gate, open_gate
from trtbuild.steps.precision.judge import judged_engines
from trtbuild_calibration import Progress, ScaleTable, Source

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]


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
    def is_int8(self) -> bool:
        return self.config.precision == "int8"

    @property
    def inference_precision(self) -> str:
        """What backends compute in besides INT8."""
        if self.is_int8:
            return INFERENCE_PRECISION[self.config.rest]
        return INFERENCE_PRECISION[self.config.precision]

    def record(self, network: NetworkRecord, backend: str) -> BuildRecord:
        """How a network is run while it is judged."""
        return plain_record(
            network, backend=backend, inference_precision=self.inference_precision, threads=self.threads
        )


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
    make_scales_folder(config.calibration)
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
    accurate = observed_form(load_onnx(file))
    kept = kept_layers(accurate, job.config.keep, ends=not job.config.quantize_ends) if job.is_int8 else {}
    with ExitStack() as stack:
        gate = _gate(job, stage, network, accurate, held_out)
        if gate is not None:
            stack.enter_context(gate)
            job.report(f"the gate judges by {_judged_by(data, network.fold, gate)}")
        if job.config.precision == "bf16":
            return _judged(job, network, network, file.read_bytes(), gate)
        job.report(what_is_done(network.id, job.data, len(calibration)))
        work = Calibration(spec=stage.spec, sources=calibration, data=data, config=job.data, threads=job.threads)
        table = calibrated(network.id, accurate, work, calibration_progress(job.say))
        for label in table.coverage.missed:
            job.report(f"no patch holds class {label}: {table.coverage.classes[label].missed}")
        if job.is_int8:
            return _int8(job, network, accurate, table, kept, gate)
        return _fp16(job, network, accurate, table, gate)


def _judged_by(data: StageData, fold: str, gate: Gate) -> str:
    criterion = "Dice against labels" if gate.labelled else "Dice against FP32, as there are no labels"
    return f"{criterion}: {data.held_out_by(fold)}"


def _gate(
    job: _Job, stage: Stage, network: NetworkRecord, accurate: onnx.ModelProto, held_out: Sequence[Source]
) -> Gate | None:
    """FP32 on the held-out patches, by the first backend; None without a gate."""
    if job.config.gate is None:
        return None
    job.report(f"FP32 of {network.id} on {job.config.gate.patches} patches for the gate")
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
    job: _Job,
    network: NetworkRecord,
    accurate: onnx.ModelProto,
    table: ScaleTable,
    kept: Mapping[str, str],
    gate: Gate | None,
) -> TypedNetwork:
    # the backends' own norm: in INT8 its rounding is a tenth of the quantisation's, and writing it out costs a tenth
    model = clean(accurate, rewrite_conv_transpose=False, split_instance_norm=False).model
    typed = _record(network, "int8", opset_from_model(model))
    work = Int8Job(
        model=model,
        table=table,
        methods=methods_of(job.config.method),
        kept=kept,
        record=job.record(typed, job.backends[0]),
        gate=gate,
        scratch=job.scratch,
    )
    if gate is not None:
        job.report(f"gating INT8 of {network.id}")
    decision = decide(work, job.say)
    layers = {"int8": list(decision.network.quantized), "kept": list(decision.left)}
    more = {"method": decision.method, "layers": layers}
    content: bytes = decision.network.model.SerializeToString()
    return _judged(job, network, typed, content, gate, decision=decision, table=table, more=more)


def _fp16(
    job: _Job, network: NetworkRecord, accurate: onnx.ModelProto, table: ScaleTable, gate: Gate | None
) -> TypedNetwork:
    result = cast(accurate, "fp16", keep=fp16_sensitive(accurate, table.ranges))
    if result.underflow:
        job.report(f"weights too small for FP16 in {len(result.underflow)} tensors (the bundle lists them)")
    more = {"layers": {"kept": list(result.left), "underflow": list(result.underflow)}}
    typed = _record(network, "fp16", opset_from_model(result.model))
    content: bytes = result.model.SerializeToString()
    return _judged(job, network, typed, content, gate, table=table, more=more)


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


def _judged(
    job: _Job,
    network: NetworkRecord,
    typed: NetworkRecord,
    content: bytes,
    gate: Gate | None,
    *,
    decision: Decision | None = None,
    table: ScaleTable | None = None,
    more: Facts = MappingProxyType({}),
) -> TypedNetwork:
    """The network with what the gate of every backend said of it."""
    quantized = 0 if decision is None else len(decision.network.quantized)
    file = job.scratch / f"{typed.id}_gated.onnx"
    write_whole(file, content)
    records = [job.record(typed, backend) for backend in job.backends]
    records = [with_layers(record, quantized) for record in records]
    gates, failures = ((), ()) if gate is None else judged_engines(gate, records, file, decision, job.say)
    return TypedNetwork(
        record=typed,
        content=None if typed is network else content,
        quantized=quantized,
        calibration=None if table is None else {**calibration_facts(network, table), **more},
        files={} if table is None else calibration_files(network, table),
        gates=gates,
        failures=failures,
    )
