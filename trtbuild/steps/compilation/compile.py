"""`compile`: a trained model, or a bundle, becomes a bundle."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.accuracy import LOGIT_TOLERANCE, logit_error
from trtbuild.bundle import Bundle, Contents, Golden, write_bundle
from trtbuild.bundle.writer import check_target
from trtbuild.config import CompileConfig
from trtbuild.errors import EngineError
from trtbuild.spec import BuildRecord
from trtbuild.steps.compilation.exported import networks_from_model
from trtbuild.steps.compilation.golden import GoldenCase, golden_case
from trtbuild.steps.compilation.networks import (
    INFERENCE_PRECISION,
    GoldenPair,
    Networks,
    materialised,
    networks_from_bundle,
)

Report = Callable[[str], None]


def compile_bundle(config: CompileConfig, report: Report = lambda line: None) -> Bundle:
    """Runs every step from the model to the bundle; the bundle appears under its name only when it is whole.

    What is cheap to find out (a place for the bundle, usable backends) is found out before the work starts.

    Args:
        config: what to compile, for which backends, where to.
        report: called with one line per step.

    Raises:
        ModelError, GraphError, EngineError, OutputError: with what was expected, what came, where, and what to do.
    """
    check_target(config.output, overwrite=config.overwrite)
    backends = _chosen_backends(config, report)
    networks = _networks(config, report)
    with tempfile.TemporaryDirectory(prefix="trtbuild-") as scratch:
        models = materialised(networks, Path(scratch))
        engines = tuple(_build_engines(config, backends, networks, models, report))
        if networks.case is None:
            report("making the golden case")
        case = networks.case or golden_case(networks.stages, models, networks.postprocessing, Path(scratch))
    goldens, golden_files = _goldens(networks, case)
    contents = Contents(
        stages=networks.stages,
        engines=engines,
        calibrations=(),
        gates=(),
        goldens=goldens,
        postprocessing=networks.postprocessing,
        provenance=networks.provenance,
        extensions={},
    )
    report(f"writing {config.output}")
    return write_bundle(config.output, contents, {**networks.files, **golden_files}, overwrite=config.overwrite)


def _networks(config: CompileConfig, report: Report) -> Networks:
    if config.model is not None and os.path.isfile(config.model / "bundle.json"):
        return networks_from_bundle(config.model, config, report)
    return networks_from_model(config, report)


def _goldens(networks: Networks, case: GoldenCase | None) -> tuple[tuple[Golden, ...], Mapping[str, bytes]]:
    """The list of goldens and their `.npy` files."""
    goldens, files = [], {}
    for name in (network.id for stage in networks.stages for network in stage.networks):
        stem = f"goldens/{name}"
        goldens.append(
            Golden(kind="patch", network=name, input=f"{stem}_input.npy", output=f"{stem}_logits.npy", spacing=None)
        )
        files[f"{stem}_input.npy"], files[f"{stem}_logits.npy"] = map(_npy, networks.goldens[name])
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
        _check_precision(name, config.precision)
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
            hint="compile with --precision fp32",
        )


def _build_engines(
    config: CompileConfig,
    backends: tuple[str, ...],
    networks: Networks,
    models: Mapping[str, Path],
    report: Report,
) -> Iterable[BuildRecord]:
    """One engine per backend and network. All folds of a stage share the settings that were measured for the first."""
    from trtbuild.engine import engine_from_onnx

    for backend in backends:
        for stage in networks.stages:
            first: BuildRecord | None = None
            for network in stage.networks:
                report(f"building {network.id} for {backend} ({config.precision})")
                if first is None:
                    record = first = engine_from_onnx(
                        models[network.id],
                        network,
                        backend=backend,
                        threads=config.threads,
                        inference_precision=INFERENCE_PRECISION[config.precision],
                        tune=config.tune,
                    )
                else:
                    record = replace(first, network=network.id)
                _check_against_golden(record, models[network.id], networks.goldens[network.id], report)
                yield record


def _check_against_golden(record: BuildRecord, model: Path, golden: GoldenPair, report: Report) -> None:
    from trtbuild.runtime.select import open_runner

    with open_runner(record, model) as runner:
        error = logit_error(runner.infer(golden[0]), golden[1])
    limit = LOGIT_TOLERANCE[record.inference_precision]
    report(f"logits differ from PyTorch by {error:.1e} of the largest (limit {limit:.0e})")
    if not error <= limit:
        raise EngineError(
            "An engine does not compute what the network computes.",
            got=f"{error:.2e} of the largest logit",
            expected=f"at most {limit:.0e}",
            where=f"{record.backend} ({record.inference_precision}), {record.network}",
            hint="compile with --backend onnxruntime, and report the model",
        )
