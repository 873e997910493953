"""16-bit floats in compiled loops. Numba has none: loops get their bits, and the integer's type says which they are.

    bfloat16   uint16   the upper half of a float32:   sign, 8 bits of exponent,  7 of fraction
    float16    int16    IEEE's half:                   sign, 5 bits of exponent, 10 of fraction

A loop computes in float32 with `number` of an element, and writes `rounded`. The type is known when a loop is compiled,
so one branch of each function below is left.
"""

import numpy as np

from minipaged.compiling import exactly

_INFINITY = np.uint32(0x7F800000)  # of float32: every bit of the exponent, none of the fraction. NaN has more
_SIGN = np.uint32(0x80000000)
_TOO_LARGE = np.uint32((127 + 16) << 23)  # 65,536: from here on a float16 is infinite, or NaN
_SUBNORMAL = np.uint32((127 - 14) << 23)  # 2^-14: below it a float16 has steps of 2^-24
_REBIAS = np.uint32((127 - 15) << 23)  # from the exponents of float16 to those of float32


@exactly
def computed(x, like):
    """x in the type that elements such as `like` are computed in."""
    return np.float64(x) if isinstance(like, np.float64) else np.float32(x)


@exactly
def number(x):
    """The value of an element of an array."""
    if isinstance(x, np.uint16):
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    if isinstance(x, np.int16):
        bits = np.uint32(np.uint16(x))
        magnitude = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13))
        scaled = np.float32(magnitude.view(np.float32) * np.float32(2.0**112)).view(np.uint32)
        if magnitude >= np.uint32(31 << 23):  # infinity or NaN
            scaled = magnitude | _INFINITY
        return np.uint32(scaled | ((bits & np.uint32(0x8000)) << np.uint32(16))).view(np.float32)
    return x


@exactly
def rounded(x, like):
    """x as an element of the array that `like` is an element of."""
    if isinstance(like, np.uint16):
        bits = np.float32(x).view(np.uint32)
        if np.uint32(bits & ~_SIGN) > _INFINITY:  # NaN: rounding could make a number of it
            return np.uint16(0x7FC0)
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))
    if isinstance(like, np.int16):
        bits = np.float32(x).view(np.uint32)
        sign, magnitude = bits & _SIGN, np.uint32(bits & ~_SIGN)
        if magnitude >= _TOO_LARGE:
            half = np.uint32(0x7E00) if magnitude > _INFINITY else np.uint32(0x7C00)
        elif magnitude < _SUBNORMAL:  # added to 0.5, a float32 is rounded to steps of 2^-24
            half = np.float32(magnitude.view(np.float32) + np.float32(0.5)).view(np.uint32) - np.uint32(126 << 23)
        else:
            odd = (magnitude >> np.uint32(13)) & np.uint32(1)
            half = np.uint32(magnitude - _REBIAS + np.uint32(0xFFF) + odd) >> np.uint32(13)
        return np.uint16(half | (sign >> np.uint32(16))).view(np.int16)
    return x
