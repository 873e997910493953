"""Rounding up: how many blocks of `b` tokens hold `a` tokens, how many pages hold so many bytes."""


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up to a whole number; b is at least 1. (Triton's name.)"""
    return -(-a // b)
