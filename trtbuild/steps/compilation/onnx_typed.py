"""A generic ONNX graph in the precision that its engine shall have: INT8, FP16 or BF16 written into it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from trtbuild.errors import InputError, TrtbuildError
from trtbuild.graph import check_model, clean, io_from_model, run_passes
from trtbuild.graph.drop_dead import DROP_DEAD
from trtbuild.graph.naming import FreeNames
from trtbuild.graph.precision import (
    HalfType,
    Quantized,
    cast,
    fp16_sensitive,
    quantize,
    tensorrt_form,
    weighted_layers,
)
from trtbuild.graph.precision.flow import QUANTIZERS, activations
from trtbuild.machine import usable_cores
from trtbuild.spec import TensorSpec
from trtbuild.steps.compilation.onnx_config import PERCENTILE, OnnxFileConfig
from trtbuild.steps.precision.arrays import Ranges, measured_ranges, patches_from_file
from trtbuild.steps.precision.decide import kept_layers, left_with_reasons

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]
SHOWN = 8
"""Names of layers that an error lists."""


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


def inputs_of(model: onnx.ModelProto) -> tuple[TensorSpec, ...]:
    """The inputs of a model, without its stored tensors."""
    specs = io_from_model(model)
    return specs[: len(specs) - len(model.graph.output)]


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
        check: called with the graph before anything is calibrated, to refuse it.

    Raises:
        TrtbuildError: the network does not go with the precision, INT8 has no arrays, or --keep finds no layer.
        InputError: the arrays cannot be used, or the network has not one float32 input to feed them to.
        GraphError: a pass failed, or the opset cannot be raised for BF16.
    """
    typed = _typed(config, model, report, say, check)
    return replace(typed, model=_with_interface_of(typed.model, model))


def _typed(
    config: OnnxFileConfig, model: onnx.ModelProto, report: Say, say: Say, check: Callable[[onnx.ModelProto], None]
) -> TypedGraph:
    live = run_passes(model, (DROP_DEAD,)).model  # what leads nowhere says nothing of the network, Q/DQ among it
    own = any(node.op_type in QUANTIZERS for node in live.graph.node)
    _check_own(config, own)
    plain = live if own else clean(live, rewrite_conv_transpose=False, split_instance_norm=False).model
    form = tensorrt_form(plain)
    check(form)
    kept = _kept(config, form) if config.precision == "int8" and not own else {}
    measured = None if config.calibration is None else _measured(config, model, plain, report, say)
    ranges = None if measured is None else measured.ranges
    typed = TypedGraph(model=form, patches=None if measured is None else measured.patches)
    if config.precision == "int8":
        int8 = _quantized(form, ranges, kept)
        notes = () if ranges is None else _zeros(form, ranges, int8.quantized)
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


@dataclass(frozen=True, kw_only=True)
class _Measured:
    ranges: Ranges
    patches: int


def _measured(
    config: OnnxFileConfig, model: onnx.ModelProto, plain: onnx.ModelProto, report: Say, say: Say
) -> _Measured:
    """Ranges of the clean network `plain`, whose input is called as in `model`, as the arrays call it."""
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
    chosen = f", thresholds by {config.threshold}" if config.threshold is not None else ""
    report(f"calibrating on {len(patches)} input{'s' * (len(patches) != 1)}{chosen}")
    threads = config.threads or usable_cores()
    ranges = measured_ranges(plain, patches, method=config.threshold or PERCENTILE, threads=threads, say=say)
    return _Measured(ranges=ranges, patches=len(patches))


def _kept(config: OnnxFileConfig, form: onnx.ModelProto) -> Mapping[str, str]:
    """The layers that stay in higher precision, and why. Names are those of the cleaned graph, which nobody has seen."""
    names = [layer.name for layer in weighted_layers(form)]
    for pattern in config.keep:
        if not any(re.search(pattern, name) for name in names):
            more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
            raise TrtbuildError("--keep finds no layer: names are those of the cleaned graph.", got=pattern,
                                expected=f"a part of one of: {', '.join(names[:SHOWN]) or 'none'}{more}",
                                where=config.model,
                                hint=f"trtbuild clean {config.model.name} -o CLEAN.onnx writes the graph with these "
                                     "names")  # fmt: skip
    return kept_layers(form, config.keep, ends=not config.quantize_ends)


def _zeros(form: onnx.ModelProto, ranges: Ranges, quantized: Sequence[str]) -> tuple[str, ...]:
    """What was zero in all arrays, but may be anything later: a scale of 1 then takes its place."""
    read = {layer.name: layer.activation for layer in weighted_layers(form)}
    dead = dict.fromkeys(read[name] for name in quantized if not ranges.amax.get(read[name]))
    return tuple(f"{tensor} is zero on all calibration arrays: its INT8 scale is 1, which is a guess" for tensor in dead)


def _quantized(form: onnx.ModelProto, ranges: Ranges | None, kept: Mapping[str, str]) -> Quantized:
    if ranges is None:  # a network with Q/DQ of its own
        return quantize(form, {}, keep=(), zero_point="s8")
    result = quantize(form, ranges.amax, keep=kept.keys(), zero_point="s8")
    return replace(result, left=left_with_reasons(result.left, kept))


def _sensitive(config: OnnxFileConfig, model: onnx.ModelProto, ranges: Ranges | None) -> dict[str, str]:
    """What stays float32 in FP16; with no ranges norms alone."""
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
