"""Chapter 4. Where does the memory go? Reserve one contiguous run of slots a request, and count what is never used.

Before paging, a serving system chose the length of a request's run when the request arrived, before the first token
was generated. A policy said how long, and an allocator said where. A slot holds K and V of one token. One request of
4 prompt tokens and 5 output tokens, after its second one, policy pow2, pool of 24 slots:

    slots     0 1 2 3 4 5 6 7 8 9 . . . . . .   . . . . . . . .
              H H H H H H r r r o o o - - - -   f f f f f f f f       H held   r reserved   o over-reserved
              asked: 4 + 8 = 12                                       - rounding: a buddy block of 16 for 12
              buddy block: 16                   free: a block of 8

A next request that needs a block of 16 finds 8 free slots: too few. If a second such block of 8 were free, the request
would still be refused, and those 16 slots would be external fragmentation.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention" (arXiv
2309.06180): section 3.1 names the wastes, Figure 2 measures them, section 6.1 defines the policies of its baseline,
Orca (Oracle, Pow2, Max), over a buddy allocator. The buddy system itself: Knuth, TAOCP volume 1, section 2.5.
"""

# Exercise ch04_fragmentation, about 60 minutes. Write what raises
# NotImplementedError, in this order, and run `minipaged check 4` after each step:
#
#   1. BuddyAllocator.__init__
#   2. BuddyAllocator.num_free_for
#   3. BuddyAllocator.allocate
#   4. BuddyAllocator.free
#   5. MemoryAccount.external_and_others
#   6. ReservationPool.num_tokens
#   7. ReservationPool.reservation
#   8. ReservationPool.can_allocate
#   9. ReservationPool.allocate
#   10. ReservationPool.append
#   11. ReservationPool.free
#   12. ReservationPool.account
#
# What is given may be changed too. Any way that keeps the docstrings' promises is right.
# A call that raises changes nothing. Bad input is a ValueError whose message has the numbers, in any words;
# where two errors are due, either is right.
#
# Made from minipaged/memory/reservation.py by minipaged/course/generate.py.

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple

POLICIES = ("max", "pow2", "oracle")


class OutOfSlots(RuntimeError):
    """No free block is large enough. Nothing was changed: the caller may free slots or wait, and retry."""


class BuddyAllocator:
    """A pool of `num_slots` slots, handed out in blocks of a power of two. Every method is O(log num_slots).

    The buddy of a block is the other half of the block that both were split from: start XOR size.
    Invariant: a block of size 2^k starts at a multiple of 2^k, and no two free blocks are buddies (they are merged).

    A pool whose size is no power of two is cut into arenas, largest first: 24 slots are an arena of 16 and one of 8.
    An arena has no buddy, so blocks of two arenas never merge. Raises ValueError for a pool of less than one slot.
    """

    num_free: int  # slots, wherever they lie
    largest_block: int  # slots of the largest arena: a longer request can never be served

    def __init__(self, num_slots: int):
        raise NotImplementedError("ch04: BuddyAllocator.__init__")

    def num_free_for(self, size: int) -> int:
        """Free slots that lie in a free block large enough for `size` slots: 0 means that allocate(size) is refused.
        Raises ValueError as allocate does."""
        raise NotImplementedError("ch04: BuddyAllocator.num_free_for")

    def allocate(self, size: int) -> int:
        """Take a block of at least `size` slots, the next power of two, and return its first slot.

        The smallest free block that suffices is halved until it fits; the upper halves stay free.
        Raises OutOfSlots, changing nothing; raises ValueError for a size that the empty pool could not serve either.
        """
        raise NotImplementedError("ch04: BuddyAllocator.allocate")

    def free(self, start: int) -> None:
        """Free the block that starts at `start`, and merge it with its buddy as long as that one is free too.
        Raises ValueError where no block in use starts there."""
        raise NotImplementedError("ch04: BuddyAllocator.free")


class MemoryAccount(NamedTuple):
    """Where every slot of the pool is, at one moment. Invariant: sum(account) is the number of slots of the pool."""

    held: int  # K and V of a token are stored here
    reserved: int  # empty now; its request will fill it before it ends
    over_reserved: int  # internal fragmentation: asked for by the policy, and never to be filled
    rounding: int  # internal fragmentation: added by the allocator to reach a power of two, and never to be filled
    external: int  # free, in pieces too small for the next request, although all free slots together would suffice
    free: int  # the other free slots

    @property
    def external_and_others(self) -> int:
        """The fourth bar of the paper's Figure 2, "External frag. & Others": what no request asked for. (Rounding is in
        it, since the figure shows no internal fragmentation for Orca (Oracle), whose blocks are rounded up too.)"""
        raise NotImplementedError("ch04: MemoryAccount.external_and_others")


@dataclass(slots=True)
class _Request:
    start: int  # first slot of its run
    num_tokens: int  # stored now
    final_len: int  # stored when it ends
    asked: int  # slots the policy asked for


class ReservationPool:
    """Requests in one pool, each in one contiguous run of slots that is reserved from its arrival until it is freed.

    `policy` is "max", "pow2" or "oracle": see `reservation`. `output_len` is the real one, known from the workload:
    pow2, oracle and the account need the future.
    Invariant, for each request: tokens stored <= final length <= slots asked for <= slots of its block.
    Raises ValueError for an unknown policy or request, and where a length or number of tokens is out of its range.
    """

    def __init__(self, num_slots: int, policy: str, max_model_len: int):
        if policy not in POLICIES:
            raise ValueError(f"unknown policy {policy!r}: it is one of {', '.join(POLICIES)}")
        if max_model_len < 1:
            raise ValueError(f"max_model_len must be at least 1, got {max_model_len}")
        self.num_slots, self.policy, self.max_model_len = num_slots, policy, max_model_len
        self._allocator = BuddyAllocator(num_slots)
        self._requests: dict[Hashable, _Request] = {}

    @property
    def num_free(self) -> int:
        """Free slots, wherever they lie."""
        return self._allocator.num_free

    def num_tokens(self, seq: Hashable) -> int:
        """Tokens of the request that are stored now."""
        raise NotImplementedError("ch04: ReservationPool.num_tokens")

    def reservation(self, prompt_len: int, output_len: int) -> int:
        """Slots that the policy asks for, before the allocator rounds. Raises ValueError for what can never run.

        max       as long as the model allows: the one policy that needs no future, and so the real one
        pow2      a good guess: the prompt exactly, the output rounded up to a power of two (25 -> 32), at most max
        oracle    exactly the final length, which no system knows: no contiguous system can do better
        """
        raise NotImplementedError("ch04: ReservationPool.reservation")

    def can_allocate(self, prompt_len: int, output_len: int) -> bool:
        """Whether allocate() would succeed now. Raises ValueError for what can never run."""
        raise NotImplementedError("ch04: ReservationPool.can_allocate")

    def allocate(self, seq: Hashable, prompt_len: int, output_len: int) -> int:
        """Reserve the run of a request, store its prompt in it, and return its first slot.

        Raises OutOfSlots (wait) or ValueError (never, or `seq` is in the pool already), changing nothing.
        """
        raise NotImplementedError("ch04: ReservationPool.allocate")

    def append(self, seq: Hashable, n: int = 1) -> None:
        """Store n more tokens of a request in its run. Raises ValueError past its final length."""
        raise NotImplementedError("ch04: ReservationPool.append")

    def free(self, seq: Hashable) -> None:
        """Free the whole run of a request, finished or not."""
        raise NotImplementedError("ch04: ReservationPool.free")

    def account(self, next_request: tuple[int, int] | None = None) -> MemoryAccount:
        """Split the pool into its parts, as seen by a next request (prompt_len, output_len). None: nothing is external.

        A free slot is external fragmentation if its free block is smaller than the block that the next request needs,
        while all free slots together are no fewer than it asks for. Else it is free: a pool without enough free slots
        is full, not fragmented.
        """
        raise NotImplementedError("ch04: ReservationPool.account")
