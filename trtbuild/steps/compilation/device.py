"""TensorRT engines of a bundle: built, or taken from the user's cache, with what the bundle says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from trtbuild.atomic import write_whole
from trtbuild.bundle import Stage
from trtbuild.config import CompileConfig
from trtbuild.engine.tensorrt import shapes_from_io
from trtbuild.engine.tensorrt.layers_file import layers_file
from trtbuild.engine.tensorrt.record import record_from_plan, target_device
from trtbuild.engine.tensorrt.reuse import engine_key, plan_or_build
from trtbuild.engine.tensorrt.script import equivalent_commands, script
from trtbuild.errors import EngineError, MissingExtra
from trtbuild.graph import load_onnx
from trtbuild.graph.cost import operations
from trtbuild.nvinfer import Nvinfer, no_driver
from trtbuild.spec import BuildRecord
from trtbuild.steps.compilation.backends import Backends
from trtbuild.steps.compilation.engines import EngineJob, check_against_golden
from trtbuild.steps.compilation.networks import Report


@dataclass(frozen=True, kw_only=True)
class DeviceEngine:
    """The record of an engine, its input's name, and its files: the raw plan, and its layers where they are known.

    `unrun` says why it was not run when it was built; None where it was, and computed what it should.
    """

    record: BuildRecord
    input: str
    files: Mapping[str, bytes] = field(repr=False)
    unrun: str | None = None


def build_device_engines(
    config: CompileConfig,
    backends: Backends,
    stages: tuple[Stage, ...],
    jobs: tuple[EngineJob, ...],
    scratch: Path,
    report: Report,
    say: Report,
) -> Iterable[DeviceEngine]:
    """One engine per network of `stages` for the flavour of TensorRT, if there is one.

    Where there is a GPU that runs it, each is held to its golden; else it is said why it was not.

    Raises:
        EngineError: the build failed, with the failing layer; the engine computes something else.
        OutOfMemory: the build ran out of memory.
    """
    if backends.device is None:
        return
    device = target_device(config.tensorrt, backends.device)
    for job in (job for job in jobs if job.on_device):
        spec = stages[job.stage].spec
        engine = _engine(config, backends.device, device, job, f"{spec.dataset} {spec.configuration}", report, say)
        reason = no_driver() or _misfit(engine, job, scratch, report)
        if reason is not None:
            report(f"the engine of {job.network.id} was not run here: {reason}")
        yield replace(engine, unrun=reason)


def _misfit(engine: DeviceEngine, job: EngineJob, scratch: Path, report: Report) -> str | None:
    """Runs the engine and holds it to its golden; why this machine cannot, else None."""
    from trtbuild.runtime.select import open_runner

    file = scratch / Path(str(engine.record.file)).name
    write_whole(file, engine.files[str(engine.record.file)])
    try:
        runner = open_runner(engine.record, file)
    except (EngineError, MissingExtra) as error:
        return " ".join(str(error).split())
    with runner:
        check_against_golden(engine.record, job, runner, report)
    return None


def device_script(config: CompileConfig, plans: tuple[DeviceEngine, ...], bundle: Path) -> bytes:
    """A shell script with the commands of trtexec and Polygraphy that build the same engines from the bundle."""
    lines: list[str] = []
    for plan in plans:
        profile = plan.record.profile
        lines += ["", f"# {plan.record.network}, {plan.record.precision}"]
        lines += equivalent_commands(
            config.tensorrt,
            {plan.input: (profile.min, profile.opt, profile.max)},
            onnx=f"{bundle.name}/networks/{plan.record.network}.onnx",
            engine=f"{plan.record.network}.engine",
            backend=plan.record.backend,
        )
    return script(f"Builds the engines of {bundle.name}; to be run beside it.", lines)


def _engine(
    config: CompileConfig,
    flavour: Nvinfer,
    device: Mapping[str, str],
    job: EngineJob,
    model: str,
    report: Report,
    say: Callable[[str], None],
) -> DeviceEngine:
    shapes = shapes_from_io(job.network.io[:1], config.tensorrt)
    plan = plan_or_build(
        job.model,
        name=f"{job.network.id} of {model}",
        nvinfer=flavour,
        config=config.tensorrt,
        shapes=shapes,
        device=device,
        tell=lambda phase, done: say(f"{job.network.id}: {phase}, {done:.0%}"),
        report=report,
    )
    for line in plan.warnings:
        report(f"TensorRT: {line}")
    stem = f"engines/{job.network.id}.{flavour.backend}"
    record = record_from_plan(
        plan,
        network=job.network.id,
        file=f"{stem}.engine",
        precision=job.network.precision,
        rest=job.rest,
        nvinfer=flavour,
        config=config.tensorrt,
        shapes=shapes,
        device=device,
        key=engine_key(job.model, config.tensorrt, flavour, shapes, device),
    )
    files = {f"{stem}.engine": plan.content}
    if plan.table is not None:
        name = f"{stem}.layers.json"
        files[name] = layers_file(plan.table, operations(load_onnx(job.model)))
        record = replace(record, options={**record.options, "layers": name})
    return DeviceEngine(record=record, input=job.network.io[0].name, files=files)
