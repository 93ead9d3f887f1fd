"""What a runner asks of a network's inputs and outputs: one of each, float32, over the patch of the record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trtbuild.errors import EngineError
from trtbuild.spec import BuildRecord, TensorSpec


def input_from_ports(ports: Sequence[TensorSpec], record: BuildRecord, model: Path) -> TensorSpec:
    """The network's only input as ("batch", C, *patch).

    Every dimension is the record's or free. The batch must be free, or 1 where the engine runs patch by patch.
    """
    batch, *rest = record.profile.max
    port = _only(ports, "input", model)
    fits = len(port.shape) == len(record.profile.max) and all(
        isinstance(got, str) or got == want for got, want in zip(port.shape[1:], rest, strict=True)
    )
    if not fits or not (isinstance(port.shape[0], str) or port.shape[0] == batch == 1):
        raise EngineError("The network's input shape is not the record's.", expected=("batch", *rest), got=port.shape,
                          where=f"{model}, {port.name}")  # fmt: skip
    return TensorSpec(name=port.name, dtype=port.dtype, shape=("batch", *rest))


def output_from_ports(ports: Sequence[TensorSpec], record: BuildRecord, model: Path) -> TensorSpec:
    """The network's only output as ("batch", heads, *patch)."""
    patch = record.profile.max[2:]
    port = _only(ports, "output", model)
    if port.shape[2:] != patch or not isinstance(port.shape[1], int):
        raise EngineError("The network's output is no map over its patch.", expected=("batch", "heads", *patch),
                          got=port.shape, where=f"{model}, {port.name}")  # fmt: skip
    return TensorSpec(name=port.name, dtype=port.dtype, shape=("batch", *port.shape[1:]))


def _only(ports: Sequence[TensorSpec], role: str, model: Path) -> TensorSpec:
    if len(ports) != 1 or ports[0].dtype != "float32":
        raise EngineError(f"The network's {role}s do not fit.", expected=f"one float32 {role}", where=model,
                          got=", ".join(f"{p.name} {p.dtype} {p.shape}" for p in ports) or "none")  # fmt: skip
    return ports[0]
