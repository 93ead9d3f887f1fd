"""What all networks of a compilation in lower precision share: the wishes, the judges, and how a network is judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from trtbuild.atomic import write_whole
from trtbuild.config import CalibrationConfig, CompileConfig
from trtbuild.engine import plain_record
from trtbuild.machine import usable_cores
from trtbuild.spec import BuildRecord, NetworkRecord, Precision
from trtbuild.steps.compilation.backends import Backends
from trtbuild.steps.compilation.networks import INFERENCE_PRECISION, Report
from trtbuild.steps.precision.decide import Decision, Int8Job, decide, kept_layers, methods_of, with_layers
from trtbuild.steps.precision.facts import Facts, calibration_facts
from trtbuild.steps.precision.gate import Gate
from trtbuild.steps.precision.judge import judged_engines
from trtbuild_calibration import ScaleTable

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]
Target = Literal["cpu", "device"]
"""For CPU backends, or for GPUs."""


@dataclass(frozen=True, kw_only=True)
class TypedNetwork:
    """A network that engines are built from, beside the FP32 network that it comes from.

    Attributes:
        target: what it is for; the graphs differ in their norms, their zero points and their ConvTransposes.
        record: of the network; the FP32 one itself for BF16 on a CPU, which computes it from that.
        content: its ONNX file; None where it is the FP32 network's.
        reference: what ONNX Runtime computes its golden logits with, where it cannot run `content` (BF16) or not well
            enough (its norms).
        layers: "int8" layers, "<name>: <reason>" of what is "kept" in a higher precision, and tensors with weights
            that are lost, "underflow"; as far as the precision has such.
        quantized: how many layers are in INT8.
        calibration: for the bundle's `calibrations`, with the files that belong to it; None where there was none.
        gates: for the bundle's `gates`, one per backend.
        failures: why it may not be used; empty where it may.
    """

    target: Target
    record: NetworkRecord
    content: bytes | None = field(repr=False)
    reference: bytes | None = field(default=None, repr=False)
    layers: Facts = field(default_factory=dict, repr=False)
    quantized: int = 0
    calibration: Facts | None = None
    files: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    gates: tuple[Facts, ...] = ()
    failures: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """What stays the same for all networks."""

    config: CompileConfig
    data: CalibrationConfig
    backends: Backends
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
        """What CPU backends compute in besides INT8, as engines and as judges."""
        return INFERENCE_PRECISION[self.config.cpu_rest if self.is_int8 else self.config.precision]

    def record(self, network: NetworkRecord, backend: str, *, inference_precision: str | None = None) -> BuildRecord:
        """How a network is run while it is judged."""
        computed = inference_precision or self.inference_precision
        return plain_record(network, backend=backend, inference_precision=computed, threads=self.threads)


def lower_record(network: NetworkRecord, precision: Precision, opset: int, target: Target) -> NetworkRecord:
    """The record of a network in `precision`, made from an FP32 one."""
    name = f"{network.id.removesuffix('_fp32')}_{precision}{'_tensorrt' * (target == 'device')}"
    zero_point: Literal["none", "s8", "u8"] = "none" if precision != "int8" else "u8" if target == "cpu" else "s8"
    return replace(
        network,
        id=name,
        file=f"networks/{name}.onnx",
        precision=precision,
        zero_point=zero_point,
        opset=opset,
        parent=network.id,
    )


def decided_int8(
    job: Job, model: onnx.ModelProto, table: ScaleTable, judge: BuildRecord, gate: Gate | None
) -> Decision:
    """What of `model` is quantised and how, by the wishes of the user and what `judge` computes."""
    work = Int8Job(
        model=model,
        table=table,
        methods=methods_of(job.config.method),
        kept=kept_layers(model, job.config.keep, ends=not job.config.quantize_ends),
        record=judge,
        gate=gate,
        scratch=job.scratch,
    )
    return decide(work, job.say)


def gates_of(
    job: Job, judges: list[BuildRecord], content: bytes, gate: Gate | None, decision: Decision | None = None
) -> tuple[tuple[Facts, ...], tuple[str, ...]]:
    """What the gate says of a network in the engines of `judges`, and why it may not be used."""
    if gate is None:
        return (), ()
    quantized = 0 if decision is None else len(decision.network.quantized)
    file = job.scratch / f"{judges[0].network}_gated.onnx"
    write_whole(file, content)
    records = [with_layers(record, quantized) for record in judges]
    return judged_engines(gate, records, file, decision, job.say)


def facts_of(network: NetworkRecord, typed: NetworkRecord, table: ScaleTable, more: Facts) -> Facts:
    """A calibration for the bundle: where it is, which network was made with it, and what came of it."""
    return {**calibration_facts(network, table), "typed": typed.id, **more}


def tell_lost(typed: TypedNetwork, report: Report) -> None:
    """Says which tensors hold weights that are too small for the precision; the bundle lists them."""
    lost = typed.layers.get("underflow", ())
    if lost:
        names = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        report(f"{typed.record.id}: weights too small for {typed.record.precision.upper()} in {names}")
