"""All networks of a model in a lower precision: calibrated, decided, gated, ready to be built."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.atomic import write_whole
from trtbuild.bundle import Stage
from trtbuild.config import CompileConfig
from trtbuild.engine import plain_record
from trtbuild.errors import TrtbuildError
from trtbuild.graph import load_onnx
from trtbuild.machine import give_back_memory, usable_cores
from trtbuild.spec import NetworkRecord
from trtbuild.steps.compilation.backends import Backends
from trtbuild.steps.compilation.networks import Networks, Report
from trtbuild.steps.precision.calibrate import (
    Calibration,
    calibrated,
    make_scales_folder,
    observed_form,
    what_is_done,
)
from trtbuild.steps.precision.cpu import cpu_bf16, cpu_fp16, cpu_int8
from trtbuild.steps.precision.data import StageData, check_previous, stage_data
from trtbuild.steps.precision.decide import kept_layers
from trtbuild.steps.precision.device import (
    device_bf16,
    device_form,
    device_fp16,
    device_fp16_uncalibrated,
    device_fp32,
    device_int8,
)
from trtbuild.steps.precision.gate import Gate, open_gate
from trtbuild.steps.precision.job import Job, Say, TypedNetwork, tell_lost
from trtbuild_calibration import Progress, Source

if TYPE_CHECKING:
    import onnx


def typed_networks(
    config: CompileConfig,
    networks: Networks,
    models: Mapping[str, Path],
    backends: Backends,
    scratch: Path,
    report: Report,
    say: Say,
) -> tuple[TypedNetwork, ...]:
    """Each FP32 network in lower precision, for CPU backends and for GPUs as `backends` has them.

    Args:
        config: asks for a precision below FP32, with cases to measure or to judge on.
        networks: of the model, FP32.
        models: their files.
        backends: that engines are built for; the first judge decides, the others are gated with what it decided.
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
    job = Job(config=config, data=config.calibration, backends=backends, scratch=scratch, report=report, say=say)
    typed = list[TypedNetwork]()
    for number, stage in enumerate(networks.stages):
        data = _data(job, networks, stage, number)
        for network in stage.networks:
            typed += _typed(job, stage, network, models[network.id], data)
    return tuple(typed)


def uncalibrated_networks(
    config: CompileConfig, networks: Networks, models: Mapping[str, Path], report: Report
) -> tuple[TypedNetwork, ...]:
    """Each FP32 network for GPUs where nothing is calibrated and nothing judged: FP32, BF16, FP16.

    Raises:
        NonFinite: an activation of the golden patch is NaN or infinite.
    """
    typed = []
    for network in (network for stage in networks.stages for network in stage.networks):
        accurate = observed_form(load_onnx(models[network.id]))
        if config.precision == "bf16":
            typed.append(device_bf16(None, network, accurate, None))
        elif config.precision == "fp16":
            report(f"ranges of {network.id} from its golden patch alone; --calibration measures and judges them")
            patch, threads = networks.goldens[network.id][0][:1], config.threads or usable_cores()
            norms = not config.fp16_norms
            typed.append(device_fp16_uncalibrated(network, accurate, patch, norms=norms, threads=threads))
        else:
            typed.append(device_fp32(network, accurate))
        tell_lost(typed[-1], report)
    return tuple(typed)


def _data(job: Job, networks: Networks, stage: Stage, number: int) -> StageData:
    folder = job.scratch / f"cases_{number}"
    folder.mkdir()
    plans, dataset = (_content(networks.files[name]) for name in ("plans.json", "dataset.json"))
    return stage_data(job.data, stage.spec, plans=plans, dataset=dataset, scratch=folder, report=job.report)


def _content(file: bytes | Path) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file


def _typed(job: Job, stage: Stage, network: NetworkRecord, file: Path, data: StageData) -> Iterable[TypedNetwork]:
    calibration, held_out = data.split(network.fold, job.data.seed, gated=job.config.gate is not None)
    accurate = observed_form(load_onnx(file))
    _check_kept(job, accurate)
    with ExitStack() as stack:
        gate = _gate(job, stage, network, accurate, held_out)
        if gate is not None:
            stack.enter_context(gate)
            job.report(f"the gate judges by {_judged_by(data, network.fold, gate)}")
        if job.config.precision == "bf16":
            return [
                *([cpu_bf16(job, network, file.read_bytes(), gate)] if job.backends.cpu else []),
                *([device_bf16(job, network, accurate, gate)] if job.backends.for_gpu else []),
            ]
        job.report(what_is_done(network.id, job.data, len(calibration)))
        work = Calibration(spec=stage.spec, sources=calibration, data=data, config=job.data, threads=job.threads)
        table = calibrated(network.id, accurate, work, calibration_progress(job.say))
        for label in table.coverage.missed:
            job.report(f"no patch holds class {label}: {table.coverage.classes[label].missed}")
        on_cpu, on_device = (cpu_int8, device_int8) if job.is_int8 else (cpu_fp16, device_fp16)
        made = [
            *([on_cpu(job, network, accurate, table, gate)] if job.backends.cpu else []),
            *([on_device(job, network, accurate, table, gate)] if job.backends.for_gpu else []),
        ]
        for network_made in made:
            tell_lost(network_made, job.report)
        return made


def _check_kept(job: Job, accurate: onnx.ModelProto) -> None:
    """Before hours of calibration: whether --keep finds its layers and leaves some."""
    if job.is_int8:
        model = device_form(accurate) if job.backends.for_gpu and not job.backends.cpu else accurate
        kept_layers(model, job.config.keep, ends=not job.config.quantize_ends)


def _judged_by(data: StageData, fold: str, gate: Gate) -> str:
    criterion = "Dice against labels" if gate.labelled else "Dice against FP32, as there are no labels"
    return f"{criterion}: {data.held_out_by(fold)}"


def _gate(
    job: Job, stage: Stage, network: NetworkRecord, accurate: onnx.ModelProto, held_out: Sequence[Source]
) -> Gate | None:
    """FP32 on the held-out patches, by the first judge; None without a gate."""
    if job.config.gate is None:
        return None
    job.report(f"FP32 of {network.id} on {job.config.gate.patches} patches for the gate")
    file = job.scratch / f"{network.id}_reference.onnx"
    write_whole(file, accurate.SerializeToString())
    record = plain_record(network, backend=job.backends.judges[0], inference_precision="f32", threads=job.threads)
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
