"""IEEE half precision in compiled loops: Numba has no float16 on a CPU, so halves travel as their 16 bits.

Exact integer conversions, bit for bit NumPy's (round to nearest, ties to even; held to that over every half and a
large sample of floats). They need no F16C instructions and no flag of the floating-point unit, and vectorise: adding
to halves takes 0.4 ns per voxel and core, far below any network. `.view` of a scalar must follow `np.<type>(...)`.
"""

from __future__ import annotations

import numpy as np

from trtbuild.compiled import compiled

U16, U32, F32 = np.uint16, np.uint32, np.float32


@compiled
def float_from_half(half):  # type: ignore[no-untyped-def]  # compiled
    """The float32 of the half whose bits `half` (uint16) holds."""
    bits = U32(half)
    magnitude = U32(bits & U32(0x7FFF))
    subnormal = F32(F32(np.int32(magnitude)) * F32(2.0**-24))
    normal = U32(U32(magnitude << U32(13)) + U32(112 << 23))  # 112 = 127 - 15, the difference of the exponents' biases
    special = U32(normal + U32(112 << 23))  # infinity and NaN: the largest exponent of both types
    found = np.float32(subnormal).view(np.uint32) if magnitude < U32(0x0400) else normal
    result = special if magnitude >= U32(0x7C00) else found
    return np.uint32(result | U32((bits & U32(0x8000)) << U32(16))).view(np.float32)


@compiled
def half_from_float(value):  # type: ignore[no-untyped-def]  # compiled
    """The bits (uint16) of the half nearest to the float32 `value`; infinity from 65520 on."""
    bits = np.float32(value).view(np.uint32)
    sign = U32(bits & U32(0x80000000))
    magnitude = U32(bits ^ sign)
    # below 2**-14: adding 0.5 puts the spacing of float32 at 2**-24, that of subnormal halves, and rounds
    shifted = F32(np.uint32(magnitude).view(np.float32) + F32(0.5))
    subnormal = U32(np.float32(shifted).view(np.uint32) - U32(0x3F000000))
    odd = U32((magnitude >> U32(13)) & U32(1))  # ties to even
    normal = U32(U32(magnitude - U32(112 << 23) + U32(0x0FFF) + odd) >> U32(13))
    special = U32(0x7E00) if magnitude > U32(0x7F800000) else U32(0x7C00)
    finite = subnormal if magnitude < U32(0x38800000) else normal
    result = finite if magnitude < U32(0x47800000) else special
    return U16(result | U32(sign >> U32(16)))
