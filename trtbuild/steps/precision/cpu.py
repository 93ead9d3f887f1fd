"""A network in lower precision for CPU backends: INT8 with uint8 activations, FP16, BF16 as OpenVINO computes it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trtbuild.graph import clean, opset_from_model
from trtbuild.graph.precision import cast, fp16_sensitive
from trtbuild.spec import NetworkRecord
from trtbuild.steps.precision.facts import calibration_files
from trtbuild.steps.precision.gate import Gate
from trtbuild.steps.precision.job import Job, TypedNetwork, decided_int8, facts_of, gates_of, lower_record
from trtbuild_calibration import ScaleTable

if TYPE_CHECKING:
    import onnx


def cpu_bf16(job: Job, network: NetworkRecord, content: bytes, gate: Gate | None) -> TypedNetwork:
    """BF16 from the FP32 network itself: the backend computes in it."""
    judges = [job.record(network, backend) for backend in job.backends.cpu]
    gates, failures = gates_of(job, judges, content, gate)
    return TypedNetwork(target="cpu", record=network, content=None, gates=gates, failures=failures)


def cpu_int8(
    job: Job, network: NetworkRecord, accurate: onnx.ModelProto, table: ScaleTable, gate: Gate | None
) -> TypedNetwork:
    """INT8, by the gate's contest of methods and its roll-back."""
    # the backends' own norm: in INT8 its rounding is a tenth of the quantisation's, and writing it out costs a tenth
    model = clean(accurate, rewrite_conv_transpose=False, split_instance_norm=False).model
    typed = lower_record(network, "int8", opset_from_model(model), "cpu")
    judges = [job.record(typed, backend) for backend in job.backends.cpu]
    if gate is not None:
        job.report(f"gating INT8 of {network.id}")
    decision = decided_int8(job, model, table, judges[0], gate)
    content: bytes = decision.network.model.SerializeToString()
    gates, failures = gates_of(job, judges, content, gate, decision)
    layers = {"int8": list(decision.network.quantized), "kept": list(decision.left)}
    return TypedNetwork(
        target="cpu",
        record=typed,
        content=content,
        quantized=len(decision.network.quantized),
        calibration=facts_of(network, typed, table, {"method": decision.method, "layers": layers}),
        files=calibration_files(network, table),
        gates=gates,
        failures=failures,
    )


def cpu_fp16(
    job: Job, network: NetworkRecord, accurate: onnx.ModelProto, table: ScaleTable, gate: Gate | None
) -> TypedNetwork:
    """FP16 where the measured ranges allow it; a CPU computes it in float32."""
    result = cast(accurate, "fp16", keep=fp16_sensitive(accurate, table.ranges))
    typed = lower_record(network, "fp16", opset_from_model(result.model), "cpu")
    content: bytes = result.model.SerializeToString()
    gates, failures = gates_of(job, [job.record(typed, name) for name in job.backends.cpu], content, gate)
    layers = {"kept": list(result.left), "underflow": list(result.underflow)}
    return TypedNetwork(
        target="cpu",
        record=typed,
        content=content,
        layers=layers,
        calibration=facts_of(network, typed, table, {"layers": layers}),
        files=calibration_files(network, table),
        gates=gates,
        failures=failures,
    )
