"""`compile`: a trained model, or a bundle, becomes a bundle."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.accuracy import LOGIT_TOLERANCE, logit_error
from trtbuild.atomic import write_whole
from trtbuild.bundle import Bundle, Contents, Golden, write_bundle
from trtbuild.bundle.writer import check_target
from trtbuild.config import CompileConfig
from trtbuild.errors import EngineError, GateFailed
from trtbuild.spec import BuildRecord, NetworkRecord
from trtbuild.steps.compilation.exported import networks_from_model
from trtbuild.steps.compilation.golden import GoldenCase, golden_case
from trtbuild.steps.compilation.networks import (
    INFERENCE_PRECISION,
    GoldenPair,
    Networks,
    in_fp32,
    materialised,
    networks_from_bundle,
)

if TYPE_CHECKING:
    from trtbuild.steps.precision.typed import TypedNetwork

Report = Callable[[str], None]


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
    backends = _chosen_backends(config, report)
    networks = _networks(config, report)
    with tempfile.TemporaryDirectory(prefix="trtbuild-") as folder:
        scratch = Path(folder)
        models = materialised(networks, scratch)
        typed = _typed(config, networks, models, backends, scratch, report, say)
        failures = tuple(reason for network in typed.values() for reason in network.failures)
        if failures:
            report(f"the gate did not pass {config.precision}: FP32 engines")
            networks = in_fp32(networks)
            models = materialised(networks, scratch)
        jobs = _jobs(config, networks, models, None if failures else typed, scratch)
        built = tuple(_build_engines(config, backends, jobs, report))
        if networks.case is None:
            report("making the golden case")
        case = networks.case or golden_case(networks.stages, models, networks.postprocessing, scratch)
    contents, files = _contents(networks, case, typed, jobs, built)
    report(f"writing {config.output}")
    bundle = write_bundle(config.output, contents, files, overwrite=config.overwrite)
    if failures:
        raise GateFailed(
            f"{config.precision.upper()} is not good enough for this model.",
            expected="a loss within the limits of the gate",
            got="\n            ".join(failures),
            where=config.output,
            hint="the bundle holds FP32 engines and the gate's findings (trtbuild inspect shows them); try --precision "
            "bf16 or fp16, more --calibration-patches, or other limits",
        )
    return bundle


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One network to build engines from: its file, and the FP32 golden (input, logits) that it is compared with.

    `computed` is what backends compute in, besides the `quantized` layers.
    """

    stage: int
    computed: str
    network: NetworkRecord
    model: Path
    golden: GoldenPair
    quantized: int


@dataclass(frozen=True, kw_only=True)
class _Built:
    """An engine's record, and the logits of the golden input that it gave."""

    record: BuildRecord
    logits: NDArray[np.float32]


def _typed(
    config: CompileConfig,
    networks: Networks,
    models: Mapping[str, Path],
    backends: tuple[str, ...],
    scratch: Path,
    report: Report,
    say: Report,
) -> Mapping[str, TypedNetwork]:
    """Each network in lower precision, by its id; empty where nothing is measured for the precision."""
    if config.calibration is None:
        return {}
    from trtbuild.steps.precision.typed import typed_networks

    return typed_networks(config, networks, models, backends, scratch, report, say)


def _jobs(
    config: CompileConfig,
    networks: Networks,
    models: Mapping[str, Path],
    typed: Mapping[str, TypedNetwork] | None,
    scratch: Path,
) -> tuple[_Job, ...]:
    """What is built: the networks in lower precision where there are any, FP32 where `typed` is None."""
    jobs = []
    for number, stage in enumerate(networks.stages):
        for network in stage.networks:
            own, model, quantized = network, models[network.id], 0
            lower = None if typed is None else typed.get(network.id)
            if lower is not None and lower.content is not None:
                own, quantized = lower.record, lower.quantized
                model = scratch / Path(own.file).name
                write_whole(model, lower.content)
            precision = "fp32" if typed is None else config.rest if own.precision == "int8" else config.precision
            jobs.append(
                _Job(
                    stage=number,
                    computed=INFERENCE_PRECISION[precision],
                    network=own,
                    model=model,
                    golden=networks.goldens[network.id],
                    quantized=quantized,
                )
            )
    return tuple(jobs)


def _contents(
    networks: Networks,
    case: GoldenCase | None,
    typed: Mapping[str, TypedNetwork],
    jobs: tuple[_Job, ...],
    built: tuple[_Built, ...],
) -> tuple[Contents, Mapping[str, bytes | Path]]:
    """bundle.json and the files of the bundle. A network in lower precision stands behind the one it comes from."""
    used = {job.network.id: job for job in jobs}
    lower = [network for network in typed.values() if network.content is not None and network.record.id in used]
    goldens, files = _goldens(networks, case, {one.record.network: one.logits for one in built}, lower)
    for network in typed.values():
        files |= network.files
    for network in lower:
        files[network.record.file] = network.content or b""
    stages = tuple(
        replace(stage, networks=(*stage.networks, *(network.record for network in lower
                                                    if network.record.parent in {n.id for n in stage.networks})))
        for stage in networks.stages
    )  # fmt: skip
    contents = Contents(
        stages=stages,
        engines=tuple(one.record for one in built),
        calibrations=tuple(network.calibration for network in typed.values() if network.calibration is not None),
        gates=tuple(gate for network in typed.values() for gate in network.gates),
        goldens=goldens,
        postprocessing=networks.postprocessing,
        provenance=networks.provenance,
        extensions={},
    )
    return contents, {**networks.files, **files}


def _networks(config: CompileConfig, report: Report) -> Networks:
    if config.model is not None and os.path.isfile(config.model / "bundle.json"):
        return networks_from_bundle(config.model, config, report)
    return networks_from_model(config, report)


def _goldens(
    networks: Networks,
    case: GoldenCase | None,
    logits: Mapping[str, NDArray[np.float32]],
    lower: Sequence[TypedNetwork],
) -> tuple[tuple[Golden, ...], dict[str, bytes | Path]]:
    """The list of goldens and their `.npy` files: PyTorch's logits for FP32 networks, an engine's own for others."""
    goldens, files = [], dict[str, bytes | Path]()
    for name in (network.id for stage in networks.stages for network in stage.networks):
        stem = f"goldens/{name}"
        goldens.append(
            Golden(kind="patch", network=name, input=f"{stem}_input.npy", output=f"{stem}_logits.npy", spacing=None)
        )
        files[f"{stem}_input.npy"], files[f"{stem}_logits.npy"] = map(_npy, networks.goldens[name])
    for record in (network.record for network in lower):
        output = f"goldens/{record.id}_logits.npy"
        source = f"goldens/{record.parent}_input.npy"
        goldens.append(Golden(kind="patch", network=record.id, input=source, output=output, spacing=None))
        files[output] = _npy(logits[record.id])
    if case is not None:
        image, labels = "goldens/case_image.npy", "goldens/case_labels.npy"
        goldens.append(Golden(kind="case", network=None, input=image, output=labels, spacing=case.spacing))
        files[image], files[labels] = _npy(case.image), _npy(case.labels)
    return tuple(goldens), files


def _npy(array: NDArray[Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def _chosen_backends(config: CompileConfig, report: Report) -> tuple[str, ...]:
    """The backends by name, each of which runs here and computes in the precision."""
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


def _build_engines(
    config: CompileConfig, backends: tuple[str, ...], jobs: tuple[_Job, ...], report: Report
) -> Iterable[_Built]:
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
            yield _Built(record=record, logits=_checked_against_golden(record, job, report))


def _checked_against_golden(record: BuildRecord, job: _Job, report: Report) -> NDArray[np.float32]:
    """The engine's logits for the golden input, which must be about PyTorch's."""
    from trtbuild.runtime.select import open_runner

    with open_runner(record, job.model) as runner:
        logits = np.array(runner.infer(job.golden[0]))
    error = logit_error(logits, job.golden[1])
    limit = LOGIT_TOLERANCE[record.precision if record.precision in ("int8", "fp16") else record.inference_precision]
    report(f"logits differ from PyTorch by {error:.1e} of the largest (limit {limit:.0e})")
    if not error <= limit:
        raise EngineError(
            "An engine does not compute what the network computes.",
            got=f"{error:.2e} of the largest logit",
            expected=f"at most {limit:.0e}",
            where=f"{record.backend} ({record.inference_precision}), {record.network}",
            hint="compile with --backend onnxruntime, and report the model",
        )
    return logits
