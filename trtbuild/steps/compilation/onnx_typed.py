"""A generic ONNX graph in the precision that its engine shall have: INT8, FP16 or BF16 written into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtbuild.errors import TrtbuildError
from trtbuild.graph import clean, run_passes
from trtbuild.graph.drop_dead import DROP_DEAD
from trtbuild.graph.precision import (
    HalfType,
    Quantized,
    cast,
    fp16_sensitive,
    quantize,
    tensorrt_form,
)
from trtbuild.graph.precision.flow import QUANTIZERS, activations
from trtbuild.steps.compilation.onnx_config import OnnxFileConfig
from trtbuild.steps.compilation.onnx_interface import with_interface_of
from trtbuild.steps.compilation.onnx_measured import arrays_of, guessed_scales, kept_of, ranges_on
from trtbuild.steps.precision.arrays import Ranges
from trtbuild.steps.precision.decide import left_with_reasons

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TypedGraph:
    """The graph, its layers in INT8, `<name>: <reason>` of what computes in higher precision than asked for, and notes.

    `patches` is how many inputs it was calibrated on, None without calibration. `notes` are what people should know of
    its accuracy.
    """

    model: onnx.ModelProto = field(repr=False)
    quantized: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    patches: int | None = None
    notes: tuple[str, ...] = ()


def typed_graph(
    config: OnnxFileConfig,
    model: onnx.ModelProto,
    report: Say,
    say: Say,
    check: Callable[[onnx.ModelProto], None] = lambda model: None,
) -> TypedGraph:
    """The graph that says what everything computes in, in the form that TensorRT takes.

    Inputs and outputs keep their names; nodes and what lies between get those of `trtbuild clean`.

    Args:
        config: the precision, and the arrays to calibrate on.
        model: float32, or with Q/DQ of its own. It is not changed.
        report: called with a line per step.
        say: called with what is under way, often.
        check: called with the float graph before it is calibrated, if it is, to refuse it.

    Raises:
        TrtbuildError: the network does not go with the precision, INT8 has no arrays, or --keep finds no layer.
        InputError: the arrays cannot be used, or the network has not one float32 input to feed them to.
        GraphError: a pass failed, or the opset cannot be raised for BF16.
    """
    typed = _typed(config, model, report, say, check)
    return replace(typed, model=with_interface_of(typed.model, model))


def _typed(
    config: OnnxFileConfig, model: onnx.ModelProto, report: Say, say: Say, check: Callable[[onnx.ModelProto], None]
) -> TypedGraph:
    live = run_passes(model, (DROP_DEAD,)).model  # what leads nowhere says nothing of the network, Q/DQ among it
    own = any(node.op_type in QUANTIZERS for node in live.graph.node)
    _check_own(config, own)
    patches = arrays_of(config, model)
    plain = live if own else clean(live, rewrite_conv_transpose=False, split_instance_norm=False).model
    form = tensorrt_form(plain)
    if patches is not None:  # a calibration takes long, and fails at the same operators with other words
        check(form)
    kept = kept_of(config, form) if config.precision == "int8" and not own else {}
    ranges = None if patches is None else ranges_on(config, plain, patches, report, say)
    typed = TypedGraph(model=form, patches=None if patches is None else len(patches))
    if config.precision == "int8":
        int8 = _quantized(form, ranges, kept)
        notes = () if ranges is None else guessed_scales(form, ranges, int8.quantized)
        typed = replace(typed, model=int8.model, quantized=int8.quantized, left=int8.left, notes=notes)
    return _lowered(config, typed, ranges)


def _lowered(config: OnnxFileConfig, typed: TypedGraph, ranges: Ranges | None) -> TypedGraph:
    """What is not in INT8 in the precision of the rest."""
    lower: HalfType
    notes = typed.notes
    if config.computed == "fp16":
        lower, keep = "fp16", _sensitive(config, typed.model, ranges)
        if ranges is None:
            notes += ("FP16 without calibration: nobody knows whether a value goes beyond 65504",)
    elif config.computed == "bf16":
        lower, keep = "bf16", {}
    else:
        return typed
    result = cast(typed.model, lower, keep=keep)
    if result.underflow:
        notes += (f"weights too small for {lower.upper()} in {len(result.underflow)} tensors",)
    return replace(typed, model=result.model, left=(*typed.left, *result.left), notes=notes)


def _check_own(config: OnnxFileConfig, own: bool) -> None:
    """A network with Q/DQ of its own is INT8 already; all others need arrays for it."""
    if own and config.precision != "int8":
        raise TrtbuildError("The network comes with Q/DQ of its own.", expected="--precision int8",
                            got=config.precision, where=config.model,
                            hint="--precision int8 --rest fp32 keeps the rest as it is")  # fmt: skip
    unused = {"--calibration-arrays": config.calibration is not None, "--method": config.method is not None,
              "--keep": bool(config.keep), "--quantize-ends": config.quantize_ends}  # fmt: skip
    given = [option for option, is_given in unused.items() if is_given]
    if own and given:
        raise TrtbuildError("The network comes with Q/DQ of its own, and needs none.", got=", ".join(given),
                            expected=f"no {given[0]}", where=config.model,
                            hint=f"leave {given[0]} out, or give the network without Q/DQ")  # fmt: skip
    if not own and config.precision == "int8" and config.calibration is None:
        raise TrtbuildError("INT8 needs arrays to measure the network's ranges on.", where=config.model,
                            expected="--calibration-arrays FILE (.npy, .npz or Polygraphy's .json)",
                            hint="without any, compile with --precision bf16, fp16 or fp32")  # fmt: skip


def _quantized(form: onnx.ModelProto, ranges: Ranges | None, kept: Mapping[str, str]) -> Quantized:
    if ranges is None:  # a network with Q/DQ of its own
        return quantize(form, {}, keep=(), zero_point="s8")
    result = quantize(form, ranges.amax, keep=kept.keys(), zero_point="s8")
    return replace(result, left=left_with_reasons(result.left, kept))


def _sensitive(config: OnnxFileConfig, model: onnx.ModelProto, ranges: Ranges | None) -> dict[str, str]:
    """What stays float32 in FP16; with no ranges norms alone."""
    largest = dict.fromkeys(activations(model), 0.0) if ranges is None else ranges.largest
    return dict(fp16_sensitive(model, largest, norms=not config.fp16_norms))
