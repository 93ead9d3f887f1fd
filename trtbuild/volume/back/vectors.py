"""Sixteen voxels at a time, for the compiled loops: LLVM vectors, which every processor's registers are cut from.

Numba leaves vectors to LLVM, which guards each short loop with tests that its arrays do not overlap; on rows of 16
voxels these tests cost ten times the arithmetic (0.5 against 0.05 ns per voxel in `keep16`), and it has no way to say
"pick any of these 16 values", which is one instruction of AVX-512. Each function says in NumPy what it does, for
arrays (one-dimensional, C-contiguous) and positions in them. Nothing is checked: reading or writing outside an array
is up to the caller, as in C.
"""

from __future__ import annotations

from typing import Any

from trtbuild.compiled import ir, llvm, types
from trtbuild.volume.back.taps import LANES

_I16, _I32, _F32 = ir.IntType(16), ir.IntType(32), ir.FloatType()


def _vector(element: Any) -> Any:
    return ir.VectorType(element, LANES)


def _element(array: Any) -> Any:
    """LLVM's type of an array's elements."""
    return _F32 if array.dtype == types.float32 else ir.IntType(array.dtype.bitwidth)


class _Row:
    """Sixteen elements of an array, from a position on."""

    def __init__(self, context: Any, builder: Any, kind: Any, array: Any, position: Any) -> None:
        data = context.make_array(kind)(context, builder, array).data
        element = _element(kind)
        self.builder, self.align = builder, element.get_abi_alignment(context.target_data)
        self.pointer = builder.bitcast(builder.gep(data, [position]), _vector(element).as_pointer())

    def load(self) -> Any:
        value = self.builder.load(self.pointer)
        value.align = self.align
        return value

    def store(self, value: Any) -> None:
        self.builder.store(value, self.pointer).align = self.align


def _all(builder: Any, value: Any) -> Any:
    """The scalar in all lanes."""
    empty = ir.Constant(_vector(value.type), ir.Undefined)
    one = builder.insert_element(empty, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(one, empty, ir.Constant(_vector(_I32), [0] * LANES))


def _between(builder: Any, low: Any, high: Any, weight: Any) -> Any:
    """low + weight * (high - low): exact where both are equal and where the weight is 0."""
    return builder.fadd(low, builder.fmul(weight, builder.fsub(high, low)))


def _smaller_larger(builder: Any, a: Any, b: Any) -> tuple[Any, Any]:
    compare = builder.fcmp_ordered if a.type.element == _F32 else builder.icmp_signed
    less = compare("<", a, b)
    return builder.select(less, a, b), builder.select(less, b, a)


def _floats_from_halves(builder: Any, halves: Any) -> Any:
    """`trtbuild.half.float_from_half` for 16 lanes; that says why."""
    wide, real = _vector(_I32), _vector(_F32)

    def each(number: int) -> Any:
        return ir.Constant(wide, [number] * LANES)

    bits = builder.zext(halves, wide)
    magnitude = builder.and_(bits, each(0x7FFF))
    normal = builder.add(builder.shl(magnitude, each(13)), each(112 << 23))
    special = builder.add(normal, each(112 << 23))
    tiny = builder.fmul(builder.uitofp(magnitude, real), ir.Constant(real, [2.0**-24] * LANES))
    result = builder.select(builder.icmp_unsigned("<", magnitude, each(0x0400)), builder.bitcast(tiny, wide), normal)
    result = builder.select(builder.icmp_unsigned(">=", magnitude, each(0x7C00)), special, result)
    sign = builder.shl(builder.and_(bits, each(0x8000)), each(16))
    return builder.bitcast(builder.or_(result, sign), real)


def _keys(builder: Any, values: Any) -> Any:
    if values.type.element == _F32:
        return values
    sign = builder.ashr(values, ir.Constant(values.type, [15] * LANES))
    return builder.xor(values, builder.and_(sign, ir.Constant(values.type, [0x7FFF] * LANES)))


@llvm
def lerp16(typing: Any, out: Any, to: Any, values: Any, low: Any, high: Any, weight: Any) -> Any:
    """``out[to:][:16] = values[low:][:16] + weight * (values[high:][:16] - values[low:][:16])``, float32."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, to, values, low, high, weight = arguments
        a = _Row(context, builder, signature.args[2], values, low).load()
        b = _Row(context, builder, signature.args[2], values, high).load()
        _Row(context, builder, signature.args[0], out, to).store(_between(builder, a, b, _all(builder, weight)))
        return context.get_dummy_value()

    return types.void(out, types.intp, values, types.intp, types.intp, types.float32), code


@llvm
def keep16(
    typing: Any, best: Any, at: Any, labels: Any, to: Any, values: Any, low: Any, high: Any, weight: Any, label: Any
) -> Any:
    """Interpolates as `lerp16`; where that exceeds ``best[at:][:16]``, it and `label` replace what is there."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        best, at, labels, to, values, low, high, weight, label = arguments
        a = _Row(context, builder, signature.args[4], values, low).load()
        b = _Row(context, builder, signature.args[4], values, high).load()
        here = _between(builder, a, b, _all(builder, weight))
        best_row = _Row(context, builder, signature.args[0], best, at)
        label_row = _Row(context, builder, signature.args[2], labels, to)
        old = best_row.load()
        better = builder.fcmp_ordered(">", here, old)
        best_row.store(builder.select(better, here, old))
        label_row.store(builder.select(better, _all(builder, label), label_row.load()))
        return context.get_dummy_value()

    number = types.intp
    return types.void(best, number, labels, number, values, number, number, types.float32, labels.dtype), code


@llvm
def fill16(typing: Any, out: Any, to: Any, value: Any) -> Any:
    """``out[to:][:16] = value``."""

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, to, value = arguments
        _Row(context, builder, signature.args[0], out, to).store(_all(builder, value))
        return context.get_dummy_value()

    return types.void(out, types.intp, out.dtype), code


@llvm
def spread16(typing: Any, out: Any, to: Any, values: Any, start: Any, low: Any, high: Any, weight: Any, at: Any) -> Any:
    """``v = values[start:][:16]; a = v[low[at:][:16]]; out[to:][:16] = a + weight[at:][:16] * (v[high[at:][:16]] - a)``

    float32 (`values` also the bits of halves, uint16), the indices int32 in 0..15. LLVM makes each picking one
    permutation where the processor has it.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, to, values, start, low, high, weight, at = arguments
        window = _Row(context, builder, signature.args[2], values, start).load()
        if window.type.element != _F32:
            window = _floats_from_halves(builder, window)

        def picked(kind: Any, array: Any) -> Any:
            index = _Row(context, builder, kind, array, at).load()
            result = ir.Constant(_vector(_F32), ir.Undefined)
            for lane in range(LANES):
                number = ir.Constant(_I32, lane)
                value = builder.extract_element(window, builder.extract_element(index, number))
                result = builder.insert_element(result, value, number)
            return result

        a, b = picked(signature.args[4], low), picked(signature.args[5], high)
        w = _Row(context, builder, signature.args[6], weight, at).load()
        _Row(context, builder, signature.args[0], out, to).store(_between(builder, a, b, w))
        return context.get_dummy_value()

    number = types.intp
    return types.void(out, number, values, number, low, high, weight, number), code


@llvm
def extremes16(typing: Any, lowest: Any, highest: Any, at: Any, values: Any, first: Any, second: Any) -> Any:
    """``lowest[at:][:16] = minimum(lowest[at:][:16], v)``, and so `highest`, for v at `first` and at `second`.

    float32; or for the bits of halves (uint16) their keys (int16), integers that are ordered as the halves are:
    ``bits ^ ((bits >> 15) & 0x7fff)``. Two rows, because loading and storing what is known takes longer than comparing.
    """

    def code(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lowest, highest, at, values, first, second = arguments
        low_row = _Row(context, builder, signature.args[0], lowest, at)
        high_row = _Row(context, builder, signature.args[1], highest, at)
        a, b = (_keys(builder, _Row(context, builder, signature.args[3], values, n).load()) for n in (first, second))
        smaller, larger = _smaller_larger(builder, a, b)
        low_row.store(_smaller_larger(builder, smaller, low_row.load())[0])
        high_row.store(_smaller_larger(builder, larger, high_row.load())[1])
        return context.get_dummy_value()

    return types.void(lowest, highest, types.intp, values, types.intp, types.intp), code
