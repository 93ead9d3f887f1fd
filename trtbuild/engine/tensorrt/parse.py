"""ONNX bytes -> a strongly typed network."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from trtbuild.engine.tensorrt.failures import parse_failure, without_gpu
from trtbuild.engine.tensorrt.logger import Rows, new_logger, sentence
from trtbuild.errors import EngineError, OutOfMemory
from trtbuild.nvinfer import Nvinfer, no_driver

TYPES = re.compile(r"must (be|have|be of) (of )?(the )?same (input |data )?types?|same type\b", re.IGNORECASE)
PLUGIN = re.compile(r'creator && "Plugin not found')
NOISE = re.compile(r"^Invalid Node - |catchCudaError")
FOLLOWS = re.compile(r"can not be computed for node")


def new_builder(nvinfer: Nvinfer, logger: Any, rows: Rows) -> Any:
    """A Builder.

    Raises:
        EngineError: TensorRT makes none, as it does without a GPU.
    """
    try:
        return nvinfer.module.Builder(logger)
    except (TypeError, RuntimeError) as error:  # pybind11: "factory function returned nullptr"
        said = "; ".join(sentence(message) for message in rows.errors())
        reason = no_driver()
        if reason is not None:
            raise without_gpu("TensorRT cannot start to build.", reason) from error
        raise EngineError("TensorRT cannot start to build.", got=said or error, where=nvinfer.flavour) from error


def parsed(nvinfer: Nvinfer, builder: Any, logger: Any, model: bytes | Path) -> tuple[Any, Any]:
    """The network of an ONNX model, and the parser, which has to live as long as the network is used.

    Raises:
        EngineError: it is no ONNX model, TensorRT lacks operators for it, or its types do not go together.
        OutOfMemory: the host's memory does not hold its weights.
    """
    network, parser, found = _parsed(nvinfer, builder, logger, model)
    if found:
        raise parse_failure([reason for reason, _ in found], typed=all(typed for _, typed in found))
    return network, parser


def unsupported(model: bytes | Path, nvinfer: Nvinfer) -> tuple[str, ...]:
    """What TensorRT refuses of an ONNX model, without building it: "node (operator): reason"; () if nothing.

    Operators that it lacks are all named, and the first node whose types do not go together: the types behind it are
    not known.

    Raises:
        EngineError: it is no ONNX model.
        OutOfMemory: the host's memory does not hold its weights.
    """
    rows = Rows()
    logger = new_logger(nvinfer.module, rows, verbose=False)
    _, _, found = _parsed(nvinfer, new_builder(nvinfer, logger, rows), logger, model)
    return tuple(reason for reason, _ in found)


def _parsed(
    nvinfer: Nvinfer, builder: Any, logger: Any, model: bytes | Path
) -> tuple[Any, Any, list[tuple[str, bool]]]:
    """Network, parser, and for each node that is refused the reason and whether it is a question of types."""
    if isinstance(model, Path) and not model.is_file():
        raise EngineError("There is no such ONNX file.", where=model)
    trt = nvinfer.module
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parser.set_flag(trt.OnnxParserFlag.NATIVE_INSTANCENORM)  # the plugin in its place computes in its own precision
    try:
        done = parser.parse_from_file(str(model)) if isinstance(model, Path) else parser.parse(model)
    except MemoryError as error:
        raise OutOfMemory("The ONNX model does not fit in the host's memory.", got=_shown(model)) from error
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    if any(error.code().name == "MODEL_DESERIALIZE_FAILED" for error in errors) or (done and not network.num_outputs):
        raise EngineError("This is no ONNX model.", expected="a serialised ModelProto with its weights inside",
                          got=f"what cannot be read: {_shown(model)}", hint="write the file again")  # fmt: skip
    found = [_reason(error) for error in errors]
    return network, parser, found if found or done else [("the graph: no reason given", False)]


def _shown(model: bytes | Path) -> str:
    return str(model) if isinstance(model, Path) else f"{len(model)} bytes"


def _reason(error: Any) -> tuple[str, bool]:
    """ "node (operator): reason", and whether the reason are types."""
    text = error.desc()
    lines = [sentence(line) for line in text.splitlines() if not NOISE.search(line)]
    said = "; ".join(line for line in lines if not FOLLOWS.search(line))
    node, operator = error.node_name(), error.node_operator()
    if PLUGIN.search(text):
        said = "there is neither such an operator nor such a plugin"
    elif said in ("", "false"):  # the condition that a check found not to hold
        said = "this operator is not supported"
    return (f"{node} ({operator}): {said}" if operator else said), TYPES.search(text) is not None
