"""What an observation is given: a network that it can run, and the tensors that it shall look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from trtbuild_calibration.errors import CalibrationError

MaximaPass = Callable[[NDArray[np.float32]], Mapping[str, float]]
OutputsPass = Callable[[NDArray[np.float32]], Mapping[str, NDArray[Any]]]


class Network(Protocol):
    """A network that can be opened in two ways. Each pass takes one patch, float32 (C, *patch)."""

    def maxima(self) -> AbstractContextManager[MaximaPass]:
        """A pass that gives the largest |x| of every tensor, reduced in the graph."""
        ...

    def outputs(self, names: Sequence[str]) -> AbstractContextManager[OutputsPass]:
        """A pass through the graph cut to these tensors, which it gives as float32 of any shape.

        The arrays may be the network's own buffers: they are read before the next call, and not kept.
        """
        ...

    def sizes(self) -> Mapping[str, int]:
        """Bytes of each tensor for one patch, in the order in which the network computes them."""
        ...


class Patches(Protocol):
    """Patches by number, each float32 (C, *patch)."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True, kw_only=True)
class Target:
    """A tensor that is to be quantised.

    Attributes:
        name: the tensor.
        sources: the tensors that are looked at for it: itself, or the inputs of the Concat that makes it.
    """

    name: str
    sources: tuple[str, ...]


def pack(targets: Sequence[Target], sizes: Mapping[str, int], budget_bytes: int) -> tuple[tuple[str, ...], ...]:
    """The sources in groups of at most `budget_bytes`, in the order of the network.

    Neighbours share a group, so that the graphs of early groups are cut short.
    """
    wanted = {source for target in targets for source in target.sources}
    groups: list[list[str]] = []
    used = 0
    for name in (name for name in sizes if name in wanted):
        if not groups or used + sizes[name] > budget_bytes:
            groups.append([])
            used = 0
        groups[-1].append(name)
        used += sizes[name]
    return tuple(tuple(group) for group in groups)


def check_targets(targets: Sequence[Target], sizes: Mapping[str, int]) -> None:
    """Targets have different names, and sources that the network knows.

    Raises:
        CalibrationError: otherwise, or there are none.
    """
    names = [target.name for target in targets]
    if not names or len(set(names)) < len(names):
        raise CalibrationError("Targets must have different names, and there must be one.", got=", ".join(names))
    for target in targets:
        if not target.sources:
            raise CalibrationError("A target has no tensor to look at.", where=target.name)
        unknown = [source for source in target.sources if source not in sizes]
        if unknown:
            raise CalibrationError(
                "The network has no such tensor.", expected="a tensor of the network", got=", ".join(unknown)
            )
