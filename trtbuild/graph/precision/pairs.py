"""Writes the Q/DQ nodes of activations and weights, each tensor once, with their scales and zero points."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtbuild.errors import GraphError
from trtbuild.graph.naming import FreeNames
from trtbuild.graph.precision.flow import stored_values
from trtbuild.graph.wiring import initializer_names, output_names

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

    from trtbuild.graph.precision.zero_point import ZeroPoint

LEVELS = 127  # int8 is used from -127 to 127 by weights and by the range of activations, so 0 is in the middle
OFFSET = 128  # what uint8 lies above int8 on the same grid
LEAST = 2.0**-126  # the smallest normal float32: some processors and kernels treat smaller numbers as 0


def scale_of(amax: Any) -> NDArray[np.float32]:
    """amax / 127 as float32, and 1 where that is 0 or not a normal number; of a number or an array."""
    import numpy as np

    scale = (np.asarray(amax, np.float64) / LEVELS).astype(np.float32)
    return np.where(scale >= np.float32(LEAST), scale, np.float32(1)).astype(np.float32)


def quantized_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Int8 values and one scale per output channel of weights (Co, Ci, *kernel).

    q = clip(rint(w / scale), -127, 127), in float64; rint rounds half to even as QuantizeLinear does.
    """
    import numpy as np

    channels = weight.reshape(weight.shape[0], -1).astype(np.float64)
    scale = scale_of(np.abs(channels).max(axis=1))
    levels = np.clip(np.rint(channels / scale[:, None].astype(np.float64)), -LEVELS, LEVELS)
    return levels.astype(np.int8).reshape(weight.shape), scale


@dataclass(frozen=True, kw_only=True)
class PairWriter:
    """Gives for a tensor the name of its quantised twin, and the nodes that make it when it is asked for first."""

    zero_point: ZeroPoint
    old: tuple[onnx.TensorProto, ...]
    outputs: frozenset[str]
    stored: Mapping[str, onnx.TensorProto]
    names: FreeNames
    twins: dict[str, str] = field(default_factory=dict)
    new: dict[str, onnx.TensorProto] = field(default_factory=dict)

    @classmethod
    def of(cls, model: onnx.ModelProto, *, zero_point: ZeroPoint) -> PairWriter:
        """A writer for this model, whose names it leaves free."""
        taken = {name for node in model.graph.node for name in (node.name, *node.input, *node.output)}
        return cls(
            zero_point=zero_point,
            old=tuple(model.graph.initializer),
            outputs=frozenset(output_names(model)),
            stored=stored_values(model),
            names=FreeNames(taken | initializer_names(model) | {value.name for value in model.graph.input}),
        )

    def activation(self, tensor: str, amax: float) -> tuple[list[onnx.NodeProto], str]:
        """QuantizeLinear and DequantizeLinear of `tensor`, and the name of the result."""
        import numpy as np

        if tensor in self.twins:
            return [], self.twins[tensor]
        zero = np.int8(0) if self.zero_point == "s8" else np.uint8(OFFSET)
        parameters = [
            self._stored(f"{tensor}/scale", scale_of(amax)),
            self._stored(f"{tensor}/zero_point", np.asarray(zero)),
        ]
        quantized = self.names.free(f"{tensor}/quantized")
        first = self._node("QuantizeLinear", tensor, [tensor, *parameters], quantized)
        self.twins[tensor] = self.names.free(f"{tensor}/dequantized")
        second = self._node("DequantizeLinear", tensor, [quantized, *parameters], self.twins[tensor])
        return [first, second], self.twins[tensor]

    def weight(self, tensor: str) -> tuple[list[onnx.NodeProto], str]:
        """The DequantizeLinear of the weight `tensor` (Co, Ci, *kernel), and the name of its result."""
        import numpy as np
        from onnx import numpy_helper

        if tensor in self.twins:
            return [], self.twins[tensor]
        values = numpy_helper.to_array(self.stored[tensor])
        if not np.isfinite(values).all():
            count = int((~np.isfinite(values)).sum())
            raise GraphError("Weights are not finite.", expected="finite numbers",
                             got=f"{count} of {values.size} values are NaN or infinite",
                             where=f"tensor {tensor}",
                             hint="Export the network from an intact checkpoint.")  # fmt: skip
        levels, scale = quantized_weight(values)
        inputs = [
            self._stored(f"{tensor}/quantized", levels),
            self._stored(f"{tensor}/scale", scale),
            self._stored(f"{tensor}/zero_point", np.zeros(scale.shape, np.int8)),
        ]
        self.twins[tensor] = self.names.free(f"{tensor}/dequantized")
        return [self._node("DequantizeLinear", tensor, inputs, self.twins[tensor], axis=0)], self.twins[tensor]

    def initializers(self, nodes: Sequence[onnx.NodeProto]) -> list[onnx.TensorProto]:
        """All that `nodes` read; the old ones first. What nobody reads any more is gone."""
        read = {name for node in nodes for name in node.input} | self.outputs
        return [tensor for tensor in (*self.old, *self.new.values()) if tensor.name in read]

    def _stored(self, wanted: str, values: NDArray[Any]) -> str:
        from onnx import numpy_helper

        name = self.names.free(wanted)
        self.new[name] = numpy_helper.from_array(values, name)
        return name

    def _node(self, operator: str, base: str, inputs: list[str], output: str, **attributes: int) -> onnx.NodeProto:
        from onnx import helper

        return helper.make_node(operator, inputs, [output], self.names.free(f"{base}/{operator}"), **attributes)
