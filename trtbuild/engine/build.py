"""Engines for the CPU backends: the ONNX file stays as it is, and the record says how to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from trtbuild.engine.memory import peak_bytes
from trtbuild.engine.onnxruntime import PRECISIONS as ONNXRUNTIME_PRECISIONS
from trtbuild.engine.onnxruntime import onnxruntime_candidates
from trtbuild.engine.openvino import PRECISIONS as OPENVINO_PRECISIONS
from trtbuild.engine.openvino import openvino_candidates
from trtbuild.engine.tune import Options, fastest, noise
from trtbuild.errors import EngineError, NonFinite
from trtbuild.machine import available_memory, cpu_description, usable_cores, usable_cpus
from trtbuild.spec import BuildRecord, Memory, NetworkRecord, Precision, Profile

if TYPE_CHECKING:
    from trtbuild.runtime.runner import Runner


@dataclass(frozen=True, kw_only=True)
class _Backend:
    precisions: tuple[str, ...]
    candidates: Callable[[int], tuple[Options, ...]]


BACKENDS: Mapping[str, _Backend] = {
    "openvino": _Backend(precisions=OPENVINO_PRECISIONS, candidates=openvino_candidates),
    "onnxruntime": _Backend(precisions=ONNXRUNTIME_PRECISIONS, candidates=onnxruntime_candidates),
}


def engine_from_onnx(
    model: Path,
    network: NetworkRecord,
    *,
    backend: str,
    inference_precision: str,
    threads: int | None,
    tune: bool,
) -> BuildRecord:
    """Prove that a backend runs a network, choose its settings, and write down how to open it again.

    Args:
        model: the network's ONNX file.
        network: its record; `io` holds one input (batch, C, *patch) and one output (batch, heads, *patch).
        backend: "openvino" or "onnxruntime".
        inference_precision: what the backend computes in: "f32", or "bf16" (OpenVINO, on a CPU that has it).
        threads: None takes one per core that this process may use.
        tune: measure streams and batches for a few seconds; else one stream and single patches.

    Returns:
        A record without a file. `memory.host` is the measured rise of resident memory over opening and running one
        round (libraries already loaded), where the system can tell. `options.tuning` is a text that says what was
        measured beside the simplest settings; a patch that takes too long for that keeps them.

    Raises:
        MissingExtra, EngineError, PrecisionMismatch, NonFinite, OutOfMemory: the backend cannot run this network so.
    """
    from trtbuild.runtime.select import open_runner

    known = _backend(backend, inference_precision)
    count = _threads(threads)
    drafts = tuple(_draft(network, backend, inference_precision, options) for options in known.candidates(count))

    def open_engine(record: BuildRecord) -> Runner:
        return open_runner(record, model)

    with open_engine(drafts[0]) as runner:  # loads the libraries, so that they are not counted below
        version = runner.describe().version
    drafts = tuple(replace(draft, version=version) for draft in drafts)
    chosen, tuning = drafts[0], "off"
    memory = _checked_memory(chosen, open_engine, model)
    if tune:
        free = available_memory()
        limits = None if memory is None or free is None else (memory, free)
        result = fastest(drafts, open_engine, memory=limits)
        tuning = result.text()
        if result.record is not chosen:
            chosen = result.record
            memory = _checked_memory(chosen, open_engine, model)
    return replace(
        chosen,
        options={**chosen.options, "tuning": tuning},
        memory=Memory(host=memory, device_per_batch={}, measured=memory is not None),
    )


def plain_record(network: NetworkRecord, *, backend: str, inference_precision: str, threads: int | None) -> BuildRecord:
    """A record with the simplest settings, patch by patch in one stream, nothing measured: for runs at compile time.

    Raises:
        EngineError: no such backend, or it does not compute in this precision.
    """
    options = _backend(backend, inference_precision).candidates(_threads(threads))[0]
    return _draft(network, backend, inference_precision, options)


def _backend(name: str, inference_precision: str) -> _Backend:
    if name not in BACKENDS:
        close = get_close_matches(name, BACKENDS, n=1)
        raise EngineError("There is no such backend.", expected=", ".join(BACKENDS), got=name,
                          hint=f"Did you mean {close[0]}?" if close else None)  # fmt: skip
    if inference_precision not in BACKENDS[name].precisions:
        raise EngineError("The backend does not compute in this precision.", where=name, got=inference_precision,
                          expected=" or ".join(BACKENDS[name].precisions), hint="use --precision fp32")  # fmt: skip
    return BACKENDS[name]


def _threads(asked: int | None) -> int:
    if asked is None:
        return usable_cores()
    if asked < 1:
        raise EngineError("The number of threads is out of range.", expected=">= 1", got=asked)
    return min(asked, usable_cpus())


def _draft(network: NetworkRecord, backend: str, inference_precision: str, options: Options) -> BuildRecord:
    """The record for some settings, before anything is known of the installed backend."""
    shape = (int(options["batch"]), *_channels_and_patch(network))
    precision: Precision = "bf16" if (network.precision, inference_precision) == ("fp32", "bf16") else network.precision
    return BuildRecord(
        network=network.id, backend=backend, flavour="cpu", version="", file=None, precision=precision,
        inference_precision=inference_precision, profile=Profile(min=(1, *shape[1:]), opt=shape, max=shape),
        device={**cpu_description(), "cpus": str(usable_cpus())}, options=dict(options),
        memory=Memory(host=None, device_per_batch={}, measured=False),
    )  # fmt: skip


def _channels_and_patch(network: NetworkRecord) -> tuple[int, ...]:
    """(C, *patch) of the network's input, which stands first in `io`."""
    shape = network.io[0].shape if network.io else ()
    if len(shape) not in (4, 5) or not all(isinstance(n, int) for n in shape[1:]):
        raise EngineError("The network's input has no fixed patch.", expected="(batch, C, *patch)", got=shape,
                          where=f"network {network.id}")  # fmt: skip
    return tuple(int(n) for n in shape[1:])


def _checked_memory(record: BuildRecord, open_engine: Callable[[BuildRecord], Runner], model: Path) -> int | None:
    """Open and run with everything under way that `stream` allows: the logits of noise must be finite.

    Gives the bytes that running adds to the opened engine, where that can be told: activations and windows.
    """

    def work() -> None:
        for logits in runner.stream([batch] * (info.parallel + 2)):
            if not np.isfinite(logits).all():
                raise NonFinite("The network returns NaN or infinity for normal noise.", expected="finite logits",
                                where=f"{model}, {record.backend} ({record.inference_precision})")  # fmt: skip

    with open_engine(record) as runner:
        info = runner.describe()
        batch = noise(info.batch, info.inputs.shape)
        return peak_bytes(work)
