"""The types in pybind11's signatures: which Python values they take, and what stands for them as a result."""

from __future__ import annotations

import ast
import operator
import re
from typing import Any, ClassVar

CPP_NAMES = {"IBuilder": "Builder", "IRuntime": "Runtime", "IParserError": "ParserError"}
"""Classes that signatures name as C++ does, as they were bound after the function that uses them."""


class Kinds:
    """The classes and enums of one twin by name."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.facts = facts
        self.classes: dict[str, type] = {}
        self.enums = {name: _enum(name, members, facts) for name, members in facts["enums"].items()}

    def enum(self, name: str) -> Any:
        return self.enums[name]

    def member(self, text: str) -> Any:
        """ "DataType.FLOAT" -> that member."""
        enum, _, name = text.rpartition(".")
        return self.enums[enum].__members__[name]

    def from_default(self, text: str) -> Any:
        """A default as the signature writes it; an enum member is the text "<Severity.WARNING: 2>"."""
        value = ast.literal_eval(text)
        found = re.fullmatch(r"<(\w+)\.(\w+): \d+>", value) if isinstance(value, str) else None
        if found is None:
            return value
        enum = next(name for name in self.enums if name.rpartition(".")[2] == found[1])
        return self.enums[enum].__members__[found[2]]

    def refuses(self, value: Any, kind: str) -> str | None:
        """Why a parameter of this type does not take a value, None if it does. None is refused but for `object`."""
        return None if self._takes(value, kind) else f"{kind} expected, got {value!r} ({type(value).__name__})"

    def _takes(self, value: Any, kind: str) -> bool:
        kind = CPP_NAMES.get(kind, kind)
        if kind in self.enums:
            return isinstance(value, self.enums[kind])
        if kind in ("Dims", "Weights"):  # both are made of what Python has
            return isinstance(value, self.classes[kind]) or (kind == "Dims" and self._sequence(value, "int"))
        if kind in self.classes:
            # pybind11 makes no object of a subclass that forgot its base's __init__
            return isinstance(value, self.classes[kind]) and (getattr(value, "_made", False) or kind == "IHostMemory")
        if kind.startswith(("collections.abc.Sequence[", "list[")):
            return self._sequence(value, kind[kind.index("[") + 1 : -1])
        check = SIMPLE.get(kind)
        if check is None:
            raise NotImplementedError(f"{kind}: the twin does not know what this takes")
        return bool(check(value))

    def _sequence(self, value: Any, kind: str) -> bool:
        is_sequence = hasattr(value, "__len__") and hasattr(value, "__getitem__") and not isinstance(value, (str, dict))
        return is_sequence and all(self._takes(each, kind) for each in value)

    def default(self, kind: str) -> Any:
        """What stands for a result that no answer is given for."""
        kind = CPP_NAMES.get(kind, kind)
        if kind in self.enums:
            return next(iter(self.enums[kind].__members__.values()))
        if kind in self.classes:
            return self.new(kind)
        if kind.startswith(("list", "collections.abc.Sequence")):
            return []
        if kind.startswith("tuple"):
            return ()
        simple = {"int": 0, "float": 0.0, "str": "", "bool": True, "None": None, "object": None, "dict": {}}
        if kind not in simple:
            raise NotImplementedError(f"{kind}: the twin has nothing to give for it")
        return simple[kind]

    def new(self, kind: str, content: Any = None) -> Any:
        """An object of a class as TensorRT makes it, without its constructor: IHostMemory of bytes, Dims of numbers."""
        cls = self.classes[kind]
        if kind == "IHostMemory":
            return bytes.__new__(cls, content or b"")
        made: Any = object.__new__(cls)
        object.__setattr__(made, "_made", True)
        if kind == "Dims":
            object.__setattr__(made, "_shape", tuple(content or ()))
        return made

    def returned(self, value: Any, kind: str, where: str) -> Any:
        """A scripted answer as the binding would give it; refuses one that the binding never gives."""
        kind = CPP_NAMES.get(kind, kind)
        if value is None or isinstance(value, BaseException):
            if isinstance(value, BaseException):
                raise value
            return None
        if (kind == "IHostMemory" and type(value) is bytes) or (kind == "Dims" and isinstance(value, tuple)):
            return self.new(kind, value)
        if kind == "list[Dims]":
            return [self.new("Dims", each) for each in value]
        if not self._takes(value, "int" if kind == "typing.SupportsInt" else kind):
            raise NotImplementedError(f"the test answers {where} with {value!r}, but it gives {kind}")
        return value


def _is_int(value: Any) -> bool:
    try:
        operator.index(value)
    except TypeError:
        return False
    return True


def _is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True


SIMPLE: dict[str, Any] = {
    "int": _is_int,
    "typing.SupportsInt": _is_int,
    "typing.SupportsFloat": lambda value: isinstance(value, float) or _is_int(value),
    "float": lambda value: isinstance(value, float) or _is_int(value),
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "tuple": lambda value: isinstance(value, tuple),
    "list": lambda value: isinstance(value, list),
    "dict": lambda value: isinstance(value, dict),
    "slice": lambda value: isinstance(value, slice),
    "object": lambda value: True,
    "typing_extensions.Buffer": _is_buffer,
    "collections.abc.Buffer": _is_buffer,  # the same, from Python 3.12 on
    "None": lambda value: value is None,
}


def _enum(name: str, members: dict[str, int], facts: dict[str, Any]) -> Any:
    """An enum as pybind11 makes it: members have `name` and `value` and can be an index, but are no numbers."""

    class Enum:
        __members__: ClassVar[dict[str, Any]] = {}

        def __init__(self, value: int) -> None:
            names = [key for key, number in members.items() if number == value]
            if not names:
                raise TypeError(f"{value} is no {name}")
            self._value, self._name = value, names[0]

        @property
        def name(self) -> str:
            return self._name

        @property
        def value(self) -> int:
            return self._value

        def __index__(self) -> int:
            return self.value

        __int__ = __index__

        def __eq__(self, other: object) -> bool:
            return type(other) is type(self) and other.value == self.value

        def __hash__(self) -> int:
            return hash((name, self.value))

        def __repr__(self) -> str:
            return f"<{name}.{self.name}: {self.value}>"

    Enum.__name__ = Enum.__qualname__ = name
    for key, number in members.items():
        Enum.__members__[key] = Enum(number)
        setattr(Enum, key, Enum.__members__[key])
    for key in facts["operators"][name]:  # those of an enum that pybind11 calls arithmetic
        setattr(Enum, key, lambda self, *others, key=key: getattr(int, key)(self.value, *map(int, others)))
    if name == "DataType":
        Enum.itemsize = property(lambda self: facts["itemsize"][self.name])  # type: ignore[attr-defined]
    return Enum
