"""The precision of a graph: Q/DQ nodes, casts, zero points, and the graphs that show a network's activations.

Does: says which layers there are (`weighted_layers`), makes graphs that show their inputs (`with_outputs`,
`with_maxima`), writes INT8 (`quantize`) and FP16 or BF16 (`cast`) into a graph, whose results are strongly typed.
Takes: a clean network in float32, and ranges that were measured. Gives: another model; what it was given is never
changed, and inputs and outputs stay float32. May touch: nothing but these models. Knows no backend.
"""

from trtbuild.graph.precision.cast import Cast, cast
from trtbuild.graph.precision.half_weights import HalfType
from trtbuild.graph.precision.layers import Layer, targets, weighted_layers
from trtbuild.graph.precision.observed import tensor_sizes, with_maxima, with_outputs
from trtbuild.graph.precision.quantize import Quantized, keep_ends, quantize, tensorrt_form
from trtbuild.graph.precision.sensitive import LIMIT, fp16_sensitive
from trtbuild.graph.precision.zero_point import ZeroPoint, with_zero_point

__all__ = [
    "LIMIT",
    "Cast",
    "HalfType",
    "Layer",
    "Quantized",
    "ZeroPoint",
    "cast",
    "fp16_sensitive",
    "keep_ends",
    "quantize",
    "targets",
    "tensor_sizes",
    "tensorrt_form",
    "weighted_layers",
    "with_maxima",
    "with_outputs",
    "with_zero_point",
]
