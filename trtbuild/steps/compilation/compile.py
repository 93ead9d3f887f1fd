"""`compile`: a trained model, or a bundle, becomes a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.atomic import scratch_folder, write_whole
from trtbuild.bundle import Bundle, write_bundle
from trtbuild.bundle.writer import check_target
from trtbuild.config import CompileConfig
from trtbuild.engine.tensorrt.script import check_script
from trtbuild.errors import GateFailed
from trtbuild.spec import Precision
from trtbuild.steps.compilation.backends import Backends, chosen_backends
from trtbuild.steps.compilation.contents import bundle_contents
from trtbuild.steps.compilation.cuda import cuda_engines
from trtbuild.steps.compilation.device import build_device_engines, device_script
from trtbuild.steps.compilation.engines import build_engines, engine_jobs
from trtbuild.steps.compilation.exported import networks_from_model
from trtbuild.steps.compilation.golden import golden_case
from trtbuild.steps.compilation.networks import Networks, in_fp32, materialised, networks_from_bundle

if TYPE_CHECKING:
    from trtbuild.steps.precision.job import TypedNetwork

Report = Callable[[str], None]
INSTEAD: Mapping[Precision, str] = {
    "int8": "--precision bf16 or fp16, more --calibration-patches, or ",
    "fp16": "--precision bf16, more --calibration-patches, or ",
    "bf16": "--precision fp32, or ",
}
"""What to try where the gate does not pass a precision."""
TURING = "75"


def compile_bundle(
    config: CompileConfig, report: Report = lambda line: None, say: Report = lambda line: None
) -> Bundle:
    """Runs every step from the model to the bundle; the bundle appears under its name only when it is whole.

    What is cheap to find out (a place for the bundle, usable backends) is found out before the work starts.

    Args:
        config: what to compile, for which backends, where to.
        report: called with one line per step.
        say: called with what is under way within a long step, and how long it will take.

    Raises:
        GateFailed: a lower precision is not good enough. The bundle was written, with FP32 engines and the gate's
            findings.
        ModelError, GraphError, EngineError, InputError, OutputError: with what was expected, what came, where, and
            what to do.
    """
    check_target(config.output, overwrite=config.overwrite)
    if config.emit_script is not None:
        check_script(config.emit_script, taken=_taken(config), overwrite=config.overwrite)
    backends = chosen_backends(config, report)
    networks = _networks(config, report)
    with scratch_folder() as scratch:
        models = materialised(networks, scratch)
        typed = _typed(config, networks, models, backends, scratch, report, say)
        failures, usable, built = tuple(reason for network in typed for reason in network.failures), typed, config
        if failures:
            without = f" (not for {TURING})" * (TURING in config.tensorrt.compute_capabilities)
            report(f"the gate did not pass {config.precision}: FP32 engines{without}")
            networks, built = in_fp32(networks), _in_fp32(config)
            models = materialised(networks, scratch)
            usable = _typed(built, networks, models, backends, scratch, report, say)
        jobs = engine_jobs(built, backends, networks, models, usable, scratch, report)
        engines = tuple(build_engines(built, backends.cpu, jobs, report))
        on_cuda = tuple(cuda_engines(built, backends, jobs, report))
        plans = tuple(build_device_engines(built, backends, networks.stages, jobs, scratch, report, say))
        if networks.case is None:
            report("making the golden case")
        case = networks.case or golden_case(networks.stages, models, networks.postprocessing, scratch)
    contents, files = bundle_contents(networks, case, typed, usable, jobs, engines, plans, on_cuda)
    report(f"writing {config.output}")
    bundle = write_bundle(config.output, contents, files, overwrite=config.overwrite)
    if config.emit_script is not None:
        write_whole(config.emit_script, device_script(built, plans, config.output))
    if failures:
        raise GateFailed(
            f"{config.precision.upper()} is not good enough for this model.",
            expected="a loss within the limits of the gate",
            got="\n            ".join(failures),
            where=config.output,
            hint="the bundle holds FP32 engines and the gate's findings (trtbuild inspect shows them); try "
            f"{INSTEAD[config.precision]}other limits",
        )
    return bundle


def _typed(
    config: CompileConfig,
    networks: Networks,
    models: Mapping[str, Path],
    backends: Backends,
    scratch: Path,
    report: Report,
    say: Report,
) -> tuple[TypedNetwork, ...]:
    """The networks in lower precision, and those for GPUs; none where CPU backends take the FP32 ones."""
    if config.calibration is not None:
        from trtbuild.steps.precision.typed import typed_networks

        return typed_networks(config, networks, models, backends, scratch, report, say)
    if backends.for_gpu:
        from trtbuild.steps.precision.typed import uncalibrated_networks

        return uncalibrated_networks(config, networks, models, report)
    return ()


def _taken(config: CompileConfig) -> list[Path]:
    """What the command reads and writes."""
    data = config.calibration
    paths = [config.output, config.model, config.previous_stage, config.postprocessing]
    paths += [] if data is None else [data.data, data.images, data.labels, data.previous, data.scales]
    return [path for path in paths if path is not None]


def _in_fp32(config: CompileConfig) -> CompileConfig:
    """The same without anything of a lower precision, and without Turing, which has no FP32 convolutions in 3-D."""
    capabilities = tuple(name for name in config.tensorrt.compute_capabilities if name != TURING)
    return replace(
        config,
        tensorrt=replace(config.tensorrt, compute_capabilities=capabilities),
        precision="fp32",
        rest=None,
        method="auto",
        keep=(),
        quantize_ends=False,
        calibration=None,
        gate=None,
    )


def _networks(config: CompileConfig, report: Report) -> Networks:
    if config.model is not None and os.path.isfile(config.model / "bundle.json"):
        return networks_from_bundle(config.model, config, report)
    return networks_from_model(config, report)
