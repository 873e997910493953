"""Threads for compiled loops: those of the OpenMP that torch computes its products with, which it calls a team.

    a step of the model     product | loop | product | loop | product          the same threads all along

After each piece of work a thread of the team waits in a loop for the next one, for some tenths of a millisecond, and
only then sleeps. Threads of our own would find the cores taken by those that wait, and would leave torch's asleep for
the next product: a step of 32 sequences took a fifth longer with them (docs/tried.md). A forked child has none of its
parent's threads, and OpenMP does not notice: there, and where torch has no OpenMP that is found, a loop takes one.
"""

import ctypes
import os
from typing import Any

import torch
from llvmlite import ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic

PIECES = 4  # for each thread: if one is delayed, the others take its later pieces


def _address_of_gomp_parallel() -> int:
    """GOMP_parallel(function, data, num_threads, flags) calls function(data) in each thread. LLVM's has it too."""
    try:
        return ctypes.cast(ctypes.CDLL(None).GOMP_parallel, ctypes.c_void_p).value or 0
    except (AttributeError, OSError, TypeError):
        return 0


_gomp_parallel = _address_of_gomp_parallel()


def _be_alone() -> None:
    global _gomp_parallel
    _gomp_parallel = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_be_alone)


def team(count: int, least: int = 1) -> tuple[int, int]:
    """The threads for `count` items, of which each should have `least`: the first argument of a loop."""
    most = torch.get_num_threads() if _gomp_parallel else 1
    return _gomp_parallel, max(1, min(most, count // least))


if config.DISABLE_JIT:

    def shared_out(team: tuple[int, int]) -> bool:
        return False

else:

    @intrinsic  # type: ignore[untyped-decorator]
    def shared_out(typing_context: Any, team: Any) -> Any:
        """In a compiled loop whose arguments are team, first, last, ...: have the team call this same loop, each thread
        for pieces of first to last. False where the team is one thread: then the caller computes them all."""

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            loop, word, byte = builder.function, ir.IntType(64), ir.IntType(8).as_pointer()
            # Numba's convention: where the answer goes, where an error goes, then the arguments, tuples flattened.
            _, _, gomp_parallel, num_threads, first, last, *others = loop.args
            pieces = builder.mul(num_threads, word(PIECES))
            size = builder.sdiv(builder.add(builder.sub(last, first), builder.sub(pieces, word(1))), pieces)
            is_shared = builder.icmp_signed(">", num_threads, word(1))
            with builder.if_then(is_shared):
                # What the threads see: the next item, the end, a piece's size, whether one failed, the other arguments.
                data = cgutils.pack_struct(builder, [first, last, size, word(0), *others])
                place = cgutils.alloca_once_value(builder, data)
                work_type = ir.FunctionType(ir.VoidType(), [byte])
                work = ir.Function(builder.module, work_type, builder.module.get_unique_name(f"{loop.name}.work"))
                _call_for_pieces(work, loop, place.type)
                number = ir.IntType(32)
                start_type = ir.FunctionType(ir.VoidType(), [work_type.as_pointer(), byte, number, number])
                start = builder.inttoptr(gomp_parallel, start_type.as_pointer())
                builder.call(start, [work, builder.bitcast(place, byte), builder.trunc(num_threads, number), number(0)])
                failed = builder.load(cgutils.gep_inbounds(builder, place, 0, 3))
                with builder.if_then(builder.icmp_signed("!=", failed, word(0)), likely=False):
                    context.call_conv.return_user_exc(builder, MemoryError, ("a thread of a compiled loop failed",))
            return is_shared

        return types.boolean(team), generate


def _call_for_pieces(work: Any, loop: Any, place_type: Any) -> None:
    """The body of work(data): take the next piece of data, as long as there is one, and call the loop for it."""
    work.linkage = "internal"
    begin, piece, end = (work.append_basic_block(name) for name in ("begin", "piece", "end"))
    builder = ir.IRBuilder(begin)
    data, word = builder.bitcast(work.args[0], place_type), ir.IntType(64)

    def field(i: int) -> Any:
        return cgutils.gep_inbounds(builder, data, 0, i)

    last, size, *others = (builder.load(field(i)) for i in (1, 2, *range(4, len(place_type.pointee.elements))))
    answer, error = (builder.alloca(argument.type.pointee) for argument in loop.args[:2])
    take = work.append_basic_block("take")
    builder.branch(take)
    builder.position_at_end(take)
    first = builder.atomic_rmw("add", field(0), size, "monotonic")
    builder.cbranch(builder.icmp_signed("<", first, last), piece, end)
    builder.position_at_end(piece)
    stop = builder.add(first, size)
    stop = builder.select(builder.icmp_signed("<", stop, last), stop, last)
    failed = builder.call(loop, [answer, error, word(0), word(1), first, stop, *others])
    with builder.if_then(builder.icmp_signed("!=", failed, failed.type(0)), likely=False):
        builder.store(word(1), field(3))
    builder.branch(take)
    builder.position_at_end(end)
    builder.ret_void()
