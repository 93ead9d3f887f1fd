"""Any ONNX file -> a TensorRT engine beside the typed graph that it was built from; no nnU-Net, no bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from trtbuild.engine.tensorrt import Plan, Shapes, unsupported
from trtbuild.engine.tensorrt.build import check_wishes
from trtbuild.engine.tensorrt.layers_file import layers_file
from trtbuild.engine.tensorrt.record import record_from_plan, target_device
from trtbuild.engine.tensorrt.reuse import engine_key, plan_or_build
from trtbuild.engine.tensorrt.script import equivalent_commands, script
from trtbuild.errors import EngineError, GraphError
from trtbuild.graph import load_onnx
from trtbuild.graph.cost import operations
from trtbuild.nvinfer import Nvinfer, nvinfer
from trtbuild.spec import BuildRecord, json_from_value
from trtbuild.steps.compilation.onnx_config import OnnxFileConfig
from trtbuild.steps.compilation.onnx_interface import inputs_of
from trtbuild.steps.compilation.onnx_outputs import check_paths, write_outputs
from trtbuild.steps.compilation.onnx_shapes import profile_of
from trtbuild.steps.compilation.onnx_typed import TypedGraph, typed_graph

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]
PRECISION = ("method", "patches", "quantized", "left")
"""What NAME.engine.json says of how the precision came about."""


@dataclass(frozen=True, kw_only=True)
class CompiledOnnx:
    """What was made: the engine's record, the layers in INT8, and `<name>: <reason>` of what stayed higher.

    `method` is how INT8 thresholds were chosen and `patches` on how many inputs the network was calibrated; None where
    it was not. `warnings` are of its accuracy, and TensorRT's own, which say so.
    """

    record: BuildRecord
    method: str | None
    patches: int | None
    quantized: tuple[str, ...]
    left: tuple[str, ...]
    warnings: tuple[str, ...]


def compile_onnx_file(config: OnnxFileConfig, report: Say, say: Say) -> CompiledOnnx:
    """Writes NAME.engine (the raw plan), NAME.onnx (the typed graph) and NAME.engine.json (all that is known of them).

    Args:
        config: what to compile.
        report: called with a line per step.
        say: called with what is under way, often.

    Raises:
        OutputError: an output exists, or cannot be written.
        GraphError: the network is malformed, or cannot be brought into the precision.
        InputError: the calibration arrays cannot be used.
        EngineError: TensorRT does not build it; nodes that it does not know are all named.
        TrtbuildError: the wishes do not go together.
    """
    check_paths(config)
    flavour = nvinfer(config.backend)
    check_wishes(config.tensorrt, flavour)
    model = load_onnx(config.model)
    shapes = profile_of(config, inputs_of(model))
    check = partial(_check_operators, config, flavour)
    typed = typed_graph(config, model, report, say, check)
    check(typed.model)
    content: bytes = typed.model.SerializeToString(deterministic=True)
    device = target_device(config.tensorrt, flavour)
    plan = plan_or_build(
        content,
        name=config.output.stem,
        nvinfer=flavour,
        config=config.tensorrt,
        shapes=shapes,
        device=device,
        tell=lambda phase, done: say(f"{phase}, {done:.0%}"),
        report=report,
    )
    record = record_from_plan(
        plan,
        network=config.output.stem,
        file=config.output.name,
        precision=config.precision,
        rest=config.computed,
        nvinfer=flavour,
        config=config.tensorrt,
        shapes=shapes,
        device=device,
        key=engine_key(content, config.tensorrt, flavour, shapes, device),
    )
    compiled = _compiled(config, typed, plan, record)
    write_outputs(
        config,
        engine=plan.content,
        onnx=content,
        facts=_facts(compiled, plan, _operations(typed.model, shapes, report)),
        script=None if config.emit_script is None else _script(config, shapes),
    )
    return compiled


def _check_operators(config: OnnxFileConfig, flavour: Nvinfer, model: onnx.ModelProto) -> None:
    unknown = unsupported(model.SerializeToString(), flavour)
    if unknown:
        raise EngineError(f"{flavour.backend} {flavour.version} cannot build this network.", got="; ".join(unknown[:5]),
                          expected="operators that its ONNX parser knows", where=config.model,
                          hint="replace these nodes, and export the network again")  # fmt: skip


def _compiled(config: OnnxFileConfig, typed: TypedGraph, plan: Plan, record: BuildRecord) -> CompiledOnnx:
    """`record` with how thresholds were chosen, if they were."""
    calibrated = {"method": config.threshold, "patches": typed.patches}
    options = {f"calibration_{name}": value for name, value in calibrated.items() if value is not None}
    return CompiledOnnx(
        record=replace(record, options={**record.options, **options}),
        method=config.threshold,
        patches=typed.patches,
        quantized=typed.quantized,
        left=typed.left,
        warnings=(*typed.notes, *(f"TensorRT: {line}" for line in plan.warnings)),
    )


def _operations(model: onnx.ModelProto, shapes: Shapes, report: Say) -> Mapping[str, int]:
    """Per layer at the usual sizes, for one item of a free batch; nothing, and why, where that cannot be told."""
    sized = type(model)()
    sized.CopyFrom(model)
    sized.graph.ClearField("value_info")
    for value in sized.graph.input:
        usual = shapes[value.name][1] if value.name in shapes else ()
        for size, dimension in zip(usual[1:], value.type.tensor_type.shape.dim[1:], strict=False):
            dimension.dim_value = size
    try:
        return operations(sized)
    except GraphError as error:
        report(f"the operations of the layers are not known: {' '.join(str(error).split())}")
        return {}


def _facts(compiled: CompiledOnnx, plan: Plan, counted: Mapping[str, int]) -> bytes:
    facts: dict[str, Any] = {
        "record": json_from_value(compiled.record),
        "precision": {name: json_from_value(getattr(compiled, name)) for name in PRECISION},
        "warnings": list(compiled.warnings),
        "inputs": json_from_value(plan.inputs),
        "outputs": json_from_value(plan.outputs),
        "layers": None if plan.table is None else json.loads(layers_file(plan.table, counted)),
    }
    return json.dumps(facts, indent=2).encode()


def _script(config: OnnxFileConfig, shapes: Shapes) -> bytes:
    commands = equivalent_commands(
        config.tensorrt, shapes, onnx=config.onnx.name, engine=config.output.name, backend=config.backend
    )
    return script(f"Builds {config.output.name} of {config.onnx.name}.", commands)
