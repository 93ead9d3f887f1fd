"""What INT8 of a generic ONNX graph is made from: arrays, the ranges on them, and the layers that stay out of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from trtbuild.errors import InputError, TrtbuildError
from trtbuild.graph.precision import weighted_layers
from trtbuild.machine import usable_cores
from trtbuild.steps.compilation.onnx_config import PERCENTILE, OnnxFileConfig
from trtbuild.steps.compilation.onnx_interface import inputs_of
from trtbuild.steps.precision.arrays import ArrayPatches, Ranges, measured_ranges, patches_from_file
from trtbuild.steps.precision.decide import kept_layers

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]
SHOWN = 8
"""Names of layers that an error lists."""


def arrays_of(config: OnnxFileConfig, model: onnx.ModelProto) -> ArrayPatches | None:
    """The arrays to calibrate `model` on, None where there is to be no calibration.

    Raises:
        InputError: they cannot be used, or the network has not one float32 input with a fixed patch to feed them to.
    """
    if config.calibration is None:
        return None
    inputs = inputs_of(model)
    if len(inputs) != 1 or inputs[0].dtype != "float32":
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
    return patches_from_file(config.calibration, inputs[0])


def ranges_on(config: OnnxFileConfig, plain: onnx.ModelProto, patches: ArrayPatches, report: Say, say: Say) -> Ranges:
    """The ranges of a clean float32 network, as `measured_ranges`; `report` is told what they are made of."""
    chosen = f", thresholds by {config.threshold}" if config.threshold is not None else ""
    report(f"calibrating on {len(patches)} input{'s' * (len(patches) != 1)}{chosen}")
    threads = config.threads or usable_cores()
    return measured_ranges(plain, patches, method=config.threshold or PERCENTILE, threads=threads, say=say)


def kept_of(config: OnnxFileConfig, form: onnx.ModelProto) -> Mapping[str, str]:
    """The layers that stay in higher precision, and why.

    Names are those of the cleaned graph, which the user has not seen.

    Raises:
        TrtbuildError: --keep finds no layer, or leaves none to quantise.
    """
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


def guessed_scales(form: onnx.ModelProto, ranges: Ranges, quantized: Sequence[str]) -> tuple[str, ...]:
    """What was zero in all arrays, but may be anything later: `quantize` gives it a scale of 1."""
    read = {layer.name: layer.activation for layer in weighted_layers(form)}
    dead = dict.fromkeys(read[name] for name in quantized if not ranges.amax.get(read[name]))
    return tuple(
        f"the INT8 threshold of {tensor} is 0 on these arrays: its scale is 1, which is a guess" for tensor in dead
    )
