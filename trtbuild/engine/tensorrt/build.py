"""Typed ONNX -> strongly typed network -> plan: one path for TensorRT 10, TensorRT 11 and TensorRT-RTX."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.config import TensorRTConfig
from trtbuild.engine.tensorrt.failures import build_failure, profile_failure
from trtbuild.engine.tensorrt.logger import WARNING, Rows, new_logger
from trtbuild.engine.tensorrt.parse import new_builder, parsed, unsupported
from trtbuild.engine.tensorrt.progress import Stop, Tell, kept_interrupts, new_monitor, silent
from trtbuild.engine.tensorrt.settings import check_config, new_config
from trtbuild.engine.tensorrt.shapes import check_shapes, shapes_from_io
from trtbuild.engine.tensorrt.table import table_from_inspector, table_from_log
from trtbuild.engine.tensorrt.values import EngineTable, Plan, Shapes
from trtbuild.errors import EngineError
from trtbuild.machine import give_back_memory
from trtbuild.nvinfer import Nvinfer, no_driver
from trtbuild.spec import TensorSpec

__all__ = ["Tell", "check_wishes", "plan_from_onnx", "shapes_from_io", "silent", "unsupported"]

DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Run:
    """What one build works with."""

    nvinfer: Nvinfer
    config: TensorRTConfig
    tell: Tell
    rows: Rows
    stop: Stop
    logger: Any


@dataclass(frozen=True, kw_only=True)
class _Built:
    content: bytes
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    timing_cache: bytes | None


def plan_from_onnx(
    model: bytes | Path,
    *,
    nvinfer: Nvinfer,
    config: TensorRTConfig,
    shapes: Shapes,
    tell: Tell = silent,
    timing_cache: bytes = b"",
) -> Plan:
    """Build an engine.

    Args:
        model: ONNX with its weights inside; its types are the engine's precision. A file costs its size less memory
            than bytes, which stay as long as the build: 0.6 GB of 2.7 GB for a ResidualEncoderUNet M in 2D and FP32.
        nvinfer: the flavour of TensorRT.
        config: its batches are not looked at: `shapes` says them.
        shapes: smallest, usual and largest shape of every input with free dimensions.
        tell: what it raises stops the build and is raised again, as is what Ctrl-C raises.
        timing_cache: of an earlier build on the same GPU and version; a fitting one makes the build faster.

    Raises:
        EngineError: the model, the shapes or the configuration do not go with this TensorRT, or the build failed; the
            message names the ONNX node as far as TensorRT does.
        OutOfMemory: neither the workspace nor the memory suffices.
        Cancelled: the build was stopped, nobody knows by what.
    """
    start = time.perf_counter()
    check_config(config, nvinfer)
    tell("Reading the ONNX graph", 0.0)
    rows, stop = Rows(), Stop()
    logger = new_logger(nvinfer.module, rows, verbose=config.verbose)
    run = _Run(nvinfer=nvinfer, config=config, tell=tell, rows=rows, stop=stop, logger=logger)
    try:
        with kept_interrupts(stop):
            built = _built(run, model, shapes, timing_cache)
        stop.check()
    finally:
        give_back_memory()  # weights and kernels, several times the plan
    table, trouble = _table(run, built.content)
    plan = Plan(
        content=built.content,
        inputs=built.inputs,
        outputs=built.outputs,
        table=table,
        warnings=(*rows.warnings(), *trouble),
        seconds=time.perf_counter() - start,
        timing_cache=built.timing_cache,
    )
    tell("The engine is built", 1.0)
    return plan


def check_wishes(config: TensorRTConfig, nvinfer: Nvinfer) -> None:
    """Before any work: whether something comes of all that a configuration asks for, whether it is built or kept.

    Raises:
        EngineError: the flavour lacks something.
    """
    check_config(config, nvinfer)
    if not config.timing_cache and not nvinfer.features.timing_cache:
        raise EngineError(f"{nvinfer.backend} has no timing cache.", expected="no --noTimingCache",
                          got="--noTimingCache", where=nvinfer.flavour,
                          hint="leave --noTimingCache out, or use --backend tensorrt")  # fmt: skip


def _built(run: _Run, model: bytes | Path, shapes: Shapes, timing_cache: bytes) -> _Built:
    """The plan as bytes of Python's; all that TensorRT made for it is gone when this returns."""
    builder = new_builder(run.nvinfer, run.logger, run.rows)
    network, parser = parsed(run.nvinfer, builder, run.logger, model)
    run.stop.check()
    inputs, outputs = _tensors(network)
    check_shapes(inputs, shapes)
    settings = new_config(builder, run.nvinfer, run.config, shapes)
    cache = _timing_cache(run, settings, timing_cache)
    monitor = new_monitor(run.nvinfer.module, run.tell, run.stop)
    settings.progress_monitor = monitor
    plan = builder.build_serialized_network(network, settings)
    run.stop.check()
    if plan is None:
        raise build_failure(run.rows, workspace=run.config.workspace)
    trouble = profile_failure(run.rows)
    if trouble is not None:
        raise trouble
    kept = None if cache is None else cache.serialize()  # None where there is no memory for it
    written = None if kept is None else bytes(kept)
    # In the order in which they stand on each other; and before the copy, as the parser holds all weights once more
    del kept, cache, settings, monitor, parser, network, builder
    return _Built(content=bytes(plan), inputs=inputs, outputs=outputs, timing_cache=written)


def _timing_cache(run: _Run, settings: Any, known: bytes) -> Any:
    """The cache that the build fills, None where the flavour has none or it is not wanted.

    One of another GPU or version is left out, as the log's warnings say then; a new one takes its place.
    """
    if not (run.nvinfer.features.timing_cache and run.config.timing_cache):
        return None
    for content in dict.fromkeys((known, b"")):
        cache = settings.create_timing_cache(content)
        if cache is not None and settings.set_timing_cache(cache, ignore_mismatch=False):
            return cache
        run.rows.all.append((WARNING, "The timing cache cannot be used here; a new one is made."))
    raise EngineError("TensorRT makes no timing cache.", got="; ".join(run.rows.errors()) or "no message",
                      where=run.nvinfer.flavour, hint="--noTimingCache")  # fmt: skip


def _tensors(network: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs. The parser names free dimensions of inputs only; those of outputs get an input's name where
    they are on the same axis."""
    inputs = tuple(_spec(network.get_input(index), {}) for index in range(network.num_inputs))
    names = {axis: name for spec in reversed(inputs) for axis, name in enumerate(spec.shape) if isinstance(name, str)}
    return inputs, tuple(_spec(network.get_output(index), names) for index in range(network.num_outputs))


def _spec(tensor: Any, names: Mapping[int, str]) -> TensorSpec:
    if tensor.dtype.name not in DTYPES:
        raise EngineError("A tensor's type is not supported.", expected=", ".join(DTYPES.values()),
                          got=tensor.dtype.name, where=tensor.name)  # fmt: skip
    shape = tuple(
        n if n >= 0 else tensor.get_dimension_name(axis) or names.get(axis) or f"{tensor.name}_{axis}"
        for axis, n in enumerate(map(int, tensor.shape))
    )
    return TensorSpec(name=tensor.name, dtype=DTYPES[tensor.dtype.name], shape=shape)


def _table(run: _Run, plan: bytes) -> tuple[EngineTable | None, tuple[str, ...]]:
    """The layer table, and why there is none: a good engine is not thrown away because its log reads differently."""
    try:
        return table_from_log(run.rows.messages()) or _inspected(run, plan), ()
    except EngineError as error:
        return None, (f"The layers of the engine are not known. {error}",)


def _inspected(run: _Run, plan: bytes) -> EngineTable | None:
    """The layer table of a plan that can be opened here: of a flavour that logs none."""
    if no_driver() is not None:
        return None
    trt = run.nvinfer.module
    engine = trt.Runtime(run.logger).deserialize_cuda_engine(plan)
    if engine is None:
        return None
    text = engine.create_engine_inspector().get_engine_information(trt.LayerInformationFormat.JSON)
    return table_from_inspector(text)
