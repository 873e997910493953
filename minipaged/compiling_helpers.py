"""Helpers of the compiled loops: what Numba lacks, or does not vectorise. They become part of the loops that call them,
so the contents of this file name the folder in which compiled loops are kept (`compiling.py`)."""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from minipaged.compiling import exactly, inlined
from minipaged.halves import number
from minipaged.processor import processor


@inlined
def floats(tile, head_dim, widened):
    """A tile [slots, head_dim] in the type to compute in. Of halves, given by their bits, that is float32, in the first
    rows of `widened`; anything else stays where it is."""
    if isinstance(tile[0, 0], (np.uint16, np.int16)):
        for s in range(len(tile)):
            for d in range(head_dim):
                widened[s, d] = number(tile[s, d])
        return widened[: len(tile)]
    return tile


@inlined
def scores(q, rows, keys, head_dim, following, weights):
    """weights[row, slot] = q[row] . keys[slot]. Meanwhile the same slots of the following block are prefetched.

    Slots are taken by four: a number of q is loaded once for four products. (The last four may overlap those before.)
    Numbers are named by both indices, since Numba counts the owners of an array at each view of it, such as keys[slot],
    by an atomic operation.
    """
    num_slots = len(keys)
    for begin in range(0, num_slots, 4):
        prefetch(following, begin, min(begin + 4, num_slots))
        s = max(min(begin, num_slots - 4), 0)
        s1, s2, s3 = min(s + 1, num_slots - 1), min(s + 2, num_slots - 1), min(s + 3, num_slots - 1)
        for row in range(rows):
            x0 = x1 = x2 = x3 = q.dtype.type(0)
            for d in range(head_dim):
                x0 += q[row, d] * keys[s, d]
                x1 += q[row, d] * keys[s1, d]
                x2 += q[row, d] * keys[s2, d]
                x3 += q[row, d] * keys[s3, d]
            weights[row, s], weights[row, s1], weights[row, s2], weights[row, s3] = x0, x1, x2, x3


@inlined
def add_weighted(weights, rows, values, head_dim, following, sums):
    """sums[row] += weights[row, slot] * values[slot], of all slots, four for each load of sums."""
    num_slots = len(values)
    whole = num_slots - num_slots % 4
    for s in range(0, whole, 4):
        prefetch(following, s, s + 4)
        for row in range(rows):
            w0, w1, w2, w3 = weights[row, s], weights[row, s + 1], weights[row, s + 2], weights[row, s + 3]
            for d in range(head_dim):
                early, late = w0 * values[s, d] + w1 * values[s + 1, d], w2 * values[s + 2, d] + w3 * values[s + 3, d]
                sums[row, d] += early + late
    prefetch(following, whole, num_slots)
    for s in range(whole, num_slots):
        for row in range(rows):
            for d in range(head_dim):
                sums[row, d] += weights[row, s] * values[s, d]


# The coefficients are those of Cephes' expf.
_POLYNOMIAL = tuple(
    map(np.float32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5))
)


@exactly
def exp(x):
    """e^x within a relative error of 1e-7, in operations that vectorise; float64 by the library.

    x = n log 2 + r with |r| <= log 2 / 2, so e^x = 2^n e^r: 2^n is the bits of an exponent, e^r a polynomial. Above
    88.4 it is infinite, below -87.3 it is 0, and of NaN it is NaN.
    """
    if isinstance(x, np.float64):
        return np.exp(x)
    bounded = np.float32(89.0) if x > np.float32(89.0) else x
    bounded = np.float32(-87.3) if x < np.float32(-87.3) else bounded
    n = np.floor(bounded * np.float32(1.44269504) + np.float32(0.5))
    r = (bounded - n * np.float32(0.693359375)) - n * np.float32(-2.12194440e-4)  # the first product is exact
    power = np.float32(0.0)
    for coefficient in _POLYNOMIAL:
        power = power * r + coefficient
    power = power * r * r + r + np.float32(1.0)
    power *= np.uint32(np.uint32(np.int32(n) + np.int32(127)) << np.uint32(23)).view(np.float32)
    return np.float32(0.0) if x < np.float32(-87.3) else power


if config.DISABLE_JIT:
    larger = np.maximum

    def _prefetch_line(tile, slot, line):
        tile[slot]

    def borrowed(array):
        return array

    def use_widest_vectors():
        pass

else:

    @intrinsic
    def larger(typing_context, x, y):
        """The larger of two numbers; NaN if one is. LLVM takes the maximum of a row of them many at a time. Of Python's
        `max` it may not: there the order of the numbers decides what comes of a NaN."""

        def generate(context, builder, signature, arguments):
            of = ir.FunctionType(arguments[0].type, [argument.type for argument in arguments])
            maximum = builder.module.declare_intrinsic("llvm.maximum", [of.return_type], of)
            return builder.call(maximum, arguments, fastmath=["nsz"])

        return x(x, x), generate

    @intrinsic
    def borrowed(typing_context, array):
        """The array without its count of owners, which each view of it would change: by an atomic operation a block."""

        def generate(context, builder, signature, arguments):
            view = context.make_array(array)(context, builder, arguments[0])
            view.meminfo = context.get_constant_null(types.MemInfoPointer(types.voidptr))
            return view._getvalue()

        return array(array), generate

    @intrinsic
    def use_widest_vectors(typing_context):
        """Let LLVM use vectors of 512 bits in the function that calls this. By itself it takes 256 on Intel's server
        processors, since the early ones with AVX-512 lower their clock for more. On one with bfloat16 instructions
        beside AVX-512 the wide ones were measured to pay (docs/tried.md)."""

        def generate(context, builder, signature, arguments):
            if "avx512_bf16" in processor():
                # What `clang -mprefer-vector-width=512` writes. (`add` of llvmlite's own class knows few attributes.)
                set.add(builder.function.attributes, '"prefer-vector-width"="512"')
            return context.get_dummy_value()

        return types.void(), generate

    @intrinsic
    def _prefetch_line(typing_context, tile, slot, line):
        """Prefetch a line of 64 bytes of tile[slot], of a contiguous array."""

        def generate(context, builder, signature, arguments):
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            begin = builder.mul(arguments[1], builder.extract_value(array.strides, 0))
            begin = builder.add(begin, builder.shl(arguments[2], arguments[2].type(6)))
            address = builder.gep(builder.bitcast(array.data, byte), [begin])
            of = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
            llvm_prefetch = cgutils.get_or_insert_function(builder.module, of, "llvm.prefetch.p0i8")
            read, keep, data = number(0), number(3), number(1)
            builder.call(llvm_prefetch, [address, read, keep, data])
            return context.get_dummy_value()

        return types.void(tile, types.intp, types.intp), generate


@inlined
def prefetch(tile, first_slot, end):
    lines = (tile.shape[1] * tile.itemsize + 63) // 64  # a cache line has 64 bytes
    for slot in range(first_slot, end):
        for line in range(lines):
            _prefetch_line(tile, slot, line)
