"""A generic ONNX graph in the precision that its engine shall have: INT8, FP16 or BF16 written into it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtbuild.errors import InputError, TrtbuildError
from trtbuild.graph import check_model, clean, io_from_model
from trtbuild.graph.naming import FreeNames
from trtbuild.graph.precision import HalfType, Quantized, cast, fp16_sensitive, quantize, tensorrt_form
from trtbuild.graph.precision.flow import QUANTIZERS, activations
from trtbuild.machine import usable_cores
from trtbuild.spec import TensorSpec
from trtbuild.steps.compilation.onnx_config import OnnxFileConfig
from trtbuild.steps.precision.arrays import Ranges, measured_ranges, patches_from_file
from trtbuild.steps.precision.decide import kept_layers, left_with_reasons

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class TypedGraph:
    """The graph, its layers in INT8, and `<name>: <reason>` of what computes in higher precision than asked for."""

    model: onnx.ModelProto = field(repr=False)
    quantized: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


def inputs_of(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The inputs of a model, without its stored tensors."""
    specs = io_from_model(model)
    return specs[: len(specs) - len(model.graph.output)]


def typed_graph(config: OnnxFileConfig, model: onnx.ModelProto, report: Say, say: Say) -> TypedGraph:
    """The graph that says what everything computes in, in the form that TensorRT takes.

    Inputs and outputs keep their names; nodes and what lies between get those of `trtbuild clean`.

    Args:
        config: the precision, and the arrays to calibrate on.
        model: float32, or with Q/DQ of its own. It is not changed.
        report: called with a line per step.
        say: called with what is under way, often.

    Raises:
        TrtbuildError: the network does not go with the precision, or INT8 has no arrays.
        InputError: the arrays cannot be used, or the network has not one float32 input to feed them to.
        GraphError: a pass failed, or the opset cannot be raised for BF16.
    """
    typed = _typed(config, model, report, say)
    return replace(typed, model=_with_interface_of(typed.model, model))


def _typed(config: OnnxFileConfig, model: onnx.ModelProto, report: Say, say: Say) -> TypedGraph:
    own = any(node.op_type in QUANTIZERS for node in model.graph.node)
    _check_own(config, own)
    ranges = None if config.calibration is None else _ranges(config, model, report, say)
    plain = model if own else clean(model, rewrite_conv_transpose=False, split_instance_norm=False).model
    form = tensorrt_form(plain)
    typed = TypedGraph(model=form)
    if config.precision == "int8":
        int8 = _quantized(config, form, ranges, own=own)
        typed = TypedGraph(model=int8.model, quantized=int8.quantized, left=int8.left)
    lower: HalfType
    if config.computed == "fp16":
        lower, keep = "fp16", _sensitive(config, typed.model, ranges, report)
    elif config.computed == "bf16":
        lower, keep = "bf16", {}
    else:
        return typed
    result = cast(typed.model, lower, keep=keep)
    if result.underflow:
        report(f"weights too small for {lower.upper()} in {len(result.underflow)} tensors")
    return replace(typed, model=result.model, left=(*typed.left, *result.left))


def _check_own(config: OnnxFileConfig, own: bool) -> None:
    """A network with Q/DQ of its own is INT8 already; all others need arrays for it."""
    if own and config.precision != "int8":
        raise TrtbuildError("The network comes with Q/DQ of its own.", expected="--precision int8",
                            got=config.precision, where=config.model)  # fmt: skip
    unused = {"--calibration-arrays": config.calibration is not None, "--method": config.method is not None,
              "--keep": bool(config.keep), "--quantize-ends": config.quantize_ends}  # fmt: skip
    given = [option for option, is_given in unused.items() if is_given]
    if own and given:
        raise TrtbuildError("The network comes with Q/DQ of its own, and needs none.", got=", ".join(given),
                            expected=f"no {given[0]}", where=config.model)  # fmt: skip
    if not own and config.precision == "int8" and config.calibration is None:
        raise TrtbuildError("INT8 needs arrays to measure the network's ranges on.", where=config.model,
                            expected="--calibration-arrays FILE (.npy, .npz or Polygraphy's .json)",
                            hint="without any, compile with --precision bf16, fp16 or fp32")  # fmt: skip


def _ranges(config: OnnxFileConfig, model: onnx.ModelProto, report: Say, say: Say) -> Ranges:
    inputs = inputs_of(model)
    if config.calibration is None or len(inputs) != 1 or inputs[0].dtype != "float32":
        raise InputError("Only networks with one float32 input are calibrated.", where=config.model,
                         expected="one float32 input (batch, ...)",
                         got=", ".join(f"{spec.name} ({spec.dtype})" for spec in inputs),
                         hint="compile with --precision bf16, fp32, or fp16 without calibration")  # fmt: skip
    shape = inputs[0].shape
    if not shape or shape[0] not in (1, *(n for n in shape[:1] if isinstance(n, str))) or not all(
        isinstance(n, int) for n in shape[1:]
    ):  # fmt: skip
        raise InputError("Only networks with a fixed patch are calibrated.", got=shape, where=f"input {inputs[0].name}",
                         expected="a first dimension that is free or 1, and numbers behind it",
                         hint="export the network with fixed shapes but for the batch")  # fmt: skip
    patches = patches_from_file(config.calibration, inputs[0])
    report(f"calibrating on {len(patches)} input{'s' * (len(patches) != 1)}")
    accurate = clean(model, rewrite_conv_transpose=False, split_instance_norm=False).model
    threads = config.threads or usable_cores()
    method = config.method or "percentile"
    return measured_ranges(accurate, patches, method=method, threads=threads, say=say)


def _quantized(config: OnnxFileConfig, form: onnx.ModelProto, ranges: Ranges | None, *, own: bool) -> Quantized:
    if own or ranges is None:
        return quantize(form, {}, keep=(), zero_point="s8")
    kept = kept_layers(form, config.keep, ends=not config.quantize_ends)
    result = quantize(form, ranges.amax, keep=kept.keys(), zero_point="s8")
    return replace(result, left=left_with_reasons(result.left, kept))


def _sensitive(config: OnnxFileConfig, model: onnx.ModelProto, ranges: Ranges | None, report: Say) -> dict[str, str]:
    """What stays float32 in FP16; with no ranges norms alone, which is said."""
    if ranges is None:
        report("FP16 without calibration: nobody knows whether a value goes beyond 65504")
    largest = dict.fromkeys(activations(model), 0.0) if ranges is None else ranges.largest
    return dict(fp16_sensitive(model, largest, norms=not config.fp16_norms))


def _with_interface_of(model: onnx.ModelProto, before: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with the names of the inputs and outputs of `before`; an inner tensor that has one of these gives way."""
    names = {spec.name: old.name for spec, old in zip(io_from_model(model), io_from_model(before), strict=True)}
    if all(new == old for new, old in names.items()):
        return model
    result = type(model)()
    result.CopyFrom(model)
    graph = result.graph
    inner = {name for node in graph.node for name in (*node.input, *node.output)} - names.keys()
    free = FreeNames(inner | set(names.values()))
    names |= {name: free.free(name) for name in sorted(inner & set(names.values()))}
    for node in graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    for part in (*graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.name = names.get(part.name, part.name)
    check_model(result, where="the graph with its own inputs and outputs")
    return result
