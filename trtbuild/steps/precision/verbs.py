"""`calibrate` and `quantize`: the steps of INT8 one by one, for those who build with another tool."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from trtbuild.atomic import scratch_folder
from trtbuild.bundle import Bundle, Stage, open_bundle
from trtbuild.config import CalibrationConfig, QuantizeConfig, check_folds, check_threads
from trtbuild.errors import InputError, ModelError, OutputError, TrtbuildError
from trtbuild.graph import clean, load_onnx, save_onnx
from trtbuild.graph.precision import Quantized, cast, fp16_sensitive, quantize, targets, tensorrt_form
from trtbuild.machine import usable_cores
from trtbuild.steps.precision.calibrate import (
    Calibration,
    calibrated,
    make_scales_folder,
    observed_form,
    what_is_done,
)
from trtbuild.steps.precision.data import as_input_errors, check_previous, stage_data
from trtbuild.steps.precision.decide import kept_layers, left_with_reasons
from trtbuild.steps.precision.facts import calibration_facts
from trtbuild.steps.precision.typed import calibration_progress
from trtbuild_calibration import Method, ScaleTable, check_cache, read_cache, read_table

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]
QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
DEFAULT: Method = "percentile"
OF_KIND: Mapping[str, Method] = {"EntropyCalibration2": "entropy", "MinMaxCalibration": "minmax"}
"""What TensorRT's calibrators choose thresholds by."""


def calibrate_bundle(
    path: Path, config: CalibrationConfig, *, folds: tuple[str, ...] | None, threads: int | None, report: Say, say: Say
) -> dict[str, Any]:
    """Calibrates the FP32 networks of a bundle into `config.scales`; gives the facts of each calibration.

    Raises:
        BundleError, ModelError: no bundle, or it lacks a fold.
        InputError: the data cannot be used.
    """
    check_folds(folds)
    check_threads(threads)
    bundle = open_bundle(path)
    check_previous(config, bundle.manifest.stages)
    make_scales_folder(config)
    facts = []
    with scratch_folder() as scratch:
        for number, stage in enumerate(bundle.manifest.stages):
            folder = scratch / str(number)
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
        report(what_is_done(network.id, config, len(sources)))
        model = observed_form(load_onnx(bundle.file(network.file)))
        job = Calibration(spec=stage.spec, sources=sources, data=data, config=config, threads=threads)
        table = calibrated(network.id, model, job, calibration_progress(say))
        facts.append(calibration_facts(network, table))
    return facts


def quantize_file(config: QuantizeConfig) -> dict[str, Any]:
    """Writes INT8 into one ONNX file; gives what was quantised, what was not, and why.

    Raises:
        OutputError: the output exists, or cannot be written.
        InputError: the scales are damaged, of another network, or of another method than asked for.
        GraphError: the network is malformed, or is not clean.
        TrtbuildError: scales are missing, or given for a network with Q/DQ of its own.
    """
    if config.output.exists() and not config.overwrite:
        raise OutputError("The output exists.", where=config.output, hint="choose another name, or add --overwrite")
    model = load_onnx(config.source)
    if any(node.op_type in QUANTIZERS for node in model.graph.node):
        typed, table = _with_its_own(config, model), None
    else:
        typed, table = _with_scales(config, model)
    result, left = typed.model, typed.left
    if config.rest != "fp32":
        lower = cast(result, config.rest, keep={} if config.rest == "bf16" else _sensitive(config, result, table))
        result, left = lower.model, (*left, *lower.left)
    save_onnx(result, config.output)
    return {"output": str(config.output), "int8": list(typed.quantized), "left": list(left)}


def _zero_point(config: QuantizeConfig) -> Literal["s8", "u8"]:
    return "s8" if config.backend == "tensorrt" else "u8"


def _with_its_own(config: QuantizeConfig, model: onnx.ModelProto) -> Quantized:
    """A network that came with Q/DQ, which stay: only their form becomes the backend's."""
    given = {
        "--scales": config.scales is not None,
        "--method": config.method is not None,
        "--keep": bool(config.keep),
        "--quantize-ends": config.quantize_ends,
    }
    unused = [option for option, is_given in given.items() if is_given]
    if unused:
        raise TrtbuildError(
            "The network comes with Q/DQ of its own, and needs none.",
            expected=f"no {unused[0]}",
            got=", ".join(unused),
            where=config.source,
            hint=f"leave {' and '.join(unused)} out: its layers and scales stay as they are",
        )
    if config.rest == "fp16":
        raise TrtbuildError(
            "FP16 needs the ranges of all tensors, which a network with Q/DQ of its own does not bring.",
            expected="--rest fp32 or bf16",
            got="--rest fp16",
            where=config.source,
        )
    model = tensorrt_form(model) if config.backend == "tensorrt" else model
    return quantize(model, {}, keep=(), zero_point=_zero_point(config))


def _with_scales(config: QuantizeConfig, source: onnx.ModelProto) -> tuple[Quantized, ScaleTable | None]:
    """A float network in INT8, and the table of its scales where they are one."""
    if config.scales is None:
        raise TrtbuildError(
            "INT8 needs scales: the network has no Q/DQ of its own.",
            expected="--scales",
            got="no scales",
            where=config.source,
            hint="trtbuild calibrate BUNDLE --calibration nnUNet_preprocessed/DatasetX -o FOLDER makes them",
        )
    model = clean(source, rewrite_conv_transpose=False, split_instance_norm=False).model
    model = tensorrt_form(model) if config.backend == "tensorrt" else model
    wanted = [name for name, _ in targets(model)]
    with as_input_errors():
        table = read_table(config.scales) if config.scales.suffix == ".json" else None
        amax = _from_cache(config, config.scales, wanted) if table is None else table.amax(config.method or DEFAULT)
    if table is not None:
        _check_network(config, source, table)
    kept = kept_layers(model, config.keep, ends=not config.quantize_ends)
    result = quantize(model, amax, keep=kept.keys(), zero_point=_zero_point(config))
    return replace(result, left=left_with_reasons(result.left, kept)), table


def _from_cache(config: QuantizeConfig, scales: Path, wanted: list[str]) -> dict[str, float]:
    cache = read_cache(scales)
    held = OF_KIND[cache.kind]
    if config.method not in (None, held):
        raise InputError(
            "A calibration cache holds the thresholds of one method.",
            expected=f"--method {held}, or none",
            got=f"--method {config.method}",
            where=scales,
            hint="the table that trtbuild calibrate writes beside it holds all of them",
        )
    return check_cache(cache, wanted)


def _check_network(config: QuantizeConfig, source: onnx.ModelProto, table: ScaleTable) -> None:
    """Folds of one model differ in their weights alone, so that names do not tell their scales apart."""
    found = hashlib.sha256(observed_form(source).SerializeToString()).hexdigest()
    if found != table.fingerprint.network:
        raise InputError(
            "The scales are not of this network.",
            expected=f"those of the network {found[:16]} ({config.source.name})",
            got=f"those of the network {table.fingerprint.network[:16]}",
            where=config.scales,
            hint="trtbuild calibrate the bundle that the network is from, and quantize the bundle's own file",
        )


def _sensitive(config: QuantizeConfig, model: onnx.ModelProto, table: ScaleTable | None) -> dict[str, str]:
    if table is None:
        raise InputError(
            "FP16 needs the ranges of all tensors, and a calibration cache holds those of a few.",
            expected="NAME.json of trtbuild calibrate",
            got="a cache",
            where=config.scales,
        )
    return dict(fp16_sensitive(model, table.ranges, norms=not config.fp16_norms))
