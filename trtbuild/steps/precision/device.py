"""A network for TensorRT: one strongly typed graph per precision, judged on a CPU by a graph of the same numbers.

All have InstanceNormalization as one operator and their ConvTransposes rewritten as Conv and depth-to-space. What a
CPU computes in their place: INT8 with uint8 activations, which is the same grid, and its rest in float32 or OpenVINO's
bf16; FP16 as it is, in float32 with weights that are rounded to FP16; BF16 from the FP32 graph in OpenVINO's bf16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from trtbuild.errors import NonFinite
from trtbuild.graph import clean, opset_from_model
from trtbuild.graph.precision import Cast, cast, fp16_sensitive, tensorrt_form, with_zero_point
from trtbuild.spec import NetworkRecord
from trtbuild.steps.precision.decide import Decision
from trtbuild.steps.precision.facts import Facts, calibration_files
from trtbuild.steps.precision.gate import Gate
from trtbuild.steps.precision.job import Job, TypedNetwork, decided_int8, facts_of, gates_of, lower_record
from trtbuild.steps.precision.network import ObservedNetwork
from trtbuild_calibration import ScaleTable

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True, kw_only=True)
class _Lower:
    """A graph for TensorRT, and what is to be said of it. `reference` as in TypedNetwork."""

    model: onnx.ModelProto
    reference: bytes | None
    layers: Facts


def device_form(accurate: onnx.ModelProto) -> onnx.ModelProto:
    """A clean float32 network as TensorRT gets it."""
    return tensorrt_form(clean(accurate, rewrite_conv_transpose=False, split_instance_norm=False).model)


def device_fp32(network: NetworkRecord, accurate: onnx.ModelProto) -> TypedNetwork:
    """FP32: nothing to judge."""
    form = device_form(accurate)
    record = lower_record(network, "fp32", opset_from_model(form), "device")
    content: bytes = form.SerializeToString()
    return TypedNetwork(target="device", record=record, content=content, reference=_accurate(form))


def device_bf16(job: Job | None, network: NetworkRecord, accurate: onnx.ModelProto, gate: Gate | None) -> TypedNetwork:
    """BF16 has float32's range: everything is cast. `job` and `gate` are None where nothing judges."""
    form = device_form(accurate)
    lower = _lower(cast(form, "bf16", keep={}), reference=_accurate(form))
    record = lower_record(network, "bf16", opset_from_model(lower.model), "device")
    content: bytes = lower.model.SerializeToString()
    typed = TypedNetwork(
        target="device", record=record, content=content, reference=lower.reference, layers=lower.layers
    )
    if job is None or gate is None:
        return typed
    judges = [job.record(record, job.backends.judges[0], inference_precision="bf16")]
    gates, failures = gates_of(job, judges, form.SerializeToString(), gate)
    return replace(typed, gates=gates, failures=failures)


def device_fp16(
    job: Job, network: NetworkRecord, accurate: onnx.ModelProto, table: ScaleTable, gate: Gate | None
) -> TypedNetwork:
    """FP16 where the ranges of the calibration allow it."""
    lower = _fp16(device_form(accurate), table.ranges, norms=not job.config.fp16_norms)
    record = lower_record(network, "fp16", opset_from_model(lower.model), "device")
    content: bytes = lower.model.SerializeToString()
    judges = [job.record(record, job.backends.judges[0], inference_precision="f32")]
    gates, failures = gates_of(job, judges, content, gate)
    return TypedNetwork(
        target="device",
        record=record,
        content=content,
        layers=lower.layers,
        calibration=facts_of(network, record, table, {"layers": lower.layers}),
        files=calibration_files(network, table),
        gates=gates,
        failures=failures,
    )


def device_fp16_uncalibrated(
    network: NetworkRecord, accurate: onnx.ModelProto, patch: NDArray[np.float32], *, norms: bool, threads: int
) -> TypedNetwork:
    """FP16 by the ranges of the golden patch (1, C, *patch) alone. What leaves FP16's range at run time becomes
    infinite, and stops its case there."""
    observed = ObservedNetwork(model=accurate, patch=patch.shape[1:], threads=threads)
    with observed.maxima() as maxima:
        ranges = maxima(patch[0])
    lower = _fp16(device_form(accurate), ranges, norms=norms)
    if not all(np.isfinite(value) for value in ranges.values()):
        raise NonFinite("The network returns NaN or infinity for its golden patch.", expected="finite activations",
                        where=network.id)  # fmt: skip
    record = lower_record(network, "fp16", opset_from_model(lower.model), "device")
    content: bytes = lower.model.SerializeToString()
    return TypedNetwork(target="device", record=record, content=content, layers=lower.layers)


def device_int8(
    job: Job, network: NetworkRecord, accurate: onnx.ModelProto, table: ScaleTable, gate: Gate | None
) -> TypedNetwork:
    """INT8, decided on the graph with uint8 activations; built is its twin with zero point 0 and a typed rest."""
    form = device_form(accurate)
    record = lower_record(network, "int8", opset_from_model(form), "device")
    judge = job.record(record, job.backends.judges[0])
    if gate is not None:
        job.report(f"gating INT8 of {network.id} for TensorRT")
    decision = decided_int8(job, form, table, judge, gate)
    gates, failures = gates_of(job, [judge], decision.network.model.SerializeToString(), gate, decision)
    lower = _rest(job, decision, table)
    content: bytes = lower.model.SerializeToString()
    return TypedNetwork(
        target="device",
        record=replace(record, opset=opset_from_model(lower.model)),
        content=content,
        reference=lower.reference,
        layers=lower.layers,
        quantized=len(decision.network.quantized),
        calibration=facts_of(network, record, table, {"method": decision.method, "layers": lower.layers}),
        files=calibration_files(network, table),
        gates=gates,
        failures=failures,
    )


def _rest(job: Job, decision: Decision, table: ScaleTable) -> _Lower:
    """The built twin of what was decided, with everything that is not in INT8 in the precision that was asked for."""
    model = with_zero_point(decision.network.model, "s8")
    layers = {"int8": list(decision.network.quantized), "kept": list(decision.left), "underflow": list[str]()}
    if job.config.device_rest == "fp32":
        return _Lower(model=model, reference=None, layers=layers)
    if job.config.device_rest == "bf16":
        lower = _lower(cast(model, "bf16", keep={}), reference=model.SerializeToString())
    else:
        lower = _fp16(model, table.ranges, norms=not job.config.fp16_norms)
    kept = [*layers["kept"], *lower.layers["kept"]]
    return replace(lower, layers={**layers, **lower.layers, "kept": kept})


def _fp16(model: onnx.ModelProto, ranges: Mapping[str, float], *, norms: bool) -> _Lower:
    """With `norms` these stay float32."""
    return _lower(cast(model, "fp16", keep=fp16_sensitive(model, ranges, norms=norms)))


def _lower(result: Cast, reference: bytes | None = None) -> _Lower:
    layers = {"kept": list(result.left), "underflow": list(result.underflow)}
    return _Lower(model=result.model, reference=reference, layers=layers)


def _accurate(form: onnx.ModelProto) -> bytes:
    """The same with norms written out: ONNX Runtime's own norm is off by up to 7e-4 of the largest logit at 128^3."""
    model: bytes = clean(form, rewrite_conv_transpose=False, split_instance_norm=True).model.SerializeToString()
    return model
