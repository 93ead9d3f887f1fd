"""How a BuildRecord fits this machine: the settings that hold here, and what differs from the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import EngineError
from trtbuild.machine import cpu_description, usable_cpus
from trtbuild.spec import BuildRecord

INT8_ISA = ("avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm")
"""Instruction sets that sum products of 8-bit numbers in 32 bits."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Threads in all, streams (calls at once) and patches per call; `notes` go into RunnerInfo.details."""

    threads: int
    streams: int
    batch: int
    notes: Mapping[str, str]


def fit_from_record(record: BuildRecord, *, version: str, threads: int | None) -> Fit:
    """Settings for a CPU engine on this machine.

    Args:
        record: `options` holds threads, streams and batch.
        version: the installed backend's.
        threads: the user's number in place of the record's. Either is capped by the CPUs that this process may use.

    With fewer threads a stream keeps its threads and there are fewer streams, as far as possible: the logits depend
    (in rounding) on the threads per stream, not on the number of streams. There are never more streams than recorded,
    since each needs its own activations.
    """
    if record.precision == "int8":
        check_int8(cpu_description()["isa"], f"engine of {record.network}")
    if "quantized_layers" in record.options:
        positive_option(record, "quantized_layers")
    recorded, streams, batch = (positive_option(record, key) for key in ("threads", "streams", "batch"))
    if record.profile.max[0] != batch:
        raise EngineError("An engine's batch is not its profile's.", expected=record.profile.max[0], got=batch,
                          where=f"engine of {record.network}, options.batch")  # fmt: skip
    if threads is not None and threads < 1:
        raise EngineError("The number of threads is out of range.", expected=">= 1", got=threads)
    wanted, cpus = threads or recorded, usable_cpus()
    usable = min(wanted, cpus)
    notes = {f"note.{key}": text for key, text in _differences(record, version)}
    if usable != recorded or usable != wanted:
        reason = f"{wanted} wanted, but this process may use {cpus} CPUs" if usable != wanted else "as asked"
        notes["note.threads"] = f"{usable}, recorded {recorded}: {reason}"
    per_stream = max(1, recorded // streams)
    return Fit(threads=usable, streams=min(streams, max(1, usable // per_stream)), batch=batch, notes=notes)


def check_int8(isa: str, where: str) -> None:
    """Refuses INT8 on a CPU whose int8 products saturate.

    Without VNNI, AMX or Arm's dot products two of them are summed in 16 bits (oneDNN's "Nuances of int8 Computations",
    ONNX Runtime's "U8S8"), and voxels change in silence.

    Args:
        isa: this CPU's instruction sets, as `cpu_description` has them; empty where the system does not tell them
            (it is no Linux), and then nothing is refused.
        where: what for.

    Raises:
        EngineError: the CPU is known to have none of them.
    """
    if not isa or set(isa.split()) & set(INT8_ISA):
        return
    raise EngineError("INT8 would saturate on this CPU and give wrong voxels.", expected=" or ".join(INT8_ISA), got=isa,
                      where=where, hint="run an FP32 bundle: trtbuild compile BUNDLE -o OTHER.trtb")  # fmt: skip


def positive_option(record: BuildRecord, key: str) -> int:
    """`record.options[key]`, which must be a whole number from 1 up."""
    value = record.options.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise EngineError("An engine option is wrong.", expected="a whole number >= 1", got=value,
                          where=f"engine of {record.network}, options.{key}")  # fmt: skip
    return value


def check_model_file(model: Path) -> None:
    """Refuse a path that is no readable file, in words that the backends do not find."""
    if not model.is_file():
        raise EngineError("The network's file is missing.", expected="an ONNX file", where=model)


def _differences(record: BuildRecord, version: str) -> list[tuple[str, str]]:
    here = {"version": version, **cpu_description()}
    then = {"version": record.version, **record.device}
    return [
        (key, f"recorded {then[key]!r}, here {here[key]!r}") for key in here if then.get(key, here[key]) != here[key]
    ]
