"""What a TensorRT binding is made of, told by the binding itself: classes, enums, properties, signatures.

pybind11 writes the signature of every method and property into its docstring. Two versions of TensorRT cannot be in
one process, so this file is also a script: MODULE [FOLDER MAJOR], whose output is `facts(module)` as JSON.
"""

from __future__ import annotations

import ast
import ctypes
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from stub_library import write_stubs

VERSIONS = tuple(
    line.partition("==")[2]
    for line in (Path(__file__).parent / "bindings.txt").read_text().splitlines()
    if line.startswith("tensorrt")
)
FOLDER = Path(sys.prefix) / "bindings"
OWN_PREFIX = re.compile(r"\b(?:tensorrt\w*\.tensorrt\w*|nvinfer1|nvonnxparser)\.(?:v_\d_\d\.)?")
OPERATORS = ("__lt__", "__le__", "__gt__", "__ge__", "__and__", "__or__", "__xor__", "__invert__")
REPR = re.compile(r"<[^<>]*>")


@cache
def facts_of(version: str) -> dict[str, Any]:
    """The facts of TensorRT 10.16 or 11.4, by version; those of the installed TensorRT-RTX for "rtx"."""
    script = __file__
    if version == "rtx":
        command = [sys.executable, script, "tensorrt_rtx"]
    else:
        if not (FOLDER / version).is_dir():
            raise FileNotFoundError(
                f"the bindings of TensorRT {version} are not in {FOLDER}; `make setup` puts them there"
            )
        command = [sys.executable, script, "tensorrt_bindings", str(FOLDER / version), version.partition(".")[0]]
    told = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if told.returncode != 0:
        raise ImportError(f"the bindings of TensorRT {version} cannot be imported: {told.stderr}")
    return dict(json.loads(told.stdout))


def facts(module: ModuleType) -> dict[str, Any]:
    """{"version", "classes", "enums", "operators", "values", "functions", "itemsize"} of a binding.

    A class: {"bases", "methods": {name: [signature]}, "static": [method], "properties": {name: {"get": type,
    "set": type}}, "constants": {name: class or member}}.
    A signature: {"parameters": [[name, type, default or None, positional only]], "returns"}, or None where pybind11
    wrote something that is no Python. An enum: {member: number}, with the "operators" it has; "itemsize" is DataType's.
    Nested names are "ILogger.Severity".
    """
    told: dict[str, Any] = {"version": module.__version__}
    told.update({key: {} for key in ("classes", "enums", "operators", "values", "functions")})
    for name, value in vars(module).items():
        if isinstance(value, type):
            _add_class(told, name, value)
        elif hasattr(type(value), "__members__"):
            told["values"][name] = _enum_value(value)
        elif callable(value) and not name.startswith("_"):
            told["functions"][name] = _function(value, name)
    told["itemsize"] = {name: member.itemsize for name, member in module.DataType.__members__.items()}
    return told


def _add_class(told: dict[str, Any], name: str, cls: type) -> None:
    if hasattr(cls, "__members__"):
        told["enums"][cls.__qualname__] = {key: int(value) for key, value in cls.__members__.items()}
        told["operators"][cls.__qualname__] = [key for key in OPERATORS if key in vars(cls)]
        return
    methods: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    constants: dict[str, str] = {}
    static = [key for key, value in vars(cls).items() if isinstance(value, staticmethod)]
    for key, value in ((key, getattr(cls, key) if key in static else value) for key, value in vars(cls).items()):
        if isinstance(value, property):
            properties[key] = {"get": _type_of(value.fget, "returns"), "set": _type_of(value.fset, "value")}
        elif isinstance(value, type):
            _add_class(told, f"{name}.{key}", value)
            constants[key] = value.__qualname__
        elif hasattr(type(value), "__members__"):
            constants[key] = _enum_value(value)
        elif callable(value) and (inspect.isfunction(value) or (value.__doc__ or "").startswith(f"{key}(")):
            methods[key] = _function(value, key)
    bases = [base.__name__ for base in cls.__bases__ if base.__module__ == cls.__module__]
    told["classes"][name] = {
        "bases": bases, "methods": methods, "static": static, "properties": properties, "constants": constants,
    }  # fmt: skip


def _enum_value(value: Any) -> str:
    return f"{type(value).__qualname__}.{value.name}"


def _type_of(accessor: Any, which: str) -> str | None:
    """The type that a property's getter returns or its setter takes; None where there is no such accessor."""
    if accessor is None or accessor.__doc__ is None:
        return None
    signature = _signature(accessor.__doc__.splitlines()[0])
    if signature is None:
        return "unknown"
    return str(signature["returns"] if which == "returns" else signature["parameters"][-1][1])


def _function(function: Any, name: str) -> list[dict[str, Any] | None]:
    if inspect.isfunction(function):  # added in Python, such as __enter__
        names = inspect.signature(function).parameters
        return [{"parameters": [[each, "object", None, False] for each in names], "returns": "object"}]
    doc = function.__doc__ or ""
    if "\nOverloaded function.\n" in doc:
        return [_signature(line) for line in re.findall(rf"^\d+\. ({re.escape(name)}\(.*)$", doc, re.MULTILINE)]
    return [_signature(doc.splitlines()[0])] if doc else []


def _signature(line: str) -> dict[str, Any] | None:
    """One line of pybind11's, "name(self: T, arg: type = default) -> T"."""
    text = OWN_PREFIX.sub("", line.replace("::", ".").strip())
    text = REPR.sub(lambda found: repr(found.group()), text)
    try:
        function = ast.parse(f"def f{text[text.find('(') :]}: ...").body[0]
    except SyntaxError:
        return None
    assert isinstance(function, ast.FunctionDef)
    arguments = [*function.args.posonlyargs, *function.args.args]
    first_default = len(arguments) - len(function.args.defaults)
    parameters = []
    for index, argument in enumerate(arguments):
        default = None if index < first_default else ast.unparse(function.args.defaults[index - first_default])
        kind = ast.unparse(argument.annotation) if argument.annotation else "object"
        unnamed = index < len(function.args.posonlyargs) or re.fullmatch(r"arg\d+", argument.arg) is not None
        parameters.append([argument.arg, kind, default, unnamed])
    returns = ast.unparse(function.returns) if function.returns else "object"
    return {"parameters": parameters, "returns": returns}


def main(name: str, folder: str = "", major: str = "") -> None:
    """Print the facts of a binding; FOLDER and MAJOR are of one that has no libraries here."""
    with tempfile.TemporaryDirectory() as stubs:
        if folder:
            sys.path.insert(0, folder)
            for path in write_stubs(Path(stubs), major):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        json.dump(facts(importlib.import_module(name)), sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
