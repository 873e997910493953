"""How many bytes a piece of code has allocated at its peak, and how many stay: a count of malloc's, without a clock.

torch, NumPy and the packing libraries all take memory from malloc. It is asked at every call and return of Python code
and of functions in C, so that a temporary tensor counts which two calls have in their hands. Mapped files do not count:
the system may drop their pages.
"""

import ctypes
import gc
import sys

import pytest

from minipaged.model import gguf_file, linear, load

MOST = 1.3  # times the bytes of the form that stays: what a model may take while it is loaded


class _Mallinfo2(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
    )]  # fmt: skip


def peak_and_rest(work):
    """work() -> (what it returns, most bytes at once above those before, bytes that stay)."""
    try:
        mallinfo2 = ctypes.CDLL(None).mallinfo2
    except (AttributeError, TypeError, OSError):
        pytest.skip("the C library does not say what malloc gave: glibc 2.33 and later do")
    mallinfo2.restype = _Mallinfo2

    def live():
        found = mallinfo2()
        return found.uordblks + found.hblkhd

    peak = 0

    def note(*event):
        nonlocal peak
        peak = max(peak, live())

    gc.collect()
    before, profiler = live(), sys.getprofile()
    sys.setprofile(note)
    try:
        result = work()
    finally:
        sys.setprofile(profiler)
    gc.collect()
    return result, peak - before, live() - before


def assert_load_is_frugal(load, numbers, twice, itemsize):
    """load(): allocates these numbers, `twice` of them two times, and never many more at once than stay."""
    load()  # modules, the libraries' own memory
    stays = (numbers + twice) * itemsize
    _, peak, rest = peak_and_rest(load)
    # The embedding of a folder may stay in its mapped file, and a tokenizer takes memory too.
    assert 0.85 * stays < rest < 1.15 * stays, f"{rest:,} bytes stay of a form of {stays:,}"
    assert peak < MOST * stays, f"{peak:,} bytes at the peak, for a form of {stays:,}"


def pack_everything(monkeypatch, dtype):
    """Each linear layer is packed in float32, whichever way is the faster here, and files are read in small pieces.
    (MKL asks for more memory than it touches, and does not count.)"""
    packing = [way for way in linear.ways(dtype)[1:] if way.library != "MKL"]
    if not packing:
        pytest.skip("nothing can be packed here")
    monkeypatch.setattr(load, "fastest_way", lambda dtype: packing[-1])
    monkeypatch.setattr(linear, "MIN_SIZE", 1)
    monkeypatch.setattr(gguf_file, "_PIECE", 1 << 14)
