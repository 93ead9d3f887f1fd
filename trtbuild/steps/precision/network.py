"""A clean network as calibration sees it: its tensors, their maxima, and graphs cut to some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trtbuild.graph import clean
from trtbuild.graph.precision import targets, tensor_sizes, with_maxima, with_outputs
from trtbuild.graph.precision.flow import activations
from trtbuild.runtime.tensors import open_tensors
from trtbuild_calibration import Target

if TYPE_CHECKING:
    import onnx

Patch = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class ObservedNetwork:
    """Implements `trtbuild_calibration.Network` for a float32 network whose norms are written out.

    Attributes:
        model: the network.
        patch: (C, *patch).
        threads: CPU threads.
    """

    model: onnx.ModelProto = field(repr=False)
    patch: tuple[int, ...]
    threads: int

    @contextmanager
    def maxima(self) -> Iterator[Callable[[Patch], Mapping[str, float]]]:
        """The tensors of the network as TensorRT gets it; what a written-out norm has inside is left out."""
        graph, names = with_maxima(self.model, self._names())
        opened = self._opened(graph)
        del graph  # as large as the weights
        with opened as run:

            def reduced(patch: Patch) -> Mapping[str, float]:
                outputs = list(run(patch[None]).values())
                return {name: float(value.item()) for name, value in zip(names, outputs, strict=True)}

            yield reduced

    @contextmanager
    def outputs(self, names: Sequence[str]) -> Iterator[Callable[[Patch], Mapping[str, NDArray[Any]]]]:
        """The graph cut to these tensors. The input of the network is answered without one."""
        image = self.model.graph.input[0].name
        computed = [name for name in names if name != image]
        if not computed:
            yield lambda patch: {image: patch}
            return
        with self._opened(with_outputs(self.model, computed)) as run:

            def cut(patch: Patch) -> Mapping[str, NDArray[Any]]:
                values = run(patch[None]).values()
                found: dict[str, NDArray[Any]] = dict(zip(computed, values, strict=True))
                return found | {image: patch} if image in names else found

            yield cut

    def sizes(self) -> Mapping[str, int]:
        """Bytes of each tensor for one patch, in graph order."""
        return tensor_sizes(self.model)

    def targets(self) -> tuple[Target, ...]:
        """The tensors that layers read."""
        return tuple(Target(name=name, sources=sources) for name, sources in targets(self.model))

    def _opened(self, graph: onnx.ModelProto) -> AbstractContextManager[Callable[[Patch], Mapping[str, NDArray[Any]]]]:
        return open_tensors(graph.SerializeToString(), (1, *self.patch), threads=self.threads)

    def _names(self) -> tuple[str, ...]:
        joined = clean(self.model, rewrite_conv_transpose=False, split_instance_norm=False).model
        known = set(activations(self.model))
        return tuple(name for name in with_maxima(joined, None)[1] if name in known)
