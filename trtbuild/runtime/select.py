"""Which backend runs an engine: opening by record, what this machine has, and the choice that keeps every refusal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.errors import EngineError, TrtbuildError
from trtbuild.runtime.runner import Runner
from trtbuild.spec import BuildRecord

if TYPE_CHECKING:
    from trtbuild.runtime.gpu.shared import Enqueues, Gpu

AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class BackendStatus:
    """Whether a backend can be used here: `version` where it can, `reason` where it cannot."""

    name: str
    available: bool
    version: str | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The chosen backend, and (name, reason) of every one that was tried before it."""

    name: str
    refused: tuple[tuple[str, str], ...]


def _openvino_version() -> str:
    from trtbuild.runtime.openvino import openvino_version

    return openvino_version()


def _onnxruntime_version() -> str:
    from trtbuild.runtime.onnxruntime import onnxruntime_version

    return onnxruntime_version()


def _open_openvino(record: BuildRecord, model: Path, threads: int | None) -> Runner:
    from trtbuild.runtime.openvino import open_openvino

    return open_openvino(record, model, threads=threads)


def _open_onnxruntime(record: BuildRecord, model: Path, threads: int | None) -> Runner:
    from trtbuild.runtime.onnxruntime import open_onnxruntime

    return open_onnxruntime(record, model, threads=threads)


def _tensorrt_version() -> str:
    from trtbuild.runtime.tensorrt import usable_version

    return usable_version("tensorrt")


def _tensorrt_rtx_version() -> str:
    from trtbuild.runtime.tensorrt import usable_version

    return usable_version("tensorrt-rtx")


def _onnxruntime_cuda_version() -> str:
    from trtbuild.runtime.onnxruntime_cuda import usable_version

    return usable_version()


def _open_tensorrt(record: BuildRecord, engine: Path, threads: int | None, gpu: Gpu | None) -> Enqueues:
    from trtbuild.runtime.tensorrt import open_tensorrt

    return open_tensorrt(record, engine, threads=threads, gpu=gpu)


def _open_onnxruntime_cuda(record: BuildRecord, model: Path, threads: int | None, gpu: Gpu | None) -> Enqueues:
    from trtbuild.runtime.onnxruntime_cuda import open_onnxruntime_cuda

    return open_onnxruntime_cuda(record, model, threads=threads, gpu=gpu)


def _open_null(record: BuildRecord, model: Path, threads: int | None) -> Runner:
    from trtbuild.runtime.null import open_null

    return open_null(record, model, threads=threads)


# In the order of "auto". The null runner answers records that name it, and is never chosen.
VERSIONS: Mapping[str, Callable[[], str]] = {
    "tensorrt": _tensorrt_version,
    "tensorrt-rtx": _tensorrt_rtx_version,
    "openvino": _openvino_version,
    "onnxruntime": _onnxruntime_version,
    "onnxruntime-cuda": _onnxruntime_cuda_version,
}
OPENERS: Mapping[str, Callable[[BuildRecord, Path, int | None], Runner]] = {
    "openvino": _open_openvino,
    "onnxruntime": _open_onnxruntime,
    "null": _open_null,
}
DEVICE_OPENERS: Mapping[str, Callable[[BuildRecord, Path, int | None, Gpu | None], Enqueues]] = {
    "tensorrt": _open_tensorrt,
    "tensorrt-rtx": _open_tensorrt,
    "onnxruntime-cuda": _open_onnxruntime_cuda,
}
DEVICE_BACKENDS = tuple(DEVICE_OPENERS)
"""Their runners take work that is on a GPU already (`gpu.shared.Enqueues`)."""


def open_runner(record: BuildRecord, model: Path, *, threads: int | None = None, gpu: Gpu | None = None) -> Runner:
    """Open an engine with the backend of its record.

    Args:
        record: how the engine was built.
        model: the engine's file; for an engine without one (`record.file` None) the network's ONNX file.
        threads: CPU threads in place of the record's.
        gpu: where a device backend runs, and that outlives the runner; None opens the first GPU for this runner. A CPU
            backend takes no notice of it.

    Raises:
        MissingExtra: the backend's package is not installed.
        EngineError: unknown backend, or the backend refused.
    """
    if record.backend in DEVICE_OPENERS:
        return DEVICE_OPENERS[record.backend](record, model, threads, gpu)
    if record.backend not in OPENERS:
        raise _unknown(record.backend, (*DEVICE_OPENERS, *OPENERS), f"engine of {record.network}")
    return OPENERS[record.backend](record, model, threads)


def available_backends() -> tuple[BackendStatus, ...]:
    """Every backend in the order of "auto", with its version or the reason why engines cannot be run with it here.

    The CPU's are loaded; TensorRT is not, since one process holds one of its flavours.
    """
    return tuple(map(_status, VERSIONS))


def choose_backend(asked: str) -> Choice:
    """The first usable backend for "auto"; a backend that is named is used, or is an error.

    Raises:
        MissingExtra: the named backend's package is not installed.
        EngineError: no backend of this name, it cannot be loaded, or (auto) there is none.
    """
    if asked != AUTO:
        if asked not in VERSIONS:
            raise _unknown(asked, (AUTO, *VERSIONS), "--backend")
        VERSIONS[asked]()
        return Choice(name=asked, refused=())
    refused: list[tuple[str, str]] = []
    for name in VERSIONS:
        status = _status(name)
        if status.available:
            return Choice(name=name, refused=tuple(refused))
        refused.append((name, status.reason or "unknown"))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    raise EngineError(
        "No backend can be used here.", expected=" or ".join(VERSIONS), got=reasons, hint="trtbuild doctor"
    )


def _status(name: str) -> BackendStatus:
    try:
        return BackendStatus(name=name, available=True, version=VERSIONS[name](), reason=None)
    except TrtbuildError as error:
        return BackendStatus(name=name, available=False, version=None, reason=" ".join(str(error).split()))


def _unknown(name: str, known: Mapping[str, object] | tuple[str, ...], where: str) -> EngineError:
    close = get_close_matches(name, known, n=1)
    return EngineError("There is no such backend.", expected=", ".join(known), got=name, where=where,
                       hint=f"Did you mean {close[0]}?" if close else None)  # fmt: skip
