"""What TensorRT's messages mean, in one place: the cause, the ONNX node, the next step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from trtbuild.engine.tensorrt.logger import Rows, sentence
from trtbuild.errors import Cancelled, EngineError, OutOfMemory, TrtbuildError
from trtbuild.nvinfer import no_driver

MEMORY = re.compile(
    r"OutOfMemory|out of memory|within workspace limit|insufficient workspace|increas\w+ the workspace|bad_alloc"
    r"|cudaErrorMemoryAllocation|cudaError 2:",
    re.IGNORECASE,
)
TURING = re.compile(r"Turing \(SM75\): FP32 3D convolution")
NO_GPU = re.compile(r"cudaError (35|100)\b|CHECK\(status == CUDA_SUCCESS\) failed")
PROFILE = re.compile(r"Profile k(MIN|OPT|MAX) values are not self-consistent")
CANCELLED = re.compile(r"BuildCancell?ed")
MOST = 3
"""Messages that an error shows; the first ones are the cause."""


def build_failure(rows: Rows, *, workspace: int | None) -> TrtbuildError:
    """The error for a build that gave no engine, by what the log says. `workspace` is its limit in MiB."""
    messages = rows.errors()
    text = "\n".join(messages)
    got = "\n            ".join(sentence(message) for message in messages[:MOST]) or "no message"
    where = failing_nodes(text, rows.nodes())
    if CANCELLED.search(text):
        return Cancelled("The build of an engine was cancelled.")
    if TURING.search(text):
        return EngineError("TensorRT has no 3D convolution in FP32 for Turing (compute capability 7.5).", got=got,
                           where=where, hint="build FP16, or leave 75 out of --compute-capability")  # fmt: skip
    if MEMORY.search(text):
        limit = "all that there is" if workspace is None else f"--workspace {workspace} (MiB)"
        return OutOfMemory("TensorRT has not enough memory to build the engine.", expected=f"room within {limit}",
                           got=got, where=where,
                           hint="raise --workspace, lower --max-batch, or compile a smaller patch")  # fmt: skip
    if NO_GPU.search(text) and (reason := no_driver()) is not None:
        return without_gpu("Such an engine can only be built where there is an NVIDIA GPU.", f"{reason} ({got})")
    return EngineError("TensorRT cannot build the engine.", got=got, where=where,
                       hint="--verbose shows all that TensorRT says")  # fmt: skip


def profile_failure(rows: Rows) -> EngineError | None:
    """The error for a profile that no engine can keep, of which TensorRT only warns; None where it is fine."""
    found = [line for line in rows.warnings() if PROFILE.search(line)]
    if not found:
        return None
    return EngineError("The shapes of the profile do not go together.", expected="shapes that the engine can run",
                       got="; ".join(found[:MOST]),
                       hint="give other shapes: --minShapes, --optShapes, --maxShapes, or a smaller "
                            "--max-batch")  # fmt: skip


def without_gpu(what: str, got: str) -> EngineError:
    """For what asks for a GPU at build time, on a machine that has none."""
    return EngineError(what, expected="a GPU and its driver", got=got,
                       hint="build on the machine with the GPU; TensorRT-RTX builds without one, but not with --refit, "
                            "--stripWeights or --compute-capability current")  # fmt: skip


def failing_nodes(text: str, nodes: Mapping[str, str]) -> str | None:
    """The ONNX nodes that a message names, with their operators.

    Names in quotation marks come first. Without them a name of letters alone is passed over: it may be a word.
    """
    quoted = [name for name in nodes if f"'{name}'" in text or f'"{name}"' in text]
    found = quoted or [name for name in nodes if not name.isalpha() and _names(text, name)]
    shown = [f"node {name} ({nodes[name]})" for name in found[:MOST]]
    return ", ".join(shown) + (f" and {len(found) - MOST} more" if len(found) > MOST else "") if found else None


def _names(text: str, name: str) -> bool:
    return re.search(rf"(?<![\w/])(?<!\w\.){re.escape(name)}(?![\w/]|\.\w)", text) is not None


def parse_failure(found: Sequence[str], *, typed: bool) -> EngineError:
    """The error for a graph that the parser refuses: `found` are its nodes with reasons, `typed` if it is their types.

    A strongly typed network computes in the types that stand in the graph, so that they have to agree.
    """
    if typed:
        return EngineError("The types of an ONNX node do not go together.",
                           expected="a strongly typed graph: the inputs of a node in one type, Casts between others",
                           got="; ".join(found),
                           hint="trtbuild export and trtbuild compile write such graphs")  # fmt: skip
    return EngineError("TensorRT does not support this ONNX graph.", expected="operators that its parser knows",
                       got="; ".join(found),
                       hint="compile it for onnxruntime or openvino, or replace these nodes")  # fmt: skip
