"""`calibrate` and `quantize`: the steps of INT8 one by one, for those who build with another tool."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trtbuild.bundle import Bundle, Stage, open_bundle
from trtbuild.config import CalibrationConfig, QuantizeConfig, check_folds, check_threads
from trtbuild.errors import InputError, ModelError, OutputError
from trtbuild.graph import clean, load_onnx, save_onnx
from trtbuild.graph.precision import cast, fp16_sensitive, quantize, targets, tensorrt_form
from trtbuild.machine import usable_cores
from trtbuild.steps.precision.calibrate import Calibration, calibrated
from trtbuild.steps.precision.data import as_input_errors, check_previous, stage_data
from trtbuild.steps.precision.decide import kept_layers
from trtbuild.steps.precision.typed import calibration_facts, calibration_progress
from trtbuild_calibration import ScaleTable, check_cache, read_cache, read_table

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]


def calibrate_bundle(
    path: Path, config: CalibrationConfig, *, folds: tuple[str, ...] | None, threads: int | None, report: Say, say: Say
) -> dict[str, Any]:
    """Calibrates the FP32 networks of a bundle into `config.scales`; gives the facts of each calibration.

    Raises:
        BundleError, ModelError: no bundle, or it lacks a fold.
        InputError: the data cannot be used.
    """
    import tempfile

    check_folds(folds)
    check_threads(threads)
    bundle = open_bundle(path)
    check_previous(config, bundle.manifest.stages)
    facts = []
    with tempfile.TemporaryDirectory(prefix="trtbuild-") as scratch:
        for number, stage in enumerate(bundle.manifest.stages):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            facts += _calibrated_stage(bundle, stage, config, folds, threads or usable_cores(), folder, report, say)
    return {"scales": str(config.scales), "calibrations": facts}


def _calibrated_stage(
    bundle: Bundle,
    stage: Stage,
    config: CalibrationConfig,
    folds: tuple[str, ...] | None,
    threads: int,
    scratch: Path,
    report: Say,
    say: Say,
) -> list[dict[str, Any]]:
    roots = [network for network in stage.networks if network.parent is None]
    missing = sorted(set(folds or ()) - {network.fold for network in roots})
    if missing:
        raise ModelError(
            "The bundle lacks a fold.",
            expected=", ".join(missing),
            got=", ".join(network.fold for network in roots),
            where=bundle.path,
        )
    files = {name: bundle.file(name).read_bytes() for name in ("plans.json", "dataset.json")}
    data = stage_data(
        config, stage.spec, plans=files["plans.json"], dataset=files["dataset.json"],
        scratch=scratch, report=report,
    )  # fmt: skip
    facts = []
    for network in (network for network in roots if folds is None or network.fold in folds):
        sources, _ = data.split(network.fold, config.seed, gated=False)
        report(f"calibrating {network.id} on {config.patches} patches of {len(sources)} cases")
        model = clean(load_onnx(bundle.file(network.file)), rewrite_conv_transpose=False, split_instance_norm=True)
        job = Calibration(spec=stage.spec, sources=sources, data=data, config=config, threads=threads)
        table = calibrated(network.id, model.model, job, calibration_progress(say))
        facts.append(calibration_facts(network, table))
    return facts


def quantize_file(config: QuantizeConfig) -> dict[str, Any]:
    """Writes INT8 into one ONNX file; gives what was quantised, what was not, and why.

    Raises:
        OutputError: the output exists, or cannot be written.
        InputError: the scales are damaged, or of another network.
        GraphError: the network is malformed, or is not clean.
    """
    if config.output.exists() and not config.overwrite:
        raise OutputError("The output exists.", where=config.output, hint="choose another name, or add --overwrite")
    model = load_onnx(config.source)
    if not any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        model = clean(model, rewrite_conv_transpose=False, split_instance_norm=False).model
    if config.backend == "tensorrt":
        model = tensorrt_form(model)
    table, amax = _scales(config, model)
    kept = kept_layers(model, config.keep, ends=not config.quantize_ends)
    result = quantize(model, amax, keep=kept, zero_point="s8" if config.backend == "tensorrt" else "u8")
    typed, left = result.model, result.left
    if config.rest != "fp32":
        sensitive = {} if config.rest == "bf16" else _sensitive(config, typed, table)
        lower = cast(typed, config.rest, keep=sensitive)
        typed, left = lower.model, (*left, *lower.left)
    save_onnx(typed, config.output)
    return {"output": str(config.output), "int8": list(result.quantized), "left": list(left)}


def _sensitive(config: QuantizeConfig, model: onnx.ModelProto, table: ScaleTable | None) -> dict[str, str]:
    if table is None:
        raise InputError(
            "FP16 needs the ranges of all tensors, and a calibration cache holds those of a few.",
            expected="NAME.json of trtbuild calibrate",
            got=config.scales.name,
            where=config.scales,
        )
    return dict(fp16_sensitive(model, table.ranges, norms=not config.fp16_norms))


def _scales(config: QuantizeConfig, model: onnx.ModelProto) -> tuple[ScaleTable | None, dict[str, float]]:
    """The table, where it is one, and the thresholds of the network's tensors."""
    wanted = [name for name, _ in targets(model)]
    with as_input_errors():
        if config.scales.suffix == ".json":
            table = read_table(config.scales)
            known = table.amax(config.method)
            _check_tensors(config, wanted, known)
            return table, known
        return None, check_cache(read_cache(config.scales), wanted)


def _check_tensors(config: QuantizeConfig, wanted: list[str], known: dict[str, float]) -> None:
    missing = [name for name in wanted if name not in known]
    if missing:
        raise InputError(
            "The scales are not of this network.",
            expected=f"scales of {len(wanted)} tensors",
            got=f"{len(missing)} are missing, {missing[0]} first",
            where=config.scales,
            hint="trtbuild calibrate the bundle that the network is from",
        )
