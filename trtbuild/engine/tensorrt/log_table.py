"""The layers of a built engine, from what TensorRT says of it: the builder's log, or the engine inspector.

With ProfilingVerbosity.DETAILED and a VERBOSE logger, TensorRT-RTX (seen: 1.7) ends a build with one message:

    table   = "Layers:" NL (row NL)* NL "I/O Tensors:" …
    row     = "Name: " text ", LayerType: " text ", Inputs: " tensors ", Constants: " tensors ", Outputs: " tensors
              ", TacticName: " text ", StreamId: " integer ", Metadata: " nodes
    tensors = "[]" | "[ " tensor (", " tensor)* "]"
    tensor  = "{ Name: " text ", Dimensions: " list [", Strides: " list ", StrideOrder: " list] ", Datatype: " text
              ", Format: " text " }"
    list    = "[" [integer ("," integer)*] "]"
    nodes   = "" | "[ONNX Layer: " text "]" (separator "[ONNX Layer: " text "]")*     separator = 0x1E | 0x1F

A text ends where the next key begins, so a name that holds a key, as ONNX allows, makes an error and no wrong row.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from trtbuild.engine.tensorrt.metadata import NODE, nodes_from_metadata, unreadable
from trtbuild.engine.tensorrt.values import EngineLayer, EngineTable, LayerTensor
from trtbuild.errors import EngineError

HEAD, END = "Layers:\n", "\n\nI/O Tensors:\n"
MEMORY = {"activation_memory": "Total Activation Memory: ", "weights_memory": "Total Weights Memory: "}


def table_from_log(rows: Sequence[str]) -> EngineTable | None:
    """The table that a build ended with, None where there is none.

    Args:
        rows: the builder's messages of all severities in order: the table is VERBOSE, the bytes are INFO.

    Raises:
        EngineError: a row cannot be read (it is named), the table was cut off, or there are several.
    """
    tables = [row for row in rows if row.startswith(HEAD)]
    if not tables:
        return None
    if len(tables) > 1:
        raise unreadable("The build's log has several layer tables.", "one", len(tables), None)
    body, end, _ = tables[0].removeprefix(HEAD).partition(END)
    if not end:
        raise unreadable("The layer table in the build's log was cut off.", "I/O Tensors after the layers", body[-80:],
                          None)  # fmt: skip
    layers = [_layer_from_row(row, number) for number, row in enumerate(body.split("\n"), start=1)]
    return EngineTable(layers=tuple(layers), **{name: _bytes(rows, head) for name, head in MEMORY.items()})


@dataclass
class _Row:
    """A row of the log and how far it has been read."""

    text: str
    number: int
    place: int = 0

    def reads(self, word: str) -> bool:
        """Goes past `word` where it stands next."""
        found = self.text.startswith(word, self.place)
        self.place += len(word) * found
        return found

    def expect(self, word: str) -> None:
        if not self.reads(word):
            raise self.error(repr(word))

    def until(self, word: str) -> str:
        """The text before the next `word`, which is gone past."""
        end = self.text.find(word, self.place)
        if end < 0:
            raise self.error(f"{word!r} further on")
        start, self.place = self.place, end + len(word)
        return self.text[start:end]

    def error(self, expected: str) -> EngineError:
        got = repr(self.text[self.place : self.place + 60])
        return unreadable("A row of the layer table cannot be read.", expected, got, f"row {self.number}: {self.text}")


def _layer_from_row(text: str, number: int) -> EngineLayer:
    row = _Row(text, number)
    row.expect("Name: ")
    name = row.until(", LayerType: ")
    kind = _word(row, row.until(", Inputs: "))
    inputs = _tensors(row)
    row.expect(", Constants: ")
    _tensors(row)
    row.expect(", Outputs: ")
    outputs = _tensors(row)
    row.expect(", TacticName: ")
    tactic = row.until(", StreamId: ")
    if not row.until(", Metadata: ").isdecimal():
        raise row.error("a whole number as StreamId")
    nodes = nodes_from_metadata(text[row.place :])
    if nodes is None:
        raise row.error(f"{NODE}…] or nothing as Metadata")
    return EngineLayer(name=name, kind=kind, tactic=tactic, inputs=inputs, outputs=outputs, nodes=nodes)


def _tensors(row: _Row) -> tuple[LayerTensor, ...]:
    if row.reads("[]"):
        return ()
    row.expect("[ ")
    found = [_tensor(row)]
    while row.reads(", "):
        found.append(_tensor(row))
    row.expect("]")
    return tuple(found)


def _tensor(row: _Row) -> LayerTensor:
    row.expect("{ Name: ")
    name = row.until(", Dimensions: ")
    shape = _integers(row)
    if row.reads(", Strides: "):
        _integers(row)
        row.expect(", StrideOrder: ")
        _integers(row)
    row.expect(", Datatype: ")
    dtype = _word(row, row.until(", Format: "))
    return LayerTensor(name=name, shape=shape, dtype=dtype, format=row.until(" }"))


def _word(row: _Row, text: str) -> str:
    if not text.isidentifier():
        raise row.error(f"one word before this, not {text[:60]!r},")
    return text


def _integers(row: _Row) -> tuple[int, ...]:
    row.expect("[")
    words = row.until("]")
    if not re.fullmatch(r"(-?[0-9]{1,18}(,-?[0-9]{1,18})*)?", words):
        raise row.error("whole numbers in a list")
    return tuple(int(word) for word in words.split(",")) if words else ()


def _bytes(rows: Sequence[str], head: str) -> int | None:
    said = [row for row in rows if row.startswith(head)]
    if not said:
        return None
    number = said[-1].removeprefix(head).removesuffix(" bytes")
    if not re.fullmatch("[0-9]{1,18}", number):
        raise unreadable("TensorRT's memory message cannot be read.", f"{head}N bytes", said[-1], None)
    return int(number)
