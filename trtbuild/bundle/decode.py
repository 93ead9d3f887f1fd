"""bundle.json as bytes <-> Manifest. What comes in must be exactly what would go out, but for white space and order."""

from __future__ import annotations

import json
import re
from typing import Any

from trtbuild.bundle.checks import FORMAT
from trtbuild.bundle.files import COMPILE_AGAIN, short
from trtbuild.bundle.manifest import Manifest
from trtbuild.bundle.strictjson import value_from_text
from trtbuild.errors import BundleFormat, BundleKey, ModelError
from trtbuild.spec import ModelSpec, json_from_value, value_from_json

Key = tuple[int | str, ...]


def text_from_manifest(manifest: Manifest) -> bytes:
    """bundle.json: UTF-8, two spaces of indentation, keys in the order of the classes, files in order of their names.

    Raises: BundleKey if a value has no JSON.
    """
    data = json_from_value(manifest)
    data["files"] = dict(sorted(data["files"].items()))
    try:
        return (json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    except (TypeError, ValueError) as error:
        raise BundleKey("The manifest holds a value that JSON does not have.", got=str(error),
                        expected="finite numbers, text, lists and mappings") from error  # fmt: skip


def manifest_from_text(raw: bytes) -> Manifest:
    """The manifest that the bytes of a bundle.json hold.

    Raises: BundleFormat, BundleTooLarge, BundleKey, BundlePath; `where` is the path of the key.
    """
    data = value_from_text(raw)
    _check_format(data)
    manifest = _manifest_from_json(data)
    _check_same(data, json_from_value(manifest), ())
    return manifest


def _check_format(data: Any) -> None:
    if not isinstance(data, dict) or type(data.get("format")) is not int or data["format"] < 1:
        got = data.get("format", "no such key") if isinstance(data, dict) else data
        raise BundleFormat("bundle.json does not say its format.", expected=f"an object with format {FORMAT}",
                           got=short(got), where="format", hint=COMPILE_AGAIN)  # fmt: skip
    if data["format"] > FORMAT:
        raise BundleFormat("The bundle has a newer format than this version of trtbuild reads.", expected=FORMAT,
                           got=data["format"], where="format", hint=_upgrade(data.get("provenance")))  # fmt: skip


def _upgrade(provenance: Any) -> str:
    version = provenance.get("trtbuild") if isinstance(provenance, dict) else None
    if isinstance(version, str) and re.fullmatch(r"[0-9][0-9A-Za-z.+]{0,30}", version):
        return f"it needs trtbuild >= {version}: pip install --upgrade 'trtbuild>={version}'"
    return "it needs trtbuild >= the version that wrote it: pip install --upgrade trtbuild"


def _manifest_from_json(data: Any) -> Manifest:
    from pydantic import ValidationError

    try:
        return value_from_json(Manifest, data)
    except ValidationError as error:
        raise _key_error(error.errors(include_url=False), data) from error
    except ModelError as error:
        where = _spec_at_fault(data["stages"])
        raise BundleKey(error.what, expected=error.expected, got=short(error.got), where=where,
                        hint=COMPILE_AGAIN) from error  # fmt: skip


def _spec_at_fault(stages: list[Any]) -> str:
    for n, stage in enumerate(stages):
        try:
            value_from_json(ModelSpec, stage["spec"])
        except ModelError:
            return f"stages[{n}].spec"
    return "stages"


def _key_error(errors: list[Any], data: Any) -> BundleKey:
    """One error of pydantic's, the first. Where a value may be of several classes, of that class which `kind` names."""
    other_kinds = {error["loc"][:-1] for error in errors if error["loc"][-1:] == ("kind",)}
    errors = [error for error in errors if error["loc"][:-1] not in other_kinds] or errors
    first = errors[0]
    key = _resolved(first["loc"], data)
    if first["type"] == "missing":
        return BundleKey("A key of bundle.json is missing.", expected=key[-1], where=path_from_key(key[:-1]),
                         got="no such key", hint=COMPILE_AGAIN)  # fmt: skip
    if first["type"] == "unexpected_keyword_argument":
        return BundleKey("bundle.json has a key that the format does not.", got=short(key[-1]),
                         expected="unknown keys under extensions only", where=path_from_key(key),
                         hint=COMPILE_AGAIN)  # fmt: skip
    messages = dict.fromkeys(
        error["msg"].removeprefix("Input should be ") for error in errors if _resolved(error["loc"], data) == key
    )
    return BundleKey("A key of bundle.json holds a value that it must not hold.", expected=" or ".join(messages),
                     got=short(first["input"]), where=path_from_key(key), hint=COMPILE_AGAIN)  # fmt: skip


def _resolved(location: Key, data: Any) -> Key:
    """`location` without the names of classes that pydantic puts in where a value may be of several."""
    key: list[int | str] = []
    for n, part in enumerate(location):
        inside = part in data if isinstance(data, dict) else isinstance(data, list) and part in range(len(data))
        if inside:
            data = data[part]
        if inside or (n == len(location) - 1 and isinstance(data, dict)):
            key.append(part)
    return tuple(key)


def path_from_key(key: Key) -> str:
    """`stages[0].spec.patch` from ("stages", 0, "spec", "patch")."""
    path = ""
    for part in key:
        if isinstance(part, str) and part.isidentifier():
            path += f".{part}" if path else part
        else:
            path += f"[{short(part)}]"
    return path or "the whole file"


def _check_same(read: Any, meant: Any, key: Key) -> None:
    """Raises BundleKey where a value was taken for another, as "3" and true are for 3 and 1, or a key was left out."""
    if isinstance(read, dict) and isinstance(meant, dict):
        for name in meant:
            if name not in read:
                raise BundleKey("A key of bundle.json is missing.", expected=name, got="no such key",
                                where=path_from_key(key), hint=COMPILE_AGAIN)  # fmt: skip
            _check_same(read[name], meant[name], (*key, name))
    elif isinstance(read, list) and isinstance(meant, list) and len(read) == len(meant):
        for n, (item, other) in enumerate(zip(read, meant, strict=True)):
            _check_same(item, other, (*key, n))
    elif read != meant or not (type(read) is type(meant) or (type(read) is int and type(meant) is float)):
        raise BundleKey("A key of bundle.json holds a value of the wrong type.", where=path_from_key(key),
                        expected=f"{type(meant).__name__}, as in {short(meant)}",
                        got=f"{type(read).__name__} {short(read)}", hint=COMPILE_AGAIN)  # fmt: skip
