"""Methods and properties of a twin (tests/bindings.py): each checks what it is given, and records it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bindings import Twin


class MissingName(AttributeError):
    """The binding has no such class, member, method or property, or the property cannot be used like this."""


class WrongCall(TypeError):
    """The binding has no overload for these arguments."""


@dataclass(frozen=True)
class Call:
    """A call, the setting of a property ("IBuilderConfig.flags"), or the making of an object ("Builder")."""

    name: str
    arguments: Mapping[str, Any]
    on: Any = field(repr=False)


def absent(twin: Twin, name: str) -> property:
    return property(lambda self: twin.lacks(name))


def no_constructor(name: str) -> Callable[..., None]:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        raise WrongCall(f"{name}: No constructor defined!")

    return __init__


def method_of(twin: Twin, name: str, signatures: list[dict[str, Any] | None]) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        refused = []
        for signature in signatures:
            if signature is None:
                raise NotImplementedError(f"{name}: its signature is no Python, and cannot be checked")
            bound = _bound(twin, signature, args, kwargs)
            if isinstance(bound, dict):
                on = args[0] if args and name not in twin.facts["functions"] else None
                if name in twin.facts["classes"]:
                    object.__setattr__(on, "_made", True)
                return twin.record(name, bound, on, signature["returns"])
            refused.append(bound)
        raise WrongCall(f"{name}: {'; or '.join(refused)}")

    return method


def _bound(
    twin: Twin, signature: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | str:
    """Arguments by name without self, or why they do not fit."""
    parameters = [
        inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_ONLY if unnamed else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if default is None else default,
        )
        for name, _, default, unnamed in signature["parameters"]
    ]
    first_named = next((i for i, each in enumerate(parameters) if each.kind != each.POSITIONAL_ONLY), len(parameters))
    if any(each.kind == each.POSITIONAL_ONLY for each in parameters[first_named:]):  # (self: T, arg0: int)
        parameters = [each.replace(kind=each.POSITIONAL_ONLY) for each in parameters]
    try:
        bound = inspect.Signature(parameters).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    given = dict(bound.arguments)
    for name, kind, default, _ in signature["parameters"]:
        if name == "self":
            continue
        allowed_none = default == "None" and name in given and given[name] is None
        if name in given and not allowed_none and (reason := twin.kinds.refuses(given[name], kind)):
            return f"{name}: {reason}"
        if name not in given:
            given[name] = twin.kinds.from_default(default) if default else None
    given.pop("self", None)
    return given


def property_of(twin: Twin, name: str, get: str | None, put: str | None) -> property:
    def getter(self: Any) -> Any:
        if get is None:
            raise MissingName(f"{name} cannot be read")
        if name in self.__dict__:
            return self.__dict__[name]
        return twin.answer(Call(name, {}, self), get)

    def setter(self: Any, value: Any) -> None:
        if put is None:
            raise MissingName(f"{name} cannot be set")
        if reason := twin.kinds.refuses(value, put):
            raise WrongCall(f"{name}: {reason}")
        twin.calls.append(Call(name, {"value": value}, self))
        self.__dict__[name] = value

    return property(getter, setter)
