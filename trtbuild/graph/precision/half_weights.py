"""Stored float32 tensors as FP16 or BF16: which of them fit, their bits, and what small values lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    import onnx
    from numpy.typing import NDArray

HalfType = Literal["fp16", "bf16"]


@dataclass(frozen=True, kw_only=True)
class HalfFormat:
    """A 16-bit floating-point type: ONNX's number of it, and its largest, smallest normal and smallest number."""

    element_type: int
    largest: float
    normal: float
    least: float


FORMATS: Mapping[HalfType, HalfFormat] = {
    "fp16": HalfFormat(element_type=10, largest=65504.0, normal=2.0**-14, least=2.0**-24),  # IEEE 754 binary16
    "bf16": HalfFormat(
        element_type=16, largest=255 * 2.0**120, normal=2.0**-126, least=2.0**-133
    ),  # float32's top half
}


def values_of(tensor: onnx.TensorProto) -> NDArray[np.float32]:
    """The values of a stored float32 tensor."""
    from onnx import numpy_helper

    values: NDArray[np.float32] = numpy_helper.to_array(tensor)
    return values


def does_not_fit(tensor: onnx.TensorProto, to: HalfType) -> str:
    """Why the tensor cannot be of the type: a value that is not finite or beyond the largest; "" if it can."""
    import numpy as np

    largest = float(np.abs(values_of(tensor)).max(initial=0))
    if largest <= FORMATS[to].largest:
        return ""
    return f"{tensor.name} holds {largest:.6g}, and {to} ends at {FORMATS[to].largest:.6g}"


def scale_does_not_fit(tensor: onnx.TensorProto, to: HalfType) -> str:
    """Why scales cannot be of the type: as other tensors, or one below the smallest normal number.

    Below it FP16 has a fixed spacing of 2^-24, so a scale loses its relative precision, and the whole grid is off.
    """
    least = float(values_of(tensor).min())
    if least < FORMATS[to].normal:
        return f"the scale {tensor.name} is {least:.3g}, and {to}'s normal numbers begin at {FORMATS[to].normal:.3g}"
    return does_not_fit(tensor, to)


def as_half(tensor: onnx.TensorProto, to: HalfType, name: str) -> onnx.TensorProto:
    """The tensor under a new name, rounded to nearest, ties to even; it has to fit (`does_not_fit`)."""
    import numpy as np

    values = values_of(tensor)
    bits = values.astype(np.float16).view(np.uint16) if to == "fp16" else _bfloat16_bits(values)
    return type(tensor)(
        name=name, data_type=FORMATS[to].element_type, dims=tensor.dims, raw_data=bits.astype("<u2").tobytes()
    )


def lost_in(tensor: onnx.TensorProto, to: HalfType) -> str:
    """How many values become 0 and how many keep fewer bits than others, for want of small numbers; "" if none."""
    import numpy as np

    size = np.abs(values_of(tensor).astype(np.float64))
    zero = int(((size > 0) & (size <= FORMATS[to].least / 2)).sum())
    few = int(((size > FORMATS[to].least / 2) & (size < FORMATS[to].normal)).sum())
    if not zero + few:
        return ""
    return f"{tensor.name}: of {size.size} values {zero} become 0 in {to} and {few} are subnormal"


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[Any]:
    """The upper half of the float32 bits, rounded to nearest, ties to even; for finite values that do not overflow."""
    import numpy as np

    bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
    rounded: NDArray[Any] = (bits + np.uint64(0x7FFF) + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    return rounded.astype(np.uint16)
