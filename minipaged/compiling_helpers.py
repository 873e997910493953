"""Helpers of the compiled loops: what Numba has not, or not in operations that vectorise.

They become part of the loops that call them. Numba, which keeps compiled loops on disk, asks whether a loop's own file
has changed; `compiling.py` keeps them in a folder that is named by this one's contents.
"""

import numpy as np
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

from minipaged.compiling import compiled, inlined


@inlined
def scores(q, rows, keys, following, weights):
    """weights[row, slot] = q[row] . keys[slot]. The same slots of the following block are asked for meanwhile."""
    num_slots, head_dim = keys.shape
    for s in range(0, num_slots, 4):
        s1, s2, s3 = min(s + 1, num_slots - 1), min(s + 2, num_slots - 1), min(s + 3, num_slots - 1)
        prefetch(following, s, s3)
        k0, k1, k2, k3 = keys[s], keys[s1], keys[s2], keys[s3]
        for row in range(rows):
            x0 = x1 = x2 = x3 = q.dtype.type(0)
            for d in range(head_dim):
                x0 += q[row, d] * k0[d]
                x1 += q[row, d] * k1[d]
                x2 += q[row, d] * k2[d]
                x3 += q[row, d] * k3[d]
            weights[row, s], weights[row, s + 1], weights[row, s + 2], weights[row, s + 3] = x0, x1, x2, x3


@inlined
def add_weighted(weights, rows, values, following, sums):
    """sums[row] += weights[row, slot] * values[slot], of all slots."""
    num_slots, head_dim = values.shape
    for s in range(0, num_slots, 4):
        s1, s2, s3 = min(s + 1, num_slots - 1), min(s + 2, num_slots - 1), min(s + 3, num_slots - 1)
        prefetch(following, s, s3)
        v0, v1, v2, v3 = values[s], values[s1], values[s2], values[s3]
        for row in range(rows):
            w0, w1, w2, w3 = weights[row, s], weights[row, s + 1], weights[row, s + 2], weights[row, s + 3]
            for d in range(head_dim):
                sums[row, d] += w0 * v0[d] + w1 * v1[d] + w2 * v2[d] + w3 * v3[d]


@compiled
def exp(x):
    """exp(x) of a float32 x <= 0, in operations that vectorise: 2^n * e^r with n = round(x / ln 2), and a polynomial
    for e^r (Cephes, expf). The C library's, which float64 can wait for, takes one number at a time."""
    is_zero = x < np.float32(-87.0)
    x = np.float32(-87.0) if is_zero else x  # not max(), which may lose a NaN
    n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) - n * np.float32(-2.12194440e-4)
    e = np.float32(1.9875691500e-4)
    e = e * r + np.float32(1.3981999507e-3)
    e = e * r + np.float32(8.3334519073e-3)
    e = e * r + np.float32(4.1665795894e-2)
    e = e * r + np.float32(1.6666665459e-1)
    e = e * r + np.float32(5.0000001201e-1)
    e = e * r * r + r + np.float32(1.0)
    e = e * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0.0) if is_zero else e


@compiled
def _of_float16(bits):
    """5 bits of exponent become 8: 2^112 is the difference of the two biases, and right for subnormal numbers too."""
    sign = np.uint32(np.uint32(bits & np.uint16(0x8000)) << np.uint32(16))
    magnitude = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13))
    scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
    if magnitude >= np.uint32(0x0F800000):  # infinite, or NaN
        scaled = np.uint32(magnitude | np.uint32(0x7F800000))
    return np.uint32(scaled | sign).view(np.float32)


@inlined
def widen(halves, widened, is_bfloat16):
    """Halves [slots, head_dim], by their bits, as float32 in the first rows of `widened`; returns those rows."""
    num_slots, head_dim = halves.shape
    for s in range(num_slots):
        if is_bfloat16:
            for d in range(head_dim):  # a bfloat16 is the upper half of a float32
                widened[s, d] = np.uint32(np.uint32(halves[s, d]) << np.uint32(16)).view(np.float32)
        else:
            for d in range(head_dim):
                widened[s, d] = _of_float16(halves[s, d])
    return widened[:num_slots]


if config.DISABLE_JIT:

    def _prefetch_line(tile, slot, line):
        tile[slot]

else:

    @intrinsic
    def _prefetch_line(typing_context, tile, slot, line):
        """Ask for 64 bytes of tile[slot], of a contiguous array, and do not wait for them."""

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
def prefetch(tile, first_slot, last_slot):
    lines = (tile.shape[1] * tile.itemsize + 63) // 64  # a cache line has 64 bytes
    for slot in range(first_slot, last_slot + 1):
        for line in range(lines):
            _prefetch_line(tile, slot, line)
