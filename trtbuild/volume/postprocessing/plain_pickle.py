"""The plain values of a pickle, read without executing it.

`pickletools` takes the opcodes apart; a small machine puts together what they say. It knows only the opcodes that
Python's pickler writes for None, booleans, whole numbers, texts, bytes, tuples, lists and dicts (protocols 0 to 5),
NumPy's whole-number scalars, and the global names that the caller allows, which become `Global` values and are never
looked up. Everything else is refused by name. Nothing is imported and nothing is called.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from trtbuild.errors import ModelError, Untrusted

SCALARS = ("numpy.core.multiarray scalar", "numpy._core.multiarray scalar")  # NumPy 1 and NumPy 2
DTYPE = "numpy dtype"
ENCODE = "_codecs encode"  # how protocols 0 to 2 spell bytes
WHOLE_NUMBERS = tuple(kind + size for kind in "iu" for size in "1248")
CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
LITERALS = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES",
    "SHORT_BINBYTES",
)  # fmt: skip


@dataclass(frozen=True)
class Global:
    """A name "module attribute" that the pickle mentions."""

    name: str


@dataclass
class _Dtype:
    """A whole-number dtype of NumPy. Its byte order comes last, by BUILD, when the memo already holds the dtype."""

    code: str
    order: Literal["little", "big"] = "little"

    def number(self, raw: bytes) -> int:
        return int.from_bytes(raw, self.order, signed=self.code[0] == "i")


class _Mark:
    pass


def value_from_pickle(content: bytes, allowed: Collection[str], where: str) -> Any:
    """What `content` holds: plain values, and `Global` for the names in `allowed`.

    Args:
        content: the whole file.
        allowed: names as "module attribute".
        where: the file, for messages.

    Raises:
        Untrusted: the pickle has an opcode or a global name that plain values do not need.
        ModelError: it is truncated or damaged.
    """
    machine = _Machine(allowed=frozenset(allowed), where=where)
    for opcode, argument, end in _opcodes(content, where):
        if opcode == "STOP":
            if end != len(content) or len(machine.stack) != 1:
                raise damaged(where, "something is left over after its end")
            return machine.pop()
        machine.step(opcode, argument)
    raise damaged(where, "it has no end")


def damaged(where: str, reason: object) -> ModelError:
    """The error for a pickle that no pickler has written."""
    return ModelError("The pickle is damaged.", expected="a complete file", got=reason, where=where,
                      hint="copy the file again")  # fmt: skip


def _opcodes(content: bytes, where: str) -> Iterator[tuple[str, Any, int]]:
    """Name and argument of every opcode, and for STOP where it ends."""
    operations = pickletools.genops(content)
    while True:
        try:
            opcode, argument, position = next(operations)
        except StopIteration:
            return
        except ValueError as error:  # pickletools' only error: unknown opcode, truncated or malformed argument
            raise damaged(where, error) from error
        yield opcode.name, argument, (position or 0) + 1


@dataclass
class _Machine:
    """The pickle machine's stack and memo."""

    allowed: frozenset[str]
    where: str
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def step(self, opcode: str, argument: Any) -> None:
        if opcode in ("PROTO", "FRAME"):
            return
        if opcode in CONSTANTS:
            self.stack.append(CONSTANTS[opcode])
        elif opcode in LITERALS:
            self.stack.append(argument)
        elif opcode in STEPS:
            STEPS[opcode](self, argument)
        else:
            raise self.refused(f"opcode {opcode}")

    def refused(self, what: str) -> Untrusted:
        return Untrusted(
            "The pickle holds more than plain values, and trtbuild does not execute it.",
            expected=", ".join(sorted(self.allowed)) + " with numbers, texts, tuples, lists and dicts",
            got=what, where=self.where, hint="use the .json file that nnU-Net writes beside it",
        )  # fmt: skip

    def pop(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise damaged(self.where, "a value is missing")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        value = self.pop()
        self.stack.append(value)
        if type(value) is not kind:
            raise damaged(self.where, f"a {kind.__name__} is missing")
        return value

    def since_mark(self) -> list[Any]:
        """Everything above the last mark, which goes too."""
        for position in range(len(self.stack) - 1, -1, -1):
            if isinstance(self.stack[position], _Mark):
                values = self.stack[position + 1 :]
                del self.stack[position:]
                return values
        raise damaged(self.where, "a mark is missing")

    def push_tuple(self, count: int) -> None:
        values = [self.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def set_items(self, values: list[Any]) -> None:
        """Keys and values in turn, into the dict on top of the stack."""
        target = self.top(dict)
        if len(values) % 2:
            raise damaged(self.where, "a dict lacks a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):
                raise self.refused(f"a dict with a key of type {type(key).__name__}")
            target[key] = value

    def append_items(self, values: list[Any]) -> None:
        self.top(list).extend(values)

    def append_one(self) -> None:
        value = self.pop()
        self.append_items([value])

    def set_one(self) -> None:
        value = self.pop()
        key = self.pop()
        self.set_items([key, value])

    def push_dict(self, values: list[Any]) -> None:
        self.stack.append({})
        self.set_items(values)

    def remember(self, key: int) -> None:
        value = self.pop()
        self.stack.append(value)
        self.memo[key] = value

    def recall(self, key: int) -> None:
        if key not in self.memo:
            raise damaged(self.where, f"nothing was stored under {key}")
        self.stack.append(self.memo[key])

    def push_global(self, name: str) -> None:
        if name not in {*self.allowed, *SCALARS, DTYPE, ENCODE}:
            raise self.refused(f"global {name!r}")
        self.stack.append(Global(name))

    def push_stack_global(self) -> None:
        attribute, module = self.pop(), self.pop()
        if type(module) is not str or type(attribute) is not str:
            raise damaged(self.where, "the name of a global is no text")
        self.push_global(f"{module} {attribute}")

    def reduce(self) -> None:
        """Of calls, only those that spell a whole number of NumPy or bytes; they are worked out here, not called."""
        arguments, function = self.pop(), self.pop()
        name = function.name if isinstance(function, Global) else type(function).__name__
        match name, arguments:
            case "numpy dtype", (str(code), bool(), bool()) if code in WHOLE_NUMBERS:
                self.stack.append(_Dtype(code))
            case (
                ("numpy.core.multiarray scalar" | "numpy._core.multiarray scalar"),
                (_Dtype() as dtype, bytes(raw)),
            ) if len(raw) == int(dtype.code[1:]):
                self.stack.append(dtype.number(raw))
            case "_codecs encode", (str(text), "latin1") if text.isascii() or max(map(ord, text)) < 256:
                self.stack.append(text.encode("latin1"))
            case _:
                raise self.refused(f"a call of {name}")

    def build(self) -> None:
        """Of states, only a dtype's: (version, byte order, and no fields, names or subarray)."""
        state, value = self.pop(), self.pop()
        match value, state:
            case _Dtype(), (int(), ("<" | ">" | "|") as order, None, None, None, int(), int(), int()):
                value.order = "big" if order == ">" else "little"
                self.stack.append(value)
            case _:
                raise self.refused("a state (BUILD)")


STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": lambda machine, _: machine.stack.append(_Mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.push_tuple(1),
    "TUPLE2": lambda machine, _: machine.push_tuple(2),
    "TUPLE3": lambda machine, _: machine.push_tuple(3),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "APPEND": lambda machine, _: machine.append_one(),
    "APPENDS": lambda machine, _: machine.append_items(machine.since_mark()),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "DICT": lambda machine, _: machine.push_dict(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.set_one(),
    "SETITEMS": lambda machine, _: machine.set_items(machine.since_mark()),
    "PUT": lambda machine, key: machine.remember(key),
    "BINPUT": lambda machine, key: machine.remember(key),
    "LONG_BINPUT": lambda machine, key: machine.remember(key),
    "MEMOIZE": lambda machine, _: machine.remember(len(machine.memo)),
    "GET": lambda machine, key: machine.recall(key),
    "BINGET": lambda machine, key: machine.recall(key),
    "LONG_BINGET": lambda machine, key: machine.recall(key),
    "GLOBAL": lambda machine, name: machine.push_global(name),
    "STACK_GLOBAL": lambda machine, _: machine.push_stack_global(),
    "REDUCE": lambda machine, _: machine.reduce(),
    "BUILD": lambda machine, _: machine.build(),
}
