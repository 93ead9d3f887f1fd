"""Any ONNX file -> a TensorRT engine beside the typed graph that it was built from; no nnU-Net, no bundle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from trtbuild.atomic import write_whole
from trtbuild.engine.tensorrt import Plan, Shapes, unsupported
from trtbuild.engine.tensorrt.layers_file import layers_file
from trtbuild.engine.tensorrt.record import record_from_plan, target_device
from trtbuild.engine.tensorrt.reuse import engine_key, plan_or_build
from trtbuild.engine.tensorrt.script import equivalent_commands, script
from trtbuild.errors import EngineError, GraphError, OutputError
from trtbuild.graph import load_onnx
from trtbuild.graph.cost import operations
from trtbuild.nvinfer import nvinfer
from trtbuild.spec import BuildRecord, json_from_value
from trtbuild.steps.compilation.onnx_config import OnnxFileConfig, profile_of
from trtbuild.steps.compilation.onnx_typed import inputs_of, typed_graph

if TYPE_CHECKING:
    import onnx

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class CompiledOnnx:
    """What was made: the engine's record, the layers in INT8, and `<name>: <reason>` of what stayed higher."""

    record: BuildRecord
    quantized: tuple[str, ...]
    left: tuple[str, ...]
    warnings: tuple[str, ...]


def compile_onnx_file(config: OnnxFileConfig, report: Say, say: Say) -> CompiledOnnx:
    """Writes NAME.engine (the raw plan), NAME.onnx (the typed graph) and NAME.engine.json (BuildRecord, layer table).

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
    _check_outputs(config)
    flavour = nvinfer(config.backend)
    model = load_onnx(config.model)
    shapes = profile_of(config, inputs_of(model))
    typed = typed_graph(config, model, report, say)
    content: bytes = typed.model.SerializeToString(deterministic=True)
    unknown = unsupported(content, flavour)
    if unknown:
        raise EngineError(f"{flavour.backend} {flavour.version} cannot build this network.", got="; ".join(unknown[:5]),
                          expected="operators that its ONNX parser knows", where=config.model)  # fmt: skip
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
    _write(config, plan, content, record, _operations(typed.model, shapes, report))
    if config.emit_script is not None:
        commands = equivalent_commands(
            config.tensorrt, shapes, onnx=config.onnx.name, engine=config.output.name, backend=config.backend
        )
        write_whole(config.emit_script, script(f"Builds {config.output.name} of {config.onnx.name}.", commands))
    return CompiledOnnx(record=record, quantized=typed.quantized, left=typed.left, warnings=plan.warnings)


def _check_outputs(config: OnnxFileConfig) -> None:
    if not config.output.parent.is_dir():
        raise OutputError("There is no such folder.", where=config.output.parent, hint="make it, or choose another one")
    for path in (config.output, config.onnx, config.facts):
        if path.exists() and not config.overwrite:
            raise OutputError("The output exists.", where=path, hint="choose another name, or add --overwrite")


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


def _write(config: OnnxFileConfig, plan: Plan, content: bytes, record: BuildRecord, counted: Mapping[str, int]) -> None:
    facts: dict[str, Any] = {
        "record": json_from_value(record),
        "inputs": json_from_value(plan.inputs),
        "outputs": json_from_value(plan.outputs),
        "layers": None if plan.table is None else json.loads(layers_file(plan.table, counted)),
    }
    write_whole(config.onnx, content)
    write_whole(config.output, plan.content)
    write_whole(config.facts, json.dumps(facts, indent=2).encode())
