"""Whether a TensorRT engine fits what is here, judged from its record before anything of it is loaded."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

from trtbuild.errors import EngineError
from trtbuild.spec import BuildRecord

ANY = "all"
"""In place of compute capabilities: those that TensorRT-RTX supports, which it judges itself."""
CURRENT = "current"
"""In their place: the one of the GPU of the building machine, which the record names beside it."""
VERSION = re.compile(r"(\d+(?:\.\d+)*)(?:(?:a|b|rc)\d+)?(?:\.post\d+)?(?:\.dev\d+)?(?:\+[\w.]+)?")
"""A version of Python packages (PEP 440); what stands behind the numbers tells how the package was made."""


def engine_content(engine: Path, record: BuildRecord) -> bytes:
    """The plan's bytes.

    Raises:
        EngineError: there is no such file, or it is not the one that was built.
    """
    wanted = _text_option(record, "sha256")
    try:
        content = engine.read_bytes()
    except OSError as error:
        raise EngineError("The engine file is missing or cannot be read.", expected="a TensorRT engine",
                          got=error.strerror, where=engine)  from error  # fmt: skip
    found = hashlib.sha256(content).hexdigest()
    if found != wanted:
        raise EngineError("The engine file is not the one that was built: it was cut off or altered.",
                          expected=f"SHA-256 {wanted}", got=f"{found} ({len(content)} bytes)", where=engine,
                          hint=rebuild_hint(record))  # fmt: skip
    return content


def check_weights(record: BuildRecord) -> None:
    """Refuse a plan without weights: TensorRT loads it, runs it without a word, and computes nothing of use.

    Raises:
        EngineError: the plan was built with --stripWeights.
    """
    if record.options.get("strip_plan") is True:
        raise EngineError("A plan that was built with --stripWeights has no weights and cannot run.",
                          expected="a plan with its weights", got="options.strip_plan is true", where=_where(record),
                          hint="refit it with TensorRT's own tools, or compile without --stripWeights")  # fmt: skip


def check_version(record: BuildRecord, *, flavour: str, version: str) -> None:
    """Refuse an engine of another TensorRT than the installed one.

    A plan runs in the very version that built it, whose package may be another (10.13.3.9, 10.13.3.9.post1). One of
    TensorRT built with --versionCompatible also runs in newer ones, up to the next major version (NVIDIA's support
    matrix, "Engine Portability"); TensorRT-RTX has no such plans ("not compatible between different releases", its
    engine compatibility page).
    """
    if record.backend == "tensorrt" and record.options.get("version_compatible") is True:
        built, here = _numbers(record.version, record), _numbers(version, record)
        if built <= here and here[0] - built[0] <= 1:
            return
        differing = [("version", f"{record.version} or newer, up to {built[0] + 1}.x", version)]
    else:
        pairs = (("flavour", record.flavour, flavour), ("version", record.version, version))
        differing = [pair for pair in pairs if pair[1] != pair[2]]
        if differing == [pairs[1]] and _numbers(record.version, record) == _numbers(version, record):
            return
    for name, expected, got in differing:
        raise EngineError(f"The engine was built by another TensorRT: the {name} differs.", expected=expected,
                          got=f"{got}, installed here", where=_where(record), hint=rebuild_hint(record))  # fmt: skip


def check_gpu(record: BuildRecord, *, name: str, capability: str) -> Mapping[str, str]:
    """Refuse an engine that was not built for this GPU.

    Args:
        record: its `device`: capabilities "86,89" or "all" (TensorRT-RTX), or the GPU's name and capability.
        name, capability: this GPU's; "8.6".

    Returns:
        What is worth knowing: another GPU of the same capability, for which TensorRT did not choose its kernels.
    """
    if record.backend == "tensorrt-rtx":
        return _check_capabilities(record, capability)
    level = record.options.get("hardware_compatibility", "none")
    if level not in ("none", "ampere+", "sameComputeCapability"):
        raise EngineError("An engine option is wrong.", expected="none, ampere+ or sameComputeCapability", got=level,
                          where=f"{_where(record)}, options.hardware_compatibility")  # fmt: skip
    built = _device(record, "capability")
    fits = _numbers(capability, record) >= (8, 0) if level == "ampere+" else capability == built
    if not fits:
        expected = "8.0 or newer" if level == "ampere+" else built
        raise _wrong_gpu(record, expected, f"{capability} ({name})")
    known = record.device.get("gpu", name)
    return {} if known == name or level != "none" else {"note.gpu": f"recorded {known!r}, here {name!r}"}


def _check_capabilities(record: BuildRecord, capability: str) -> Mapping[str, str]:
    listed = _device(record, "capabilities")
    if listed == CURRENT:
        listed = _device(record, "capability").replace(".", "")
    if listed != ANY and capability.replace(".", "") not in listed.split(","):
        raise _wrong_gpu(record, listed, capability)
    return {}


def _wrong_gpu(record: BuildRecord, expected: str, got: str) -> EngineError:
    return EngineError("The engine was not built for this GPU.", expected=f"compute capability {expected}", got=got,
                       where=_where(record), hint=rebuild_hint(record))  # fmt: skip


def _device(record: BuildRecord, key: str) -> str:
    if key not in record.device:
        raise EngineError("An engine's record does not say which GPU it is for.", expected=f"device.{key}",
                          got=", ".join(record.device) or "nothing", where=_where(record))  # fmt: skip
    return record.device[key]


def _text_option(record: BuildRecord, key: str) -> str:
    value = record.options.get(key)
    if not isinstance(value, str):
        raise EngineError("An engine option is wrong.", expected="text", got=value,
                          where=f"{_where(record)}, options.{key}")  # fmt: skip
    return value


def _numbers(version: str, record: BuildRecord) -> tuple[int, ...]:
    found = VERSION.fullmatch(version)
    if found is None:
        raise EngineError("A version is not made of numbers.", expected="10.16.1.11", got=version, where=_where(record))
    return tuple(map(int, found[1].split(".")))


def _where(record: BuildRecord) -> str:
    return f"engine of {record.network}"


def rebuild_hint(record: BuildRecord) -> str:
    """The next step where an engine does not fit."""
    return f"rebuild it: trtbuild compile BUNDLE --backend {record.backend} -o OTHER.trtb"
