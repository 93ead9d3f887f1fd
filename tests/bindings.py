"""A recording twin of a TensorRT binding, made of what the real binding tells of itself (tests/bindings_facts.py).

Code that runs on the twin runs on the binding as far as names, enum members, argument lists and types go: what the
binding lacks, the twin lacks, with the same kind of error. Nothing is computed: a call is recorded and answered.
"""

from __future__ import annotations

import inspect
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from bindings_members import Call, MissingName, WrongCall, absent, method_of, no_constructor, property_of
from bindings_types import Kinds

OVERRIDDEN = ("ILogger", "IProgressMonitor")
"""Classes whose methods TensorRT calls: a subclass has to bring all of them."""


VALUES: dict[str, Callable[[Any], Any]] = {
    "Dims": lambda call: object.__setattr__(call.on, "_shape", tuple(call.arguments.get("shape", ()))),
    "Dims.__len__": lambda call: len(call.on._shape),
    "Dims.__getitem__": lambda call: call.on._shape[call.arguments["arg0"]],
    "IHostMemory.nbytes": lambda call: memoryview(call.on).nbytes,
}
"""What holds values in the twin as in the binding."""


class Twin(types.ModuleType):
    """The module. `answers` says what calls and properties give: {"ICudaEngine.num_io_tensors": 2}, or a function of
    the Call; without one it is 0, "", True, an empty list, or a new object of the declared class."""

    def __init__(self, facts: dict[str, Any], answers: Mapping[str, Any] | None = None, name: str = "tensorrt") -> None:
        super().__init__(name)
        self.facts = facts
        self.answers = {**VALUES, **(answers or {})}
        self.calls: list[Call] = []
        self.missing: list[str] = []
        """Names that were looked for in vain; the code under test may ask with hasattr."""
        self.__version__ = facts["version"]
        self.kinds = Kinds(facts)
        for enum in facts["enums"]:
            if "." not in enum:
                setattr(self, enum, self.kinds.enum(enum))
        self.base = type("Base", (_Object,), {"_twin": self, "_fact": None})
        for cls in facts["classes"]:
            self._add(cls)
        for short, value in facts["values"].items():
            setattr(self, short, self.kinds.member(value))
        for function, signatures in facts["functions"].items():
            setattr(self, function, method_of(self, function, signatures))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.lacks(name)

    def lacks(self, name: str) -> Any:
        self.missing.append(name)
        raise MissingName(f"TensorRT {self.facts['version']} has no {name}")

    def names(self) -> list[str]:
        """What was called and set, in order."""
        return [call.name for call in self.calls]

    def of(self, name: str) -> list[dict[str, Any]]:
        """The arguments of each call of one name."""
        return [dict(call.arguments) for call in self.calls if call.name == name]

    def record(self, name: str, arguments: Mapping[str, Any], on: Any, returns: str) -> Any:
        call = Call(name, arguments, on)
        if name.endswith(".__enter__"):
            warnings.warn("Context managers for TensorRT types are deprecated.", DeprecationWarning, stacklevel=3)
            return on
        if ".__" not in name:
            self.calls.append(call)
        return self.answer(call, returns)

    def answer(self, call: Call, returns: str) -> Any:
        if call.name not in self.answers:
            return self.kinds.default(returns)
        value = self.answers[call.name]
        return self.kinds.returned(value(call) if callable(value) else value, returns, call.name)

    def _add(self, name: str) -> type:
        if name in self.kinds.classes:
            return self.kinds.classes[name]
        fact = self.facts["classes"][name]
        bases = [self._add(base) for base in fact["bases"] if base in self.facts["classes"]]
        kind = bytes if name == "IHostMemory" else None  # the one class with the buffer protocol
        body: dict[str, Any] = {"_twin": self, "_fact": name}
        for key, value in fact["constants"].items():
            body[key] = self.kinds.enum(value) if value in self.facts["enums"] else self.kinds.member(value)
        for key, signatures in fact["methods"].items():
            method = method_of(self, f"{name}.{key}" if key != "__init__" else name, signatures)
            body[key] = staticmethod(method) if key in fact["static"] else method
        if "__init__" not in fact["methods"]:
            body["__init__"] = no_constructor(name)
        if kind is not None:  # the binding has the buffer, and nothing else of `bytes`
            body.update({key: absent(self, f"{name}.{key}") for key in dir(bytes) if not key.startswith("_")})
            body.update({"__len__": None, "__iter__": None, "__getitem__": None, "__contains__": None})
        for key, types_of in fact["properties"].items():
            body[key] = property_of(self, f"{name}.{key}", types_of["get"], types_of["set"])
        cls = type(name, (*(bases or [self.base]), *([kind] if kind else [])), body)
        self.kinds.classes[name] = cls
        setattr(self, name, cls)
        return cls


class _Object:
    """What all classes of a twin share."""

    _twin: Twin
    _fact: str | None

    def __init_subclass__(cls) -> None:
        base = next((each for each in cls.__mro__ if each.__dict__.get("_fact")), None)
        if base is None or "_fact" in cls.__dict__:
            return
        for name, signatures in cls._twin.facts["classes"][base.__name__]["methods"].items():
            if name.startswith("__") or signatures[0] is None:
                continue
            own = inspect.getattr_static(cls, name)
            if own is base.__dict__[name] and base.__name__ in OVERRIDDEN:
                raise WrongCall(f"{cls.__name__} lacks {base.__name__}.{name}, which TensorRT calls")
            try:  # the binding calls it with its arguments in order
                inspect.signature(own).bind(*signatures[0]["parameters"])
            except TypeError as error:
                raise WrongCall(
                    f"{cls.__name__}.{name} does not take what {base.__name__}.{name} gets: {error}"
                ) from None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._twin.lacks(f"{type(self).__name__}.{name}")

    def __setattr__(self, name: str, value: Any) -> None:
        made_by_twin = "_fact" in type(self).__dict__
        if made_by_twin and not isinstance(inspect.getattr_static(type(self), name, None), property):
            self._twin.lacks(f"{type(self).__name__}.{name} to set")
        object.__setattr__(self, name, value)
