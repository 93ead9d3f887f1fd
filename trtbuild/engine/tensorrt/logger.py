"""What TensorRT says while it parses and builds: it reports failures only there."""

from __future__ import annotations

import re
import sys
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trtbuild.nvinfer import kept_logger

INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)
"""nvinfer1::ILogger::Severity, whose numbers are the same in every version."""
LETTERS = "FEWIV"
NODE = re.compile(r"^Parsing node: (?P<name>.+) \[(?P<operator>\w+)\]$")
# Calls into CUDA that an API error makes on its way out, on a machine without a GPU; and what every build says
SILENT = (
    re.compile(r"catchCudaError::\d+\] Error Code 1: Cuda Runtime"),
    re.compile(r"Converting conv (activation|weight) scales to fp32"),
)
# "IBuilder::x: Error Code 4: API Usage Error (text In validate at /path/file.cpp:12)" holds one sentence
FRAME = re.compile(r"^.*?Error Code \d+: (?P<kind>[\w ]+) \((?P<text>.*)\)\s*$", re.DOTALL)
PLACE = re.compile(r"\s*(In \S+ at \S+:\d+|^\[[\w.]+:\d+: \w+\])\s*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Rows:
    """All that was said, in order, as (severity, message)."""

    all: list[tuple[int, str]] = field(default_factory=list)

    def messages(self) -> tuple[str, ...]:
        """Every message, the layer table of a finished build among them."""
        return tuple(message for _, message in self.all)

    def errors(self) -> tuple[str, ...]:
        """Errors without what says nothing; all of them if nothing else is left."""
        errors = [message for severity, message in self.all if severity <= ERROR]
        return tuple([message for message in errors if not _silent(message)] or errors)

    def warnings(self) -> tuple[str, ...]:
        """Each warning once."""
        found = (sentence(message) for severity, message in self.all if severity == WARNING and not _silent(message))
        return tuple(dict.fromkeys(found))

    def nodes(self) -> Mapping[str, str]:
        """Operator by name of the ONNX nodes that the parser has come to."""
        found = (NODE.match(message) for severity, message in self.all if severity == VERBOSE)
        return {match["name"]: match["operator"] for match in found if match}


def sentence(message: str) -> str:
    """A message without the places in TensorRT's source that it names."""
    match = FRAME.match(message)
    return PLACE.sub(" ", match["text"] if match else message).strip().rstrip(".")


def new_logger(module: Any, rows: Rows, *, verbose: bool) -> Any:
    """An ILogger of this TensorRT that keeps everything in `rows`; `verbose` also prints it to stderr as it comes.

    It lives as long as the process (`kept_logger`), and writes to `rows` as long as somebody else holds these.
    """
    held = weakref.ref(rows)

    class Logger(module.ILogger):  # type: ignore[misc] # a class of the module that is loaded
        def __init__(self) -> None:
            module.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            rows = held()
            if rows is not None:
                rows.all.append((int(severity), msg))
            if verbose:
                print(f"[{LETTERS[int(severity)]}] {msg}", file=sys.stderr)

    return kept_logger(Logger())


def _silent(message: str) -> bool:
    return any(pattern.search(message) for pattern in SILENT)
